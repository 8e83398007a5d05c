"""Where the moments' promises are checked, and how an error is measured."""

from typing import NamedTuple

import pytest
import torch

from mir_kernels.ops.moments import StreamingMoments, reference, streaming
from mir_kernels.ops.moments.launch import STREAMING_MOMENTS


class Run(NamedTuple):
    """Where a test runs."""

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
    """A backend for CPU tensors, by `indirect`; skipped where it cannot run."""
    if reason := STREAMING_MOMENTS.reason(request.param, torch.device("cpu")):
        pytest.skip(reason)
    return request.param


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> int:
    """A block is 16 rows, so that a few dozen rows go through gathering, whole blocks and a remainder."""
    monkeypatch.setattr(streaming, "ROWS", {"cpu": 16, "cuda": 16})
    return 16


@pytest.fixture
def assert_moments():
    return _assert_moments


def _assert_moments(moments: StreamingMoments, x: torch.Tensor, limit: float = 1e-5) -> None:
    """Count, mean and every covariance entry are those of the rows x, relative to sigma_i sigma_j within `limit`."""
    assert moments.count == x.shape[0]
    mean, covariance = moments.mean.cpu(), moments.covariance(ddof=0).cpu()
    assert mean.dtype == covariance.dtype == torch.float64
    assert torch.equal(covariance, covariance.T)
    true = reference.covariance(x.cpu(), ddof=0)
    # A column without deviation has no scale of its own: its last places stand in.
    sigma = true.diagonal().clamp(min=0).sqrt() + 1e-7 * reference.mean(x.cpu()).abs() + 1e-30
    error = ((covariance - true).abs() / (sigma[:, None] * sigma)).max().item()
    assert error <= limit, f"covariance {error:.2e} > {limit:.0e}"
    error = ((mean - reference.mean(x.cpu())).abs() / sigma).max().item()
    assert error <= limit, f"mean {error:.2e} > {limit:.0e}"
