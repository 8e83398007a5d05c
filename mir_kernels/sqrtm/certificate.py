"""Proved bounds on Tr((AB)^(1/2)) and on nuclear norms, in float64 with every rounding error counted outward.

The theorem and its sources are in this folder's README, section "Bounds".
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from mir_kernels.sqrtm import factor

UNIT = factor.UNIT


class Witness(NamedTuple):
    """What the bounds are read from; any values give true bounds, good ones give close bounds.

    N ~ X R (the columns of X against the rows of R), and U close to the orthogonal polar factor of N.
    """

    u: Tensor
    x: Tensor
    r: Tensor


class Enclosure(NamedTuple):
    """inner inner^T - slack_in D^2 <= A+ <= outer outer^T + slack_out D^2 in the Loewner order.

    A is scaled by 4^-exponent; A+ is the positive part of A (A itself where it is semi-definite), D = diag(scale).
    """

    inner: Tensor
    outer: Tensor
    slack_in: Tensor
    slack_out: Tensor
    scale: Tensor
    exponent: Tensor


def gamma(n: int) -> float:
    """The relative error that n roundings can make in any order (Higham, Accuracy and Stability, Lemma 3.1)."""
    return n * UNIT / (1 - n * UNIT)


def trace_bounds(a: Tensor, b: Tensor, witness: Callable[[Tensor], Witness]) -> tuple[Tensor, Tensor]:
    """lower <= Tr((A+ B+)^(1/2)) <= upper for symmetric float64 (batch, d, d).

    witness: makes one for N (batch, d, d); `spectral_witness`, or `polar_witness` of an iterated polar factor.
    """
    x, y = enclose(a), enclose(b)
    n_outer = x.outer.mT @ y.outer
    n_inner = x.inner.mT @ y.inner
    found = witness(n_outer)
    lower = nuclear_lower(n_inner, found) - product_error(x.inner, y.inner)
    upper = nuclear_upper(n_outer, found) + product_error(x.outer, y.outer)
    # f(A + s D^2, B) <= f(A, B) + sqrt(s) |D B^(1/2)|_*, and a nuclear norm is at most the sum of the row norms.
    scales = (x.scale * y.scale).sum(-1)
    grown = (1 + x.slack_in + x.slack_out).sqrt() * (1 + y.slack_in + y.slack_out).sqrt() * (1 + gamma(4 * a.shape[-1]))
    lower = lower - (x.slack_in.sqrt() + y.slack_in.sqrt()) * scales * grown
    upper = upper + (x.slack_out.sqrt() + y.slack_out.sqrt()) * scales * grown
    power = torch.exp2(x.exponent + y.exponent)
    return lower.clamp(min=0.0) * (1 - 8 * UNIT) * power, upper * (1 + 8 * UNIT) * power


def enclose(a: Tensor) -> Enclosure:
    """Two factors that hold A between them, by the residual of a Cholesky factor computed without rounding."""
    h, scale, exponent = factor.equilibrate(a)
    d = h.shape[-1]
    lower, singular = factor.cholesky(h)
    if bool(singular.any()):
        lower[singular] = factor.spectral_factor(h[singular])[0]
    error = residual_bound(h, lower)
    shift = 4 * error
    eye = torch.eye(d, dtype=h.dtype, device=h.device)
    below, info = torch.linalg.cholesky_ex(h - shift[..., None, None] * eye)
    above, info_above = torch.linalg.cholesky_ex(h + shift[..., None, None] * eye)
    # H -+ shift is rounded on the diagonal: one unit of a number below 2.
    definite = (
        (info == 0)
        & (info_above == 0)
        & (residual_bound(h, below, -shift) + 4 * UNIT <= shift)
        & (residual_bound(h, above, shift) + 4 * UNIT <= shift)
    )
    pick = definite[..., None, None]
    inner, outer = torch.where(pick, below, lower), torch.where(pick, above, lower)
    slack = torch.where(definite, 0.0, error)
    return Enclosure(scale[..., None] * inner, scale[..., None] * outer, slack, 2 * slack, scale, exponent)


def residual_bound(h: Tensor, c: Tensor, shift: Tensor | float = 0.0) -> Tensor:
    """At least |H + shift I - C C^T|_2, for H with a diagonal below 1.

    C = C1 + C2 with C1 on a grid of 2^-26: the products of C1 are multiples of 2^-52 that Cauchy-Schwarz keeps below
    2, so C1 C1^T comes out of an ordinary float64 product without any rounding (the splitting of Ozaki et al., 2012);
    what is left is 2^-27 times smaller and so are its roundings.
    """
    d = h.shape[-1]
    grid = 2.0**26
    top = torch.round(c * grid) / grid
    rest = c - top
    cross = (top + rest / 2) @ rest.mT
    eye = torch.eye(d, dtype=h.dtype, device=h.device)
    shift = torch.as_tensor(shift, dtype=h.dtype, device=h.device)[..., None, None]
    residual = ((h - factor.gram(top.mT)) + shift * eye) - (cross + cross.mT)
    # |E|_2^2 = |E^2|_2 <= |E^2|_F, a good deal less than |E|_F^2 when the eigenvalues of E are many and alike.
    size = frobenius(residual)
    normalized = residual / size.clamp(min=torch.finfo(h.dtype).tiny)[..., None, None]
    spectral = size * (frobenius(factor.gram(normalized)) + gamma(2 * d)).sqrt()
    rounded = 2 * gamma(d + 4) * frobenius(top + rest / 2) * frobenius(rest) + 8 * UNIT * (size + frobenius(cross))
    big_rows = c.square().sum(-1).amax(-1) > 1.9  # the argument above needs rows of norm below sqrt(2)
    return torch.where(big_rows, torch.inf, spectral * (1 + 8 * UNIT) + rounded + 4 * UNIT * shift[..., 0, 0].abs())


def product_error(x: Tensor, y: Tensor) -> Tensor:
    """At least |fl(X^T Y) - X^T Y|_*: each column of the error is within gamma |X|_F times a column of Y."""
    d = x.shape[-2]
    columns_x, columns_y = x.square().sum(-2).sqrt(), y.square().sum(-2).sqrt()
    one = frobenius(x) * columns_y.sum(-1)
    other = frobenius(y) * columns_x.sum(-1)
    return gamma(d) * torch.minimum(one, other) * (1 + gamma(4 * d))


def spectral_witness(n: Tensor) -> Witness:
    """X = N V and U = Q V^T from the eigenvectors V of N^T N and N V = Q R."""
    _, v = torch.linalg.eigh(factor.gram(n))
    v = v.flip(-1)
    x = n @ v
    q, r = torch.linalg.qr(x)
    sign = torch.where(r.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0)
    return Witness((q * sign[..., None, :]) @ v.mT, x, v.mT)


def polar_witness(n: Tensor, u: Tensor, tolerance: float) -> Witness:
    """X = N R^-1 with R^T R = sym(U^T N) + delta I: the dual bound (Tr P + Tr(P^-1 N^T N)) / 2 without an inverse.

    delta costs tolerance/4 of the nuclear norm and makes up for the rounding in U, which can leave sym(U^T N)
    indefinite; where it does not suffice, X and R are zero, and the bound is honest but useless.
    """
    p = u.mT @ n
    p = (p + p.mT) / 2
    d = p.shape[-1]
    delta = (p.diagonal(dim1=-2, dim2=-1).sum(-1).abs() * (tolerance / (4 * d)))[..., None, None]
    eye = torch.eye(d, dtype=p.dtype, device=p.device)
    r, info = torch.linalg.cholesky_ex((p + delta * eye).nan_to_num(0.0), upper=True)
    good = (info == 0)[..., None, None]
    r = torch.where(good, r, eye)
    x = torch.where(good, torch.linalg.solve_triangular(r, n, upper=True, left=False), 0.0)
    return Witness(u, x, torch.where(good, r, 0.0))


def nuclear_lower(n: Tensor, witness: Witness) -> Tensor:
    """<U, N> / |U|_2 <= |N|_*: the nuclear norm is the dual of the spectral norm."""
    m, k = n.shape[-2:]
    u = witness.u
    inner = (u * n).sum(-1).sum(-1)
    inner = inner - gamma(m + k + 2) * frobenius(u) * frobenius(n) * (1 + gamma(4 * m * k))
    norm = spectral_norm_bound(u)
    return torch.where(norm > 0, inner.clamp(min=0.0) / norm, 0.0) * (1 - 8 * UNIT)


def nuclear_upper(n: Tensor, witness: Witness) -> Tensor:
    """|N|_* <= sum_i |x_i| |r_i| + |N - X R|_*: the triangle inequality over the rank-one terms of X R."""
    m, k = n.shape[-2:]
    x, r = witness.x, witness.r
    terms = (x.square().sum(-2).sqrt() * r.square().sum(-1).sqrt()).sum(-1) * (1 + gamma(m + 2 * k + 8))
    rounded = gamma(x.shape[-1] + 2) * (frobenius(n) + frobenius(x) * frobenius(r))
    return terms + (frobenius(n - x @ r) + rounded) * (min(m, k) ** 0.5 * (1 + gamma(4)))


def spectral_norm_bound(u: Tensor) -> Tensor:
    """At least |U|_2, close to it where the singular values are at most 1 and a little.

    If Cholesky of S = (1 + tau) I - U^T U runs through, then S >= -gamma Tr S (Rump, Verification of positive
    definiteness, BIT 2006), so |U|_2^2 <= 1 + tau + gamma Tr S. Otherwise the largest row sum of U^T U.
    """
    m, k = u.shape[-2:]
    g = factor.gram(u if k <= m else u.mT)
    d = g.shape[-1]
    eye = torch.eye(d, dtype=g.dtype, device=g.device)
    squared = g.abs().sum(-1).amax(-1) * (1 + gamma(d))
    for tau in (1e-2, 1e-4, 1e-6, 1e-8, 1e-10):
        s = (1 + tau) * eye - g
        passes = torch.linalg.cholesky_ex(s.nan_to_num(0.0)).info == 0
        trace = s.diagonal(dim1=-2, dim2=-1).abs().sum(-1)
        proved = 1 + tau + gamma(d + 1) / (1 - gamma(d + 1)) * trace * (1 + gamma(d)) + 4 * UNIT
        squared = torch.where(passes, torch.minimum(squared, proved), squared)
        if not bool(passes.any()):
            break
    rounded = gamma(max(m, k) + 2) * frobenius(u).square()
    return (squared + rounded).sqrt() * (1 + 8 * UNIT)


def frobenius(x: Tensor) -> Tensor:
    """At least |x|_F: the computed norm and the rounding of its sum."""
    return x.square().sum(-1).sum(-1).sqrt() * (1 + gamma(x.shape[-2] + x.shape[-1] + 8))
