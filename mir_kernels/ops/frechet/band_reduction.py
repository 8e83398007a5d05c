"""The sum of the roots of the eigenvalues of a large symmetric matrix on a CPU, without its eigenvalues.

Orthogonal transformations take the matrix to a band (the first stage of two-stage eigenvalue solvers: Bischof, Lang
and Sun, ACM TOMS 26, 2000), nearly all of it in products of matrices. There the second stage would chase bulges; the
trace of the root is had for less, as a sum of traces of inverses of the band plus shifts.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from mir_kernels.ops.frechet import native

WIDTH = 64  # diagonals below the main one
QUADRATURE = 1e-11  # largest relative error of a root by `nodes`, before rounding


class RootSums(NamedTuple):
    """Sums over the eigenvalues l of a matrix, float64; NaN and infinity where it is not positive definite.

    total: of sqrt(l).  inverse: of 1/l.  norm: the root of the sum of l^2.
    """

    total: Tensor
    inverse: Tensor
    norm: Tensor


def root_sums_(m: Tensor, block: int) -> RootSums:
    """`RootSums` of a symmetric float64 (d, d) matrix on the CPU, which is overwritten.

    Only the lower triangle and the blocks of `block` on the diagonal are read. Needs the native module.
    """
    band = reduce_(m, block)
    squares = band.square().sum(0)
    norm = (squares[0] + 2 * squares[1:].sum()).sqrt()
    (inverse,) = native.inverse_traces(band, torch.zeros(1, dtype=torch.float64))
    if not inverse > 0:  # NaN where it is not definite
        return RootSums(norm.new_tensor(torch.nan), norm.new_tensor(torch.inf), norm)
    # Every eigenvalue lies between 1 / inverse and norm.
    shifts, weights = nodes(1 / inverse.item(), norm.item())
    # Tr(T (T + s)^-1) = d - s Tr((T + s)^-1).
    return RootSums((weights * (m.shape[-1] - shifts * native.inverse_traces(band, shifts))).sum(), inverse, norm)


def reduce_(m: Tensor, block: int) -> Tensor:
    """A band with the eigenvalues of m, as (d, w + 1) with entry [j, r] = T[j + r, j], w = min(WIDTH, d - 1).

    Panels of `WIDTH` columns are made upper triangular below the band by Householder reflectors, I - V S V^T with
    S^-1 the upper triangle of V^T V with half its diagonal (Puglisi), and m becomes m - V Y^T - Y V^T.
    """
    d = m.shape[-1]
    for c in range(0, d - WIDTH, WIDTH):
        r = c + WIDTH
        packed, tau = torch.geqrf(m[r:, c:r])
        k = tau.shape[0]
        m[r : r + k, c:r] = packed[:k].triu()
        v = packed[:, :k].tril(-1)
        v.diagonal().fill_(1.0)
        idle = tau == 0  # no reflector: the column was zero below its first entry
        v.masked_fill_(idle, 0.0)
        s_inverse = (v.mT @ v).triu_(1)
        s_inverse.diagonal().copy_(torch.where(idle, 1.0, 1 / tau))
        rest = m[r:, r:]
        blocks = list(pairwise([0, *range(block - r % block, d - r, block), d - r]))
        y = torch.zeros_like(v)
        for j0, j1 in blocks:
            y[j0:].addmm_(rest[j0:, j0:j1], v[j0:j1])
            y[j0:j1].addmm_(rest[j1:, j0:j1].mT, v[j1:])
        y = torch.linalg.solve_triangular(s_inverse, y, upper=True, left=False)
        y.addmm_(v, torch.linalg.solve_triangular(s_inverse.mT, v.mT @ y, upper=False), alpha=-0.5)
        left, right = torch.cat((v, y), 1), torch.cat((y, v), 1)
        for j0, j1 in blocks:
            rest[j0:, j0:j1].addmm_(left[j0:], right[j0:j1].mT, alpha=-1)
    return _packed(m, min(WIDTH, d - 1))


def _packed(m: Tensor, width: int) -> Tensor:
    """The diagonal of m and the `width` below it as (d, width + 1), zero beyond the last row."""
    d = m.shape[-1]
    band = m.new_zeros(d, width + 1)
    whole = d - width
    band[:whole] = m.as_strided((whole, width + 1), (m.stride(0) + m.stride(1), m.stride(0)), m.storage_offset())
    for j in range(whole, d):
        band[j, : d - j] = m[j:, j]
    return band


def nodes(low: float, high: float) -> tuple[Tensor, Tensor]:
    """shifts and weights with sqrt(x) = sum of weights x / (x + shifts) for low <= x <= high, within QUADRATURE.

    The midpoint rule for sqrt(x) = 2/pi int_0^inf x / (x + t^2) dt with t = sqrt(low) sc(u | 1 - low/high), which
    converges like exp(-2 pi^2 n / (log(high/low) + 3)) (Hale, Higham and Trefethen, SIAM J. Numer. Anal. 46, 2008,
    method 3). n is even, so that the nodes are pairs t and sqrt(low high) / t; in whole vectors of eight.
    """
    ratio = math.sqrt(low / high)
    n = 8 * math.ceil((-2 * math.log(ratio) + 3) * math.log(4 / QUADRATURE) / (16 * math.pi**2))
    # Arithmetic-geometric means for the modulus whose complement is the ratio (Abramowitz and Stegun, 16.4 and 17.6).
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
    return torch.tensor(shifts, dtype=torch.float64), torch.tensor(weights, dtype=torch.float64)
