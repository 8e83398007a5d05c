"""MIRResults for people: tables for the terminal, plots as files, two results side by side."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modality_integration.result import MODALITIES, MIRResult, paired_error

if TYPE_CHECKING:
    from rich.table import Table

_TITLE = "Fréchet distance of vision and text tokens, layer by layer"


@dataclass
class Comparison:
    """Two results: b against a.

    difference: MIR of b minus MIR of a (below 0: b's modalities are closer). per_layer: each layer's distance in b over
    that in a; empty where they have different depths. disjoint: whether the proved intervals do not overlap, None
    where a result has no bounds. error: standard error of the difference, None unless both results have one. paired:
    whether it is the jackknife of the differences, group by group, which takes the same samples in both; otherwise it
    is sqrt(error_a^2 + error_b^2), of two results with samples of their own. notes: what makes the two not comparable
    as they stand, or the error weak.
    """

    a: MIRResult
    b: MIRResult
    difference: float
    per_layer: list[float]
    disjoint: bool | None
    error: float | None
    notes: list[str]
    paired: bool = False

    @property
    def z(self) -> float | None:
        """The difference in standard errors; None without them."""
        if self.error is None or self.difference == 0.0:
            return None if self.error is None else 0.0
        return self.difference / self.error if self.error else math.copysign(math.inf, self.difference)

    def verdict(self, names: tuple[str, str] = ("A", "B")) -> str:
        """Whether the two differ, in words: from two standard errors on one "seems" better, from three it is.

        With errors from 5 groups each, two are passed by chance once in 12 times and three once in 59 (Student's t, 8
        degrees of freedom); paired, once in 9 and once in 25 (4 degrees). With fewer groups nothing is said for sure,
        and without an error nothing at all.
        """
        if self.difference == 0:
            words = "the same MIR"
        else:
            lower, higher = (names[1], names[0]) if self.difference < 0 else names
            far = f"MIR is {abs(self.difference):.4f} below {higher}'s"
            if self.z is None:
                words = (
                    f"{lower}'s {far}; whether other samples would say so too takes a standard error of both "
                    "(mir compute --groups 5)"
                )
            else:
                far += f", {abs(self.z):.1f} standard errors of the difference ({self.error:.2g})"
                if abs(self.z) >= 3 and min(map(_groups, (self.a, self.b))) >= FEW_GROUPS:
                    words = f"{lower} blends the modalities better: its {far}"
                elif abs(self.z) >= 2:
                    words = f"{lower} seems to blend the modalities better, more samples would tell: its {far}"
                else:
                    words = f"no difference beyond the standard error: {lower}'s {far}"
        if self.disjoint is not None:
            words += f" (their proved intervals {'do not overlap' if self.disjoint else 'overlap'})"
        return words

    def table(self, names: tuple[str, str] = ("A", "B")) -> Table:
        """A rich table: each layer's distances, their ratio where both are as deep, MIR at the foot."""
        columns = {name: _column(result) for name, result in zip(names, (self.a, self.b), strict=True)}
        if self.per_layer:
            ratios = [f"{ratio:.3f}" for ratio in self.per_layer]
            columns[f"{names[1]} / {names[0]}"] = (ratios, f"{self.difference:+.4f}")
        return _distance_table(columns)


FEW_GROUPS = 5  # below, a standard error is too uncertain to decide by


def compare(a: MIRResult, b: MIRResult, *, paired: bool | None = None) -> Comparison:
    """Set b beside a.

    paired: whether both have the same samples in the same groups; None goes by their settings ("chosen_samples",
    "processes"). ValueError where True cannot be: a result without groups, or with another number of them.
    """
    groups = _groups(a), _groups(b)
    if paired and (0 in groups or groups[0] != groups[1]):
        raise ValueError(f"paired: takes results with as many groups of samples, got {groups[0]} and {groups[1]}")
    if paired is None:
        same = ("chosen_samples", "processes")
        paired = groups[0] == groups[1] > 0 and all(
            a.settings.get(name) is not None and a.settings.get(name) == b.settings.get(name) for name in same
        )
    if paired:
        error = paired_error(a, b)
    else:
        error = None if a.error is None or b.error is None else math.hypot(a.error, b.error)
    disjoint = None
    if a.lower is not None and b.lower is not None:
        disjoint = a.upper < b.lower or b.upper < a.lower  # type: ignore[operator]
    # Two results of -inf are equal, and inf - inf is not a number.
    difference = 0.0 if a.value == b.value else b.value - a.value
    ratios = []
    if len(a.terms) == len(b.terms):
        ratios = [_ratio(y, x) for x, y in zip(a.per_layer, b.per_layer, strict=True)]
    return Comparison(a, b, difference, ratios, disjoint, error, _differing(a, b, paired), paired)


def _differing(a: MIRResult, b: MIRResult, paired: bool) -> list[str]:
    """Notes on what is not alike in a and b, and on errors that say little."""
    known = [{"outliers": r.outliers, "normalize": r.normalize, **r.settings} for r in (a, b)]
    notes = [
        f"{name.replace('_', ' ')} differs: {known[0][name]} and {known[1][name]}"
        for name in known[0]
        if name in known[1] and known[0][name] != known[1][name]
    ]
    if len(a.terms) != len(b.terms):
        notes.append(f"{len(a.terms)} and {len(b.terms)} layers: MIR sums over them, and is compared as it stands")
    if paired:
        notes.append("the same samples in both: the error is that of the differences, group by group")
    for name, result in (("A", a), ("B", b)):
        if 0 < (groups := _groups(result)) < FEW_GROUPS:
            notes.append(f"{name}'s standard error is of {groups} groups of samples: take {FEW_GROUPS} or more")
    return notes


def _groups(result: MIRResult) -> int:
    return len(result.left_out[0]) if result.left_out else 0


def layer_table(result: MIRResult) -> Table:
    """A rich table of one result: each layer's distance and its terms (Eq. 3), tokens kept and out, MIR at the foot."""
    table = _table()
    table.add_column("layer", justify="right", footer="MIR")
    table.add_column("distance", justify="right", no_wrap=True, footer=f"{result.value:.4f}")
    for name in ("mean", "Tr v", "Tr t", "Tr root", "alpha", *(f"{m} -out" for m in MODALITIES)):
        table.add_column(name, justify="right")
    for index, terms in enumerate(result.terms):
        numbers = (terms.mean, terms.trace_vision, terms.trace_text, terms.trace_root, result.alpha[index])
        counts = [f"{result.kept[m][index]} -{result.removed[m][index]}" for m in MODALITIES]
        table.add_row(str(index + 1), _number(terms.distance), *(f"{number:.3g}" for number in numbers), *counts)
    return table


def comparison_table(results: Mapping[str, MIRResult]) -> Table:
    """A rich table of several results: a column each with the layers' distances, MIR at the foot."""
    return _distance_table({name: _column(result) for name, result in results.items()})


def plot_layers(results: MIRResult | Mapping[str, MIRResult], path: str | Path) -> Path:
    """The distance of each layer, a curve a result, as the paper's Figure 2, right; the file's suffix is the format."""
    named = results if isinstance(results, Mapping) else {f"MIR {results.value:.3f}": results}
    figure, axes = _figure()
    drawn = False
    for name, result in named.items():
        layers = range(1, len(result.per_layer) + 1)
        distances = _drawable(result.per_layer)
        drawn = drawn or any(distance > 0 for distance in distances)
        label = name if not isinstance(results, Mapping) else f"{name} (MIR {result.value:.3f})"
        axes.plot(layers, distances, marker="o", markersize=3, linewidth=1.5, label=label)
    if drawn:
        axes.set_yscale("log")
    axes.set_xlabel("decoder layer")
    axes.set_ylabel("Fréchet distance, vision to text")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    return _save(figure, path)


def plot_training(results: Mapping[int, MIRResult | float], loss: Mapping[int, float], path: str | Path) -> Path:
    """MIR (left axis) and loss (right axis) against training steps, as the paper's Figure 4.

    results: step to MIRResult or MIR; loss: step to loss, at steps of its own; may be empty.
    """
    figure, axes = _figure()
    steps = sorted(results)
    color_mir, color_loss = "tab:blue", "tab:orange"
    axes.plot(steps, [float(results[s]) for s in steps], marker="o", markersize=4, color=color_mir, zorder=3)
    axes.set_xlabel("training step")
    axes.set_ylabel("MIR", color=color_mir)
    axes.grid(alpha=0.3)
    if loss:
        right = axes.twinx()
        right.plot(sorted(loss), [loss[s] for s in sorted(loss)], linewidth=1.0, alpha=0.7, color=color_loss)
        right.set_ylabel("loss", color=color_loss)
    return _save(figure, path)


def plot_runs(
    results: Mapping[str, Sequence[Mapping[int, float]]],
    losses: Mapping[str, Sequence[Mapping[int, float]]],
    path: str | Path,
) -> Path:
    """MIR (above) and loss (below) against training steps: several ways to train, each done once or more often.

    Repetitions are thin lines, their mean a thick one; those of one way are measured at the same steps.
    """
    figure, axes = _figure()
    axes.remove()
    above, below = figure.subplots(2, sharex=True)
    for color, name in enumerate(results):
        for part, repetitions, marker in ((above, results[name], "o"), (below, losses[name], None)):
            steps = sorted(repetitions[0])
            drawn = [[values[step] for step in steps] for values in repetitions]
            mean = [sum(at) / len(at) for at in zip(*drawn, strict=True)]
            for values in drawn[: len(drawn) if len(drawn) > 1 else 0]:
                part.plot(steps, values, marker=marker, markersize=2, linewidth=0.6, alpha=0.5, color=f"C{color}")
            part.plot(steps, mean, marker=marker, markersize=4, linewidth=1.6, color=f"C{color}", label=name)
    above.set_ylabel("MIR")
    below.set(xlabel="training step", ylabel="loss")
    for part in (above, below):
        part.grid(alpha=0.3)
    above.legend()
    return _save(figure, path)


def rows_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """A rich table of a study's rows, a column a key."""
    table = _table()
    table.title, table.show_footer = None, False
    for name in rows[0]:
        table.add_column(name.replace("_", " "), justify="left" if isinstance(rows[0][name], str) else "right")
    for row in rows:
        table.add_row(*(_cell(name, value) for name, value in row.items()))
    return table


def plot_study(name: str, rows: Sequence[Mapping[str, Any]], path: str | Path) -> Path:
    """The rows of study `name` (see `study`), drawn; standard errors as bars."""
    figure, axes = _figure()
    errors = None if any(row.get("error") is None for row in rows) else [row["error"] for row in rows]
    if name == "samples":
        counts = sorted({row["samples"] for row in rows})
        values, label = [row["mir"] for row in rows], "MIR, with its standard error"
        bars: Any = errors
        if "set" in rows[0]:
            sets = [[row["mir"] for row in rows if row["samples"] == count] for count in counts]
            values, label = [sum(one) / len(one) for one in sets], f"MIR, mean and range of {len(sets[0])} sets"
            ends = zip(values, sets, strict=True)
            bars = list(zip(*((mean - min(one), max(one) - mean) for mean, one in ends), strict=True))
        axes.errorbar(counts, values, bars, marker="o", capsize=3)
        axes.set_xscale("log")
        axes.set_xticks(counts, [str(count) for count in counts])
        axes.minorticks_off()
        axes.set(xlabel="samples", ylabel=label)
    elif name in ("normalization", "layers"):
        layers = [row["layer"] for row in rows]
        if name == "layers":
            axes.errorbar(layers, _drawable(row["distance"] for row in rows), errors, marker="o", ms=3, capsize=2)
            axes.set_ylabel("Fréchet distance, with its standard error")
        else:
            for key, label in (("normalized", "with text-centric normalisation"), ("unnormalized", "without")):
                drawn = _drawable(row[key] for row in rows)
                axes.plot(layers, [value / drawn[0] for value in drawn], marker="o", markersize=3, label=label)
            axes.set_ylabel("Fréchet distance / that of layer 1")
            axes.legend()
        axes.set_yscale("log")
        axes.set_xlabel("decoder layer")
        axes.xaxis.get_major_locator().set_params(integer=True)
    else:
        labels = [f"{row['images']}\n{row['text']}" if name == "content" else row["template"] for row in rows]
        axes.errorbar(range(len(rows)), [row["mir"] for row in rows], errors, fmt="o", capsize=4)
        axes.set_xticks(range(len(rows)), labels)
        axes.set_ylabel("MIR, with its standard error")
        axes.margins(x=0.2)
    axes.grid(alpha=0.3, which="both")
    return _save(figure, path)


def _drawable(distances: Iterable[float]) -> list[float]:
    # A distance of 0 has no place on a logarithmic axis: a gap.
    return [distance or math.nan for distance in distances]


def _cell(name: str, value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.4f}" if name == "mir" else f"{value:.4g}"
    return str(value)


def _column(result: MIRResult) -> tuple[list[str], str]:
    return [_number(distance) for distance in result.per_layer], f"{result.value:.4f}"


def _distance_table(columns: Mapping[str, tuple[list[str], str]]) -> Table:
    table = _table()
    table.add_column("layer", justify="right", footer="MIR")
    for name, (_, footer) in columns.items():
        table.add_column(name, justify="right", footer=footer)
    for layer, cells in enumerate(zip_longest(*(cells for cells, _ in columns.values()), fillvalue=""), 1):
        table.add_row(str(layer), *cells)
    return table


def _table() -> Table:
    from rich import box
    from rich.table import Table

    return Table(title=_TITLE, show_footer=True, box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1))


def _figure() -> tuple[Any, Any]:
    # A figure with its own canvas: no display is needed, and the caller's pyplot and backend stay as they are.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.0), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.add_subplot()


def _save(figure: Any, path: str | Path) -> Path:
    path = Path(path)
    path = path if path.suffix else path.with_suffix(".png")
    figure.savefig(path)
    return path


def _number(value: float) -> str:
    return f"{value:.4g}"


def _ratio(value: float, of: float) -> float:
    if of == 0.0:
        return 1.0 if value == 0.0 else math.inf
    return value / of
