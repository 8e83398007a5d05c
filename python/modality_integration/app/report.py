"""Several results and studies for people: tables for the terminal, plots as files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modality_integration.metric import display
from modality_integration.metric.result import MIRResult

if TYPE_CHECKING:
    from rich.table import Table


def write_result(result: MIRResult, out: Path) -> None:
    """mir.json and layers.png into the folder `out`, which is made where it is missing."""
    out.mkdir(parents=True, exist_ok=True)
    result.to_json(out / "mir.json")
    result.plot(out / "layers.png")


def comparison_table(results: Mapping[str, MIRResult]) -> Table:
    """A rich table of several results: a column each with the layers' distances, MIR at the foot."""
    return display.layer_table(*display.distance_columns(results))


def plot_layers(results: Mapping[str, MIRResult], path: str | Path) -> Path:
    """The distance of each layer, a curve a result, named with its MIR."""
    return display.layer_curves({f"{name} (MIR {r.value:.3f})": r for name, r in results.items()}, path)


def plot_training(
    results: Mapping[int, MIRResult | float],
    loss: Mapping[int, float],
    path: str | Path,
    held_out_loss: Mapping[int, float] | None = None,
) -> Path:
    """MIR (left axis) and loss (right axis) against training steps, as the paper's Figure 4.

    results: step to MIRResult, drawn with its standard error where it has one, or to MIR; loss: step to the training
    loss, at steps of its own; may be empty. held_out_loss: the same of pictures held out, points where it was measured.
    """
    figure, axes = display.empty_figure()
    steps = sorted(results)
    color_mir, color_loss = "tab:blue", "tab:orange"
    errors = [getattr(results[s], "error", None) or 0.0 for s in steps]
    bars = errors if any(errors) else None
    values = [float(results[s]) for s in steps]
    axes.errorbar(steps, values, bars, marker="o", markersize=4, capsize=3, color=color_mir, label="MIR")
    axes.set_xlabel("training step")
    axes.set_ylabel("MIR, with its standard error" if bars else "MIR", color=color_mir)
    axes.grid(alpha=0.3)
    if loss or held_out_loss:
        right = axes.twinx()
        # MIR is drawn over the loss, whose axis would otherwise cover it.
        axes.set_zorder(right.get_zorder() + 1)
        axes.patch.set_visible(False)
        training: dict[str, Any] = {"label": "training loss", "linewidth": 0.8, "alpha": 0.6}
        held_out: dict[str, Any] = {"label": "held-out loss", "marker": "s", "markersize": 4, "linestyle": "--"}
        for drawn, style in ((loss, training), (held_out_loss, held_out)):
            if drawn:
                right.plot(sorted(drawn), [drawn[s] for s in sorted(drawn)], color=color_loss, **style)
        right.set_ylim(bottom=0.0)
        right.set_ylabel("loss, nats a token", color=color_loss)
        curves = [*axes.get_legend_handles_labels()[0], *right.get_legend_handles_labels()[0]]
        axes.legend(handles=curves, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3, frameon=False)
    return display.save_figure(figure, path)


def rows_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """A rich table of a study's rows, a column a key."""
    table = display.empty_table()
    table.title, table.show_footer = None, False
    for name in rows[0]:
        table.add_column(name.replace("_", " "), justify="left" if isinstance(rows[0][name], str) else "right")
    for row in rows:
        table.add_row(*(_cell(name, value) for name, value in row.items()))
    return table


def plot_study(name: str, rows: Sequence[Mapping[str, Any]], path: str | Path) -> Path:
    """The rows of study `name` (see `study`), drawn; standard errors as bars."""
    figure, axes = display.empty_figure()
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
            drawn = display.on_log_axis(row["distance"] for row in rows)
            axes.errorbar(layers, drawn, errors, marker="o", ms=3, capsize=2)
            axes.set_ylabel("Fréchet distance, with its standard error")
        else:
            for key, label in (("normalized", "with text-centric normalisation"), ("unnormalized", "without")):
                drawn = display.on_log_axis(row[key] for row in rows)
                axes.plot(layers, [value / drawn[0] for value in drawn], marker="o", markersize=3, label=label)
            axes.set_ylabel("Fréchet distance / that of layer 1")
            axes.legend()
        axes.set_yscale("log")
        axes.set_xlabel("decoder layer")
        display.whole_layers(axes)
    else:
        labels = [f"{row['images']}\n{row['text']}" if name == "content" else row["template"] for row in rows]
        axes.errorbar(range(len(rows)), [row["mir"] for row in rows], errors, fmt="o", capsize=4)
        axes.set_xticks(range(len(rows)), labels)
        axes.set_ylabel("MIR, with its standard error")
        axes.margins(x=0.2)
    axes.grid(alpha=0.3, which="both")
    return display.save_figure(figure, path)


def _cell(name: str, value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.4f}" if name == "mir" else f"{value:.4g}"
    return str(value)
