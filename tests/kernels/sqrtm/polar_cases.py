"""Matrices with known polar factors, and the accuracy that `polar` promises in each precision."""

from __future__ import annotations

import torch
from torch import Tensor

from mir_kernels.ops.sqrtm import polar

# {precision: (r, error)}: singular values above r times the largest come out as 1, to within the error.
RESOLVED = {"bfloat16": (3e-3, 8e-3), "float16": (1e-3, 1e-3), "float32": (5e-7, 2e-6), "float64": (1e-12, 1e-3)}
# |U - exact|_F / |exact|_F of matrices with a condition of 10.
ERROR = {"bfloat16": 1.6e-2, "float16": 2e-3, "float32": 6e-6, "float64": 1e-13}
SPECTRA = ("one small", "half small", "one large", "even steps")
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def spectrum(kind: str, n: int, smallest: float) -> Tensor:
    """n singular values from 1 down to `smallest`, float64."""
    values = torch.ones(n, dtype=torch.float64)
    if kind == "even steps":
        return torch.logspace(0, torch.tensor(smallest).log10().item(), n, dtype=torch.float64)
    small = {"one small": slice(n - 1, n), "half small": slice(n // 2, n), "one large": slice(1, n)}[kind]
    values[small] = smallest
    return values


def with_singular_values(values: Tensor, rows: int, seed: int) -> tuple[Tensor, Tensor]:
    """A matrix (rows, n) with these singular values and random vectors, and its polar factor; float64."""
    generator = torch.Generator().manual_seed(seed)
    n = values.shape[0]
    left, right = (
        torch.linalg.qr(torch.randn(size, n, generator=generator, dtype=torch.float64)).Q for size in (rows, n)
    )
    return left * values @ right.mT, left @ right.mT


def of_rank(rank: int, rows: int, n: int, seed: int) -> tuple[Tensor, Tensor]:
    """An integer matrix of exactly this rank, and its polar factor; float64."""
    generator = torch.Generator().manual_seed(seed)
    left, right = (torch.randint(-8, 9, size, generator=generator).double() for size in ((rows, rank), (rank, n)))
    m = left @ right
    u, values, vt = torch.linalg.svd(m, full_matrices=False)
    assert (values[rank:] < 1e-12 * values[0]).all()
    assert values[rank - 1] > 1e-3 * values[0]
    return m, u[:, :rank] @ vt[:rank]


def assert_resolved(precision: str, kind: str, n: int, device: str, backend: str) -> None:
    """Resolved singular values come out as 1, never above, wherever the largest lies between powers of two."""
    lowest, off = RESOLVED[precision]
    for seed, size in enumerate((1.0, 1.3, 1.7)):
        m, _ = with_singular_values(size * spectrum(kind, n, 1.01 * lowest), n + seed, seed)
        values = torch.linalg.svdvals(polar(m.to(device), precision=precision, backend=backend))
        assert values[0] <= 1 + off
        assert values[-1] >= 1 - off


def assert_zeros_stay(precision: str, device: str, backend: str) -> None:
    """Zero rows and columns of M are zero in U, and U is zero if M is."""
    m, _ = with_singular_values(spectrum("even steps", 9, 0.1), 12, 0)
    m[3], m[:, [0, 5]] = 0.0, 0.0
    u = polar(m.to(device), precision=precision, backend=backend)
    assert torch.equal(u[3], torch.zeros_like(u[3]))
    assert torch.equal(u[:, [0, 5]], torch.zeros_like(u[:, [0, 5]]))
    zero = torch.zeros(2, 4, 3, device=device)
    assert torch.equal(polar(zero, precision=precision, backend=backend), zero)
