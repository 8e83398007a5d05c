"""One benchmark an operation, by pytest-benchmark: `make bench-watch`, or `pytest benchmarks --benchmark-only`.

To watch one machine over time (`--benchmark-autosave`, `--benchmark-compare`). Figures come from bench_*.py, which
times rivals side by side. Each result is held to a reference before it is timed.
"""

import pytest
import torch

import mir_kernels
from mir_kernels.moments import reference
from modality_integration import mir

N, D = 2048, 512


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def tokens():
    """bfloat16 (N, D), scale and shift (D,), a mask of half of the rows."""
    return normal(N, D).bfloat16(), 1 + normal(D, seed=1) / 9, normal(D, seed=2), torch.arange(N) % 2 == 0


@pytest.fixture(scope="module")
def covariances():
    """Two float64 (D // 2, D // 2) with eigenvalues that fall as i^-1."""
    d = D // 2
    spectrum = torch.arange(1, d + 1, dtype=torch.float64) ** -0.5
    factors = (torch.linalg.qr(normal(d, d, seed=seed).double()).Q * spectrum for seed in (3, 4))
    return tuple(c @ c.T for c in factors)


def timed(benchmark, call, *arguments, exact, limit):
    found = call(*arguments).double()
    assert float((found - exact).norm() / exact.norm()) <= limit
    benchmark(call, *arguments)


def formula(x, scale, shift, mask):
    """Eq. 5 of the MIR paper in float64."""
    x = x.double()
    return torch.where(mask[:, None], scale.double() * x + shift.double(), x)


def test_moca(benchmark, tokens):
    exact = formula(*tokens)
    timed(benchmark, mir_kernels.moca, *tokens, exact=exact, limit=1e-2)


def test_moca_backward(benchmark, tokens):
    x, scale, shift, mask = tokens
    leaves = [t.clone().requires_grad_() for t in (x, scale, shift)]
    out = mir_kernels.moca(*leaves, mask)
    exact = torch.where(mask[:, None], scale.double(), torch.ones(D, dtype=torch.float64))

    def call():
        return torch.autograd.grad(out, leaves, torch.ones_like(out), retain_graph=True)[0]

    timed(benchmark, call, exact=exact, limit=1e-2)


def test_add_moca_rms_norm(benchmark, tokens):
    x, scale, shift, mask = tokens
    h = formula(2 * x, scale, shift, mask)
    exact = h * torch.rsqrt(h.square().mean(-1, keepdim=True) + 1e-6) * scale.double()

    def call():
        return mir_kernels.add_moca_rms_norm(x, x, scale, shift, mask, scale)[0]

    timed(benchmark, call, exact=exact, limit=1e-2)


def test_token_norms(benchmark, tokens):
    exact = tokens[0].double().norm(dim=-1)
    timed(benchmark, mir_kernels.token_norms, tokens[0], exact=exact, limit=1e-6)


def test_streaming_moments(benchmark, tokens):
    def call():
        found = mir_kernels.StreamingMoments(D)
        for part in tokens[0].chunk(4):
            found.update(part)
        return found.covariance()

    timed(benchmark, call, exact=reference.covariance(tokens[0]), limit=1e-5)


@pytest.mark.parametrize("name", ["sqrtm", "inverse_sqrtm"])
def test_roots(benchmark, covariances, name):
    values, vectors = torch.linalg.eigh(covariances[0])
    exact = vectors * values ** (0.5 if name == "sqrtm" else -0.5) @ vectors.T
    timed(benchmark, getattr(mir_kernels, name), covariances[0], exact=exact, limit=1e-4)


def test_newton_schulz(benchmark, covariances):
    well = covariances[0] + torch.eye(D // 2).double()
    values, vectors = torch.linalg.eigh(well)

    def call():
        return mir_kernels.newton_schulz(well, iterations=12).sqrt

    timed(benchmark, call, exact=vectors * values.sqrt() @ vectors.T, limit=1e-4)


def test_polar(benchmark, covariances):
    m = normal(D // 2, D // 4, seed=5)
    u, _, vh = torch.linalg.svd(m.double(), full_matrices=False)
    timed(benchmark, mir_kernels.polar, m, exact=u @ vh, limit=1e-4)


def test_trace_sqrt_product(benchmark, covariances):
    exact = torch.linalg.eigvals(covariances[0] @ covariances[1]).sqrt().real.sum()
    timed(benchmark, mir_kernels.trace_sqrt_product, *covariances, exact=exact, limit=1e-6)


def test_frechet_distance(benchmark, covariances):
    a, b = covariances
    mean = torch.zeros(len(a)).double()
    exact = a.trace() + b.trace() - 2 * torch.linalg.eigvals(a @ b).sqrt().real.sum()

    def call():
        return mir_kernels.frechet_distance(mean, a, mean, b)

    timed(benchmark, call, exact=exact, limit=1e-5)


def test_mir(benchmark, tokens):
    vision, text = [tokens[0].float() + 0.3], [normal(N, D, seed=7)]

    def call():
        return torch.tensor(mir(vision, text).value)

    timed(benchmark, call, exact=torch.tensor(mir(vision, text, backend="reference").value), limit=1e-6)
