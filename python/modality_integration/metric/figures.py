"""Figures of per-layer curves, and output of all figures: sizes, fonts and formats for publication.

Works on plain numbers, independent of `MIRResult`. Figures have their own canvases: no display is needed, and the
caller's pyplot, backend and rcParams do not change.
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
WIDTH, HEIGHT = 6.4, 3.4  # inches: text width of a page; height without the legend

# Fonts are embedded as TrueType, as journals require, and text stays text in SVG. Output is reproducible byte for byte:
# the salt of SVG ids is fixed and files carry no date.
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
    """The data of a curve: a `MIRResult`."""

    @property
    def layer_errors(self) -> list[float] | None:
        """The standard error of each layer's distance; None if there are none."""


def layer_curves(curves: Mapping[str, Curve], path: str | Path) -> Path:
    """Write `layer_figure` to a file in the format of its suffix; returns the file. ValueError as in `check_suffix`."""
    path = check_suffix(path)
    return save_figure(layer_figure(curves)[0], path)


def layer_figure(curves: Mapping[str, Curve], ax: Axes | None = None) -> tuple[Figure, Axes]:
    """Draw the distance of each layer, one curve per label, as in Figure 2 (right) of the paper.

    Standard errors are drawn as bands. If attention sinks count, the distance without them is a thin dotted line with
    hollow markers of the same colour. The axis is logarithmic if the distances span a decade; a distance of 0 is then a
    gap. ax: the axes to draw into; its figure keeps its size, and the legend is placed to the right. In a new figure,
    the legend is below the axes. Returns figure and axes. ValueError without curves.
    """
    if not curves:
        raise ValueError("curves: expected at least one, got none")
    if ax is not None:
        drawing.legend_beside(ax, _draw_layers(curves, ax))
        return cast("Figure", ax.get_figure()), ax
    figure, axes = empty_figure()
    with paper_style():
        drawing.legend_outside(figure, _draw_layers(curves, axes))
    return figure, axes


def mir_label(result: Curve, name: str = "") -> str:
    """Label of a result's curve: `name (MIR 3.374 ± 0.002)`, or the value alone."""
    mir = f"MIR {with_error(result.value, result.error, places=3, sign='±')}"
    return f"{name} ({mir})" if name else mir


def check_suffix(path: str | Path) -> Path:
    """The file for a picture: `path`, with .png appended if it has no suffix.

    ValueError for an unsupported suffix or a folder. Call it before the computation whose result is to be drawn.
    """
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"{path}: expected an image file name, got a folder")
    path = path if path.suffix else path.with_suffix(".png")
    if path.suffix.lower() not in SUFFIXES:
        raise ValueError(f"{path}: expected an image suffix, one of {', '.join(SUFFIXES)}, got {path.suffix!r}")
    return path


def save_figure(figure: Figure, path: str | Path) -> Path:
    """Write the figure atomically in the format of the suffix; returns the file. ValueError as in `check_suffix`."""
    path = check_suffix(path)
    picture = _bytes_of(figure, path.suffix.lower().removeprefix("."))
    with written_whole(path) as partial:
        partial.write_bytes(picture)
    return path


def empty_figure() -> tuple[Figure, Axes]:
    """A figure with one set of axes in the common style."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with paper_style():
        figure = Figure(figsize=(WIDTH, HEIGHT), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        tidy(axes)
    return figure, axes


def stacked_figure(heights: Sequence[float]) -> tuple[Figure, list[Axes]]:
    """A figure of stacked panels with these relative heights and a shared horizontal axis."""
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
    """Apply the common axes style: a faint grid behind the data and readable tick labels."""
    axes.grid(color="0.9", which="both", linewidth=0.5)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=_STYLE["xtick.labelsize"], which="both")


@contextlib.contextmanager
def paper_style() -> Iterator[None]:
    """Context with matplotlib's defaults plus this module's settings."""
    import matplotlib
    from matplotlib import style

    with style.context("default"), matplotlib.rc_context(_STYLE):
        yield


def _draw_layers(curves: Mapping[str, Curve], axes: Axes) -> list[Artist]:
    """Add the curves to the axes; returns the legend handles, including those already there."""
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
            f"no installed font has {lacking}: the picture shows boxes instead; an .svg file keeps the characters",
            stacklevel=3,
        )
    file = io.BytesIO()
    with paper_style():
        figure.savefig(file, format=format, metadata=dates.get(format))
    picture = file.getvalue()
    return re.sub(rb"%%CreationDate:.*\n", b"", picture, count=1) if format == "eps" else picture
