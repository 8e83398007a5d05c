"""Standard errors of MIR over the choice of samples: the delete-a-group jackknife."""

from __future__ import annotations

import math
from collections.abc import Sequence


def jackknife(left_out: Sequence[float]) -> float:
    """The standard error of a statistic from its G values with one of G groups of samples left out each.

    sqrt((G - 1) / G sum_g (x_g - mean)^2), the delete-a-group jackknife (Kott, The delete-a-group jackknife, Journal of
    Official Statistics, 2001), for groups of about the same size.
    """
    count = len(left_out)
    mean = math.fsum(left_out) / count
    return math.sqrt((count - 1) / count * math.fsum((value - mean) ** 2 for value in left_out))


def finite_jackknife(values: Sequence[float]) -> float | None:
    """`jackknife`, None where there are no values or one is not finite."""
    return jackknife(values) if values and all(map(math.isfinite, values)) else None


def with_error(value: float, error: float | None) -> str:
    """A value of MIR for people: `3.3740`, or `3.3740 +- 0.0021` with its standard error."""
    if error is None:
        return f"{value:.4f}"
    return f"{value:.4f} +- " + (f"{error:.4f}" if error >= 0.0005 or error == 0.0 else f"{error:.1e}")
