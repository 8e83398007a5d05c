"""The figures of `reproduce.py`, one a table: seeds as thin lines or small points, their mean thick, errors as bars."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from modality_integration.app import report
from modality_integration.metric import display
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
        return report.plot_study(name, rows, path)
    if name == "content":
        return _cells(rows, path)
    key, _ = COMPARED[name]
    return _runs(rows, key, LABELS[name], path)


def _runs(rows: Sequence[Row], key: str, label: str, path: Path) -> Path:
    """MIR above and the held-out loss below, against the values of `key`: numbers as they are, words side by side."""
    figure, axes = display.empty_figure()
    axes.remove()
    above, below = figure.subplots(2, sharex=True)
    values = list(dict.fromkeys(row[key] for row in rows))
    numbers = isinstance(values[0], int)
    place = {value: value if numbers else index for index, value in enumerate(values)}
    for seed in sorted({row["seed"] for row in rows}):  # a line a seed: the same first weights and batches
        own = [row for row in rows if row["seed"] == seed]
        at, errors = [place[row[key]] for row in own], [row["error"] or 0.0 for row in own]
        above.errorbar(at, [row["mir"] for row in own], errors, lw=0.6, capsize=2, marker="o", ms=2, alpha=0.6)
        below.plot(at, [row["held_out_loss"] for row in own], lw=0.6, marker="o", ms=2, alpha=0.6)
    for part, name in ((above, "mir"), (below, "held_out_loss")):
        mean = [fmean(row[name] for row in rows if row[key] == value) for value in values]
        part.plot(list(place.values()), mean, lw=1.8, color="black", label="mean of the seeds")
        part.grid(alpha=0.3)
    if key == "images":
        below.set_xscale("log")
        below.minorticks_off()
    if key != "step":
        below.set_xticks(list(place.values()), [WORDS.get(str(value), str(value)) for value in values])
    if not numbers:
        below.margins(x=0.2)
    above.set_ylabel("MIR")
    below.set(xlabel=label, ylabel="held-out loss,\nnats a token")
    above.legend()
    return display.save_figure(figure, path)


def _cells(rows: Sequence[Row], path: Path) -> Path:
    """Contents on the left; templates on an axis of their own, since an attention sink dwarfs what contents do."""
    chat = [row for row in rows if row["template"] == "chat"]
    plain = [row for row in rows if row["template"] != "chat"]
    same = [row for row in chat if all(row[key] == plain[0][key] for key in ("images", "text"))]
    figure, axes = display.empty_figure()
    axes.remove()
    parts = figure.subplots(1, 2, width_ratios=[7, 2])
    for part, shown, named in ((parts[0], chat, ("images", "text")), (parts[1], same + plain, ("template",))):
        part.errorbar(
            range(len(shown)), [r["mir"] for r in shown], [r["error"] or 0.0 for r in shown], fmt="o", capsize=4
        )
        bare = [(place, r["mir_without_sinks"]) for place, r in enumerate(shown) if r["mir_without_sinks"] is not None]
        if bare:
            part.plot(*zip(*bare, strict=True), "x", color="C1", label="without sinks")
            part.legend(fontsize=7)
        part.set_xticks(range(len(shown)), ["\n".join(r[key] for key in named) for r in shown], fontsize=5.5)
        part.margins(x=0.15)
        part.grid(alpha=0.3)
    parts[0].set_ylabel("MIR, with its standard error")
    return display.save_figure(figure, path)
