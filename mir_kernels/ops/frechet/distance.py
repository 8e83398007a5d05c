"""The squared Frechet distance of two Gaussians: separate terms of means and covariances, so that neither rounds the
other.

|mean_x - mean_y|^2 + Tr(A + B - 2 (AB)^(1/2)): the second term is a distance of the covariances and never negative. Its
cancellation error, u times the traces, may be far larger than the first term, so the two are added last.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mir_kernels._symmetry import symmetrize
from mir_kernels.ops.frechet import launch
from mir_kernels.ops.frechet.centring import Centred
from mir_kernels.ops.frechet.certificate import outward
from mir_kernels.ops.sqrtm import factor, float64
from mir_kernels.ops.sqrtm.factor import UNIT
from mir_kernels.ops.sqrtm.rounding import FLOOR, MARGIN, at_least, gamma


class Marginals(NamedTuple):
    """Means and standard deviations of coordinates (..., d), all times 2^-exponent (...).

    The means are coarse + fine, each to within mean_error; the standard deviations lie between `lower` and `upper`.
    """

    exponent: Tensor
    coarse: Tensor
    fine: Tensor
    mean_error: Tensor
    lower: Tensor
    upper: Tensor


class Term(NamedTuple):
    """lower <= truth <= upper, and a value between them, all times 2^-exponent; float64 of the batch's shape."""

    value: Tensor
    lower: Tensor
    upper: Tensor
    exponent: Tensor

    def unscaled(self) -> tuple[Tensor, Tensor, Tensor]:
        """Value, lower and upper end; the ends stay valid outside float64's range."""
        return (
            float64.times_power(self.value, self.exponent),
            outward(self.lower, self.exponent, -1),
            outward(self.upper, self.exponent, 1),
        )


def marginals_of(centred: Centred) -> Marginals:
    """The marginals of features."""
    root = (centred.rows - 1) ** 0.5
    least = centred.norm * (1 - centred.rounding) - centred.error
    most = centred.norm * (1 + centred.rounding) + centred.error
    return Marginals(*centred[1:5], least.clamp(min=0.0) / root * (1 - 8 * UNIT), most / root * (1 + 8 * UNIT))


def exact_marginals(mean: Tensor, variance: Tensor) -> Marginals:
    """The marginals of exactly known float64 means and variances (..., d)."""
    zero, deviation = torch.zeros_like(mean), variance.clamp(min=0.0).sqrt()
    ends = (torch.nextafter(deviation, zero), torch.nextafter(deviation, torch.full_like(zero, torch.inf)))
    return Marginals(zero[..., 0], mean, zero, zero, *ends)


def mean_term(x: Marginals, y: Marginals) -> Term:
    """|mean_x - mean_y|^2."""
    exponent = torch.maximum(x.exponent, y.exponent) + 4  # so that no sum leaves the range
    ours, other = ((one.exponent - exponent)[..., None] for one in (x, y))
    coarse = float64.times_power(x.coarse, ours) - float64.times_power(y.coarse, other)
    fine = float64.times_power(x.fine, ours) - float64.times_power(y.fine, other)
    difference = coarse + fine
    known = float64.times_power(x.mean_error, ours) + float64.times_power(y.mean_error, other)
    rounded = UNIT * (coarse.abs() + fine.abs() + difference.abs())
    term = _sum_of_squares(difference, (known + rounded) * MARGIN + FLOOR)
    return term._replace(exponent=term.exponent + 2 * exponent)


def deviation_term(x: Marginals, y: Marginals) -> Term:
    """sum_i (a_ii^(1/2) - b_ii^(1/2))^2, a lower bound of Tr(A + B - 2 (AB)^(1/2)) for semi-definite A, B.

    That trace is the least E|X - Y|^2 over all X and Y, correlated in any way, with these covariances (Dowson and
    Landau, 1982), and E(X_i - Y_i)^2 is at least (a_ii^(1/2) - b_ii^(1/2))^2 in every coordinate.
    """
    exponent = torch.maximum(x.exponent, y.exponent)
    ours, other = ((one.exponent - exponent)[..., None] for one in (x, y))
    lower = [outward(end, power, -1) for end, power in ((x.lower, ours), (y.lower, other))]
    upper = [outward(end, power, 1) for end, power in ((x.upper, ours), (y.upper, other))]
    middles = [below / 2 + above / 2 for below, above in zip(lower, upper, strict=True)]
    difference = middles[0] - middles[1]
    halves = sum((above - below) / 2 for below, above in zip(lower, upper, strict=True))
    term = _sum_of_squares(difference, (halves + 4 * UNIT * (middles[0] + middles[1])) * MARGIN)
    return term._replace(exponent=term.exponent + 2 * exponent)


def trace_term(x: Marginals) -> Term:
    """The trace of the covariance: the sum of the squared standard deviations."""
    middle = x.lower / 2 + x.upper / 2
    term = _sum_of_squares(middle, ((x.upper - x.lower) / 2 + 4 * UNIT * middle) * MARGIN)
    return term._replace(exponent=term.exponent + 2 * x.exponent)


def largest_root(x: Marginals, y: Marginals) -> tuple[Tensor, Tensor]:
    """An upper bound of Tr((AB)^(1/2)) for semi-definite A and B from their diagonals, and its separate exponent."""
    d = x.upper.shape[-1]
    return (x.upper * y.upper).sum(-1) * (1 + gamma(d + 8)) + FLOOR, x.exponent + y.exponent


def frechet(
    mean_x: Tensor, cov_x: Tensor, mean_y: Tensor, cov_y: Tensor, precision: str, bounds: bool, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    """The distance of means (..., d) and covariances (..., d, d) in float64, with its ends if `bounds`, else empty.

    Leading axes broadcast. The value is at least |mean_x - mean_y|^2, and equal to it for equal covariances, because
    (A A)^(1/2) = A. If rounding made matrices indefinite, the bounds refer to their positive parts, as in
    `launch.trace_sqrt_product`.
    """
    means = torch.broadcast_shapes(mean_x.shape, mean_y.shape, (*launch.batch_of(cov_x, cov_y), cov_x.shape[-1]))
    diagonals = [cov.diagonal(dim1=-2, dim2=-1).double().expand(means) for cov in (cov_x, cov_y)]
    x, y = (exact_marginals(m.double().expand(means), v) for m, v in zip((mean_x, mean_y), diagonals, strict=True))
    mean, mean_lower, mean_upper = mean_term(x, y).unscaled()
    equal = (cov_x == cov_y).all(-1).all(-1).expand(means[:-1])
    if not bounds and bool(equal.all()):
        return mean, mean.new_empty(0), mean.new_empty(0)
    found = launch.trace_sqrt_product(cov_x, cov_y, precision, bounds, backend)
    root, lower, upper = (one.expand(means[:-1]) if bounds or one is found[0] else one for one in found)
    exponent = torch.frexp(torch.maximum(*(v.abs().amax(-1) for v in diagonals))).exponent.double()
    scaled = [float64.times_power(v, -exponent[..., None]) for v in diagonals]
    traces = scaled[0].sum(-1) + scaled[1].sum(-1)
    part = (traces - 2 * float64.times_power(root, -exponent)).clamp(min=0.0).masked_fill(equal, 0.0)
    value = mean + float64.times_power(part, exponent)
    if not bounds:
        return value, lower, upper
    upper, lower = (float64.times_power(end, -exponent) for end in (upper, lower))
    sizes, g = scaled[0].abs().sum(-1) + scaled[1].abs().sum(-1), gamma(2 * cov_x.shape[-1] + 16)
    excess = [float64.times_power(_negative_parts(cov), -exponent) for cov in (cov_x, cov_y)]
    indefinite = (excess[0] + excess[1]) * MARGIN
    least = outward(traces - 2 * upper - g * (sizes + 2 * upper) - FLOOR, exponent, -1)
    most = outward(traces - 2 * lower + g * (sizes + 2 * lower) + indefinite + FLOOR, exponent, 1)
    least = torch.maximum(least, deviation_term(x, y).unscaled()[1].masked_fill(indefinite > 0, 0.0))
    least, most = least.masked_fill(equal, 0.0), most.masked_fill(equal, 0.0)
    infinite = torch.full_like(mean, torch.inf)
    lower = torch.nextafter(mean_lower + least, -infinite).clamp(0.0, torch.finfo(mean.dtype).max)
    lower = torch.maximum(lower, mean_lower)
    upper = torch.nextafter(mean_upper + most, infinite)
    return value.clamp(lower, upper), lower, upper


def _negative_parts(covariance: Tensor) -> Tensor:
    """`negative_part` of covariances (..., d, d), any dtype, symmetric to rounding."""
    d = covariance.shape[-1]
    flat = covariance.reshape(-1, d, d)
    parts = [negative_part(symmetrize(part)) for part in flat.split(max(1, launch.CHUNK // (d * d)))]
    return torch.cat(parts).reshape(covariance.shape[:-2]) if parts else flat.new_zeros(covariance.shape[:-2])


def negative_part(a: Tensor) -> Tensor:
    """An upper bound of Tr A+ - Tr A for symmetric float64 A (batch, d, d), A+ as in `certificate`; 0 where A is proved
    semi-definite.
    """
    d = a.shape[-1]
    h, scale, exponent = factor.equilibrate(a)
    # Gershgorin: no eigenvalue of H is below -beside. Usually they are negative only by rounding: try smaller shifts.
    beside = (h.abs().sum(-1) - 2 * h.diagonal(dim1=-2, dim2=-1)).amax(-1).clamp(min=0.0)
    below, unknown = beside * (1 + gamma(d + 8)), torch.ones_like(beside, dtype=torch.bool)
    for shift in (0.0, 16 * d * UNIT, 1e-12 * d, 1e-9 * d, 1e-6 * d):
        shifted = h.clone()
        shifted.diagonal(dim1=-2, dim2=-1).add_(shift)
        proved = unknown & at_least(shifted, torch.full_like(below, 8 * UNIT if shift else 0.0))
        below, unknown = torch.where(proved, shift, below), unknown & ~proved
        if not bool(unknown.any()):
            break
    dropped = (-a.diagonal(dim1=-2, dim2=-1)).clamp(min=0.0).sum(-1)
    return float64.times_power(below * scale.square().sum(-1), 2 * exponent) * MARGIN + dropped * MARGIN


def _sum_of_squares(v: Tensor, error: Tensor) -> Term:
    """Bounds of |v + e|^2 for vectors v (..., d) and every |e_i| <= error_i."""
    d = v.shape[-1]
    exponent = torch.frexp((v.abs() + error).amax(-1)).exponent.double()
    v, error = (float64.times_power(one, -exponent[..., None]) for one in (v, error))
    error = error * (1 + 4 * UNIT) + FLOOR
    value = v.square().sum(-1)
    lower = (v.abs() - error).clamp(min=0.0).square().sum(-1) * (1 - gamma(d + 8))
    upper = (v.abs() + error).square().sum(-1) * (1 + gamma(d + 8)) + FLOOR
    return Term(value, lower.clamp(max=value), upper.clamp(min=value), 2 * exponent)
