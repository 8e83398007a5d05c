"""Drawing primitives shared by all figures: curves with error bands, scales, axis labels, legends.

The functions draw into matplotlib axes; matplotlib is imported only inside them.
"""

from __future__ import annotations

import functools
import math
import re
import textwrap
from collections.abc import Iterable, Sequence
from itertools import groupby, pairwise, takewhile
from typing import TYPE_CHECKING, Any

from modality_integration.metric import fonts

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.legend import Legend
    from matplotlib.lines import Line2D
    from matplotlib.text import Text

# Okabe and Ito's colours, distinguishable for colour-blind readers, without yellow, which is faint on white. The
# numbers of colours, dashes and markers are coprime, so the first 28 curves differ even in greyscale.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#E69F00", "#56B4E9")
DASHES: tuple[Any, ...] = ("-", (0, (5, 1.5)), (0, (6, 1.5, 1, 1.5)), (0, (2, 1)))
MARKERS = "os^Dv<>PX*p"
ERROR_LABEL = "± one standard error"

_LONGEST = 64  # characters of a label on one line
_LONGEST_NAME = 24  # of a name under an axis
_FAR_BELOW = 1e-300  # lower end of a band that reaches 0 or less: below any logarithmic axis


def look(index: int) -> dict[str, Any]:
    """Colour, dash and marker of curve `index` of a figure."""
    return {
        "color": COLORS[index % len(COLORS)],
        "linestyle": DASHES[index % len(DASHES)],
        "marker": MARKERS[index % len(MARKERS)],
    }


def spread(values: Iterable[float]) -> float:
    """Ratio of the largest to the smallest positive finite value; 1 if there are none."""
    positive = [value for value in values if 0.0 < value < math.inf]
    return max(positive) / min(positive) if positive else 1.0


def scale_for(axes: Axes, values: Iterable[float]) -> None:
    """Use a logarithmic vertical axis if the values span a decade, else a linear one; ticks are plain numbers."""
    from matplotlib.ticker import FuncFormatter, LogLocator

    values = list(values)
    ratio = spread(values)
    if ratio < 10.0:
        if not any(values):
            axes.set_ylim(-0.05, 1.0)  # all are 0; values cannot be negative
        return
    axes.set_yscale("log")
    numbers = FuncFormatter(lambda value, position: f"{value:g}")
    axes.yaxis.set_major_formatter(numbers)
    if ratio < 1000.0:  # powers of ten alone would be too few ticks
        axes.yaxis.set_minor_locator(LogLocator(subs=(2.0, 5.0)))
        axes.yaxis.set_minor_formatter(numbers)


def curve(
    axes: Axes, at: Sequence[float], values: Sequence[float], errors: Sequence[float | None] | None = None, **style: Any
) -> tuple[Line2D, bool]:
    """Draw a line with markers; non-finite values, and values <= 0 on a logarithmic axis, are gaps.

    errors: standard errors, drawn as a band along the line, or as a bar at a point between gaps; None where there is
    none. On a logarithmic axis, a band that reaches 0 or below extends past the bottom. Returns the line, and whether
    any error was drawn.
    """
    logarithmic = axes.get_yscale() == "log"
    shown = [value if math.isfinite(value) and not (logarithmic and value <= 0.0) else math.nan for value in values]
    style = {"markersize": 3.5, "linewidth": 1.4} | style
    (line,) = axes.plot(at, shown, **style)
    with_errors = False
    points = zip(at, shown, errors or [None] * len(shown), strict=True)
    for known, run in groupby(points, lambda point: _is_known(point[1], point[2])):
        if known:
            _band(axes, [(x, value, error or 0.0) for x, value, error in run], style["color"], logarithmic)
            with_errors = True
    axes.autoscale_view()
    return line, with_errors


def _is_known(value: float, error: float | None) -> bool:
    return math.isfinite(value) and error is not None and 1e-9 * abs(value) < error < math.inf  # more than rounding


def _band(axes: Axes, points: Sequence[tuple[float, float, float]], color: str, logarithmic: bool) -> None:
    from matplotlib.collections import LineCollection, PolyCollection
    from matplotlib.colors import to_rgb

    foot = _FAR_BELOW if logarithmic else -math.inf
    low = [(x, max(value - error, foot)) for x, value, error in points]
    high = [(x, value + error) for x, value, error in points]
    if len(points) > 1:
        # A pale colour instead of only transparency, which EPS does not support.
        pale = [1.0 - 0.3 * (1.0 - part) for part in to_rgb(color)]
        axes.add_collection(
            PolyCollection([low + high[::-1]], facecolors=[(*pale, 0.7)], linewidths=0, zorder=1.5), autolim=False
        )
    else:
        axes.add_collection(LineCollection([low + high], colors=[color], linewidths=1.0, zorder=1.9), autolim=False)
    # Make room for the errors, but on a logarithmic axis cut off bands that approach 0.
    least = 0.2 if logarithmic else -math.inf
    axes.update_datalim([(x, max(y, least * value)) for (x, value, _), (_, y) in zip(points, low, strict=True)])
    axes.update_datalim(high)


def error_sign() -> Artist:
    """Legend entry for the error bands."""
    from matplotlib.patches import Patch

    return Patch(facecolor="0.8", label=ERROR_LABEL)


def whole_numbers(axes: Axes) -> None:
    """Put the horizontal ticks at whole numbers, for layers and steps."""
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator("auto", steps=[1, 2, 2.5, 5, 10], integer=True, min_n_ticks=1))


def layer_axis(axes: Axes, layers: int) -> None:
    """Make the horizontal axis show layers 1 to `layers`, including gaps, or further if more are already drawn."""
    axes.set_xlabel("decoder layer")
    axes.set_xlim(0.5, max(layers, axes.dataLim.x1 if math.isfinite(axes.dataLim.x1) else 1) + 0.5)
    whole_numbers(axes)


def legend_outside(figure: Figure, handles: Sequence[Artist], title: str = "") -> None:
    """Add a legend below the axes with as many columns as fit; the figure grows by its height."""
    for columns in range(min(len(handles), 4), 0, -1):
        legend = figure.legend(
            *_numbered(handles),
            title=title,
            loc="outside lower center",
            ncols=columns,
            frameon=False,
            handlelength=3.2,
        )
        _label(legend, handles)
        extent = legend.get_window_extent(figure.canvas.get_renderer())  # type: ignore[attr-defined]
        if columns == 1 or extent.width <= 0.98 * figure.bbox.width:
            break
        legend.remove()
    figure.set_figheight(figure.get_figheight() + extent.height / figure.dpi)


def legend_beside(axes: Axes, handles: Sequence[Artist]) -> None:
    """Add a legend to the right of axes in the caller's figure, whose size does not change."""
    legend = axes.legend(*_numbered(handles), loc="upper left", bbox_to_anchor=(1.02, 1.0), borderaxespad=0.0)
    _label(legend, handles)


def _numbered(handles: Sequence[Artist]) -> tuple[Sequence[Artist], list[str]]:
    """Handles with numbers as labels, to be replaced by `_label`: matplotlib skips labels with a leading underscore."""
    return handles, [str(number) for number in range(len(handles))]


def _label(legend: Legend, handles: Sequence[Artist]) -> None:
    labels = legend_labels([str(handle.get_label()) for handle in handles])
    for text, label in zip(legend.get_texts(), labels, strict=True):
        text.set_text(label)
    fonts.with_glyphs(legend.get_texts())


def legend_labels(labels: Sequence[str]) -> list[str]:
    """Labels of one line each; the middle of long ones is replaced by an ellipsis.

    If that would make two labels equal, the leading folders shared by all long ones are removed instead. If that is not
    enough, long labels are wrapped.
    """
    long = [label for label in labels if len(label) > _LONGEST]
    shorter = _without_common_folders(long) if _middles_differ(long) else long
    fit = _wrapped if _middles_differ(shorter) else functools.partial(shortened, longest=_LONGEST)
    fitted = {label: fit(short) for label, short in zip(long, shorter, strict=True)}
    return [plain(fitted.get(label, label)) for label in labels]


def _middles_differ(labels: Sequence[str]) -> bool:
    """Whether shortening would make different labels look alike."""
    cuts = {label: _cut(label, _LONGEST) for label in labels if len(label) > _LONGEST}
    with_middles = {(head, label[len(head) : -len(tail)]) for label, (head, tail) in cuts.items()}
    return len({head for head, _ in cuts.values()}) < len(with_middles)


def _without_common_folders(labels: Sequence[str]) -> list[str]:
    parts = [label.split("/") for label in labels]
    levels = zip(*(one[:-1] for one in parts), strict=False)
    shared = sum(1 for _ in takewhile(lambda level: len(set(level)) == 1, levels))
    return ["/".join(["…", *one[shared:]]) for one in parts] if shared else list(labels)


def _wrapped(label: str) -> str:
    """Wrap a label onto several lines, keeping a final parenthesis together."""
    together = re.sub(r"\([^()]*\)$", lambda end: end[0].replace(" ", "\xa0"), label)
    return "\n".join(textwrap.wrap(together, _LONGEST, break_on_hyphens=False)).replace("\xa0", " ")


def shortened(text: str, longest: int) -> str:
    """The text, with its middle replaced by an ellipsis if it is longer than `longest` characters."""
    return text if len(text) <= longest else "…".join(_cut(text, longest))


def _cut(text: str, longest: int) -> tuple[str, str]:
    head = (longest - 1) // 2
    return text[:head], text[head + 1 - longest :]


def plain(text: str) -> str:
    """Escape the text so that matplotlib draws `$` literally."""
    return text.replace("$", r"\$")


def names_on_axis(figure: Figure, axes: Axes, places: Sequence[float], names: Sequence[str]) -> None:
    """Label the horizontal axis with names: horizontal if they fit, else slanted, else vertical.

    The middle of long names is replaced by an ellipsis unless that makes two equal. The figure grows by the height of
    the labels beyond one line.
    """
    short = [shortened(name, _LONGEST_NAME) for name in names]
    short = short if len(set(short)) == len(set(names)) else list(names)
    axes.minorticks_off()
    axes.set_xticks(places, [plain(name) for name in short])
    texts = axes.get_xticklabels()
    fonts.with_glyphs(texts)
    for angle in (0, 40, 90):
        for text in texts:
            across, along = "right" if angle else "center", "center" if angle == 90 else "top"
            text.set(rotation=angle, rotation_mode="anchor", ha=across, va=along)
        if angle == 90 or not _crowded(figure, texts, angle):
            break
    figure.draw_without_rendering()
    heights = [text.get_window_extent().height for text in texts]
    line = 1.5 * float(texts[0].get_fontsize()) * figure.dpi / 72
    figure.set_figheight(figure.get_figheight() + max(max(heights) - line, 0.0) / figure.dpi)


def _crowded(figure: Figure, texts: Sequence[Text], angle: float) -> bool:
    """Whether adjacent labels are closer than a space along the axis, or overlap if they are slanted."""
    figure.draw_without_rendering()
    boxes = [text.get_window_extent() for text in texts]
    size = float(texts[0].get_fontsize()) * figure.dpi / 72
    if angle:
        places = [box.x1 for box in boxes]
        return any((b - a) * math.sin(math.radians(angle)) < 1.1 * size for a, b in pairwise(places))
    return any(b.x0 - a.x1 < 0.5 * size for a, b in pairwise(boxes))
