"""Certified bounds on the terms of a layer's distance (Eq. 3).

They hold for the exact features if these are in memory, and for the accumulated means and covariances of a stream.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from torch import Tensor

from mir_kernels.ops.frechet.centring import Covariance, centre, covariance, exactly, widened
from mir_kernels.ops.frechet.distance import (
    Marginals,
    Term,
    deviation_term,
    exact_marginals,
    largest_root,
    marginals_of,
    mean_term,
    negative_part,
    trace_term,
)
from mir_kernels.ops.sqrtm import float64
from mir_kernels.ops.sqrtm.rounding import MARGIN, gamma
from modality_integration.metric.result import LayerTerms

_LARGEST_ALPHA = 2.0**400  # above it, squares of tokens may have underflowed in their norms


class ProvedSide(NamedTuple):
    """One modality: its means and deviations, and its covariance unless there are few tokens, all with bounds.

    accumulated: they come from a stream, whose covariance may be indefinite by rounding.
    """

    marginals: Marginals
    covariance: Covariance | None
    accumulated: bool


class ProvedRoot(NamedTuple):
    """Tr((Sigma_v Sigma_t)^(1/2)): lower 2^exponent <= root <= upper 2^exponent."""

    value: float
    lower: float
    upper: float
    exponent: float


class Scale(NamedTuple):
    """Bounds on alpha (Eq. 2)."""

    least: float
    most: float


def of_features(features: Tensor, short: bool) -> ProvedSide:
    """Bounds for features. short: omit the covariance."""
    centred = centre(features)
    return ProvedSide(marginals_of(centred), None if short else covariance(features, centred), accumulated=False)


def of_moments(mean: Tensor, matrix: Tensor) -> ProvedSide:
    """Bounds for a mean (d,) and a covariance (d, d), treated as exact."""
    return ProvedSide(exact_marginals(mean, matrix.diagonal()), exactly(matrix), accumulated=True)


def means_and_variances(side: ProvedSide) -> tuple[Tensor, Tensor, Tensor]:
    """The mean as coarse + fine, and the variances at the midpoint of their bounds: (d,) each."""
    marginals = side.marginals
    coarse, fine, middle = (
        float64.times_power(entry, marginals.exponent)
        for entry in (marginals.coarse, marginals.fine, marginals.lower / 2 + marginals.upper / 2)
    )
    if side.covariance is not None and not side.accumulated:  # consistent with the root, computed from this matrix
        diagonal = side.covariance.matrix.diagonal()
        return coarse, fine, float64.times_power(diagonal, 2 * side.covariance.exponent)
    return coarse, fine, middle.square()


def scale_of(alpha: float, roundings: int | None) -> Scale:
    """Bounds on alpha, the inverse mean norm. roundings: in its sum of norms; None if alpha is 1 by definition."""
    if roundings is None:
        return Scale(alpha, alpha)
    if not alpha < _LARGEST_ALPHA:
        return Scale(0.0, math.inf)
    share = gamma(roundings + 8)
    return Scale(alpha * (1 - share), alpha * (1 + share))


def proved_root(sides: tuple[ProvedSide, ProvedSide], value: Tensor, lower: Tensor, upper: Tensor) -> ProvedRoot:
    """The certified root, from the bounds of `trace_sqrt_product` for the sides' matrices.

    If rounding made an accumulated matrix indefinite, bounds refer to its positive semi-definite part, whose trace is
    larger. The difference is subtracted from the lower bound of the root, which yields the upper bound of the distance.
    """
    vision, text = (side.covariance for side in sides)
    assert vision is not None and text is not None  # noqa: PT018
    lower, upper = widened(lower, upper, vision, text)
    for side, known in zip(sides, (vision, text), strict=True):
        if side.accumulated:
            mended = (known.matrix.diagonal() - side.marginals.lower.square()).clamp(min=0.0).sum()
            lower = lower - (negative_part(known.matrix[None])[0] + mended) / 2
    exponent = vision.exponent + text.exponent
    return ProvedRoot(float64.times_power(value, exponent).item(), lower.item(), upper.item(), exponent.item())


def prove(terms: LayerTerms, sides: tuple[ProvedSide, ProvedSide], root: ProvedRoot, scale: Scale) -> None:
    """Set the bounds in `terms` and clamp its values to them."""
    vision, text = (side.marginals for side in sides)
    mean = mean_term(vision, text)
    terms.mean_lower, terms.mean_upper = _ends(mean, scale)
    terms.mean = _between(terms.mean, terms.mean_lower, terms.mean_upper)
    traces = [_ends(trace_term(marginals), scale) for marginals in (vision, text)]
    terms.trace_vision, terms.trace_text = (
        _between(value, *ends) for value, ends in zip((terms.trace_vision, terms.trace_text), traces, strict=True)
    )
    # It is negative if it includes the larger trace of a positive semi-definite part.
    lower = _scaled(root.lower, root.exponent, scale.most if root.lower < 0 else scale.least, -math.inf)
    upper = _scaled(root.upper, root.exponent, scale.most, math.inf)
    if any(side.accumulated for side in sides):
        terms.deviations = 0.0  # accumulated covariances need not be semi-definite
    else:
        terms.deviations = _ends(deviation_term(vision, text), scale)[0]
        most, exponent = largest_root(vision, text)
        upper = min(upper, _scaled(most.item(), exponent.item(), scale.most, math.inf))
    # Fold the errors of the traces into the root's bounds: only the traces minus twice the root matter.
    below = (terms.trace_vision - traces[0][0]) + (terms.trace_text - traces[1][0])
    above = (traces[0][1] - terms.trace_vision) + (traces[1][1] - terms.trace_text)
    terms.root_lower = math.nextafter(lower - 0.5 * MARGIN * above, -math.inf)
    terms.root_upper = math.nextafter(upper + 0.5 * MARGIN * below, math.inf)
    terms.trace_root = _between(terms.trace_root, terms.root_lower, terms.root_upper)


def _between(value: float, lower: float, upper: float) -> float:
    return min(max(value, lower), upper)


def _ends(term: Term, scale: Scale) -> tuple[float, float]:
    """Bounds of a term times alpha^2."""
    lower, upper, exponent = term.lower.item(), term.upper.item(), term.exponent.item()
    return max(_scaled(lower, exponent, scale.least, -math.inf), 0.0), _scaled(upper, exponent, scale.most, math.inf)


def _scaled(entry: float, exponent: float, alpha: float, towards: float) -> float:
    """entry alpha^2 2^exponent, rounded towards -inf or inf."""
    if math.isinf(alpha):
        return math.copysign(math.inf, entry)
    mantissa, power = math.frexp(alpha)
    try:
        product = math.ldexp(entry * mantissa * mantissa, int(exponent) + 2 * power)
    except OverflowError:
        product = math.copysign(math.inf, entry)
    for _ in range(4):  # two products, and possible rounding of a subnormal result
        product = math.nextafter(product, towards)
    return product
