"""The figures of `reproduce.py`, one per table: seeds as thin lines or small points, their mean as a thick line,
standard errors as bars."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from modality_integration.app import plots
from modality_integration.metric import drawing, figures
from reproduce_tables import COMPARED, WORDS

Row = dict[str, Any]

LABELS = {
    "training": "training step",
    "data": "captioned pictures, each seen once",
    "projector": "projector",
    "moca": "MoCa",
}


def plot(name: str, rows: Sequence[Row], path: Path) -> Path:
    """Draw the rows of experiment `name`."""
    if name in ("samples", "normalization"):
        return plots.plot_study(name, rows, path)
    if name == "content":
        return _cells(rows, path)
    key, _ = COMPARED[name]
    return _runs(rows, key, LABELS[name], path)


def _runs(rows: Sequence[Row], key: str, label: str, path: Path) -> Path:
    """MIR above and the held-out loss below, against the values of `key`; values that are words are evenly spaced."""
    figure, (above, below) = figures.stacked_figure((1, 1))
    values = list(dict.fromkeys(row[key] for row in rows))
    numbers = isinstance(values[0], int)
    place = {value: value if numbers else index for index, value in enumerate(values)}
    for index, seed in enumerate(
        sorted({row["seed"] for row in rows})
    ):  # one line per seed, which fixes the initial weights and the batches
        own = [row for row in rows if row["seed"] == seed]
        at, errors = [place[row[key]] for row in own], [row["error"] or 0.0 for row in own]
        look = drawing.look(index) | {"lw": 0.8, "markersize": 3, "label": f"seed {seed}"}
        above.errorbar(at, [row["mir"] for row in own], errors, capsize=2, elinewidth=0.8, **look)
        below.plot(at, [row["held_out_loss"] for row in own], **look)
    for part, name in ((above, "mir"), (below, "held_out_loss")):
        mean = [fmean(row[name] for row in rows if row[key] == value) for value in values]
        part.plot(list(place.values()), mean, lw=1.8, color="black", label="mean of the seeds")
    above.set_ylabel("MIR")
    below.set(xlabel=label, ylabel="held-out loss,\nnats per token")
    if key == "images":
        below.set_xscale("log")
    if not numbers:
        below.margins(x=0.2)
    with figures.paper_style():
        if key != "step":
            names = [WORDS.get(str(value), str(value)) for value in values]
            drawing.names_on_axis(figure, below, list(place.values()), names)
        drawing.legend_outside(figure, below.get_legend_handles_labels()[0])
    return figures.save_figure(figure, path)


def _cells(rows: Sequence[Row], path: Path) -> Path:
    """Contents on the left; templates on a separate axis, because an attention sink dwarfs the effect of contents."""
    chat = [row for row in rows if row["template"] == "chat"]
    plain = [row for row in rows if row["template"] != "chat"]
    same = [row for row in chat if all(row[key] == plain[0][key] for key in ("images", "text"))]
    figure, axes = figures.empty_figure()
    axes.remove()
    handles = []
    with figures.paper_style():
        parts = figure.subplots(1, 2, width_ratios=[7, 2])
        for part, shown in ((parts[0], chat), (parts[1], same + plain)):
            figures.tidy(part)
            errors = [row["error"] or 0.0 for row in shown]
            look = drawing.look(0) | {"linestyle": "none", "markersize": 4, "capsize": 4}
            part.errorbar(range(len(shown)), [row["mir"] for row in shown], errors, **look)
            without = [row["mir_without_sinks"] for row in shown]
            bare = [(place, mir) for place, mir in enumerate(without) if mir is not None]
            if bare:
                look = drawing.look(1) | {"linestyle": "none", "markersize": 4, "label": "without sinks"}
                handles = part.plot(*zip(*bare, strict=True), **look)
            part.margins(x=0.15)
        parts[0].set_ylabel("MIR, with its standard error")
        for part, shown, named in ((parts[0], chat, ("images", "text")), (parts[1], same + plain, ("template",))):
            names = [", ".join(row[key] for key in named) for row in shown]
            drawing.names_on_axis(figure, part, range(len(shown)), names)
        if handles:
            drawing.legend_outside(figure, handles)
    return figures.save_figure(figure, path)
