"""Robust factors of covariances: C with C C^T = A, in float64, also for singular or badly scaled A."""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from mir_kernels.ops.sqrtm import float64

UNIT = 2.0**-53  # unit roundoff of float64
_BLOCK = 128  # below four of these, one whole product is faster than half of it in blocks


class Scaled(NamedTuple):
    """A = 4^exponent * D H D with D = diag(scale); every factor is a power of two, so nothing is rounded.

    h: (..., d, d) with a diagonal in [1/4, 1), 1 where A has a zero row.  scale: (..., d), zero where A has a zero
    row.  exponent: (...) float64 integers.
    """

    h: Tensor
    scale: Tensor
    exponent: Tensor


class Factor(NamedTuple):
    """A = 4^exponent * C C^T.

    columns: C, (..., d, d), lower triangular unless `singular`.  singular: (...) bool, where a pivot was lost to
    rounding and C comes from the eigenvectors of the equilibrated matrix H; null directions are zero columns at the
    end.  lowest: (...) the smallest eigenvalue of H where `singular`, 0 elsewhere.
    scale: (..., d) as in `Scaled`.  rounding: (...) an estimate of |H^(1/2) - (C C^T 4^exponent scaled as H)^(1/2)|_F.
    """

    columns: Tensor
    exponent: Tensor
    singular: Tensor
    lowest: Tensor
    scale: Tensor
    rounding: Tensor


def equilibrate(a: Tensor) -> Scaled:
    """The symmetric float64 `a` with its diagonal scaled to [1/4, 1) by powers of two.

    Van der Sluis: the condition number is within a factor d of the best diagonal scaling, so one massive coordinate
    costs the others no digits.
    """
    diagonal = a.diagonal(dim1=-2, dim2=-1)
    zero = diagonal <= 0
    each = half_exponent(diagonal)
    exponent = half_exponent(diagonal.amax(-1))
    scale = torch.exp2(each - exponent[..., None]).masked_fill(zero, 0.0)
    inverse = torch.exp2(-each).masked_fill(zero, 0.0)
    h = (a * inverse[..., :, None]).mul_(inverse[..., None, :])
    h.diagonal(dim1=-2, dim2=-1).add_(zero)
    return Scaled(h, scale, exponent)


def factor(a: Tensor) -> Factor:
    """C with C C^T = A for symmetric positive semi-definite float64 `a` (..., d, d).

    Cholesky of the equilibrated matrix (Higham, Accuracy and Stability, section 10.1). If rounding loses a pivot: the
    eigenvectors times the square roots of the eigenvalues above rounding.
    """
    h, scale, exponent = equilibrate(a)
    lower, singular = cholesky(h)
    lowest, rounding = torch.zeros_like(exponent), torch.zeros_like(exponent)
    if not bool(singular.all()):
        rounding = _cholesky_rounding(lower)
    if bool(singular.any()):
        lower[singular], lowest[singular], rounding[singular] = spectral_factor(h[singular])
    return Factor(lower.mul_(scale[..., None]), exponent, singular, lowest, scale, rounding)


def gram(n: Tensor) -> Tensor:
    """N^T N, computing each pair of mirrored blocks once."""
    d = n.shape[-1]
    parts = blocks(d)
    if len(parts) == 1:
        return float64.matmul(n.mT, n)
    if n.dim() == 3 and n.shape[0] == 1:
        return gram(n[0])[None]
    out = n.new_empty(*n.shape[:-2], d, d)
    for j0, j1 in parts:
        out[..., j0:, j0:j1] = float64.matmul(n[..., :, j0:].mT, n[..., :, j0:j1])
        out[..., j0:j1, j1:] = out[..., j1:, j0:j1].mT
    return out


def blocks(d: int) -> list[tuple[int, int]]:
    """Block boundaries of products that skip blocks: 4 pieces, or one where a whole product is faster."""
    cuts = [d * i // 4 for i in range(5)] if d >= 4 * _BLOCK else [0, d]
    return list(pairwise(cuts))


def cholesky(h: Tensor) -> tuple[Tensor, Tensor]:
    """Lower Cholesky factors of equilibrated matrices, and whether rounding lost a pivot (bool)."""
    lower, failed = float64.cholesky(h)
    pivots = lower.diagonal(dim1=-2, dim2=-1).square().amin(-1)
    return lower, failed | ~(pivots > rank_tolerance(h.shape[-1]))


def rank_tolerance(d: int) -> float:
    """Pivots and eigenvalues below this, relative to a diagonal of at most one, are rounding errors."""
    return 16 * d * UNIT


def spectral_factor(h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """C with C C^T = H from eigenvectors, without eigenvalues at rounding level; the smallest one; `rounding`."""
    values, vectors = torch.linalg.eigh(h)
    values, vectors = values.flip(-1), vectors.flip(-1)
    kept = values > rank_tolerance(h.shape[-1]) * values[..., :1]
    roots = values.where(kept, 0.0).sqrt()
    # Error of the roots: the dropped eigenvalues, and rounding of the others.
    left_out = values.abs().masked_fill(kept, 0.0).sum(-1)
    moved = (backward_error(h.shape[-1]) * values[..., 0]) ** 2 / 4 * (1 / values).where(kept, 0.0).sum(-1)
    return vectors * roots[..., None, :], values[..., -1], (left_out + moved).sqrt()


def _cholesky_rounding(lower: Tensor) -> Tensor:
    """Half the backward error times |H^(-1/2)|_F: (l + e)^(1/2) - l^(1/2) of each eigenvalue l to first order."""
    d = lower.shape[-1]
    signs = signs_like(lower)
    inverse = torch.linalg.solve_triangular(lower, signs.expand(*lower.shape[:-2], *signs.shape), upper=False)
    return backward_error(d) / 2 * torch.linalg.vector_norm(inverse, dim=(-2, -1)) / signs.shape[-1] ** 0.5


def backward_error(d: int) -> float:
    """An estimate of |H - C C^T|_2 and of the errors of eigenvalues of H, for H with a diagonal below 1."""
    return 4 * d**0.5 * UNIT


def signs_like(x: Tensor, columns: int = 8) -> Tensor:
    """Fixed columns g of +1 and -1, (d, columns) for x (..., d, d): E |X g|^2 = |X|_F^2 for every X."""
    generator = torch.Generator("cpu").manual_seed(0)
    size = (x.shape[-1], columns)
    return (2 * torch.randint(0, 2, size, generator=generator, dtype=torch.int64, device="cpu") - 1).to(x)


def half_exponent(x: Tensor) -> Tensor:
    """k with x / 4^k in [1/4, 1), 0 for x = 0."""
    return torch.where(x > 0, torch.ceil(torch.frexp(x).exponent.to(x.dtype) / 2), 0.0)
