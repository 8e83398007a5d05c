"""Layers for people: tables for the terminal, curves as files. It takes plain numbers and knows no result."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from rich.table import Table

_TITLE = "Fréchet distance of vision and text tokens, layer by layer"


class Distances(Protocol):
    """What a column of distances is read from: a `MIRResult`."""

    @property
    def value(self) -> float:
        """MIR."""

    @property
    def per_layer(self) -> list[float]:
        """The distance of each layer."""

    @property
    def without_sinks(self) -> list[float] | None:
        """The distance of each layer without attention sinks; None where none count."""

    @property
    def value_without_sinks(self) -> float | None:
        """MIR without attention sinks."""


def distance_columns(results: Mapping[str, Distances]) -> tuple[dict[str, list[str]], dict[str, str]]:
    """For `layer_table`: a column of distances a result, MIR at the foot."""
    columns = {name: [distance_cell(distance) for distance in r.per_layer] for name, r in results.items()}
    return columns, {name: f"{r.value:.4f}" for name, r in results.items()}


def layer_table(columns: Mapping[str, Sequence[str]], feet: Mapping[str, str]) -> Table:
    """A rich table with a row a layer; columns may be of different length."""
    table = empty_table()
    table.add_column("layer", justify="right", footer="MIR")
    for name in columns:
        table.add_column(name, justify="right", no_wrap=name == "distance", footer=feet.get(name, ""))
    for layer, cells in enumerate(zip_longest(*columns.values(), fillvalue=""), 1):
        table.add_row(str(layer), *cells)
    return table


def empty_table() -> Table:
    """A rich table of the one style that all tables have."""
    from rich import box
    from rich.table import Table

    return Table(title=_TITLE, show_footer=True, box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1))


def distance_cell(value: float) -> str:
    """A distance in a table."""
    return f"{value:.4g}"


def layer_curves(curves: Mapping[str, Distances], path: str | Path) -> Path:
    """The distance of each layer, a curve a name, as the paper's Figure 2, right; the file's suffix is the format.

    Where attention sinks count, the distance without them is a thin line of the same colour.
    """
    figure, axes = empty_figure()
    drawn = False
    for index, (name, result) in enumerate(curves.items()):
        distances, color = result.per_layer, f"C{index}"
        drawn = drawn or any(distance > 0 for distance in distances)
        layers = range(1, len(distances) + 1)
        axes.plot(layers, on_log_axis(distances), marker="o", markersize=3, linewidth=1.5, color=color, label=name)
        if result.without_sinks is not None:
            bare = on_log_axis(result.without_sinks)
            label = f"{name}, {result.value_without_sinks:.3f} without sinks"
            axes.plot(layers, bare, linewidth=0.8, linestyle="--", color=color, label=label)
    if drawn:
        axes.set_yscale("log")
    axes.set_xlabel("decoder layer")
    axes.set_ylabel("Fréchet distance, vision to text")
    whole_layers(axes)
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    return save_figure(figure, path)


def whole_layers(axes: Axes) -> None:
    """Marks of the horizontal axis at whole numbers, as layers are."""
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator("auto", steps=[1, 2, 2.5, 5, 10], integer=True))


def on_log_axis(distances: Iterable[float]) -> list[float]:
    """A distance of 0 has no place on a logarithmic axis: a gap."""
    return [distance or math.nan for distance in distances]


def empty_figure() -> tuple[Figure, Axes]:
    """A figure with its own canvas: no display is needed, and the caller's pyplot and backend stay as they are."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.0), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.add_subplot()


def save_figure(figure: Figure, path: str | Path) -> Path:
    """Write the figure, as PNG where the name has no suffix; gives the file."""
    path = Path(path)
    path = path if path.suffix else path.with_suffix(".png")
    figure.savefig(path)
    return path
