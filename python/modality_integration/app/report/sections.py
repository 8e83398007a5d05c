"""Tables and curves of the page: from runs to rows of text and charts."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any

from modality_integration.app.report.charts import Chart, Point, Series, chart, interval_ends
from modality_integration.metric import MODALITIES
from modality_integration.metric.result import MIRResult
from modality_integration.metric.standard_error import error_cell, with_error

NOT_RECORDED = "not recorded"
RUNS_A_TABLE = 5  # run columns per table: more would be cut off in print


@dataclass
class Row:
    """A row: its header, its cells, and whether the runs differ in it."""

    head: str
    cells: list[str]
    differs: bool = False


@dataclass
class Table:
    """A table with a caption. words: cells hold text, not numbers."""

    caption: str
    columns: list[str]
    rows: list[Row]
    foot: Row | None = None
    words: bool = False


@dataclass
class Interval:
    """A value with its standard error on a shared scale; ends are percentages of its width."""

    label: str
    color: int
    value: str
    ends: tuple[float, float, float] | None


@dataclass
class Picture:
    """A titled chart with its legend: (name, colour, style) for each curve."""

    title: str
    chart: Chart | None
    legend: list[tuple[str, int, str]] = field(default_factory=list)


def shown(value: float, error: float | None) -> str:
    """MIR with its standard error: 3.3740 ± 0.0021."""
    return with_error(value, error, sign="±")


def layer_picture(results: Mapping[str, tuple[int, MIRResult]]) -> Picture:
    """Distance by layer: one curve per run with a standard-error band, and a dashed curve without sinks."""
    series, legend, sentences = [], [], []
    for label, (color, result) in results.items():
        points = [
            with_error_ends(layer, distance, error, f"{label}, layer {layer}: {distance:.4g}")
            for layer, (distance, error) in enumerate(zip(result.per_layer, _errors(result), strict=True), 1)
        ]
        series.append(Series(points, color))
        legend.append((label, color, "line"))
        high = max(points, key=lambda point: point.y)
        sentences.append(
            f"{label}: {points[0].y:.3g} in layer 1, {points[-1].y:.3g} in layer {len(points)}, highest {high.y:.3g} "
            f"in layer {high.x:g}"
        )
        if result.without_sinks is not None:
            bare = [Point(layer, distance) for layer, distance in enumerate(result.without_sinks, 1)]
            series.append(Series(bare, color, "dashed"))
            legend.append((f"{label}, without attention sinks", color, "dashed"))
    drawn = chart(
        series,
        x_label="decoder layer",
        y_label="Fréchet distance",
        text=f"Fréchet distance between vision and text tokens by decoder layer. {'; '.join(sentences)}.",
        log_y=True,
        whole_x=True,
    )
    return Picture("Fréchet distance between vision and text tokens by layer", drawn, legend)


def terms_table(result: MIRResult, label: str) -> Table:
    """Each layer's distance, its standard error, and the terms of Eq. 3."""
    errors = _errors(result)
    columns: dict[str, list[str]] = {"distance": [f"{d:.4g}" for d in result.per_layer]}
    feet = {"distance": f"{result.value:.4f}"}
    if any(error is not None for error in errors):
        columns["standard error"] = ["" if error is None else _short(error) for error in errors]
        feet["standard error"] = error_cell(result.error)
    if result.without_sinks is not None:
        columns["without sinks"] = [f"{d:.4g}" for d in result.without_sinks]
        feet["without sinks"] = f"{result.value_without_sinks:.4f}"
    terms = result.terms
    columns["|Δμ|²"] = [f"{t.mean:.3g}" for t in terms]
    columns["Tr\u00a0Σv"] = [f"{t.trace_vision:.3g}" for t in terms]
    columns["Tr\u00a0Σt"] = [f"{t.trace_text:.3g}" for t in terms]
    columns["Tr\u00a0root"] = [f"{t.trace_root:.3g}" for t in terms]
    columns["alpha"] = [f"{alpha:.3g}" for alpha in result.alpha]
    rows = [Row(str(k), list(cells)) for k, cells in enumerate(zip(*columns.values(), strict=True), 1)]
    return Table(
        f"Distances and their terms (Eq. 3), {label}",
        ["layer", *columns],
        rows,
        Row("MIR", [feet.get(name, "") for name in columns]),
    )


def distances_tables(results: Mapping[str, MIRResult]) -> list[Table]:
    """Distances by layer with one column per run, and for two runs their ratio."""
    columns = {}
    for label, result in results.items():
        columns[label] = [
            f"{d:.4g}" if e is None else f"{d:.4g} ± {_short(e)}"
            for d, e in zip(result.per_layer, _errors(result), strict=True)
        ]
    feet = [shown(result.value, result.error) for result in results.values()]
    if len(results) == 2:
        (first, a), (second, b) = results.items()
        pairs = zip(a.per_layer, b.per_layer, strict=False)
        columns[f"{second} / {first}"] = [f"{y / x:.3g}" if x else "" for x, y in pairs]
        feet.append("")
    cells = zip_longest(*columns.values(), fillvalue="")
    rows = [Row(str(layer), list(row)) for layer, row in enumerate(cells, 1)]
    caption = "Fréchet distance by layer, with its standard error"
    return _side_by_side(Table(caption, ["layer", *columns], rows, Row("MIR", feet)))


def tokens_table(result: MIRResult, label: str) -> Table:
    """Tokens kept, removed as outliers, missed, and sinks, by layer."""
    names = {"kept": "kept", "removed": "outliers", "missed": "missed", "massive": "sinks"}
    columns = [f"{m} {words}" for m in MODALITIES for words in names.values()]
    counts = [getattr(result, name)[m] for m in MODALITIES for name in names]
    rows = [Row(str(layer), [f"{n}" for n in cells]) for layer, cells in enumerate(zip(*counts, strict=True), 1)]
    return Table(f"Tokens by layer, {label}", ["layer", *columns], rows)


def outliers_table(results: Mapping[str, MIRResult]) -> Table:
    """Effect of the outlier rule, one row per run and modality."""
    rows = []
    for label, result in results.items():
        for m in MODALITIES:
            kept, removed = result.kept[m], result.removed[m]
            tokens = sorted({k + r for k, r in zip(kept, removed, strict=True)})
            most = max(range(len(removed)), key=removed.__getitem__)
            cells = [f"{tokens[0]}" if len(tokens) == 1 else f"{tokens[0]} to {tokens[-1]}", f"{sum(removed)}"]
            share = removed[most] / max(1, kept[most] + removed[most])
            cells += [f"{removed[most]} ({share:.2%}) in layer {most + 1}" if any(removed) else "0"]
            rows.append(Row(f"{label}, {m}", [result.outliers, *cells, f"{sum(result.missed[m])}"]))
    columns = ["run and modality", "rule", "tokens per layer", "outliers in all layers", "most in one layer", "missed"]
    return Table("Outlier tokens", columns, rows)


def sinks_table(results: Mapping[str, MIRResult]) -> Table | None:
    """Attention sinks, one row per run and modality that has any; None if there are none.

    A sink that the outlier rule removes in the layers where it is massive may still count in others; it is listed too.
    """
    rows = []
    for label, result in results.items():
        for m in MODALITIES:
            counts = result.massive[m]
            if not any(counts) and not (result.without_sinks and result.sink_positions[m]):
                continue
            places = sorted(result.sink_positions[m].items(), key=lambda item: -item[1])
            words = ", ".join(f"{place} ({count})" for place, count in places[:5])
            words += f" and {len(places) - 5} more" if len(places) > 5 else ""
            layers = f"{sum(map(bool, counts))} of {len(counts)}"
            without = "" if result.value_without_sinks is None else f"{result.value_without_sinks:.4f}"
            counted = "counted" if result.sinks == "report" else "excluded"
            rows.append(Row(f"{label}, {m}", [f"{max(counts)}", layers, words or "unknown", counted, without]))
    columns = ["run and modality", "most in one layer", "layers with sinks", "positions (count)", "sinks are"]
    return Table("Attention sinks", [*columns, "MIR without them"], rows) if rows else None


def facts_tables(caption: str, facts: Mapping[str, Mapping[str, Any]]) -> list[Table]:
    """Facts of each run ({label: {name: value}}), differing rows first; empty if there are no facts."""
    names = dict.fromkeys(name for of_run in facts.values() for name in of_run)
    rows = []
    for name in names:
        known = [of_run[name] for of_run in facts.values() if name in of_run]
        cells = [_fact(of_run[name]) if name in of_run else NOT_RECORDED for of_run in facts.values()]
        # Compared as JSON, so that true differs from 1.
        differs = name != "seconds" and len({json.dumps(value, default=str) for value in known}) > 1
        rows.append(Row(name.replace("_", " "), cells, differs))
    rows.sort(key=lambda row: not row.differs)
    return _side_by_side(Table(caption, ["", *facts], rows, words=True)) if rows else []


def intervals(labelled: Iterable[tuple[str, int, float, float | None]]) -> list[Interval]:
    """Place (label, colour, value, standard error) as intervals of one standard error on a common scale."""
    listed = list(labelled)
    ends = interval_ends([with_error_ends(0, value, error) for _, _, value, error in listed])
    return [Interval(label, color, shown(v, e), end) for (label, color, v, e), end in zip(listed, ends, strict=True)]


def with_error_ends(x: float, value: float, error: float | None, text: str = "") -> Point:
    """A point with one standard error on either side, if it is known."""
    if error is None or not math.isfinite(error) or not math.isfinite(value):
        return Point(x, value, text=text)
    return Point(x, value, value - error, value + error, text)


def _side_by_side(table: Table) -> list[Table]:
    """Split a table with one column per run into tables narrow enough to print."""
    count = len(table.columns) - 1
    parts = range(0, count, RUNS_A_TABLE)
    return [
        Table(
            table.caption if len(parts) == 1 else f"{table.caption} ({number} of {len(parts)})",
            [table.columns[0], *table.columns[1 + at : 1 + at + RUNS_A_TABLE]],
            [Row(row.head, row.cells[at : at + RUNS_A_TABLE], row.differs) for row in table.rows],
            table.foot and Row(table.foot.head, table.foot.cells[at : at + RUNS_A_TABLE]),
            table.words,
        )
        for number, at in enumerate(parts, 1)
    ]


def _errors(result: MIRResult) -> list[float | None]:
    """The standard error of each layer's distance; None where it is unknown."""
    if result.layer_errors is None:
        return [None] * len(result.terms)
    return [error if math.isfinite(error) else None for error in result.layer_errors]


def _short(error: float) -> str:
    return f"{error:.0f}" if 10.0 <= error < 1e4 else f"{error:.2g}"


def _fact(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:g}" if isinstance(value, float) else str(value)
