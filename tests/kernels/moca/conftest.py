"""The backends and devices of the MoCa tests, and a small set of inputs."""

import os
from typing import NamedTuple

import pytest
import torch

from kernels.moca.calls import D
from mir_kernels.ops.moca import OPERATIONS


class Run(NamedTuple):
    """The backend and device of a test."""

    backend: str
    device: str


CPU = [Run("eager", "cpu"), Run("native", "cpu")]
GPU = [Run("cuda", "cuda"), Run("triton", "cuda"), Run("eager", "cuda")]
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
RUNS = [Run("triton", "cpu")] if INTERPRETED else [*CPU, *(pytest.param(r, marks=pytest.mark.gpu) for r in GPU)]


@pytest.fixture(params=RUNS, ids=lambda r: f"{r.backend}-{r.device}")
def run(request: pytest.FixtureRequest) -> Run:
    """A backend and a device; skipped if it cannot run or the fused operation lacks the backend."""
    run = request.param
    operation = OPERATIONS["add" in request.module.__name__]
    if run.backend not in operation.names():
        pytest.skip(f"{operation.name} has no backend {run.backend!r}")
    if reason := operation.reason(run.backend, torch.device(run.device)):
        pytest.skip(reason)
    return run


@pytest.fixture
def t() -> dict[str, torch.Tensor]:
    """x (2, 9, 16) and the other arguments, in float32."""
    g = torch.Generator().manual_seed(0)
    made = {name: torch.randn(2, 9, D, generator=g) for name in ("x", "residual", "grad")}
    made |= {name: torch.randn(D, generator=g) for name in ("scale", "shift", "weight")}
    return made | {"mask": torch.rand(2, 9, generator=g) < 0.5}
