"""Studies as tables for the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from modality_integration.metric import tables
from modality_integration.metric.standard_error import error_cell

if TYPE_CHECKING:
    from modality_integration.metric.fitted_table import FittedTable

# Columns of a study that a narrow console drops, in this order; then any not named here.
EXPENDABLE = ("deviations", "trace_root", "trace_text", "trace_vision", "mean", "text_tokens", "vision_tokens", "alpha")
# Columns that identify a row if no text column does, and columns that are never dropped.
INDEX = ("set", "samples", "layer")
READ_FOR = ("mir", "error", "distance", "normalized", "unnormalized")


def rows_table(rows: Sequence[Mapping[str, Any]]) -> FittedTable:
    """A rich table of a study's rows, one column per key; keys that are empty in every row get none."""
    from rich.text import Text

    filled = [name for name in rows[0] if name == "error" or any(row[name] is not None for row in rows)]
    words = [name for name in filled if any(isinstance(row[name], str) for row in rows)]
    index = words or [name for name in filled if name in INDEX]
    table = tables.empty_table(elsewhere="the CSV has all columns", index=len(index))
    names = [*index, *(name for name in filled if name not in index)]
    for name in names:
        rank = 0 if name in index else _rank(name)
        table.add_column(Text(name.replace("_", " ")), justify="left" if name in words else "right", rank=rank)
    for row in rows:
        table.add_row(*(Text(_cell(name, row[name])) for name in names))
    return table


def _rank(name: str) -> int:
    if name in READ_FOR:
        return 0
    return len(EXPENDABLE) + 1 - EXPENDABLE.index(name) if name in EXPENDABLE else 1


def _cell(name: str, value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        if name == "error":
            return error_cell(value)
        return f"{value:.4f}" if name == "mir" else f"{value:.4g}"
    return str(value)
