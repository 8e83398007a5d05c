"""Means, deviations and covariances of features, with or without proved bounds of every rounding error.

A mean in float64 is off by u times the mean, and deviations from it by as much, however small they are. A mean is
therefore stored as an unevaluated sum, coarse + fine, and the remaining mean of the deviations is measured, so that all
errors are u times the deviations (README.md, "Bounds of features").
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from mir_kernels.ops.sqrtm import factor, float64
from mir_kernels.ops.sqrtm.factor import UNIT
from mir_kernels.ops.sqrtm.rounding import FLOOR, MARGIN, at_least, frobenius, gamma

_ROWS = 256  # rows per partial sum: a term of a sum over n rows passes through _ROWS + n / _ROWS roundings
_PRODUCT_ROWS, _PRODUCT_COLUMNS = 1024, 256  # block of a product
_SAMPLE = 512  # approximate number of rows for a rough mean
_LEAST = 2.0**-450  # smallest column norm, relative to the largest entry: products of smaller ones may underflow
# Bounds of |G - C| relative to C to try, the best first. If none is proved, the bound is the root of `shift`.
_SHARES = (2.0**-46, 2.0**-40, 2.0**-34, 2.0**-30, 2.0**-27, 2.0**-24)


class Centred(NamedTuple):
    """Features X (rows, d) times 2^-exponent: their mean, and deviations Z with columns Z_j.

    coarse, fine, mean_error: (d,), the mean is coarse + fine, each entry to within mean_error.
    norm: (d,), |Z_j| to within a relative error of `rounding`.  error: (d,), upper bounds of |(X - mean)_j - Z_j|. A
    column that is hardly larger than its error has Z_j = 0, and its size is added to the error.
    """

    rows: int
    exponent: Tensor
    coarse: Tensor
    fine: Tensor
    mean_error: Tensor
    norm: Tensor
    rounding: float
    error: Tensor

    def deviations(self, x: Tensor, rows: int) -> Iterator[Tensor]:
        """The deviations Z of x, the features that were centred, `rows` rows at a time."""
        known = self.norm > 0
        for part in _scaled(x, self.exponent, rows):
            yield part.sub_(self.coarse).sub_(self.fine).mul_(known)


class Covariance(NamedTuple):
    """A matrix C close to a covariance S (ddof 1), with bounds of the difference, all times 4^-exponent.

    The deviations behind S have columns within `error` (d,) of those of some Z, G = Z^T Z is close to C, and no column
    of Z is longer than `deviation` (d,); both divided by the root of n - 1.
    shift: -shift D^2 <= G - C <= shift D^2 in the Loewner order, D = diag(scale), scale (d,) at least the roots of C's
    diagonal.  share: if below 1, also -share C <= G - C <= share C, and C is definite.
    """

    matrix: Tensor
    exponent: Tensor
    deviation: Tensor
    error: Tensor
    scale: Tensor
    shift: float
    share: float


def moments(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The mean of x (n, d) as coarse + fine, and its covariance (ddof 1): (d,), (d,), (d, d). No bounds."""
    n, d = x.shape
    coarse = _rough_mean(x)
    product, total = x.new_zeros(d, d, dtype=torch.float64), torch.zeros_like(coarse)
    shifted = x.new_empty(min(n, _PRODUCT_ROWS), d, dtype=torch.float64)
    for part in x.split(_PRODUCT_ROWS):
        y = shifted[: len(part)].copy_(part).sub_(coarse)
        total += y.sum(0)
        _add_lower_gram(product, y)
    fine = total / n
    product.addr_(total, fine, alpha=-1.0)
    product.diagonal().clamp_(min=0.0)
    return coarse, fine, _mirror_lower(product).div_(n - 1)


def variances(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The mean of x (n, d) as coarse + fine, and its variances (ddof 1): (d,) each. No bounds."""
    n, coarse = x.shape[0], _rough_mean(x)
    total, squares = torch.zeros_like(coarse), torch.zeros_like(coarse)
    for part in x.split(_PRODUCT_ROWS):
        y = part.double() - coarse
        total += y.sum(0)
        squares += y.square_().sum(0)
    fine = total / n
    return coarse, fine, (squares - total * fine).clamp_(min=0.0).div_(n - 1)


def centre(x: Tensor) -> Centred:
    """The mean of x (n, d), any floating dtype, with proved bounds of the deviations from it."""
    n = x.shape[0]
    lowest, highest = torch.aminmax(x)
    size = torch.maximum(-lowest.double(), highest.double())
    exponent = torch.where(size > 0, torch.frexp(size).exponent.double(), 0.0)
    coarse = _column_sums(_scaled(x, exponent, _ROWS)) / n
    fine = _column_sums(part.sub_(coarse) for part in _scaled(x, exponent, _ROWS)) / n
    total, squares = torch.zeros_like(fine), torch.zeros_like(fine)
    for part in _scaled(x, exponent, _ROWS):
        z = part.sub_(coarse).sub_(fine)
        total += z.sum(0)
        squares += z.square_().sum(0)
    g, root = gamma(_ROWS + n // _ROWS + 8), n**0.5
    norm = squares.sqrt()
    most = norm * (1 + g) + torch.zeros_like(norm).masked_fill(norm < _LEAST, root * 2.0**-510)
    # With y = x - coarse and z = y - fine as rounded, each subtraction is off by at most u times its result, and
    # |Y_j| <= (1 + u) |Z_j| + sqrt(n) |fine|. The remaining mean contributes sqrt(n) |mean z| to the length of a column
    # of Z: the computed value plus the rounding of its sum, whose terms add up to at most sqrt(n) |Z_j|.
    subtracted = UNIT * (2.1 * most + root * fine.abs()) + root * FLOOR
    drift = total.abs() / root + g * most
    error = (subtracted + drift) * MARGIN
    known = (norm >= _LEAST) & (norm > 4 * error)
    return Centred(
        *(n, exponent, coarse, fine, error / root * MARGIN, torch.where(known, norm, 0.0), g),
        torch.where(known, error, (error + most) * MARGIN),
    )


def covariance(x: Tensor, centred: Centred) -> Covariance:
    """The covariance of x, with sums over its rows in twice float64's precision.

    Columns are scaled by powers of two to a length of at most about 1: W = T + R, T on a grid of 2^-26. Products of T
    are multiples of 2^-52, and by Cauchy-Schwarz no partial sum of T^T T reaches 2, so an ordinary product computes it
    exactly (as in `certificate._residual`). The rest is (T + R/2)^T R and its transpose; entries of R are at most
    2^-27, which makes its rounding as much smaller.
    """
    n, d = x.shape
    power = torch.where(centred.norm > 0, torch.frexp(centred.norm).exponent.double(), 0.0)
    upscale, grid = torch.exp2(-power), 2.0**26
    exact, cross = (x.new_zeros(d, d, dtype=torch.float64) for _ in range(2))
    for z in centred.deviations(x, _PRODUCT_ROWS):
        w = z.mul_(upscale)
        top = (w * grid).round_().div_(grid)
        rest = w.sub_(top)
        _add_lower_gram(exact, top)
        cross.addmm_(top.add_(rest, alpha=0.5).mT, rest)
    exact = _mirror_lower(exact)
    # entry: rounding of an entry in the inexact sums, for columns of length 1. Rounding of the total, of C and of its
    # division by n - 1 is relative to each entry: the 2.5 u |H|_F of `shift`.
    small = n**0.5 * 2.0**-27
    entry = (2.1 * gamma(_PRODUCT_ROWS + n // _PRODUCT_ROWS + 8) + 8 * UNIT) * small
    matrix = exact.add_(cross + cross.mT)
    matrix = matrix.mul_(torch.exp2(power)[:, None]).mul_(torch.exp2(power)).div_(n - 1)
    h, scale, exponent = factor.equilibrate(matrix)
    # The roots of C's diagonal are at least half of 2^power / sqrt(n - 1), and `scale` is at least these roots.
    shift = (2.5 * UNIT * frobenius(h) + 4.5 * d * entry).item() * MARGIN
    degrees = (n - 1) ** 0.5
    return Covariance(
        matrix,
        centred.exponent,
        centred.norm * ((1 + centred.rounding) * MARGIN / degrees),
        centred.error * (MARGIN / degrees),
        float64.times_power(scale, exponent),
        shift,
        _share(h, shift),
    )


def exactly(matrix: Tensor) -> Covariance:
    """An exactly known covariance (d, d), symmetric float64."""
    deviation = matrix.diagonal().clamp(min=0.0).sqrt() * MARGIN
    zero = torch.zeros_like(deviation)
    return Covariance(matrix, zero.new_zeros(()), deviation, zero, deviation, 0.0, 0.0)


def widened(lower: Tensor, upper: Tensor, x: Covariance, y: Covariance) -> tuple[Tensor, Tensor]:
    """Bounds of f(Sx, Sy) from lower <= f(Cx, Cy) <= upper, f(A, B) = Tr((A+ B+)^(1/2)); scalars without exponents.

    (1 - e) C <= G <= (1 + e) C changes f by factors sqrt(1 -+ e); G <= C+ + s D^2 and C+ <= G + 2 s D^2 change it by at
    most sqrt(2 s) times the nuclear norm of D B^(1/2) (`certificate`). |f(S, .) - f(G, .)| is at most the nuclear norm
    of a sum of products of columns, one of each pair being an error.
    """
    apart, below, above = 0.0, 1.0, 1.0
    for one in (x, y):
        if one.share < 1:
            below, above = below * (1 - one.share), above * (1 + one.share)
        else:
            apart += (2 * one.shift) ** 0.5 * (1 + 2 * one.shift)
    both = (x.scale * y.scale).sum() * ((1 + 2 * max(x.shift, y.shift)) * MARGIN * apart)
    centring = (x.error * (y.deviation + y.error) + x.deviation * y.error).sum() * MARGIN
    lower = (lower * (below**0.5 * (1 - 8 * UNIT)) - both - centring - FLOOR).clamp(min=0.0) * (1 - 8 * UNIT)
    return lower, ((upper + both) * (above**0.5 * (1 + 8 * UNIT)) + centring) * (1 + 8 * UNIT) + FLOOR


def _share(h: Tensor, shift: float) -> float:
    """The smallest e of `_SHARES` with -e H <= E <= e H proved for every E with |E|_2 <= shift; 1 if there is none.

    H >= (shift / e) I suffices.
    """
    for share in _SHARES:
        least = shift / share
        if least < 0.25 and bool(at_least(h, h.new_tensor(least))):
            return share * MARGIN
    return 1.0


def _scaled(x: Tensor, exponent: Tensor, rows: int) -> Iterator[Tensor]:
    """x 2^-exponent in float64 as new tensors, `rows` rows at a time."""
    for part in x.split(rows):
        yield float64.times_power(part.double(), -exponent)


def _add_lower_gram(product: Tensor, y: Tensor) -> None:
    """product += Y^T Y on and below the diagonal; entries above it become meaningless."""
    for start in range(0, y.shape[1], _PRODUCT_COLUMNS):
        stop = start + _PRODUCT_COLUMNS
        product[start:stop, :stop].addmm_(y[:, start:stop].mT, y[:, :stop])


def _mirror_lower(product: Tensor) -> Tensor:
    """Copy the lower triangle to the upper one, in place."""
    for start in range(0, product.shape[1], _PRODUCT_COLUMNS):
        stop = start + _PRODUCT_COLUMNS
        product[:start, start:stop] = product[start:stop, :start].mT
        block = product[start:stop, start:stop].tril_()
        block.add_(block.tril(-1).mT)
    return product


def _rough_mean(x: Tensor) -> Tensor:
    """The mean of a sample of s rows of x (n, d).

    It is less than sqrt(n / s) standard deviations from the mean of all rows, because the squares of s deviations sum
    to no more than those of all n. A sum of squares around it therefore loses only n / s roundings.
    """
    return x[:: -(-x.shape[0] // _SAMPLE)].mean(0, dtype=torch.float64)


def _column_sums(parts: Iterator[Tensor]) -> Tensor:
    total = None
    for part in parts:
        total = part.sum(0) if total is None else total.add_(part.sum(0))
    assert total is not None
    return total
