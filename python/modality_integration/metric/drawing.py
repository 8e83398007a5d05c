"""What all figures are drawn with: curves with their errors, scales, names on axes, a legend beside the axes.

It takes matplotlib's axes and imports no matplotlib before it has some.
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

# Okabe and Ito's colours, which colour-blind readers tell apart, without yellow, which is faint on white. Numbers of
# colours, dashes and markers share no factor, so that in grey too no two of the first 28 curves look alike.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#E69F00", "#56B4E9")
DASHES: tuple[Any, ...] = ("-", (0, (5, 1.5)), (0, (6, 1.5, 1, 1.5)), (0, (2, 1)))
MARKERS = "os^Dv<>PX*p"
ERROR_LABEL = "± one standard error"

_LONGEST = 64  # characters of a label on one line
_LONGEST_NAME = 24  # of a name under an axis
_FAR_BELOW = 1e-300  # where a band goes whose lower end is 0 or less: off any logarithmic axis


def look(index: int) -> dict[str, Any]:
    """How curve `index` of a figure is told from the others, in colour and without."""
    return {
        "color": COLORS[index % len(COLORS)],
        "linestyle": DASHES[index % len(DASHES)],
        "marker": MARKERS[index % len(MARKERS)],
    }


def spread(values: Iterable[float]) -> float:
    """The largest of the positive, finite values over the smallest; 1 without any."""
    positive = [value for value in values if 0.0 < value < math.inf]
    return max(positive) / min(positive) if positive else 1.0


def scale_for(axes: Axes, values: Iterable[float]) -> None:
    """A logarithmic vertical axis for values that span a decade, a linear one below; marks are plain numbers."""
    from matplotlib.ticker import FuncFormatter, LogLocator

    values = list(values)
    ratio = spread(values)
    if ratio < 10.0:
        if not any(values):
            axes.set_ylim(-0.05, 1.0)  # all are 0, and none can be less
        return
    axes.set_yscale("log")
    numbers = FuncFormatter(lambda value, position: f"{value:g}")
    axes.yaxis.set_major_formatter(numbers)
    if ratio < 1000.0:  # powers of ten alone would be few marks
        axes.yaxis.set_minor_locator(LogLocator(subs=(2.0, 5.0)))
        axes.yaxis.set_minor_formatter(numbers)


def curve(
    axes: Axes, at: Sequence[float], values: Sequence[float], errors: Sequence[float | None] | None = None, **style: Any
) -> tuple[Line2D, bool]:
    """A line with marks; what has no place on the axis is a gap: not finite, or 0 on a logarithmic one.

    errors: standard errors, as a band along the line and as a bar at a point between gaps; None where there is none. A
    band whose lower end is below 0 leaves a logarithmic axis at its foot. Gives the line, and whether any error was
    drawn.
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
        # Pale by itself and not by transparency alone, which EPS does not have.
        pale = [1.0 - 0.3 * (1.0 - part) for part in to_rgb(color)]
        axes.add_collection(
            PolyCollection([low + high[::-1]], facecolors=[(*pale, 0.7)], linewidths=0, zorder=1.5), autolim=False
        )
    else:
        axes.add_collection(LineCollection([low + high], colors=[color], linewidths=1.0, zorder=1.9), autolim=False)
    # The axis has room for the errors, but not for all of one that goes towards 0 on a logarithmic axis.
    least = 0.2 if logarithmic else -math.inf
    axes.update_datalim([(x, max(y, least * value)) for (x, value, _), (_, y) in zip(points, low, strict=True)])
    axes.update_datalim(high)


def error_sign() -> Artist:
    """What the legend shows for the bands."""
    from matplotlib.patches import Patch

    return Patch(facecolor="0.8", label=ERROR_LABEL)


def whole_numbers(axes: Axes) -> None:
    """Marks of the horizontal axis at whole numbers, as layers and steps are."""
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator("auto", steps=[1, 2, 2.5, 5, 10], integer=True, min_n_ticks=1))


def layer_axis(axes: Axes, layers: int) -> None:
    """A horizontal axis of the layers 1 to `layers`, those that are gaps too, or of more where more are drawn."""
    axes.set_xlabel("decoder layer")
    axes.set_xlim(0.5, max(layers, axes.dataLim.x1 if math.isfinite(axes.dataLim.x1) else 1) + 0.5)
    whole_numbers(axes)


def legend_outside(figure: Figure, handles: Sequence[Artist], title: str = "") -> None:
    """A legend below the axes in as many columns as its labels leave room for; the figure grows by its height."""
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
    """A legend to the right of axes in a figure of the caller's, whose size stays."""
    legend = axes.legend(*_numbered(handles), loc="upper left", bbox_to_anchor=(1.02, 1.0), borderaxespad=0.0)
    _label(legend, handles)


def _numbered(handles: Sequence[Artist]) -> tuple[Sequence[Artist], list[str]]:
    """For a legend that `_label` then labels: matplotlib itself leaves out labels that begin with an underscore."""
    return handles, [str(number) for number in range(len(handles))]


def _label(legend: Legend, handles: Sequence[Artist]) -> None:
    labels = legend_labels([str(handle.get_label()) for handle in handles])
    for text, label in zip(legend.get_texts(), labels, strict=True):
        text.set_text(label)
    fonts.with_glyphs(legend.get_texts())


def legend_labels(labels: Sequence[str]) -> list[str]:
    """Labels of one line each, without their middle where they are too long.

    Where the middle is what tells two apart, the folders that all long ones begin with go instead; where that does not
    do, the rest goes on several lines.
    """
    long = [label for label in labels if len(label) > _LONGEST]
    shorter = _without_common_folders(long) if _middles_differ(long) else long
    fit = _wrapped if _middles_differ(shorter) else functools.partial(shortened, longest=_LONGEST)
    fitted = {label: fit(short) for label, short in zip(long, shorter, strict=True)}
    return [plain(fitted.get(label, label)) for label in labels]


def _middles_differ(labels: Sequence[str]) -> bool:
    """Whether labels that begin alike would lose what differs in them."""
    cuts = {label: _cut(label, _LONGEST) for label in labels if len(label) > _LONGEST}
    with_middles = {(head, label[len(head) : -len(tail)]) for label, (head, tail) in cuts.items()}
    return len({head for head, _ in cuts.values()}) < len(with_middles)


def _without_common_folders(labels: Sequence[str]) -> list[str]:
    parts = [label.split("/") for label in labels]
    levels = zip(*(one[:-1] for one in parts), strict=False)
    shared = sum(1 for _ in takewhile(lambda level: len(set(level)) == 1, levels))
    return ["/".join(["…", *one[shared:]]) for one in parts] if shared else list(labels)


def _wrapped(label: str) -> str:
    """A label on several lines; what stands in brackets at its end stays together."""
    together = re.sub(r"\([^()]*\)$", lambda end: end[0].replace(" ", "\xa0"), label)
    return "\n".join(textwrap.wrap(together, _LONGEST, break_on_hyphens=False)).replace("\xa0", " ")


def shortened(text: str, longest: int) -> str:
    """The text with an ellipsis for its middle, beyond so many characters."""
    return text if len(text) <= longest else "…".join(_cut(text, longest))


def _cut(text: str, longest: int) -> tuple[str, str]:
    head = (longest - 1) // 2
    return text[:head], text[head + 1 - longest :]


def plain(text: str) -> str:
    """The text so that matplotlib draws it as it is: `$` begins no formula."""
    return text.replace("$", r"\$")


def names_on_axis(figure: Figure, axes: Axes, places: Sequence[float], names: Sequence[str]) -> None:
    """Names under the horizontal axis: upright to the reader where they fit, else slanted, else on end.

    Long ones lose their middle, unless two would then be the same.
    The figure grows by what they are higher than a line.
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
    """Whether a label comes nearer to the next than a space, along the axis or, slanted, across its lines."""
    figure.draw_without_rendering()
    boxes = [text.get_window_extent() for text in texts]
    size = float(texts[0].get_fontsize()) * figure.dpi / 72
    if angle:
        places = [box.x1 for box in boxes]
        return any((b - a) * math.sin(math.radians(angle)) < 1.1 * size for a, b in pairwise(places))
    return any(b.x0 - a.x1 < 0.5 * size for a, b in pairwise(boxes))
