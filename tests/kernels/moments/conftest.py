"""The backends and devices of the moments tests, and the error measure."""

from typing import NamedTuple

import pytest
import torch

from mir_kernels.ops.moments import StreamingMoments, reference, streaming
from mir_kernels.ops.moments.launch import STREAMING_MOMENTS


class Run(NamedTuple):
    """The backend and device of a test."""

    backend: str
    device: str


RUNS = [
    *(Run(name, "cpu") for name in ("native", "eager", "reference")),
    *(pytest.param(Run(name, "cuda"), marks=pytest.mark.gpu) for name in ("triton", "eager")),
]


@pytest.fixture(params=RUNS, ids=lambda r: f"{r.backend}-{r.device}")
def run(request: pytest.FixtureRequest) -> Run:
    run = request.param
    if reason := STREAMING_MOMENTS.reason(run.backend, torch.device(run.device)):
        pytest.skip(reason)
    return run


@pytest.fixture
def backend(request: pytest.FixtureRequest) -> str:
    """A backend for CPU tensors, passed by `indirect`; skipped if it cannot run."""
    if reason := STREAMING_MOMENTS.reason(request.param, torch.device("cpu")):
        pytest.skip(reason)
    return request.param


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> int:
    """Make a block 16 rows, so that a few dozen rows test gathering, whole blocks and a remainder."""
    monkeypatch.setattr(streaming, "ROWS", {"cpu": 16, "cuda": 16})
    return 16


@pytest.fixture
def assert_moments():
    return _assert_moments


def _assert_moments(moments: StreamingMoments, x: torch.Tensor, limit: float = 1e-5) -> None:
    """Assert that count, mean and covariance are those of the rows x, within `limit` relative to sigma_i sigma_j."""
    assert moments.count == x.shape[0]
    mean, covariance = moments.mean.cpu(), moments.covariance(ddof=0).cpu()
    assert mean.dtype == covariance.dtype == torch.float64
    assert torch.equal(covariance, covariance.T)
    true = reference.covariance(x.cpu(), ddof=0)
    # A column with zero deviation has no scale, so its unit in the last place is used.
    sigma = true.diagonal().clamp(min=0).sqrt() + 1e-7 * reference.mean(x.cpu()).abs() + 1e-30
    error = ((covariance - true).abs() / (sigma[:, None] * sigma)).max().item()
    assert error <= limit, f"covariance {error:.2e} > {limit:.0e}"
    error = ((mean - reference.mean(x.cpu())).abs() / sigma).max().item()
    assert error <= limit, f"mean {error:.2e} > {limit:.0e}"
