"""Layout of curves and intervals for inline SVG: the coordinates of every line, band, mark and tick.

The template draws them, with the colours of the page's theme and its own escaping.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple

# Width, height and margins (left, top, right, bottom) of a sheet for wide screens and paper, and of one for phones.
WIDE, NARROW = (760, 360, (64, 12, 16, 46)), (340, 300, (54, 10, 10, 44))
COLORS = 8  # in the style sheet; further curves reuse them with other marks
DECADES_BELOW = 1.0  # how far below the lowest point a band may pull a logarithmic axis


class Point(NamedTuple):
    """A measured point, the ends of its error bar if it has one, and its tooltip."""

    x: float
    y: float
    low: float | None = None
    high: float | None = None
    text: str = ""


@dataclass
class Series:
    """Points of one colour.

    style: "line", or "thin" or "dashed", which have no marks. band: draw errors as an area instead of bars.
    """

    points: Sequence[Point]
    color: int = 0
    style: str = "line"
    band: bool = True


class Tick(NamedTuple):
    """A tick: its position and its label."""

    at: float
    text: str


@dataclass
class Curve:
    """A series on a sheet: SVG path data, and marks with their tooltips."""

    color: int
    style: str
    line: str
    band: str
    bars: str
    marks: list[tuple[str, str]]


@dataclass
class Sheet:
    """A chart at one size."""

    width: int
    height: int
    left: float
    top: float
    right: float
    bottom: float
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    curves: list[Curve]


@dataclass
class Chart:
    """A chart for wide and narrow screens; text: its description for screen readers."""

    x_label: str
    y_label: str
    text: str
    wide: Sheet
    narrow: Sheet


class Axis:
    """Maps values to fractions of the axis length, 0 to 1, and chooses ticks."""

    def __init__(self, values: Iterable[float], *, log: bool = False, whole: bool = False) -> None:
        self.log, self.whole = log, whole
        placed = [self._scale(value) for value in values]
        low, high = min(placed), max(placed)
        alone = 0.05 if log else 0.5 if whole else 0.05 * abs(high) or 0.5
        # Wide enough that six-digit labels stay distinct.
        margin = max((0.04 if whole else 0.06) * (high - low), 2e-5 * max(abs(low), abs(high))) if high > low else alone
        self.low, self.high = low - margin, high + margin
        # Layers and steps have ticks only where there is data.
        self.span = (low, high) if whole and high > low else (self.low, self.high)

    def share(self, value: float) -> float:
        """The position of a value; outside 0 to 1 it lies beyond the axis."""
        if self.log and value <= 0.0:
            return -math.inf
        return (self._scale(value) - self.low) / (self.high - self.low)

    def ticks(self, most: int) -> list[Tick]:
        """About `most` ticks at round values."""
        values = self._log_ticks(most) if self.log else _round_values(*self.span, most, self.whole)
        return [Tick(self.share(value), tick_label(value)) for value in values]

    def _scale(self, value: float) -> float:
        return math.log10(value) if self.log else value

    def _log_ticks(self, most: int) -> list[float]:
        first, last = math.ceil(self.low), math.floor(self.high)
        decades = range(first, last + 1, max(1, math.ceil((last - first + 1) / most)))
        if len(decades) >= 3:
            return [10.0**k for k in decades]
        low, high = 10.0**self.low, 10.0 ** min(self.high, 308.0)
        steps = [m * 10.0**k for k in range(math.floor(self.low), last + 1) for m in (1, 2, 5)]
        inside = [value for value in steps if low <= value <= high]
        return inside if 3 <= len(inside) <= most + 2 else _round_values(low, high, most, self.whole)


def chart(
    series: Sequence[Series],
    *,
    x_label: str,
    y_label: str,
    text: str,
    log_x: bool = False,
    log_y: bool = False,
    whole_x: bool = False,
) -> Chart | None:
    """Draw the series on one pair of axes; points that are not finite, or not positive on a log axis, become gaps.

    Returns None if no point can be drawn.
    """
    placed = [point for one in series for point in one.points if _has_place(point, log_y)]
    if not placed:
        return None
    x_axis = Axis((point.x for point in placed), log=log_x, whole=whole_x)
    y_axis = Axis(_extent(placed, log_y), log=log_y)
    sheets = [_sheet(series, x_axis, y_axis, *size) for size in (WIDE, NARROW)]
    return Chart(x_label, y_label, text, *sheets)


def interval_ends(intervals: Sequence[Point]) -> list[tuple[float, float, float] | None]:
    """(low, y, high) of each interval as percentages of a common width; None where y is not finite."""
    placed = [point for point in intervals if math.isfinite(point.y)]
    if not placed:
        return [None] * len(intervals)
    axis = Axis(_extent(placed, log=False))

    def ends(point: Point) -> tuple[float, float, float]:
        low, high = (point.y if end is None else end for end in (point.low, point.high))
        return tuple(round(100.0 * axis.share(value), 2) for value in (low, point.y, high))  # type: ignore[return-value]

    return [ends(point) if math.isfinite(point.y) else None for point in intervals]


def tick_label(value: float) -> str:
    """A tick label: 0.05, 12, 1e6."""
    if value != 0.0 and not 1e-3 <= abs(value) < 1e5:
        mantissa, exponent = f"{value:.2e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    return f"{value:.6g}"


def _has_place(point: Point, log_y: bool) -> bool:
    return math.isfinite(point.y) and (not log_y or point.y > 0.0)


def _extent(points: Sequence[Point], log: bool) -> list[float]:
    """The values that a vertical axis must cover."""
    values = [point.y for point in points]
    floor = min(values) * 10.0**-DECADES_BELOW if log else -math.inf
    ends = [end for point in points for end in (point.low, point.high) if end is not None and math.isfinite(end)]
    return values + [max(end, floor) for end in ends]


def _round_values(low: float, high: float, most: int, whole: bool) -> list[float]:
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * (1 - 1e-9))
    step = max(1.0, round(step)) if whole else step
    first = math.ceil(low / step - 1e-9)
    return [k * step for k in range(first, math.floor(high / step + 1e-9) + 1)]


def _sheet(
    series: Sequence[Series],
    x_axis: Axis,
    y_axis: Axis,
    width: int,
    height: int,
    margins: tuple[int, int, int, int],
) -> Sheet:
    left, top, right, bottom = margins[0], margins[1], width - margins[2], height - margins[3]

    def x(value: float) -> float:
        return round(left + (right - left) * x_axis.share(value), 1)

    def y(value: float) -> float:
        return round(bottom - (bottom - top) * min(max(y_axis.share(value), 0.0), 1.0), 1)

    size = 3.0 if max(len(one.points) for one in series) <= 50 else 2.0
    return Sheet(
        width,
        height,
        left,
        top,
        right,
        bottom,
        [Tick(round(left + (right - left) * t.at, 1), t.text) for t in x_axis.ticks(10 if width > 500 else 6)],
        [Tick(round(bottom - (bottom - top) * t.at, 1), t.text) for t in y_axis.ticks(6)],
        [_curve(one, x, y, size, y_axis.log) for one in series],
    )


def _curve(series: Series, x: Callable[[float], float], y: Callable[[float], float], size: float, log_y: bool) -> Curve:
    runs = [list(run) for whole, run in groupby(series.points, lambda p: _has_place(p, log_y)) if whole]
    placed = [point for run in runs for point in run]
    lines = [_path((x(p.x), y(p.y)) for p in run) for run in runs]
    bands, bars = [], []
    for run in runs:
        for known, part in groupby(run, lambda p: p.low is not None and p.high is not None):
            ends = [(x(p.x), y(p.low), y(p.high)) for p in part] if known else []  # type: ignore[arg-type]
            if series.band and len(ends) > 1:
                back = [(at, low) for at, low, _ in reversed(ends)]
                bands.append(_path([*((at, high) for at, _, high in ends), *back]) + "z")
            else:
                bars += [
                    f"M{at:g} {low:g}V{high:g}M{at - 3:g} {low:g}h6M{at - 3:g} {high:g}h6" for at, low, high in ends
                ]
    # A line style without marks still gets them if all its points are isolated.
    marked = [] if series.style != "line" and any(len(run) > 1 for run in runs) else placed
    marks = [(mark(series.color, x(p.x), y(p.y), size), p.text) for p in marked]
    return Curve(series.color, series.style, "".join(lines), "".join(bands), "".join(bars), marks)


def mark(color: int, x: float, y: float, r: float) -> str:
    """A disc, square, triangle or diamond around (x, y), so that curves differ by more than colour."""
    shape = (color + color // COLORS) % 4
    if shape == 0:
        return f"M{x - r:g} {y:g}a{r:g} {r:g} 0 1 0 {2 * r:g} 0a{r:g} {r:g} 0 1 0 {-2 * r:g} 0z"
    if shape == 1:
        return f"M{x - r:g} {y - r:g}h{2 * r:g}v{2 * r:g}h{-2 * r:g}z"
    if shape == 2:
        return f"M{x:g} {y - 1.3 * r:g}l{1.3 * r:g} {2.3 * r:g}h{-2.6 * r:g}z"
    return f"M{x:g} {y - 1.4 * r:g}l{1.4 * r:g} {1.4 * r:g}l{-1.4 * r:g} {1.4 * r:g}l{-1.4 * r:g} {-1.4 * r:g}z"


def _path(points: Iterable[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{x:g} {y:g}" for x, y in points)
