"""Per-layer tables for the terminal, from plain numbers, independent of `MIRResult`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import zip_longest
from typing import TYPE_CHECKING, Protocol

from modality_integration.metric.standard_error import error_cell

if TYPE_CHECKING:
    from modality_integration.metric.fitted_table import FittedTable

TITLE = "Fréchet distance of vision and text tokens, layer by layer"


class Distances(Protocol):
    """The data of a column of distances: a `MIRResult`."""

    @property
    def value(self) -> float:
        """MIR."""

    @property
    def error(self) -> float | None:
        """Its standard error; None without one."""

    @property
    def per_layer(self) -> list[float]:
        """The distance of each layer."""

    @property
    def without_sinks(self) -> list[float] | None:
        """The distance of each layer without attention sinks; None if none count."""

    @property
    def value_without_sinks(self) -> float | None:
        """MIR without attention sinks."""


def distance_table(
    results: Mapping[str, Distances],
    feet: Mapping[str, Mapping[str, str]] | None = None,
    expendable: Mapping[str, Sequence[str]] | None = None,
) -> FittedTable:
    """One column of distances per result, with MIR and its standard error in the footer.

    feet: further footer rows, as {row: {result: cell}}. expendable: further columns, dropped on a narrow console.
    """
    columns = {name: [distance_cell(distance) for distance in r.per_layer] for name, r in results.items()}
    all_feet: dict[str, Mapping[str, str]] = {"MIR": {name: f"{r.value:.4f}" for name, r in results.items()}}
    errors = {name: error_cell(r.error) for name, r in results.items()}
    if any(errors.values()):
        all_feet["error"] = errors
    more = dict(expendable or {})
    return layer_table(columns | more, all_feet | dict(feet or {}), list(more))


def layer_table(
    columns: Mapping[str, Sequence[str]],
    feet: Mapping[str, Mapping[str, str]],
    expendable: Sequence[str] = (),
    elsewhere: str = "",
) -> FittedTable:
    """A rich table with one row per layer, for any width; columns may have different lengths.

    feet: footer rows, as {row: {column: cell}}. expendable: columns dropped on a narrow console, first one first.
    elsewhere: where to find them, for the line that names them.
    """
    from rich.text import Text

    table = empty_table(TITLE, elsewhere, footer=True)
    table.add_column("layer", justify="right", footer=Text("\n".join(feet)))
    for name in columns:
        foot = Text("\n".join(row.get(name, "") for row in feet.values()))
        rank = len(expendable) - expendable.index(name) if name in expendable else 0
        table.add_column(Text(name), justify="right", footer=foot, rank=rank, named=True)
    for layer, cells in enumerate(zip_longest(*columns.values(), fillvalue=""), 1):
        table.add_row(str(layer), *cells)
    return table


def empty_table(title: str | None = None, elsewhere: str = "", index: int = 1, footer: bool = False) -> FittedTable:
    """A rich table in the common style of all tables; see `FittedTable`."""
    from rich import box

    from modality_integration.metric.fitted_table import FittedTable

    return FittedTable(title=title, elsewhere=elsewhere, index=index, box=box.SIMPLE_HEAD, show_footer=footer)


def distance_cell(value: float) -> str:
    """A distance formatted for a table."""
    return f"{value:.4g}"
