"""Training curves and the studies of `mir compute`."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from modality_integration.app.report.charts import Point, Series, chart
from modality_integration.app.report.runs import History, Study
from modality_integration.app.report.sections import (
    Interval,
    Picture,
    Row,
    Table,
    intervals,
    shown,
    with_error_ends,
)
from modality_integration.metric.standard_error import error_cell


@dataclass
class StudyPart:
    """A study of a run: its table, and a chart or intervals for the studies that can be drawn."""

    title: str
    table: Table
    picture: Picture | None = None
    intervals: list[Interval] = field(default_factory=list)


def training_pictures(history: History) -> list[Picture]:
    """MIR and the loss over training."""
    points = [
        with_error_ends(step, mir, error, f"step {step}: {shown(mir, error)}")
        for step, mir, error in zip(history.steps, history.mir, history.error, strict=True)
    ]
    mir = chart(
        [Series(points, band=False)],
        x_label="training step",
        y_label="MIR",
        text=_sentence("MIR by step", points),
        whole_x=True,
    )
    pictures = [Picture("MIR during training, with its standard error", mir)]
    series, legend = [], []
    if history.loss:
        series.append(Series([Point(step, loss) for step, loss in history.loss], 1, "thin"))
        legend.append(("training loss", 1, "thin"))
    if history.held_out_loss:
        held_out = zip(history.steps, history.held_out_loss, strict=True)
        series.append(Series([Point(s, x, text=f"step {s}: {x:.4g}") for s, x in held_out], 2))
        legend.append(("held-out loss", 2, "line"))
    if series:
        text = " ".join(
            _sentence(f"{name} by step", one.points) for (name, *_), one in zip(legend, series, strict=True)
        )
        loss = chart(series, x_label="training step", y_label="loss", text=text, whole_x=True)
        pictures.append(Picture("Loss during training", loss, legend))
    return pictures


def training_table(history: History, label: str) -> Table:
    """MIR and the held-out loss at each probe."""
    losses = history.held_out_loss or [math.nan] * len(history.steps)
    rows = [
        Row(str(step), [f"{mir:.4f}", error_cell(error), "" if math.isnan(x) else f"{x:.4g}"])
        for step, mir, error, x in zip(history.steps, history.mir, history.error, losses, strict=True)
    ]
    return Table(f"Training, {label}", ["step", "MIR", "standard error", "held-out loss"], rows)


def study_part(study: Study, label: str) -> StudyPart:
    """The table of a study, drawn as `mir compute --study` draws it if it has the expected columns."""
    title = f"Study of {study.name}"
    caption = f"{title}, {label}"
    names = {"mir": "MIR", "error": "standard error"}
    columns = [names.get(name, name.replace("_", " ")) for name in study.columns]
    cells = [[_cell(name, cell) for name, cell in zip(study.columns, row, strict=True)] for row in study.rows]
    part = StudyPart(title, Table(caption, columns, [Row(row[0], row[1:]) for row in cells]))
    rows = [dict(zip(study.columns, row, strict=True)) for row in study.rows]
    draw = _STUDIES.get(study.name)
    if rows and draw is not None:
        try:
            draw(part, rows)
        except (KeyError, OverflowError, ValueError):  # an unrelated table of that name: show only the table
            part.picture = Picture(f"{title}: not drawn because its columns are not those of this study", None)
    return part


def _draw_samples(part: StudyPart, rows: Sequence[Mapping[str, str]]) -> None:
    by_count: dict[int, list[tuple[float, float | None]]] = {}
    for row in rows:
        by_count.setdefault(int(row["samples"]), []).append((float(row["mir"]), _optional(row.get("error", ""))))
    points = []
    for count, measured in sorted(by_count.items()):
        values = [value for value, _ in measured]
        mean = math.fsum(values) / len(values)
        ends = Point(count, mean, min(values), max(values))
        point = ends if len(values) > 1 else with_error_ends(count, mean, measured[0][1])
        points.append(point._replace(text=f"{count} samples: {mean:.4f}"))
    title = "MIR by samples, " + ("mean and range of the sets" if "set" in rows[0] else "with its standard error")
    curve = [Series(points, band=False)]
    drawn = chart(curve, x_label="samples", y_label="MIR", text=_sentence(title, points), log_x=True, whole_x=True)
    part.picture = Picture(title, drawn)


def _draw_layers(part: StudyPart, rows: Sequence[Mapping[str, str]]) -> None:
    values = [(int(row["layer"]), float(row["distance"]), _optional(row.get("error", ""))) for row in rows]
    points = [with_error_ends(layer, d, error, f"layer {layer}: {d:.4g}") for layer, d, error in values]
    part.picture = _by_layer("Fréchet distance by layer, with its standard error", [("", points)])


def _draw_normalization(part: StudyPart, rows: Sequence[Mapping[str, str]]) -> None:
    curves = []
    for key, name in (("normalized", "with text-centric normalisation"), ("unnormalized", "without")):
        values = [(int(row["layer"]), float(row[key])) for row in rows]
        first = values[0][1] or math.nan
        points = [Point(k, d / first, text=f"{name}, layer {k}: {d / first:.4g}") for k, d in values]
        curves.append((name, points))
    part.picture = _by_layer("Fréchet distance relative to layer 1", curves)


def _draw_kinds(part: StudyPart, rows: Sequence[Mapping[str, str]]) -> None:
    names = [row["template"] if "template" in row else f"{row['images']} with {row['text']}" for row in rows]
    part.intervals = intervals(
        (name, 0, float(row["mir"]), _optional(row.get("error", ""))) for name, row in zip(names, rows, strict=True)
    )


_STUDIES: dict[str, Callable[[StudyPart, Sequence[Mapping[str, str]]], None]] = {
    "samples": _draw_samples,
    "normalization": _draw_normalization,
    "layers": _draw_layers,
    "content": _draw_kinds,
    "template": _draw_kinds,
}


def _by_layer(title: str, curves: Sequence[tuple[str, list[Point]]]) -> Picture:
    series = [Series(points, color) for color, (_, points) in enumerate(curves)]
    text = " ".join(_sentence(name or title, points) for name, points in curves)
    drawn = chart(series, x_label="decoder layer", y_label="Fréchet distance", text=text, log_y=True, whole_x=True)
    legend = [(name, color, "line") for color, (name, _) in enumerate(curves) if name]
    return Picture(title, drawn, legend)


def _sentence(name: str, points: Sequence[Point]) -> str:
    first, last = points[0], points[-1]
    return f"{name}: {first.y:.4g} at {first.x:g}, {last.y:.4g} at {last.x:g}."


def _cell(column: str, cell: str) -> str:
    """A cell with non-integer numbers rounded to meaningful digits."""
    try:
        number = float(cell)
    except ValueError:
        return cell
    if column == "mir":
        return f"{number:.4f}"
    return cell if cell.lstrip("-").isdigit() else f"{number:.4g}"


def _optional(cell: str) -> float | None:
    return float(cell) if cell else None
