"""Standard errors of MIR over the choice of samples (delete-a-group jackknife), and how values are printed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from decimal import ROUND_CEILING, Context, Decimal
from typing import Any, Protocol

ROUNDING = 1e-12  # a smaller error is float64 rounding, as from identical groups of samples
NONE = "no standard error"


class Measured(Protocol):
    """The fields that statements about accuracy read: a `MIRResult`."""

    notes: list[str]
    settings: dict[str, Any]

    @property
    def groups(self) -> int:
        """The number of groups of samples behind the error; 0 if there is none."""

    @property
    def value(self) -> float:
        """MIR."""

    @property
    def error(self) -> float | None:
        """Its standard error; None without one."""

    @property
    def lower(self) -> float | None:
        """Certified lower bound of the arithmetic; None without bounds."""

    @property
    def upper(self) -> float | None:
        """Certified upper bound of the arithmetic; None without bounds."""


def jackknife(left_out: Sequence[float]) -> float:
    """The standard error of a statistic from its G values, each with one of G groups of samples left out.

    sqrt((G - 1) / G sum_g (x_g - mean)^2), the delete-a-group jackknife (Kott, The delete-a-group jackknife, Journal of
    Official Statistics, 2001), for groups of about the same size.
    """
    count = len(left_out)
    mean = math.fsum(left_out) / count
    return math.sqrt((count - 1) / count * math.fsum((value - mean) ** 2 for value in left_out))


def finite_jackknife(values: Sequence[float]) -> float | None:
    """`jackknife`, or None if there are fewer than two values or one is not finite."""
    return jackknife(values) if len(values) > 1 and all(map(math.isfinite, values)) else None


def tells(error: float | None) -> bool:
    """Whether an error is meaningful, that is, finite and larger than rounding."""
    return error is not None and ROUNDING < error < math.inf


def counted(number: int, what: str) -> str:
    """`1 note`, `2 notes`."""
    return f"{number} {what}{'s' * (number != 1)}"


def with_error(value: float, error: float | None, places: int = 4, sign: str = "+-") -> str:
    """A value of MIR for display: `3.3740`, or `3.3740 +- 0.0021` with a meaningful standard error.

    Both have `places` decimals; an error too small for that is printed with two significant digits.
    """
    text = f"{value:.{places}f}"
    return f"{text} {sign} {error_cell(error, places)}" if tells(error) else text


def error_cell(error: float | None, places: int = 4) -> str:
    """The error as printed by `with_error`; empty if it is not meaningful."""
    if error is None or not tells(error):
        return ""
    return f"{error:.{places}f}" if error >= 10.0**-places else f"{error:.1e}"


def why_no_error(result: Measured) -> str | None:
    """Why a result has no meaningful standard error, in a few words; "" if unknown, None if it has one.

    If a note starts with "no standard error: ", the reason is its text up to the first semicolon.
    """
    if tells(result.error):
        return None
    for note in result.notes:
        if note.startswith(f"{NONE}: "):
            return note.removeprefix(f"{NONE}: ").partition(";")[0]
    if not result.groups:
        return "groups 0" if result.settings.get("groups") == 0 else ""
    if result.groups < 2:
        return "one group of samples"
    return (
        "MIR is not finite with one group of samples left out"
        if result.error is None
        else "all groups of samples are identical"
    )


def missing_error(result: Measured) -> str:
    """`no standard error: 1 image for 40 samples`, to print next to the value; empty if there is an error."""
    why = why_no_error(result)
    return "" if why is None else f"{NONE}: {why}" if why else NONE


def arithmetic(result: Measured) -> str | None:
    """`arithmetic exact to 1.7e-07`: the largest possible distance from the exact value for the same inputs, rounded up
    to two digits; None without bounds. It covers neither other samples nor the computation of the model and its inputs.
    """
    lower, upper, value = result.lower, result.upper, result.value
    if lower is None or upper is None:
        return None
    if lower == value == upper:
        return "arithmetic exact"
    off = max(value - lower, upper - value)
    if not math.isfinite(off):
        return f"arithmetic exact to no digit: at most {upper:.6g}" if math.isfinite(upper) else "arithmetic overflowed"
    return f"arithmetic exact to {float(Context(2, ROUND_CEILING).create_decimal(Decimal(off))):.1e}"


def chance(z: float, degrees: int) -> float:
    """Two-sided tail probability of Student's t beyond z, with `degrees` degrees of freedom (Abramowitz and Stegun,
    26.7.3 and 26.7.4).
    """
    angle = math.atan(abs(z) / math.sqrt(degrees))
    cosine = math.cos(angle)
    odd = degrees % 2
    term = total = cosine if odd else 1.0
    for k in range(2 + odd, degrees - 1 + odd, 2):
        term *= cosine**2 * (k - 1) / k
        total += term
    within = math.sin(angle) * total
    if odd:
        within = 2.0 / math.pi * (angle + within * (degrees > 1))
    return max(1.0 - within, 0.0)
