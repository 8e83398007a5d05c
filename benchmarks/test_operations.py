"""One pytest-benchmark per operation: `make bench-watch`, or `pytest benchmarks --benchmark-only`.

They track one machine over time (`--benchmark-autosave`, `--benchmark-compare`). Inputs, errors and limits are those of
bench_*.py, which times rivals side by side and produces the figures; here only ours runs, at small sizes. Each error is
checked against its limit before timing.
"""

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

import bench_mir
import bench_moca
import bench_moments
import bench_sqrtm
import harness
import mir_kernels

N, D = 2048, 512  # tokens; matrices are half as wide


def timed(benchmark, rivals: Sequence[harness.Rival], name: str | tuple = harness.OURS, limit: float = 1.0) -> None:
    """Time the first rival whose name begins with `name`: by default our default. limit: tighter than the rival's."""
    rival = next(r for r in rivals if r.name.startswith(name))
    assert rival.found_error() <= min(rival.limit, limit)
    benchmark(rival.call, 0)


@pytest.fixture(scope="module")
def rows():
    """bfloat16 (N, D) of bench_moca.py, half of them vision."""
    return bench_moca.Inputs(N, D, "cpu")


@pytest.fixture(scope="module")
def tokens():
    """bfloat16 (N, D) of bench_moments.py, one of them."""
    return [bench_moments.tokens(N, D, "cpu")]


@pytest.fixture(scope="module")
def covariances():
    """Two float64 (1, D // 2, D // 2) of bench_sqrtm.py, and the trace of the root of their product."""
    return bench_sqrtm.covariances(D // 2, bench_sqrtm.SPECTRA["i^-1 and i^-1.5"], 1, "cpu")


def test_moca(benchmark, rows):
    timed(benchmark, bench_moca.forward(rows)[0])


def test_moca_backward(benchmark, rows):
    timed(benchmark, bench_moca.backward(rows)[0])


def test_add_moca_rms_norm(benchmark, rows):
    timed(benchmark, bench_moca.fused_forward(rows)[0])


def test_token_norms(benchmark, tokens):
    timed(benchmark, bench_moments.norm_rivals(tokens))


def test_streaming_moments(benchmark, tokens):
    timed(benchmark, bench_moments.covariance_rivals(tokens))


def test_trace_sqrt_product(benchmark, covariances):
    timed(benchmark, bench_sqrtm.trace_rivals(*covariances))


def test_polar(benchmark):
    m, exact = bench_sqrtm.polar_case(D // 2, 1, "cpu")
    timed(benchmark, [bench_sqrtm.polar_rival("ours", lambda: mir_kernels.polar(m), exact, "float32")], limit=1e-4)


def test_mir(benchmark):
    data = bench_mir.samples(layers=1, hidden=D, samples=8, vision=256, text=256, device="cpu")
    reference = bench_mir.RIVALS[bench_mir.REFERENCE](data)
    timed(
        benchmark,
        bench_mir.rivals_on(data, data, reference, dict.fromkeys(bench_mir.RIVALS)),
        "mir_kernels, lists",
        limit=1e-6,
    )


# Operations without a rival in bench_*.py: on its covariances, with a separate reference and limit.


def alone(call: Callable[[], Tensor], exact: Tensor, limit: float) -> list[harness.Rival]:
    return [harness.Rival("ours", lambda i: call(), lambda: bench_sqrtm.distance(call(), exact), limit)]


@pytest.mark.parametrize("name", ["sqrtm", "inverse_sqrtm"])
def test_roots(benchmark, covariances, name):
    values, vectors = torch.linalg.eigh(covariances[0])
    exact = vectors * values[..., None, :] ** (0.5 if name == "sqrtm" else -0.5) @ vectors.mT
    timed(benchmark, alone(lambda: getattr(mir_kernels, name)(covariances[0]), exact, 1e-4))


def test_newton_schulz(benchmark, covariances):
    well = covariances[0] + torch.eye(D // 2).double()
    values, vectors = torch.linalg.eigh(well)
    exact = vectors * values[..., None, :].sqrt() @ vectors.mT
    timed(benchmark, alone(lambda: mir_kernels.newton_schulz(well, iterations=12).sqrt, exact, 1e-4))


def test_frechet_distance(benchmark, covariances):
    a, b, root = covariances
    mean = a.new_zeros(a.shape[:-1])
    exact = (a + b).diagonal(dim1=-2, dim2=-1).sum(-1) - 2 * root
    timed(benchmark, alone(lambda: mir_kernels.frechet_distance(mean, a, mean, b), exact, 1e-5))
