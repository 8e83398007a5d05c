"""Measure how each difference from the published code changes MIR, on fixed synthetic features.

    python benchmarks/published_differences.py           # write the CSV and the table in the docs
    python benchmarks/published_differences.py --check   # exit code 1 if the docs and the CSV differ

The features have power-law spectra, a large mean in a few columns, a gap between the modalities that shrinks with
depth, and in each modality one token in fifty with an eight times larger norm. Seeds are fixed; no model is needed.
"""

from __future__ import annotations

import csv
import math
import re
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

import harness
from modality_integration import mir, official

NAME = "published_differences"
PAGE = Path(__file__).parent.parent / "docs" / "coming-from-the-published-code.md"
BLOCK = re.compile(rf"(<!-- table {NAME} -->\n).*?(<!-- end -->)", re.DOTALL)
COLUMNS = ("case", "computed", "mir", "difference", *harness.ENVIRONMENT)
CASES = {  # vision tokens, text tokens, d
    "tokens enough: 5760 vision, 2000 text, d 256": (5760, 2000, 256),
    "tokens few: 576 vision, 64 text, d 1024": (576, 64, 1024),
}
LAYERS = 4
Features = tuple[list[Tensor], list[Tensor]]  # vision and text, one float32 tensor (n, d) per layer


def features(vision: int, text: int, d: int) -> Features:
    """Fixed features of every layer."""
    generator = torch.Generator().manual_seed(0)
    spectrum = torch.arange(1, d + 1) ** -0.5
    layers: Features = ([], [])
    for depth in range(1, LAYERS + 1):
        gap = torch.randn(d, generator=generator) * spectrum / depth
        for i, count in enumerate((vision, text)):
            x = torch.randn(count, d, generator=generator) * spectrum.roll(2 * i) + (gap if i == 0 else 0)
            x[:, :: d // 4] += 2.0
            x[::50] *= 8.0
            layers[i].append(x)
    return layers


def published(data: Features, distance: Callable[[Tensor, Tensor], float], outliers: str) -> float:
    """The published loop, in float32 as published: scale, treat outliers, one distance per layer, log10 of the sum."""
    total = 0.0
    for vision, text in zip(*data, strict=True):
        alpha = 1 / text.norm(dim=-1).mean()
        total += distance(*(_treated(alpha * x, outliers) for x in (vision, text)))
    return math.log10(total) if total > 0 else math.nan


def _treated(x: Tensor, outliers: str) -> Tensor:
    if outliers == "median":
        return official.replace_outliers_with_median_l2(x.clone())
    norm = x.norm(dim=-1)
    return x[(norm - norm.median()).abs() <= 3 * norm.std()]


def accurate(a: Tensor, b: Tensor) -> float:
    """The published accurate mode: the real part of scipy's root of a float32 product."""
    from scipy.linalg import sqrtm

    cov_a, cov_b = torch.cov(a.T), torch.cov(b.T)
    root = torch.from_numpy(sqrtm((cov_a @ cov_b).numpy()).real)
    return float((a.mean(0) - b.mean(0)).square().sum() + cov_a.trace() + cov_b.trace() - 2 * root.trace())


VARIANTS: dict[str, Callable[[Features], float]] = {
    "ours: outliers removed, float64 root": lambda data: mir(*data).value,
    'ours, `outliers="median"`': lambda data: mir(*data, outliers="median").value,
    'ours, `outliers="none"`': lambda data: mir(*data, outliers="none").value,
    "published fast mode (closed form), outliers removed": lambda data: published(
        data, official.fid_of_published_fast_mode, "remove"
    ),
    "published fast mode (closed form), outliers to medians (its default)": lambda data: published(
        data, official.fid_of_published_fast_mode, "median"
    ),
    "published accurate mode (scipy, float32 product), outliers removed": lambda data: published(
        data, accurate, "remove"
    ),
    "published accurate mode, outliers to medians": lambda data: published(data, accurate, "median"),
}


def rows() -> list[dict]:
    """One row per case and way of computing, with the difference from the first way."""
    found = []
    for case, shape in CASES.items():
        data = features(*shape)
        values = {name: compute(data) for name, compute in VARIANTS.items()}
        ours = next(iter(values.values()))
        for name, value in values.items():
            row = {"case": case, "computed": name, "mir": value, "difference": value - ours}
            found.append(row | harness.environment_columns())
    return found


def table(rows: list[dict]) -> str:
    """The rows of a CSV as Markdown."""
    lines = ["| features | computed by | MIR | difference |", "| --- | --- | ---: | ---: |"]
    before = ""
    for row in rows:
        difference = float(row["difference"])
        shown = "" if row["case"] == before else row["case"]
        shift = "" if row["computed"] == next(iter(VARIANTS)) else f"{difference:+.1e}"
        lines.append(f"| {shown} | {row['computed']} | {float(row['mir']):.4f} | {shift} |")
        before = row["case"]
    one = rows[0]
    lines.append(
        f"\n`benchmarks/data/{NAME}.csv`: {one['device']}, {one['threads']} thread{'s' * (one['threads'] != '1')}, "
        f"torch {one['torch']}, Python {one['python']}, commit {one['commit']}."
    )
    return "\n".join(lines) + "\n"


def rendered(page: str) -> str:
    """The docs page with its table from the CSV."""
    with (harness.DATA / f"{NAME}.csv").open(newline="") as file:
        found = list(csv.DictReader(file))
    return BLOCK.sub(lambda m: m[1] + table(found) + m[2], page)


def main() -> int:
    if sys.argv[1:] not in ([], ["--check"]):
        print(__doc__)
        return 2
    if sys.argv[1:]:
        same = rendered(PAGE.read_text()) == PAGE.read_text()
        print(f"{PAGE.name}: its table {'matches' if same else 'differs from'} its CSV")
        return int(not same)
    with (harness.DATA / f"{NAME}.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows({k: (f"{v:.9g}" if isinstance(v, float) else v) for k, v in row.items()} for row in rows())
    PAGE.write_text(rendered(PAGE.read_text()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
