"""Proved bounds on Tr((AB)^(1/2)) and on nuclear norms, in float64 and widened by every rounding error.

The theorem and its sources are in this folder's README, section "Bounds".
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from mir_kernels.ops.frechet.cross_factor import cross_product
from mir_kernels.ops.sqrtm import factor, float64
from mir_kernels.ops.sqrtm.factor import UNIT
from mir_kernels.ops.sqrtm.rounding import at_least, frobenius, gamma, spectral_norm_bound

# Shifts to try, in units of sqrt(d) u. The rounding of Cholesky factors was 0.2 to 4.2 units for d = 16 to 2048.
_SHIFTS = (2, 16, 128)


class Witness(NamedTuple):
    """The matrices that bounds are computed from; any values yield valid bounds, good ones tight bounds.

    N ~ X R (the columns of X against the rows of R), and U close to the orthogonal polar factor of N, |U|_2 <= norm.
    """

    u: Tensor
    norm: Tensor
    x: Tensor
    r: Tensor


class Enclosure(NamedTuple):
    """inner inner^T - slack_in D^2 <= A+ <= outer outer^T + slack_out D^2 in the Loewner order.

    A is scaled by 4^-exponent; A+ is the positive part of A (A itself if it is semi-definite), D = diag(scale).
    triangular: both factors are lower triangular in the whole batch.
    """

    inner: Tensor
    outer: Tensor
    triangular: bool
    slack_in: Tensor
    slack_out: Tensor
    scale: Tensor
    exponent: Tensor


def trace_bounds(a: Tensor, b: Tensor, witness: Callable[[Tensor], Witness]) -> tuple[Tensor, Tensor]:
    """lower <= Tr((A+ B+)^(1/2)) <= upper for symmetric float64 (batch, d, d).

    witness: returns the witness of N (batch, d, d); `spectral_witness`, or `polar_witness` of an iterated polar factor.
    """
    x, y = enclose(a), enclose(b)
    triangular = x.triangular and y.triangular
    n_outer = cross_product(x.outer, y.outer, triangular=triangular)
    n_inner = cross_product(x.inner, y.inner, triangular=triangular)
    found = witness(n_outer)
    lower = nuclear_lower(n_inner, found)
    # Near singularity, factors of neighbouring matrices may be rotations of one another, and U fits only one of them.
    if bool((lower < (1 - 1e-7) * nuclear_lower(n_outer, found)).any()):
        lower = torch.maximum(lower, nuclear_lower(n_inner, witness(n_inner)))
    lower = lower - product_error(x.inner, y.inner)
    upper = nuclear_upper(n_outer, found) + product_error(x.outer, y.outer)
    # f(A + s D^2, B) <= f(A, B) + sqrt(s) |D B^(1/2)|_*, and a nuclear norm is at most the sum of the row norms.
    scales = (x.scale * y.scale).sum(-1)
    grown = (1 + x.slack_in + x.slack_out).sqrt() * (1 + y.slack_in + y.slack_out).sqrt() * (1 + gamma(4 * a.shape[-1]))
    lower = lower - (x.slack_in.sqrt() + y.slack_in.sqrt()) * scales * grown
    upper = upper + (x.slack_out.sqrt() + y.slack_out.sqrt()) * scales * grown
    power = x.exponent + y.exponent
    return outward(lower * (1 - 8 * UNIT), power, -1), outward(upper * (1 + 8 * UNIT), power, 1)


def outward(end: Tensor, exponent: Tensor, sign: int) -> Tensor:
    """end 2^exponent of a lower (sign -1) or upper (sign 1) end, still a valid bound outside float64's range."""
    end = float64.times_power(end.clamp(min=0.0), exponent)
    end = torch.nextafter(end, torch.full_like(end, sign * torch.inf))
    return end if sign > 0 else end.clamp(0.0, torch.finfo(end.dtype).max)


def enclose(a: Tensor) -> Enclosure:
    """Factors that enclose A: Cholesky factors of H -+ shift I, proved by residuals computed without rounding.

    If H - shift I is not definite for any shift tried, one factor of H and a bound of its residual.
    """
    h, scale, exponent = factor.equilibrate(a)
    inner, definite = _shifted_factor(h, -1.0)
    outer = inner
    if bool(definite.any()):
        outer, above = _shifted_factor(h, 1.0)
        definite = definite & above
    slack, triangular = torch.zeros_like(scale[..., 0]), True
    if not bool(definite.all()):
        lower, singular = factor.cholesky(h)
        if bool(singular.any()):
            lower[singular], triangular = factor.spectral_factor(h[singular])[0], False
        pick = definite[..., None, None]
        inner, outer = torch.where(pick, inner, lower), torch.where(pick, outer, lower)
        slack = torch.where(definite, 0.0, residual_bound(h, lower))
    rows = scale[..., None]
    return Enclosure(rows * inner, rows * outer, triangular, slack, 2 * slack, scale, exponent)


def _shifted_factor(h: Tensor, sign: float) -> tuple[Tensor, Tensor]:
    """Lower triangular C with C C^T <= H (sign -1) or H <= C C^T (sign 1) in the Loewner order, and where it is proved.

    C is the Cholesky factor of H + sign shift I, with the smallest of a few shifts that exceeds its rounding: the
    residual, near -sign shift I, is proved definite by a Cholesky factor of the residual.
    """
    found, proved = torch.zeros_like(h), torch.zeros(h.shape[:-2], dtype=torch.bool, device=h.device)
    hopeful = ~proved
    for multiple in _SHIFTS:
        shifted = h.clone()
        shifted.diagonal(dim1=-2, dim2=-1).add_(sign * multiple * h.shape[-1] ** 0.5 * UNIT)
        c, info = torch.linalg.cholesky_ex(shifted)
        left, rounded = _residual(h, c, triangular=True)
        holds = (info == 0) & hopeful & at_least(left.mul_(-sign), rounded)
        found, proved = torch.where(holds[..., None, None], c, found), proved | holds
        # If H minus a small shift is indefinite, so is H minus a larger one.
        hopeful = hopeful & ~holds & ((info == 0) | (sign > 0))
        if not bool(hopeful.any()):
            break
    return found, proved


def _residual(h: Tensor, c: Tensor, *, triangular: bool) -> tuple[Tensor, Tensor]:
    """H - C C^T for H with a diagonal below 1, and a bound on the spectral norm of its error.

    The result covers the blocks on and below the diagonal; blocks above are zero.
    triangular: C is lower triangular, and products skip its zeros.

    C = C1 + C2 with C1 on a grid of 2^-26: the products of C1 are multiples of 2^-52, below 2 by Cauchy-Schwarz, so an
    ordinary float64 product computes C1 C1^T without rounding (the splitting of Ozaki et al., 2012). The rest is 2^-27
    times smaller, and so are its roundings.
    """
    d, k = c.shape[-2:]
    grid = 2.0**26
    top = (c * grid).round_().div_(grid)
    rest = c - top
    half = torch.add(top, rest, alpha=0.5)
    out = torch.zeros_like(h)
    for j0, j1 in factor.blocks(d):
        upto = j1 if triangular else k
        one, two, three = (x[..., j0:, :upto] for x in (top, half, rest))
        # The exact product first; C1 C2^T + C2 C1^T + C2 C2^T is small, and so is its rounding.
        out[..., j0:, j0:j1] = h[..., j0:, j0:j1] - one @ top[..., j0:j1, :upto].mT
        out[..., j0:, j0:j1] -= two @ rest[..., j0:j1, :upto].mT + three @ half[..., j0:j1, :upto].mT
    rows = torch.linalg.vector_norm(c, dim=-1).amax(-1) * (1 + gamma(k + 8))
    small = (d * k) ** 0.5 * 2.0**-27  # at least |C2|_F
    cross = 2 * (d**0.5 * rows + small) * small  # at least |C1 C2^T + C2 C1^T + C2 C2^T|_F, also with absolute values
    rounded = gamma(k + 4) * cross + 8 * UNIT * (2 * frobenius(out) + cross)
    return out, torch.where(rows.square() < 1.9, rounded, torch.inf)  # the argument above needs rows below sqrt(2)


def residual_bound(h: Tensor, c: Tensor) -> Tensor:
    """An upper bound of |H - C C^T|_2, for H with a diagonal below 1."""
    d = h.shape[-1]
    residual, rounded = _residual(h, c, triangular=False)
    residual = residual.tril()
    residual = residual + residual.tril(-1).mT
    # |E|_2^2 = |E^2|_2 <= |E^2|_F, much less than |E|_F^2 when E has many eigenvalues of similar size.
    size = frobenius(residual)
    normalized = residual / size.clamp(min=torch.finfo(h.dtype).tiny)[..., None, None]
    spectral = size * (frobenius(factor.gram(normalized)) + gamma(2 * d)).sqrt()
    return spectral * (1 + 8 * UNIT) + rounded


def product_error(x: Tensor, y: Tensor) -> Tensor:
    """An upper bound of |fl(X^T Y) - X^T Y|_*: each column of the error is within gamma |X|_F times a column of Y."""
    d = x.shape[-2]
    columns_x, columns_y = x.square().sum(-2).sqrt(), y.square().sum(-2).sqrt()
    one = frobenius(x) * columns_y.sum(-1)
    other = frobenius(y) * columns_x.sum(-1)
    return gamma(d) * torch.minimum(one, other) * (1 + gamma(4 * d))


def spectral_witness(n: Tensor) -> Witness:
    """X = N V and U = Q V^T from the eigenvectors V of N^T N and N V = Q R with a positive diagonal of R.

    The columns of X are orthogonal up to rounding, so Cholesky of the Gram matrix of their directions yields Q as
    accurately as Householder QR, in half the time. Householder QR follows if that fails, for instance for columns that
    are rounding errors only.
    """
    _, v = torch.linalg.eigh(factor.gram(n))
    v = v.flip(-1)
    x = n @ v
    length = torch.linalg.vector_norm(x, dim=-2, keepdim=True)
    q = x / length
    r, info = torch.linalg.cholesky_ex(factor.gram(q).nan_to_num_(0.0), upper=True)
    independent = (info == 0) & (r.diagonal(dim1=-2, dim2=-1).amin(-1) > 0.1) & (length > 0).all(-1)[..., 0]
    if bool(independent.all()):
        q = torch.linalg.solve_triangular(r, q, upper=True, left=False)
    else:
        q, r = torch.linalg.qr(x)
        q = q * torch.where(r.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0)[..., None, :]
    u = q @ v.mT
    return Witness(u, spectral_norm_bound(u), x, v.mT)


def polar_witness(n: Tensor, u: Tensor, norm: Tensor, tolerance: float) -> Witness:
    """X = N R^-1 with R^T R = sym(U^T N) + delta I: the dual bound (Tr P + Tr(P^-1 N^T N)) / 2 without an inverse.

    delta costs tolerance/4 of the nuclear norm and compensates rounding in U, which can leave sym(U^T N) indefinite. If
    it does not suffice, X and R are zero, and the bound is valid but useless.
    """
    p = float64.matmul(u.mT, n)
    p = (p + p.mT) / 2
    d = p.shape[-1]
    delta = (p.diagonal(dim1=-2, dim2=-1).sum(-1).abs() * (tolerance / (4 * d)))[..., None, None]
    eye = torch.eye(d, dtype=p.dtype, device=p.device)
    lower, failed = float64.cholesky((p + delta * eye).nan_to_num(0.0))
    good = ~failed[..., None, None]
    r = torch.where(good, lower.mT, eye)
    x = torch.where(good, float64.solve_right(r, n), 0.0)
    return Witness(u, norm, x, torch.where(good, r, 0.0))


def nuclear_lower(n: Tensor, witness: Witness) -> Tensor:
    """<U, N> / |U|_2 <= |N|_*: the nuclear norm is the dual of the spectral norm."""
    m, k = n.shape[-2:]
    u = witness.u
    inner = (u * n).sum(-1).sum(-1)
    inner = inner - gamma(m + k + 2) * frobenius(u) * frobenius(n) * (1 + gamma(4 * m * k))
    return torch.where(witness.norm > 0, inner.clamp(min=0.0) / witness.norm, 0.0) * (1 - 8 * UNIT)


def nuclear_upper(n: Tensor, witness: Witness) -> Tensor:
    """|N|_* <= sum_i |x_i| |r_i| + |N - X R|_*: the triangle inequality over the rank-one terms of X R."""
    m, k = n.shape[-2:]
    x, r = witness.x, witness.r
    terms = (x.square().sum(-2).sqrt() * r.square().sum(-1).sqrt()).sum(-1) * (1 + gamma(m + 2 * k + 8))
    rounded = gamma(x.shape[-1] + 2) * (frobenius(n) + frobenius(x) * frobenius(r))
    return terms + (frobenius(n - float64.matmul(x, r)) + rounded) * (min(m, k) ** 0.5 * (1 + gamma(4)))
