"""Tr((Sx Sy)^(1/2)) and the distance from features; with few rows, no covariance is formed."""

from __future__ import annotations

import torch
from torch import Tensor

from mir_kernels.ops.frechet import certificate, launch
from mir_kernels.ops.frechet.centring import Centred, centre, covariance, variances, widened
from mir_kernels.ops.frechet.distance import deviation_term, marginals_of, mean_term, trace_term
from mir_kernels.ops.frechet.report import warn_if_missed
from mir_kernels.ops.sqrtm import factor, rounding

_FLOOR = 2.0**-960  # more than a sum of products can lose to underflow, also where subnormal numbers are flushed


def trace_sqrt(
    x: Tensor, y: Tensor, precision: str, bounds: bool, backend: str
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The value and, with `bounds`, its lower and upper end, for features x (n, d), y (m, d) with n, m >= 2."""
    tall = min(x.shape[0], y.shape[0]) > x.shape[1]
    if bounds:
        take = _tall_bounds if tall else _short_bounds
        value, lower, upper, exponent = take(x, y, precision, backend)
        lower, upper = certificate.outward(lower, exponent, -1), certificate.outward(upper, exponent, 1)
        return (value * torch.exp2(exponent)).clamp(lower, upper), lower, upper
    if tall:
        (cov_x, exponent_x), (cov_y, exponent_y) = _covariance(x), _covariance(y)
        value = launch.trace_sqrt_product(cov_x, cov_y, precision, False, backend)[0]
        return value * torch.exp2(exponent_x + exponent_y), None, None
    (cx, exponent_x), (cy, exponent_y) = _centred(x), _centred(y)
    power = torch.exp2(exponent_x + exponent_y) / ((x.shape[0] - 1) * (y.shape[0] - 1)) ** 0.5
    cx, cy = (c if c.shape[0] <= c.shape[1] else torch.linalg.qr(c, mode="r").R for c in (cx, cy))
    norms, gap = launch.solver(backend).nuclear_norm(_product(cx, cy), precision, backend)
    warn_if_missed("trace_sqrt_from_features", gap, precision)
    return norms[0] * power, None, None


def distance(
    x: Tensor, y: Tensor, precision: str, bounds: bool, backend: str
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """|mean_x - mean_y|^2 + Tr(Sx + Sy) - 2 Tr((Sx Sy)^(1/2)) and, with `bounds`, its ends; features as above.

    The covariance term is itself a squared distance: at least 0 and at least `deviation_term`.
    """
    (coarse_x, fine_x, variance_x), (coarse_y, fine_y, variance_y) = variances(x), variances(y)
    mean = ((coarse_x - coarse_y) + (fine_x - fine_y)).square().sum()
    root, root_lower, root_upper = trace_sqrt(x, y, precision, bounds, backend)
    apart = (variance_x.sqrt() - variance_y.sqrt()).square().sum()
    added = torch.maximum((variance_x.sum() + variance_y.sum()) - 2 * root, apart)
    # NaN is a difference of values beyond float64's range.
    value = mean if torch.equal(x, y) else (mean + added).nan_to_num(nan=torch.inf, posinf=torch.inf)
    if root_lower is None or root_upper is None:
        return value, None, None
    sides = marginals_of(centre(x)), marginals_of(centre(y))
    traces = [trace_term(side).unscaled() for side in sides]
    least = _down(_down(traces[0][1] + traces[1][1]) - 2 * root_upper)
    least = torch.maximum(least.nan_to_num(nan=0.0), deviation_term(*sides).unscaled()[1])
    most = _up(_up(traces[0][2] + traces[1][2]) - 2 * root_lower).clamp(min=0.0)
    _, mean_lower, mean_upper = mean_term(*sides).unscaled()
    lower = torch.maximum(_down(mean_lower + least).clamp(max=torch.finfo(value.dtype).max), mean_lower)
    upper = _up(mean_upper + most).nan_to_num(nan=torch.inf, posinf=torch.inf)
    if torch.equal(x, y):
        lower, upper = torch.zeros_like(lower), torch.zeros_like(upper)
    return value.clamp(lower, upper), lower, upper


def _down(end: Tensor) -> Tensor:
    return torch.nextafter(end, torch.full_like(end, -torch.inf))


def _up(end: Tensor) -> Tensor:
    return torch.nextafter(end, torch.full_like(end, torch.inf))


def _tall_bounds(x: Tensor, y: Tensor, precision: str, backend: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Value, lower and upper end and their exponent, by covariances."""
    sx, sy = (covariance(one, centre(one)) for one in (x, y))
    value, lower, upper = launch.trace_sqrt_product(sx.matrix, sy.matrix, precision, True, backend)
    return value, *widened(lower, upper, sx, sy), sx.exponent + sy.exponent


def _short_bounds(x: Tensor, y: Tensor, precision: str, backend: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Value, lower and upper end and their exponent, by the singular values of Zx Zy^T, Z the deviations."""
    known_x, known_y = centre(x), centre(y)
    zx, zy = (torch.cat(list(known.deviations(f, len(f)))) for known, f in ((known_x, x), (known_y, y)))
    n, solver = _product(zx, zy), launch.solver(backend)
    norms, gap = solver.nuclear_norm(n, precision, backend)
    warn_if_missed("trace_sqrt_from_features", gap, precision)
    witness = solver.witness(precision, backend)(n)
    slack = _apart(known_x, known_y)
    degrees = ((x.shape[0] - 1) * (y.shape[0] - 1)) ** 0.5
    lower = (certificate.nuclear_lower(n, witness)[0] - slack).clamp(min=0.0) / degrees * (1 - 8 * factor.UNIT)
    upper = (certificate.nuclear_upper(n, witness)[0] + slack) / degrees * (1 + 8 * factor.UNIT)
    return norms[0] / degrees, lower, upper, known_x.exponent + known_y.exponent


def _apart(x: Centred, y: Centred) -> Tensor:
    """An upper bound of the error in the nuclear norm from centring and from the computed product of Zx and Zy^T.

    Centring: products of columns, one of each pair being an error. Product: each entry rounds by gamma_d times the
    product of absolute values, which is a sum of d matrices of Frobenius norm |Zx_j| |Zy_j|.
    """
    length_x, length_y = (one.norm * (1 + one.rounding) for one in (x, y))
    centring = x.error * (length_y + y.error) + length_x * y.error
    product = (rounding.gamma(len(x.norm) + 4) * min(x.rows, y.rows) ** 0.5) * (length_x * length_y)
    return (centring + product).sum() * rounding.MARGIN + _FLOOR


def _product(x: Tensor, y: Tensor) -> Tensor:
    """X Y^T or its transpose, (1, k, l) with k >= l."""
    return (x @ y.mT if x.shape[0] >= y.shape[0] else y @ x.mT)[None]


def _centred(x: Tensor) -> tuple[Tensor, Tensor]:
    """Features minus their mean in float64, divided by 2^exponent so that squares neither over- nor underflow."""
    x = x.double()
    size = x.abs().amax()
    exponent = torch.where(size > 0, torch.frexp(size).exponent.double(), 0.0)
    centred = x * torch.exp2(-exponent)
    centred = centred - centred.mean(0)
    # Twice: the first mean rounds relative to the mean, the second relative to the deviations.
    return centred - centred.mean(0), exponent


def _covariance(x: Tensor) -> tuple[Tensor, Tensor]:
    centred, exponent = _centred(x)
    return factor.gram(centred) / (x.shape[0] - 1), exponent
