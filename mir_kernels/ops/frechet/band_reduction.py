"""The sum of the roots of the eigenvalues of a large symmetric matrix on a CPU, without computing eigenvalues.

Orthogonal transformations reduce the matrix to a band (the first stage of two-stage eigenvalue solvers), almost
entirely by matrix products. Instead of the second stage, bulge chasing, the trace of the root is computed as a sum of
traces of inverses of the band plus shifts, which is cheaper.
"""

from __future__ import annotations

import math
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from mir_kernels.ops.frechet import native

QUADRATURE = 1e-11  # largest relative error of a root by `nodes`, before rounding
_LANES = 8  # shifts per vector, or a multiple of them


class RootSums(NamedTuple):
    """Sums over the eigenvalues l of a matrix. If it is not positive definite: NaN, infinity, and 0 for `least`.

    total: of sqrt(l).  inverse: of 1/l.  norm: the root of the sum of l^2.
    least: a lower bound of all l, at least 1 / inverse.
    """

    total: float
    inverse: float
    norm: float
    least: float


def root_sums_(m: Tensor, d: int) -> RootSums:
    """`RootSums` of a symmetric float64 matrix on the CPU, laid out for `native.band`; overwrites it."""
    exponent = math.frexp(m.diagonal().amax().item())[1] // 2
    if abs(exponent) > 100:  # squares of the entries would leave float64's range
        sums = root_sums_(m.mul_(4.0**-exponent), d)
        return RootSums(*(x * 4.0 ** (p * exponent) for x, p in zip(sums, (0.5, -1, 1, 1), strict=True)))
    band = native.band(m, d)
    squares = band.square().sum(0)
    norm = (squares[0] + 2 * squares[1:].sum()).sqrt().item()
    inverse = native.inverse_traces(band, torch.zeros(1, dtype=torch.float64, device="cpu")).item()
    if not inverse > 0:  # NaN if the band is not definite
        return RootSums(math.nan, math.inf, norm, 0.0)
    least = _least(band, inverse)
    shifts, weights = nodes(least, norm, QUADRATURE, lanes=_LANES)
    # Tr(T (T + s)^-1) = d - s Tr((T + s)^-1).
    total = (weights * (d - shifts * native.inverse_traces(band, shifts))).sum().item()
    return RootSums(total, inverse, norm, least)


def _least(band: Tensor, inverse: float) -> float:
    """The largest of nine candidates that is a lower bound of the eigenvalues of `band`; inverse: Tr(band^-1).

    Like the smallest eigenvalue, they lie between 1 / inverse and d / inverse, each d^(1/8) times the previous one.
    """
    factors = torch.linspace(0, math.log(band.shape[0]), _LANES + 1, dtype=torch.float64, device="cpu").exp()
    candidates = factors / inverse
    definite = native.inverse_traces(band, -candidates[1:]) > 0
    return candidates[int(definite.cumprod(0).sum())].item()


def nodes(low: float, high: float, error: float, lanes: int = 2) -> tuple[Tensor, Tensor]:
    """Shifts and weights with sqrt(x) = sum of weights x / (x + shifts), low <= x <= high, to a relative `error`.

    The midpoint rule for sqrt(x) = 2/pi int_0^inf x / (x + t^2) dt with t = sqrt(low) sc(u | 1 - low/high), which
    converges like exp(-2 pi^2 n / (log(high/low) + 3)) (Hale, Higham and Trefethen, SIAM J. Numer. Anal. 46, 2008,
    method 3). n is a multiple of `lanes`, which is even, so that the nodes form pairs t and sqrt(low high) / t.
    """
    ratio = math.sqrt(low / high)
    n = lanes * math.ceil((-2 * math.log(ratio) + 3) * math.log(4 / error) / (2 * math.pi**2 * lanes))
    # Arithmetic-geometric mean for the modulus whose complement is the ratio (Abramowitz and Stegun, 16.4 and 17.6).
    a, b, quotients = 1.0, ratio, []
    while a - b > 1e-15 * a:
        a, b, c = (a + b) / 2, math.sqrt(a * b), (a - b) / 2
        quotients.append(c / a)
    quarter = math.pi / (2 * a)
    shifts, weights = [], []
    for j in range(n // 2):
        angle = 2 ** len(quotients) * a * (j + 0.5) * quarter / n
        for quotient in reversed(quotients):
            angle = (angle + math.asin(quotient * math.sin(angle))) / 2
        sn, cn = math.sin(angle), math.cos(angle)
        t = math.sqrt(low) * sn / cn
        step = 2 / math.pi * quarter / n * math.sqrt(low) * math.hypot(cn, ratio * sn) / cn**2
        mirror = math.sqrt(low) * math.sqrt(high) / t
        shifts += [t * t, mirror * mirror]
        weights += [step, step * mirror / t]
    as_tensor = partial(torch.tensor, dtype=torch.float64, device="cpu")
    return as_tensor(shifts), as_tensor(weights)
