"""Proved bounds on Tr((AB)^(1/2)) of large matrices on a CPU, from log determinants of the standard form plus shifts.

The theorem and its sources are in this folder's README, section "Bounds of large matrices". It costs one Cholesky
factor per quadrature node, d^3 / 3 each, and no eigenvectors. If the matrices are too close to singular to prove the
requested width, the result is None, and `certificate` is used instead.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mir_kernels.ops.frechet import native
from mir_kernels.ops.frechet.band_reduction import RootSums, nodes
from mir_kernels.ops.sqrtm.factor import UNIT
from mir_kernels.ops.sqrtm.rounding import MARGIN, gamma

_LEAST = 2.0**-900  # smallest largest entry: halving a diagonal entry is exact far above it


def form_error(a: Tensor, b: Tensor, exponent: float) -> float:
    """An upper bound of the shift of the eigenvalues of A B by rounding in the standard form: root of sum of squares.

    a, b: symmetric float64 (d, d) on the CPU, as passed to `native.standard_form`; exponent: as it returned. With C_i
    the rows of C and T the lower triangle of A with half its diagonal, two errors add up:
    |B - C C^T|_ij <= gamma |C_i| |C_j| contributes gamma |C|_F^2 |A|_F, and |m - C^T A C|_F <= 4 gamma |C|_F^2 |T|_F,
    where |T|_F <= |A|_F / sqrt(2) and |C|_F^2 <= (1 + 2 gamma) Tr B.
    """
    g = gamma(native.roundings(a.shape[-1]))
    largest, trace = torch.linalg.vector_norm(a, math.inf).item(), b.trace().item()
    if not (_LEAST <= largest < math.inf and 0 <= trace < math.inf):
        return math.inf
    power_a = math.frexp(largest)[1]
    mantissa_a = torch.linalg.vector_norm(a * 2.0**-power_a).item()  # squares of the entries may leave the range
    mantissa_b, power_b = math.frexp(trace)
    power = power_a + power_b - 2 * int(exponent)
    if power > 900:
        return math.inf
    both = math.ldexp(mantissa_a * mantissa_b, power)
    return g * (1 + 2 * math.sqrt(2) * (1 + g)) * (1 + 2 * g) * both * (1 + gamma(a.numel())) * MARGIN


def root_bounds(
    m: Tensor, d: int, moved: float, sums: RootSums, tolerance: float, widest: float
) -> tuple[float, float] | None:
    """lower <= sum of the roots of l_1 to l_d <= upper, or None if that cannot be proved.

    upper - lower is about tolerance * upper, or wider if `moved` requires it, up to widest * upper.
    m: (n, n) float64 as returned by `native.standard_form`. The l_i differ from its eigenvalues by perturbations with a
    sum of squares of at most moved^2. sums: estimates of the sums to be proved. 1e-8 <= tolerance <= widest <= 1e-2:
    the nodes are rounded, and one hundredth of the quadrature's error is reserved for all other errors.
    """
    if not (0 <= moved < math.inf and 0 < sums.total < math.inf and 0 < sums.inverse < math.inf):
        return None
    largest = torch.linalg.vector_norm(m).item() * (1 + gamma(m.numel()))
    # No eigenvalue is below `least`; a factor of m - lowest must prove it.
    lowest = 0.9 * sums.least
    least = 0.9 * lowest
    # Below 1e-13 of `largest` the rounding of the nodes would matter; no eigenvalue exceeds `largest`.
    if not (0 < 1e-13 * largest <= least <= largest and moved <= 0.99 * least):
        return None
    slope_of_roots = MARGIN / (1 + math.sqrt(1 - moved / least))
    rounded = 2.4 * slope_of_roots * moved * math.sqrt(sums.inverse) / sums.total
    width = min(max(tolerance, 2 * rounded), widest)
    if not rounded <= 0.875 * width:  # already too wide, before any factorization
        return None
    quadrature = (width - rounded) / 4.2  # which widens the interval by four times its error
    shifts, weights = nodes(least, largest, quadrature)
    shifts, order = shifts.sort()
    weights = weights[order] / 2
    centre = min(max(min(sums.total / d, math.sqrt(largest)) ** 2, least), largest)
    known = _log_determinants(m, d, lowest, shifts, centre, least)
    if known is None:
        return None
    found, errors, inverse = known
    terms = [w * f for w, f in zip(weights.tolist(), found, strict=True)]
    middle = d * math.sqrt(centre) + math.fsum(terms)
    slack = (
        quadrature * (1.01 * middle + d * math.sqrt(centre))
        + math.fsum(w * e for w, e in zip(weights.tolist(), errors, strict=True))
        + slope_of_roots * moved * math.sqrt(inverse)
        + gamma(8) * (d * math.sqrt(centre) + math.fsum(map(abs, terms)))
    ) * MARGIN
    lower, upper = middle - slack, middle + slack
    return (lower, upper) if upper - lower <= widest * upper else None


def _log_determinants(
    m: Tensor, d: int, lowest: float, shifts: Tensor, centre: float, least: float
) -> tuple[list[float], list[float], float] | None:
    """log det((m + s) / (centre + s)) for each ascending shift, their error bounds, and an upper bound of the sum of
    1/l over the eigenvalues l of m. None if it is not proved that all l are at least `least` < lowest.
    """
    at = [-lowest, *shifts.tolist()]
    pivots, size, spectral = native.shifted_factors(m, d, shifts.new_tensor(at))
    if bool(size.isnan().any()):
        return None
    # L L^T = m + s + E with |E| <= gamma |L| |L^T|.
    backward = (gamma(native.roundings(d)) * size * torch.minimum(size, spectral) * MARGIN).tolist()
    if not lowest - backward[0] >= least:
        return None
    shares = [0.0] + [e / (least + s) for e, s in zip(backward[1:], at[1:], strict=True)]
    if not max(shares) <= 0.25:
        return None
    references = [centre + max(s, 0.0) for s in at]
    logs = (pivots.square() / shifts.new_tensor(references)[:, None]).log()
    found, sizes = logs.sum(-1).tolist(), logs.abs().sum(-1).tolist()
    # Rounding of the logarithms and of their sum; then E, at first as if all eigenvalues were as small as the smallest.
    summed = [(4 * UNIT * d + gamma(d + 8) * size) * MARGIN for size in sizes]
    errors = [n + share * math.sqrt(d) / (1 - share) * MARGIN for n, share in zip(summed, shares, strict=True)]
    # A log determinant is concave in its shift: the trace of (m + s)^-1 is at most the slope up to s. The first one
    # computed is at most that of m - lowest + backward[0], because E is at most backward[0].
    traces, before = [], backward[0] - lowest
    for j in range(1, len(at)):
        further = d * math.log1p((at[j] - max(at[j - 1], 0.0)) / references[j - 1])
        change = found[j] - found[j - 1] + errors[j] + errors[j - 1] + further * MARGIN
        traces.append(change / (at[j] - before) * MARGIN)
        before = at[j]
    errors = [
        n + e * math.sqrt(trace / (least + s)) / (1 - share) * MARGIN
        for n, e, trace, s, share in zip(summed[1:], backward[1:], traces, at[1:], shares[1:], strict=True)
    ]
    inverse = (1 + at[1] / least) * traces[0] * MARGIN  # 1/l <= (1 + s / least) / (l + s)
    return found[1:], errors, inverse
