"""Layers as curves, and how all figures become files: sizes, fonts and formats for a paper.

It takes plain numbers and knows no result. Figures have canvases of their own: no display is needed, and the caller's
pyplot, backend and rcParams stay as they are.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

from modality_integration.metric import drawing, fonts
from modality_integration.metric.files import written_whole
from modality_integration.metric.standard_error import with_error
from modality_integration.metric.tables import Distances

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SUFFIXES = (".pdf", ".svg", ".eps", ".png", ".jpg", ".jpeg", ".tif", ".tiff", ".webp")
WIDTH, HEIGHT = 6.4, 3.4  # inches: the width of a page's text; the height without the legend

# Fonts in files are TrueType, as journals ask, and text stays text in SVG. Same data, same bytes: the salt of SVG's ids
# is fixed, and no file has a date.
_STYLE: Any = {
    "font.size": 9,
    "axes.labelsize": 9,
    "axes.titlesize": 9,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "legend.fontsize": 8,
    "figure.dpi": 200,
    "savefig.dpi": "figure",
    "pdf.fonttype": 42,
    "ps.fonttype": 42,
    "svg.fonttype": "none",
    "svg.hashsalt": "modality-integration",
}


class Curve(Distances, Protocol):
    """What a curve is drawn from: a `MIRResult`."""

    @property
    def layer_errors(self) -> list[float] | None:
        """The standard error of each layer's distance; None without."""


def layer_curves(curves: Mapping[str, Curve], path: str | Path) -> Path:
    """`layer_figure` in a file, whose suffix is the format; gives the file. ValueError as `check_suffix`."""
    path = check_suffix(path)
    return save_figure(layer_figure(curves)[0], path)


def layer_figure(curves: Mapping[str, Curve], ax: Axes | None = None) -> tuple[Figure, Axes]:
    """The distance of each layer, a curve a label, as the right of the paper's Figure 2; gives figure and axes.

    Standard errors are bands, where a curve has them; where attention sinks count, the distance without them is a thin
    dotted line with hollow marks of the same colour. The axis is logarithmic where the distances span a decade: a
    distance of 0 is a gap there. ax: the axes to draw into, whose figure keeps its size; the legend stands to their
    right, as it stands below those of a figure made here. ValueError without curves.
    """
    if not curves:
        raise ValueError("curves: takes at least one, got none")
    if ax is not None:
        drawing.legend_beside(ax, _draw_layers(curves, ax))
        return cast("Figure", ax.get_figure()), ax
    figure, axes = empty_figure()
    with paper_style():
        drawing.legend_outside(figure, _draw_layers(curves, axes))
    return figure, axes


def mir_label(result: Curve, name: str = "") -> str:
    """What a result's curve is labelled with: `name (MIR 3.374 ± 0.002)`, or the value alone."""
    mir = f"MIR {with_error(result.value, result.error, places=3, sign='±')}"
    return f"{name} ({mir})" if name else mir


def check_suffix(path: str | Path) -> Path:
    """The file that a picture goes into: `path`, as PNG where its name has no suffix.

    ValueError for a suffix that is no format here, and for a folder; to be called before the work that is to be drawn.
    """
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"{path}: expected a name for a picture, got a folder")
    path = path if path.suffix else path.with_suffix(".png")
    if path.suffix.lower() not in SUFFIXES:
        raise ValueError(f"{path}: expected a picture's suffix, {', '.join(SUFFIXES)}, got {path.suffix!r}")
    return path


def save_figure(figure: Figure, path: str | Path) -> Path:
    """Write the figure whole or not at all, its suffix the format; gives the file. ValueError as `check_suffix`."""
    path = check_suffix(path)
    picture = _bytes_of(figure, path.suffix.lower().removeprefix("."))
    with written_whole(path) as partial:
        partial.write_bytes(picture)
    return path


def empty_figure() -> tuple[Figure, Axes]:
    """A figure with one pair of axes, in the style of all."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with paper_style():
        figure = Figure(figsize=(WIDTH, HEIGHT), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        tidy(axes)
    return figure, axes


def stacked_figure(heights: Sequence[float]) -> tuple[Figure, list[Axes]]:
    """A figure with panels of these relative heights one above the other, over one horizontal axis."""
    figure, axes = empty_figure()
    axes.remove()
    with paper_style():
        figure.set_figheight(1.4 * HEIGHT)
        panels = list(figure.subplots(len(heights), sharex=True, height_ratios=heights))
        for panel in panels:
            tidy(panel)
        figure.align_ylabels(panels)
    return figure, panels


def tidy(axes: Axes) -> None:
    """Axes as all are: a faint grid behind what is drawn, marks of readable size."""
    axes.grid(color="0.9", which="both", linewidth=0.5)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=_STYLE["xtick.labelsize"], which="both")


@contextlib.contextmanager
def paper_style() -> Iterator[None]:
    """matplotlib's own defaults with this module's settings over them, until the context is left."""
    import matplotlib
    from matplotlib import style

    with style.context("default"), matplotlib.rc_context(_STYLE):
        yield


def _draw_layers(curves: Mapping[str, Curve], axes: Axes) -> list[Artist]:
    """The curves, beside what the axes have; gives what the legend shows."""
    rows = [row for curve in curves.values() for row in (curve.per_layer, curve.without_sinks or ())]
    drawing.scale_for(axes, itertools.chain.from_iterable(rows))
    before: list[Artist] = axes.get_legend_handles_labels()[0]
    handles, any_errors = before.copy(), False
    for index, (label, curve) in enumerate(curves.items(), len(before)):
        look = drawing.look(index)
        layers = range(1, len(curve.per_layer) + 1)
        line, with_errors = drawing.curve(axes, layers, curve.per_layer, curve.layer_errors, label=label, **look)
        handles.append(line)
        any_errors |= with_errors
        if curve.without_sinks is not None:
            look |= {"linestyle": ":", "linewidth": 0.9, "markerfacecolor": "none", "markeredgewidth": 0.6}
            bare = f"{label}, {curve.value_without_sinks:.3f} without sinks"
            handles.append(drawing.curve(axes, layers, curve.without_sinks, label=bare, **look)[0])
    axes.set_ylabel("Fréchet distance, vision to text")
    drawing.layer_axis(axes, max(len(curve.per_layer) for curve in curves.values()))
    return [*handles, *([drawing.error_sign()] if any_errors else [])]


def _bytes_of(figure: Figure, format: str) -> bytes:
    dates: dict[str, Any] = {"pdf": {"CreationDate": None}, "svg": {"Date": None}}
    if format != "svg" and (lacking := fonts.characters_without_font(figure)):
        warnings.warn(
            f"no installed font has {lacking}: the picture shows boxes for them, an .svg has them", stacklevel=3
        )
    file = io.BytesIO()
    with paper_style():
        figure.savefig(file, format=format, metadata=dates.get(format))
    picture = file.getvalue()
    return re.sub(rb"%%CreationDate:.*\n", b"", picture, count=1) if format == "eps" else picture
