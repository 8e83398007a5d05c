"""Proofs in float64 arithmetic: bounds of rounding errors and norms, and definiteness.

The lemmas and their sources are in the README of `frechet`, section "Bounds". They assume the error bound of products
stated in `float64`, native or split. The Cholesky factors that prove definiteness always run natively in float64, by
LAPACK or cuSOLVER.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mir_kernels.ops.sqrtm import float64
from mir_kernels.ops.sqrtm.factor import UNIT, gram

MARGIN = 1 + 1e-6  # covers rounding in the error bounds themselves, which are sums of positive numbers
FLOOR = 2.0**-1000  # more than an entry can lose to underflow, also where subnormal numbers are flushed to zero


def gamma(n: int) -> float:
    """The largest relative error of n roundings in any order (Higham, Accuracy and Stability, Lemma 3.1)."""
    return n * UNIT / (1 - n * UNIT)


def frobenius(x: Tensor) -> Tensor:
    """An upper bound of |x|_F: the computed norm widened by the rounding of its sum, in any order."""
    return torch.linalg.vector_norm(x, dim=(-2, -1)) * (1 + gamma(x.shape[-2] * x.shape[-1] + 8))


def at_least(s: Tensor, error: Tensor) -> Tensor:
    """Whether S >= error I is proved for symmetric S (only its lower triangle is read).

    If Cholesky of S - t I succeeds, then S - t I >= -gamma Tr|S| I (Rump, Verification of positive definiteness,
    BIT 2006).
    """
    d = s.shape[-1]
    diagonal = s.diagonal(dim1=-2, dim2=-1)
    sizes = diagonal.abs()
    below = gamma(d + 1) / (1 - gamma(d + 1)) * sizes.sum(-1) * (1 + gamma(d)) + 4 * UNIT * sizes.amax(-1)
    t = 2 * (error + below)
    usable = torch.isfinite(t)
    less = s.clone()
    less.diagonal(dim1=-2, dim2=-1).sub_(torch.where(usable, t, 0.0)[..., None])
    return usable & (torch.linalg.cholesky_ex(less.nan_to_num_(0.0)).info == 0)


def spectral_norm_bound(u: Tensor) -> Tensor:
    """An upper bound of |U|_2, tight if the singular values barely exceed 1.

    |U|_2^2 <= 1 + tau for the first tau with (1 + tau) I - U^T U >= 0 (`at_least`); otherwise the largest row sum of
    U^T U.
    """
    m, k = u.shape[-2:]
    g = gram(u if k <= m else u.mT)
    d = g.shape[-1]
    eye = torch.eye(d, dtype=g.dtype, device=g.device)
    squared = g.abs().sum(-1).amax(-1) * (1 + gamma(d))
    rounding = torch.full_like(squared, 4 * UNIT)  # of 1 + tau minus the diagonal
    for tau in (1e-10, 1e-8, 1e-6, 1e-4, 1e-2):
        passes = at_least((1 + tau) * eye - g, rounding)
        squared = torch.where(passes, squared.clamp(max=1 + tau), squared)
        if bool(passes.all()):
            break
    rounded = gamma(max(m, k) + 2) * frobenius(u).square()
    return (squared + rounded).sqrt() * (1 + 8 * UNIT)


def contract(u: Tensor) -> tuple[Tensor, Tensor]:
    """U (3I - U^T U)/2 for float64 (batch, m, n), m >= n, and a bound of its spectral norm.

    s (3 - s^2)/2 maps [0, sqrt(3)] into [0, 1] with its maximum at s = 1: the bound is 1 plus rounding, and no norm
    has to be computed.
    """
    m, k = u.shape[-2:]
    g = gram(u)
    t = g * -0.5
    t.diagonal(dim1=-2, dim2=-1).add_(1.5)
    out = float64.matmul(u, t)
    size = frobenius(u)
    of_gram = gamma(m) * size.square() * (1 + gamma(4))
    room = g.mul_(-1.0)
    room.diagonal(dim1=-2, dim2=-1).add_(3.0)
    within = at_least(room, of_gram + 4 * UNIT)
    # Rounding of U^T U, of its half, and of the last product; the norm of U is at most sqrt(3).
    rounded = 1.8 * (of_gram / 2 + 4 * UNIT * frobenius(t)) + gamma(k) * size * frobenius(t)
    norm = 1 + rounded * (1 + 8 * UNIT)
    return out, norm if bool(within.all()) else torch.where(within, norm, spectral_norm_bound(out))
