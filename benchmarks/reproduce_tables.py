"""The tables of docs/reproduction.md: the rows of `reproduce.py` by seed, each with the figure its claim rests on."""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt
from statistics import fmean, stdev
from typing import Any

Row = dict[str, Any]

# Experiment -> the column that its runs differ in, and its heading.
COMPARED = {
    "data": ("images", "pictures"),
    "training": ("step", "step"),
    "projector": ("projector", "projector"),
    "moca": ("moca", "MoCa"),
}
EXPERIMENTS = (*COMPARED, "content", "samples", "normalization")
MEASURED = {"mir": "MIR", "held_out_loss": "held-out loss"}
WORDS = {"True": "with", "False": "without", "linear": "linear", "mlp2": "two layers", "mlp4": "four layers"}


def lines(name: str, rows: Sequence[Row]) -> list[str]:
    """The rows of experiment `name` as lines of Markdown."""
    if name == "content":
        return [*_content(rows), "", _spread(rows)]
    if name == "samples":
        return _samples(rows)
    if name == "normalization":
        return _normalization(rows)
    key, heading = COMPARED[name]
    table = _by_seed(rows, key, heading)
    if name == "moca":
        return [*table, _difference(rows)]
    return table if name == "projector" else [*table, "", _follows(rows, key)]


def _by_seed(rows: Sequence[Row], key: str, heading: str) -> list[str]:
    """One row per value of `key`: MIR and the held-out loss of each seed, and their means."""
    seeds = sorted({row["seed"] for row in rows})
    titles = [f"{title}, {column}" for title in MEASURED.values() for column in (*(f"seed {s}" for s in seeds), "mean")]
    side = "---:" if isinstance(rows[0][key], int) else "---"
    made = [f"| {heading} | {' | '.join(titles)} |", f"| {side} |{' ---: |' * len(titles)}"]
    for value in dict.fromkeys(row[key] for row in rows):
        own = [row for row in rows if row[key] == value]
        cells = [WORDS.get(str(value), str(value))]
        for column in MEASURED:
            of_seed = {row["seed"]: _cell(row, column) for row in own}
            cells += [*(of_seed.get(seed, "") for seed in seeds), f"{fmean(row[column] for row in own):.3f}"]
        made.append(f"| {' | '.join(cells)} |")
    return made


def _cell(row: Row, column: str) -> str:
    value = f"{row[column]:.3f}"
    return f"{value} +- {row['error']:.3f}" if column == "mir" and row["error"] is not None else value


def _difference(rows: Sequence[Row]) -> str:
    """With MoCa minus without, seed by seed; the standard error of the mean comes from the seeds' differences."""
    seeds = sorted({row["seed"] for row in rows})
    at = {(str(row["moca"]), row["seed"]): row for row in rows}
    cells = ["difference"]
    for column in MEASURED:
        apart = [at["True", seed][column] - at["False", seed][column] for seed in seeds]
        error = f" +- {stdev(apart) / sqrt(len(apart)):.3f}" if len(apart) > 1 else ""
        cells += [*(f"{one:+.3f}" for one in apart), f"{fmean(apart):+.3f}{error}"]
    return f"| {' | '.join(cells)} |"


def _follows(rows: Sequence[Row], key: str) -> str:
    """Rank correlation of MIR with the held-out loss within each seed; seeds are measured on different pictures."""
    from scipy.stats import spearmanr

    found, count = [], 0
    for seed in sorted({row["seed"] for row in rows}):
        own = [row for row in rows if row["seed"] == seed]
        count = len(own)
        rank = spearmanr([row["mir"] for row in own], [row["held_out_loss"] for row in own]).statistic
        found.append(f"{rank:+.2f} (seed {seed})")
    what = "sizes" if key == "images" else "steps"
    return f"Rank correlation (Spearman) of MIR with the held-out loss over the {count} {what}: {', '.join(found)}."


def _content(rows: Sequence[Row]) -> list[str]:
    made = ["| pictures | text | template | MIR | without sinks |", "| --- | --- | --- | ---: | ---: |"]
    for row in rows:
        bare = "" if row["mir_without_sinks"] is None else f"{row['mir_without_sinks']:.3f}"
        made.append(f"| {row['images']} | {row['text']} | {row['template']} | {_cell(row, 'mir')} | {bare} |")
    return made


def _spread(rows: Sequence[Row]) -> str:
    """The range over kinds of pictures and over kinds of text, compared with the standard errors."""
    chat = [row for row in rows if row["template"] == "chat"]
    pictures = [row["mir"] for row in chat if row["images"] != "all"]
    texts = [row["mir"] for row in chat if row["images"] == "all"]
    errors = [row["error"] for row in chat if row["error"] is not None]
    against = f"; the largest standard error of these is {max(errors):.3f}" if errors else ""
    return (
        f"MIR spans {max(pictures) - min(pictures):.3f} over the kinds of pictures and "
        f"{max(texts) - min(texts):.3f} over the kinds of text{against}."
    )


def _samples(rows: Sequence[Row]) -> list[str]:
    made = ["| samples | vision tokens | text tokens | MIR |", "| ---: | ---: | ---: | ---: |"]
    for row in rows:
        made.append(f"| {row['samples']} | {row['vision_tokens']} | {row['text_tokens']} | {_cell(row, 'mir')} |")
    return made


def _normalization(rows: Sequence[Row]) -> list[str]:
    """The shape of both curves: first layer, smallest and largest distance, last layer."""
    made = [f"| normalisation | layer 1 | least | greatest | layer {rows[-1]['layer']} |", f"| --- |{' ---: |' * 4}"]
    for column, word in (("normalized", "with"), ("unnormalized", "without")):
        least, greatest = min(rows, key=lambda row: row[column]), max(rows, key=lambda row: row[column])
        ends = [f"{row[column]:.3g} (layer {row['layer']})" for row in (least, greatest)]
        made.append(f"| {word} | {rows[0][column]:.3g} | {' | '.join(ends)} | {rows[-1][column]:.3g} |")
    return made
