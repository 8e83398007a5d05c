"""Tables and plots of README.md and docs/, made from benchmarks/data/.

A table is between `<!-- table NAME -->` and `<!-- end -->`. NAME is a CSV in benchmarks/data/ or one of `MADE`.
`--check` fails if a page and its data differ.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path

import claims
import harness
import headlines
import reproduce_figures
import reproduce_tables
import stages
import waiting
from modality_integration.app import study

ROOT = Path(__file__).parent.parent
# Page -> the path from it to benchmarks/data, and the tables it must contain.
PAGES = {
    "README.md": ("benchmarks/data", {"headlines"}),
    "docs/benchmarks.md": (
        "../benchmarks/data",
        {"moca_cpu", "moca_spread", "moments_cpu", "sqrtm_cpu", "mir_cpu", "mir_streamed_cpu", "stream_memory"},
    ),
    "docs/demo.md": ("../benchmarks/data", {"demo"}),
    "docs/gpu.md": ("../benchmarks/data", {"claims"}),
    "docs/mir-of-a-saved-model.md": ("../benchmarks/data", {"mir_stages_cpu"}),
    "docs/reproduction.md": ("../benchmarks/data", {f"reproduce_{name}" for name in reproduce_tables.EXPERIMENTS}),
}
BLOCK = re.compile(r"(<!-- table (?P<name>[\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def table(path: Path, folder: str) -> str:
    """One CSV as a Markdown table, device and versions below it; `folder` leads to it from the page."""
    if path.stem in MADE:
        return MADE[path.stem]()
    rows = harness.read_csv(path)
    if path.stem.startswith("reproduce_"):
        lines = reproduce_tables.lines(path.stem.removeprefix("reproduce_"), study.read(path))
    else:
        lines = SPECIAL.get(path.stem, benchmark_lines)(rows)
    one = rows[0]
    lines.append("")
    lines.append(
        f"[{path.name}]({folder}/{path.name}): {one['device']}, {one['threads']} "
        f"thread{'s' * (one['threads'] != '1')}, torch {one['torch']}, Python {one['python']}, commit {one['commit']}."
    )
    if busy := sum(float(row.get("waited") or 0.0) > waiting.BEARABLE for row in rows):
        lines[-1] += f" In {busy} of {len(rows)} rows the process waited for a core that another one had."
    return "\n".join(lines) + "\n"


def headline_table() -> str:
    """Ratios from several CSVs, which docs/benchmarks.md shows whole."""
    return "\n".join(headlines.lines(lambda name: harness.read_csv(harness.DATA / f"{name}.csv"))) + "\n"


def demo_table() -> str:
    """MIR with its standard error and the held-out loss, by training step, from the demo's history.json."""
    history = json.loads((harness.DATA / "demo_history.json").read_text())
    rows = zip(history["steps"], history["mir"], history["error"], history["held_out_loss"], strict=True)
    lines = ["| steps | MIR | held-out loss |", "| ---: | ---: | ---: |"]
    lines += [f"| {step} | {mir:.3f} +- {error:.3f} | {loss:.2f} |" for step, mir, error, loss in rows]
    return "\n".join(lines) + "\n"


def memory_lines(rows: list[dict]) -> list[str]:
    """Memory of a stream, by part."""
    lines = [f"| {rows[0]['case']} | MB |", "| --- | ---: |"]
    return lines + [f"| {row['part']} | {float(row['mb']):.0f} |" for row in rows]


def spread_lines(rows: list[dict]) -> list[str]:
    """Quartiles over processes of a time and of its ratios to two copies, one line per condition."""
    head = ("condition", "processes", "ms", "of a copy", "of a copy past the caches", "waited for a core")
    lines = [f"| {' | '.join(head)} |", "| --- |" + " ---: |" * (len(head) - 1)]
    for row in rows:
        spreads = (
            f"{row[f'{name}_p50']} ({row[f'{name}_p25']} to {row[f'{name}_p75']})"
            for name in ("ms", "of_copy", "of_past_caches")
        )
        cells = (row["condition"], row["processes"], *spreads, f"{float(row['waited']):.0%}")
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def benchmark_lines(rows: list[dict]) -> list[str]:
    """Median, time relative to the case's first rival, share of the floor, error, and peak memory if measured.

    Files without a `peak_mb` column computed the floor of integer and float64 work at the float32 rate, so their floor
    is not shown.
    """
    floors = "peak_mb" in rows[0]
    peaks = any(row.get("peak_mb") is not None for row in rows)
    head = ["case", "rival", "p50 ms", "x first", *["of floor"] * floors, *["peak MB"] * peaks, "error"]
    lines = [f"| {' | '.join(head)} |", "| --- | --- |" + " ---: |" * (len(head) - 2)]
    first: dict[tuple[str, str], float | None] = {}
    for row in rows:
        case, _, peak = row["case"].partition("; peak ")
        key = (row["operation"], case)
        shown = "" if key in first else f"{key[0]}: {key[1]}"
        ms, error, base = row["p50_ms"], row["error"], first.setdefault(key, row["p50_ms"])
        cells = [
            shown,
            f"{row['rival']}{f' (peak {peak})' if peak else ''}",
            "not timed" if ms is None else f"{ms:.0f}" if ms >= 100 else f"{ms:.3g}",
            f"{ms / base:.2f}" if ms and base else "",
            *[f"{row['of_floor']:.2f}" if floors and row["of_floor"] else ""] * floors,
            *["" if row.get("peak_mb") is None else f"{row['peak_mb']:.0f}"] * peaks,
            "" if error is None else f"{error:.0e}" if error else "0",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


# Tables that are not one CSV, by name.
MADE = {"claims": lambda: claims.table(claims.of_cards()), "demo": demo_table, "headlines": headline_table}
# Tables of CSVs with other columns, by name.
SPECIAL = {"stream_memory": memory_lines, "moca_spread": spread_lines, "mir_stages_cpu": stages.lines}


def rendered(page: str, folder: str) -> str:
    """The page with every table regenerated from its CSV."""
    return BLOCK.sub(lambda m: m[1] + table(harness.DATA / f"{m['name']}.csv", folder) + m[3], page)


def plot_iterations(source: Path, target: Path) -> None:
    """Plot the relative error of the trace of the root against iterations: one panel per case, one line per method and
    precision."""
    import csv

    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    cases: dict[str, dict[tuple[str, str], list[tuple[int, float]]]] = {}
    with source.open(newline="") as file:
        for row in csv.DictReader(file):
            lines = cases.setdefault(row["case"], {})
            lines.setdefault((row["method"], row["precision"]), []).append(
                (int(row["iterations"]), float(row["error"]))
            )
    figure, panels = plt.subplots(1, len(cases), figsize=(6 * len(cases), 4.2), sharey=True, squeeze=False)
    for axes, (case, lines) in zip(panels[0], cases.items(), strict=True):
        for (method, precision), points in lines.items():
            place = ("bfloat16", "float16", "float32").index(precision)
            style = {
                "linestyle": "--" if method.startswith("coupled") else "-",
                "marker": "o^s"[place],
                "color": f"C{place}",
            }
            x, y = zip(*((i, e) for i, e in points if e == e and e < 1e6), strict=True)
            axes.semilogy(x, y, label=f"{method}, {precision}", markersize=3, **style)
        axes.set_ylim(1e-10, 1e6)
        axes.set_title(case)
        axes.set_xlabel("iterations")
        axes.grid(alpha=0.3)
    panels[0][0].set_ylabel("relative error of Tr((AB)^1/2)")
    panels[0][0].legend(fontsize="small", loc="upper left")
    figure.tight_layout()
    figure.savefig(target, dpi=130)


def plot_reproduction() -> None:
    """Plot each experiment's CSV into a PNG next to it."""
    for source in sorted(harness.DATA.glob("reproduce_*.csv")):
        name = source.stem.removeprefix("reproduce_")
        reproduce_figures.plot(name, study.read(source), source.with_suffix(".png"))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="change nothing; exit with 1 if a page and a CSV differ")
    flags = parser.parse_args()
    differing = []
    for name, (folder, required) in PAGES.items():
        path = ROOT / name
        before = path.read_text()
        if missing := sorted(required - {block["name"] for block in BLOCK.finditer(before)}):
            print(f"{name}: no `<!-- table NAME -->` of {', '.join(missing)}")
            return 1
        after = rendered(before, folder)
        if after != before:
            differing.append(name)
        if not flags.check:
            path.write_text(after)
    if flags.check:
        for name in differing:
            print(f"{name}: a table differs from its CSV; run `make figures`")
        return int(bool(differing))
    plot_iterations(harness.DATA / "sqrtm_iterations.csv", harness.DATA / "sqrtm_iterations.png")
    plot_reproduction()
    return 0


if __name__ == "__main__":
    sys.exit(main())
