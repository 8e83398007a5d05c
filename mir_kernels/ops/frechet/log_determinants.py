"""Proved bounds on Tr((AB)^(1/2)) of large matrices on a CPU, from log determinants of the standard form plus shifts.

The theorem and its sources are in this folder's README, section "Bounds of large matrices". It costs a Cholesky factor
for each node of a quadrature, a third of d^3 each, and no eigenvector; where the matrices are too close to singular to
prove what was asked for, it says so, and `certificate` takes over.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mir_kernels.ops.frechet import native
from mir_kernels.ops.frechet.band_reduction import RootSums, nodes
from mir_kernels.ops.sqrtm.factor import UNIT
from mir_kernels.ops.sqrtm.rounding import gamma

_LEAST = 2.0**-900  # of entries: half a diagonal entry is exact far above it
_MARGIN = 1 + 1e-6  # for the roundings in bounds of errors, which are sums of positive numbers


def form_error(a: Tensor, b: Tensor, exponent: float) -> float:
    """At least what rounding moves the eigenvalues of A B by in the standard form: the root of the sum of squares.

    a, b: symmetric float64 (d, d) on the CPU, as `native.standard_form` took them; exponent: what it gave. Two errors
    of one form each, with C_i the rows of C and T the lower triangle of A with half its diagonal:
    |B - C C^T|_ij <= gamma |C_i| |C_j| is worth gamma |C|_F^2 |A|_F, and |m - C^T A C|_F <= 4 gamma |C|_F^2 |T|_F,
    where |T|_F <= |A|_F / sqrt(2) and |C|_F^2 <= (1 + 2 gamma) Tr B.
    """
    g = gamma(native.roundings(a.shape[-1]))
    largest, trace = torch.linalg.vector_norm(a, math.inf).item(), b.trace().item()
    if not (_LEAST <= largest < math.inf and math.isfinite(trace)):
        return math.inf
    power_a = math.frexp(largest)[1]
    mantissa_a = torch.linalg.vector_norm(a * 2.0**-power_a).item()  # squares of the entries may leave the range
    mantissa_b, power_b = math.frexp(trace)
    both = math.ldexp(mantissa_a * mantissa_b, power_a + power_b - 2 * int(exponent))
    return g * (1 + 2 * math.sqrt(2) * (1 + g)) * (1 + 2 * g) * both * (1 + gamma(a.numel())) * _MARGIN


def root_bounds(m: Tensor, d: int, moved: float, sums: RootSums, tolerance: float) -> tuple[float, float] | None:
    """lower <= sum of the roots of l_1 to l_d <= upper, upper - lower <= tolerance * upper; None where not proved.

    m: (n, n) float64 as `native.standard_form` makes it. The l_i are what its eigenvalues are up to perturbations with
    a sum of squares of at most moved^2. sums: estimates of what is to be proved.
    """
    if not (math.isfinite(moved) and math.isfinite(sums.total) and 0 < sums.inverse < math.inf):
        return None
    if not 1.08 * moved * math.sqrt(sums.inverse) <= tolerance * sums.total:  # wide before anything is factored
        return None
    largest = torch.linalg.vector_norm(m).item() * (1 + gamma(m.numel()))
    # Below half of 1 / (sum of 1/l) there is no eigenvalue: to be proved by a factor of m less that.
    lowest = 0.5 / sums.inverse
    if not 0.9 * lowest >= 1e-13 * largest:  # below, the rounding of the nodes counts
        return None
    least, quadrature = 0.9 * lowest, tolerance / (6 if tolerance > 1e-7 else 20)
    shifts, weights = nodes(least, largest, quadrature)
    shifts, order = shifts.sort()
    weights = weights[order] / 2
    centre = min(max((sums.total / d) ** 2, least), largest)
    pivots, size, spectral = native.shifted_factors(m, d, torch.cat((shifts.new_tensor([-lowest]), shifts)))
    if bool(size.isnan().any()):
        return None
    # L L^T = m + s + E with |E| <= gamma |L| |L^T|.
    backward = (gamma(native.roundings(d)) * size * torch.minimum(size, spectral) * _MARGIN).tolist()
    if not lowest - backward[0] >= least:
        return None
    pivots, backward = pivots[1:], backward[1:]
    logs = (pivots.square() / (centre + shifts)[:, None]).log()
    sizes = logs.abs().sum(-1).tolist()
    found, at = logs.sum(-1).tolist(), shifts.tolist()
    errors = []
    for e, s, total in zip(backward, at, sizes, strict=True):
        share = e / (least + s)
        if not share <= 0.25:
            return None
        # A trace norm of (m + s)^(-1/2) E (m + s)^(-1/2), then the roundings of the logarithms and of their sum.
        errors.append((share * math.sqrt(d) / (1 - share) + 4 * UNIT * d + gamma(d + 8) * total) * _MARGIN)
    # sum 1/l <= (1 + s / least) sum 1/(l + s), and a log determinant is concave in its shift.
    slope = (found[1] - found[0] + errors[0] + errors[1] + d * _log_ratio(centre, at)) / (at[1] - at[0])
    inverse = (1 + at[1] / least) * slope * _MARGIN
    if not 4 * moved * inverse <= 1:
        return None
    terms = [w * f for w, f in zip(weights.tolist(), found, strict=True)]
    middle = d * math.sqrt(centre) + math.fsum(terms)
    slack = (
        quadrature * (1.01 * middle + d * math.sqrt(centre))
        + math.fsum(w * e for w, e in zip(weights.tolist(), errors, strict=True))
        + 0.54 * moved * math.sqrt(inverse)
        + gamma(8) * (d * math.sqrt(centre) + math.fsum(map(abs, terms)))
    ) * _MARGIN
    lower, upper = middle - slack, middle + slack
    return (lower, upper) if upper - lower <= tolerance * upper else None


def _log_ratio(centre: float, shifts: list[float]) -> float:
    """What a logarithm over centre + s loses from the first shift to the second, an upper end."""
    return math.log1p((shifts[1] - shifts[0]) / (centre + shifts[0])) * _MARGIN
