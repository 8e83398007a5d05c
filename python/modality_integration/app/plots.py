"""Plots of several results, a training and studies, written to files."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from modality_integration.metric import drawing, figures
from modality_integration.metric.result import MIRResult

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

Row = Mapping[str, Any]
Measured = Mapping[int, MIRResult | float] | Sequence[tuple[int, MIRResult | float]]
Losses = Mapping[int, float] | Sequence[tuple[int, float]]

TERMS = {"normalized": "with text-centric normalisation", "unnormalized": "without"}


def plot_layers(results: Mapping[str, MIRResult], path: str | Path) -> Path:
    """Plot the distance of each layer, one curve per result, labelled with its MIR; the suffix sets the format.

    ValueError for an unknown suffix (see `figures.check_suffix`).
    """
    path = figures.check_suffix(path)
    return figures.save_figure(layers_figure(results)[0], path)


def layers_figure(results: Mapping[str, MIRResult]) -> tuple[Figure, Axes]:
    """The figure of `plot_layers` and its axes."""
    return figures.layer_figure({figures.mir_label(result, name): result for name, result in results.items()})


def plot_training(
    results: Measured,
    loss: Losses | None,
    path: str | Path,
    held_out_loss: Losses | None = None,
) -> Path:
    """Plot MIR above losses against training steps, as in the paper's Figure 4; the suffix sets the format.

    results: step to MIR, or to an MIRResult, drawn with its standard error if it has one. loss: step to training loss,
    at its own steps; may be empty. held_out_loss: the same on held-out pictures, with a point per measurement. Each is
    a mapping, or (step, value) pairs as in `MIRCallback.history`. ValueError without results, or for an unknown suffix.
    """
    path = figures.check_suffix(path)
    return figures.save_figure(training_figure(results, loss, held_out_loss), path)


def training_figure(results: Measured, loss: Losses | None = None, held_out_loss: Losses | None = None) -> Figure:
    """The figure of `plot_training`."""
    results = dict(results)
    if not results:
        raise ValueError("results: expected at least one measurement, got none")
    steps = sorted(results)
    values, errors = [float(results[step]) for step in steps], [getattr(results[step], "error", None) for step in steps]
    if not (loss or held_out_loss):
        figure, above = figures.empty_figure()
        panels = [above]
    else:
        figure, panels = figures.stacked_figure((3, 2))
    with figures.paper_style():
        _, with_errors = drawing.curve(panels[0], steps, values, errors, **drawing.look(0))
        handles: list[Artist] = [drawing.error_sign()] if with_errors else []
        panels[0].set_ylabel("MIR")
        if len(panels) > 1:
            handles += _draw_losses(panels[1], dict(loss or {}), dict(held_out_loss or {}))
        panels[-1].set_xlabel("training step")
        drawing.whole_numbers(panels[-1])
        if handles:
            drawing.legend_outside(figure, handles)
    return figure


def plot_study(name: str, rows: Sequence[Row], path: str | Path) -> Path:
    """Plot the rows of study `name` (see `study`) with their standard errors; the suffix sets the format.

    ValueError for an unknown suffix.
    """
    path = figures.check_suffix(path)
    figure, axes = figures.empty_figure()
    draw = {
        "samples": _draw_samples,
        "normalization": _draw_normalization,
        "layers": _draw_layers,
        "content": _draw_content,
        "template": _draw_template,
    }[name]
    with figures.paper_style():
        draw(figure, axes, rows)
    return figures.save_figure(figure, path)


def draw_kinds(
    figure: Figure, axes: Axes, kinds: Sequence[str], series: Mapping[str, Mapping[str, Row]], title: str = ""
) -> None:
    """Plot MIR of each kind as a point with its standard error above the kind's name; several series side by side.

    series: rows by kind for each series name; kinds may be missing. Several series get a legend titled `title`.
    """
    width = min(0.6, 0.12 * (len(series) - 1))
    handles: list[Any] = []
    for index, (name, rows) in enumerate(series.items()):
        shift = width * (index / (len(series) - 1) - 0.5) if len(series) > 1 else 0.0
        at = [place + shift for place, kind in enumerate(kinds) if kind in rows]
        shown = [rows[kind] for kind in kinds if kind in rows]
        errors = [row.get("error") or math.nan for row in shown]
        look = drawing.look(index) | {"linestyle": "none", "markersize": 4, "capsize": 3, "elinewidth": 1.0}
        handles.append(axes.errorbar(at, [row["mir"] for row in shown], errors, label=name, **look))
    axes.set_xlim(-0.5, len(kinds) - 0.5)
    axes.set_ylabel("MIR, with its standard error")
    axes.grid(visible=False, axis="x")
    # A vertical name needs the width of one line of text, and the marks of its kind need theirs.
    figure.set_figwidth(max(figure.get_figwidth(), 0.16 * len(kinds) + 1.0, 0.09 * len(kinds) * len(series) + 1.0))
    drawing.names_on_axis(figure, axes, range(len(kinds)), kinds)
    if len(series) > 1:
        drawing.legend_outside(figure, handles, title)


def _draw_losses(axes: Axes, loss: Mapping[int, float], held_out_loss: Mapping[int, float]) -> list[Line2D]:
    training: dict[str, Any] = {"label": "training loss", "color": drawing.COLORS[6], "linewidth": 0.8}
    held_out: dict[str, Any] = {"label": "held-out loss", **drawing.look(1)}
    axes.set_ylabel("loss, nats per token")
    return [
        drawing.curve(axes, sorted(losses), [float(losses[step]) for step in sorted(losses)], **style)[0]
        for losses, style in ((loss, training), (held_out_loss, held_out))
        if losses
    ]


def _draw_samples(figure: Figure, axes: Axes, rows: Sequence[Row]) -> None:
    counts = sorted({row["samples"] for row in rows})
    if "set" in rows[0]:
        sets = [[row["mir"] for row in rows if row["samples"] == count] for count in counts]
        values = [fmean(one) for one in sets]
        label = f"MIR, mean and range of {max(map(len, sets))} sets"
        bars: Any = [[mean - min(one) for mean, one in zip(values, sets, strict=True)]]
        bars += [[max(one) - mean for mean, one in zip(values, sets, strict=True)]]
    else:
        values, label = [row["mir"] for row in rows], "MIR, with its standard error"
        bars = [row.get("error") or math.nan for row in rows]
    axes.errorbar(counts, values, bars, capsize=3, markersize=4, linewidth=1.4, **drawing.look(0))
    axes.set_xscale("log")
    axes.set(xlabel="samples", ylabel=label)
    drawing.names_on_axis(figure, axes, counts, [str(count) for count in counts])


def _draw_normalization(figure: Figure, axes: Axes, rows: Sequence[Row]) -> None:
    drawn = {label: _over_first([row[key] for row in rows]) for key, label in TERMS.items()}
    drawing.scale_for(axes, [value for values in drawn.values() for value in values])
    layers = [row["layer"] for row in rows]
    handles = [
        drawing.curve(axes, layers, values, label=label, **drawing.look(index))[0]
        for index, (label, values) in enumerate(drawn.items())
    ]
    axes.set_ylabel("Fréchet distance relative to layer 1")
    drawing.layer_axis(axes, len(rows))
    drawing.legend_outside(figure, handles)


def _over_first(distances: Iterable[float]) -> list[float]:
    first, *rest = distances
    return [1.0, *(value / first for value in rest)] if first else [math.nan] * (1 + len(rest))


def _draw_layers(figure: Figure, axes: Axes, rows: Sequence[Row]) -> None:
    distances, errors = [row["distance"] for row in rows], [row.get("error") for row in rows]
    drawing.scale_for(axes, distances)
    _, with_errors = drawing.curve(axes, [row["layer"] for row in rows], distances, errors, **drawing.look(0))
    axes.set_ylabel("Fréchet distance, vision to text")
    drawing.layer_axis(axes, len(rows))
    if with_errors:
        drawing.legend_outside(figure, [drawing.error_sign()])


def _draw_content(figure: Figure, axes: Axes, rows: Sequence[Row]) -> None:
    """Kinds of images on the axis, one series per kind of text; or kinds of text on the axis if only they differ."""
    images, texts = (list(dict.fromkeys(row[key] for row in rows)) for key in ("images", "text"))
    key, other, kinds = ("images", "text", images) if len(images) > 1 or len(texts) == 1 else ("text", "images", texts)
    series: dict[str, dict[str, Row]] = {}
    for row in rows:
        series.setdefault(row[other], {})[row[key]] = row
    draw_kinds(figure, axes, kinds, series, other)
    axes.set_xlabel(f"{key}; {other}: {drawing.plain(next(iter(series)))}" if len(series) == 1 else key)


def _draw_template(figure: Figure, axes: Axes, rows: Sequence[Row]) -> None:
    draw_kinds(figure, axes, [row["template"] for row in rows], {"": {row["template"]: row for row in rows}})
    axes.set_xlabel("template")
