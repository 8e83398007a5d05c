"""Hard covariances for all tests of square roots, and exact values in float64 that do not use the code under test."""

from __future__ import annotations

import math

import mpmath
import torch
from torch import Tensor

# Spectra like those of real hidden states, and harder ones.
SPECTRA = (
    "i^-0.5",
    "i^-1",
    "i^-2",
    "i^-3",
    "condition 1e12",
    "rank d/4",
    "one direction 1e6",
    "one coordinate 1e6",
    "flat",
    "identity",
    "diagonal",
    "block",
    "zero columns",
    "zero",
)


def covariance(kind: str, d: int, seed: int) -> Tensor:
    """A symmetric float64 (d, d) matrix with one of SPECTRA."""
    generator = torch.Generator().manual_seed(seed)
    i = torch.arange(1, d + 1, dtype=torch.float64)
    if kind == "zero":
        return torch.zeros(d, d, dtype=torch.float64)
    if kind == "identity":
        return torch.eye(d, dtype=torch.float64)
    if kind == "diagonal":
        return torch.diag(torch.rand(d, generator=generator, dtype=torch.float64) + 0.01)
    if kind == "block":
        half = d // 2
        parts = [covariance("i^-1", half, seed + 1), covariance("i^-2", d - half, seed + 2)]
        return torch.block_diag(*parts)
    if kind == "zero columns":
        a = covariance("i^-1", d, seed)
        a[:, ::3] = 0
        a[::3] = 0
        return a
    values = {
        "rank d/4": torch.where(i <= max(d // 4, 1), 1 / i, 0.0),
        "condition 1e12": torch.logspace(0, -12, d, dtype=torch.float64),
        "one direction 1e6": torch.where(i == 1, 1e6, 1 / i),
        "one coordinate 1e6": 1 / i,
        "flat": torch.ones_like(i),
    }.get(kind)
    if values is None:
        values = i ** float(kind.removeprefix("i^"))
    q, _ = torch.linalg.qr(torch.randn(d, d, generator=generator, dtype=torch.float64))
    a = q * values @ q.T
    a = (a + a.T) / 2
    if kind == "one coordinate 1e6":
        scale = torch.ones(d, dtype=torch.float64)
        scale[d // 2] = 1e3
        a = scale[:, None] * a * scale
    return a


def truth(a: Tensor, b: Tensor) -> Tensor:
    """Tr((AB)^(1/2)) in float64, as the sum of the singular values of Ca^T Cb, with factors from eigenvectors."""
    return torch.linalg.svdvals(_factor(a).T @ _factor(b)).sum()


def _factor(a: Tensor) -> Tensor:
    """C with C C^T = A, from the eigenvectors of A scaled to a unit diagonal, without eigenvalues at rounding level."""
    scale = a.diagonal().clamp(min=0).sqrt()
    inverse = torch.where(scale > 0, 1 / scale, 0.0)
    values, vectors = torch.linalg.eigh(inverse[:, None] * a * inverse)
    values = torch.where(values > 1e-14 * values[-1] * a.shape[0], values, 0.0)
    return scale[:, None] * vectors * values.sqrt()


def mpmath_truth(a: Tensor, b: Tensor, digits: int = 45) -> mpmath.mpf:
    """Tr((A+ B+)^(1/2)) to `digits` digits, from the unmodified float64 entries. A+ = D H+ D, where H+ is the positive
    part of H. H is A with its diagonal scaled to [1/4, 1) by powers of four, D^2."""
    with mpmath.workdps(digits):
        n = _mp_root(a) * _mp_root(b).T
        values = mpmath.eigsy(n * n.T, eigvals_only=True)
        return mpmath.fsum(mpmath.sqrt(max(v, mpmath.mpf(0))) for v in values)


def _mp_root(a: Tensor) -> mpmath.matrix:
    """R with R^T R = D H+ D."""
    exponents = [math.ceil(math.frexp(v)[1] / 2) if v > 0 else 0 for v in a.diagonal().tolist()]
    scale = [
        mpmath.mpf(2) ** e if v > 0 else mpmath.mpf(0) for e, v in zip(exponents, a.diagonal().tolist(), strict=True)
    ]
    d = range(len(scale))
    h = mpmath.matrix(a.tolist())
    for i in d:
        for j in d:
            h[i, j] = h[i, j] / scale[i] / scale[j] if scale[i] * scale[j] else mpmath.mpf(i == j)
    values, vectors = mpmath.eigsy((h + h.T) / 2)
    root = mpmath.diag([mpmath.sqrt(max(v, mpmath.mpf(0))) for v in values]) * vectors.T
    return root * mpmath.diag(scale)
