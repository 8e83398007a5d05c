"""The figures of `reproduce.py`, one a table: seeds as thin lines or small points, their mean thick, errors as bars."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from modality_integration.app import report
from modality_integration.metric import display
from reproduce_tables import WORDS

Row = dict[str, Any]


def plot(name: str, rows: Sequence[Row], path: Path) -> Path:
    """Draw the rows of experiment `name`."""
    if name in ("samples", "normalization"):
        return report.plot_study(name, rows, path)
    if name == "content":
        return _cells(rows, path)
    if name == "training":
        return _curves(rows, "step", "training step", path)
    if name == "data":
        return _curves(rows, "images", "captioned pictures, each seen once", path, log=True)
    labels = {"projector": "projector", "moca": "MoCa"}
    return _groups(rows, name, labels[name], path)


def _two_panels() -> tuple[Any, Any, Any]:
    figure, axes = display.empty_figure()
    axes.remove()
    above, below = figure.subplots(2, sharex=True)
    above.set_ylabel("MIR")
    below.set_ylabel("held-out loss,\nnats a token")
    for part in (above, below):
        part.grid(alpha=0.3)
    return figure, above, below


def _curves(rows: Sequence[Row], key: str, label: str, path: Path, *, log: bool = False) -> Path:
    figure, above, below = _two_panels()
    places = sorted({row[key] for row in rows})
    for seed in sorted({row["seed"] for row in rows}):
        own = [row for row in rows if row["seed"] == seed]
        at = [row[key] for row in own]
        errors = [row["error"] or 0.0 for row in own]
        above.errorbar(at, [row["mir"] for row in own], errors, lw=0.6, capsize=2, marker="o", ms=2, alpha=0.6)
        below.plot(at, [row["held_out_loss"] for row in own], lw=0.6, marker="o", ms=2, alpha=0.6)
    for part, name in ((above, "mir"), (below, "held_out_loss")):
        mean = [fmean(row[name] for row in rows if row[key] == place) for place in places]
        part.plot(places, mean, lw=1.8, color="black", label="mean of the seeds")
    if log:
        below.set_xscale("log")
        below.set_xticks(places, [str(place) for place in places])
        below.minorticks_off()
    below.set_xlabel(label)
    above.legend()
    return display.save_figure(figure, path)


def _groups(rows: Sequence[Row], key: str, label: str, path: Path) -> Path:
    figure, above, below = _two_panels()
    kinds = list(dict.fromkeys(row[key] for row in rows))
    for seed in sorted({row["seed"] for row in rows}):  # a line a seed: the same first weights and batches
        own = {row[key]: row for row in rows if row["seed"] == seed}
        at = [place for place, kind in enumerate(kinds) if kind in own]
        of_seed = [own[kinds[place]] for place in at]
        errors = [row["error"] or 0.0 for row in of_seed]
        above.errorbar(at, [row["mir"] for row in of_seed], errors, lw=0.6, capsize=2, marker="o", ms=3, alpha=0.6)
        below.plot(at, [row["held_out_loss"] for row in of_seed], lw=0.6, marker="o", ms=3, alpha=0.6)
    for part, name in ((above, "mir"), (below, "held_out_loss")):
        mean = [fmean(row[name] for row in rows if row[key] == kind) for kind in kinds]
        part.plot(range(len(kinds)), mean, lw=1.8, color="black", label="mean of the seeds")
    below.set_xticks(range(len(kinds)), [WORDS.get(str(kind), str(kind)) for kind in kinds])
    below.margins(x=0.2)
    below.set_xlabel(label)
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
