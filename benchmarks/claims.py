"""The project's performance claims on a GPU, each with the benchmark that measures it and the figure it requires.

    python benchmarks/claims.py                  # verdicts from the GPU CSVs in benchmarks/data/
    python benchmarks/claims.py DIR/*.csv        # verdicts from other CSVs

A claim holds or fails by medians measured side by side in one run on one card, together with the error. A claim that
was not measured, or whose error exceeds its limit, does not hold. docs/gpu.md shows the table.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import harness
from gpu_suite_times import Bench

# By the name of the CSV, the most important first. Compilers and eigenvalues are skipped: they take minutes on a GPU.
BENCHES = {
    "claim_moments": Bench(
        "moments", "--seconds 0.3 --tokens 8192 --d 4096 --skip compile torch.cov recipe", "--tokens 40 --d 32", 16
    ),
    "claim_moca": Bench(
        "moca",
        '--seconds 0.3 --operations "moca forward" "moca backward" "add_moca_rms_norm forward" --skip compile indexing',
        '--tokens 32 --hidden 64 --operations "moca forward" "moca backward" "add_moca_rms_norm forward"',
        20,
    ),
    "claim_polar_512": Bench(
        "sqrtm",
        "--seconds 0.2 --operations polar --d 64 --batch 512 --skip compile",
        "--operations polar --d 8 --batch 3",
        12,
    ),
    "claim_polar_256": Bench(
        "sqrtm",
        "--seconds 0.2 --operations polar --d 256 --batch 256 --skip compile",
        "--operations polar --d 12 --batch 2",
        14,
    ),
    "claim_trace": Bench(
        "sqrtm",
        "--seconds 0.2 --d 4096 --batch 33 --spectra i^-1\\ and\\ i^-1.5 --skip linalg torchmetrics published compile",
        "--d 20 --batch 2 --spectra i^-1\\ and\\ i^-1.5 --skip torchmetrics published compile scipy LAPACK",
        40,
    ),
    "claim_mir": Bench(
        "mir",
        "--seconds 0.3 --layers 32 --hidden 4096 --samples 100 --vision 576 --text 64 --checked 1 "
        "--skip lists eigh torchmetrics published",
        "--layers 2 --hidden 16 --samples 2 --vision 20 --text 12 --checked 1 --skip lists eigh torchmetrics published",
        30,
    ),
    "claim_published": Bench(
        "mir",
        "--seconds 0.3 --layers 2 --hidden 4096 --samples 20 --vision 576 --text 64 --checked 1 "
        "--skip lists eigh torchmetrics scipy",
        "--layers 1 --hidden 16 --samples 2 --vision 20 --text 12 --skip lists eigh torchmetrics scipy",
        20,
    ),
}


class Claim(NamedTuple):
    """A sentence and the rows that decide it.

    cases: regular expressions for the case of a row; each must match, and the worst case counts.  tiny: the same for a
    dry run.  ours: prefix of our rivals' names; the fastest correct one counts.  other: prefixes of the names to
    compare with; the first that has a row counts.  figure: a key of FIGURES.  target: the required value.  error: the
    largest error of ours.
    """

    name: str
    sentence: str
    bench: str
    operation: str
    cases: tuple[str, ...]
    tiny: tuple[str, ...]
    ours: str
    other: str
    figure: str
    target: float
    error: float


# For each figure: whether more is better, its format, and its value from our row and the other's.
FIGURES: dict[str, tuple[bool, str, Callable[[dict, dict], float]]] = {
    "times as fast": (True, "{:.2f} times as fast", lambda ours, other: other["p50_ms"] / ours["p50_ms"]),
    "as long": (False, "{:.3f} times as long", lambda ours, other: ours["p50_ms"] / other["p50_ms"]),
    "of the bandwidth": (True, "{:.0%} of the bandwidth", lambda ours, other: ours["of_floor"]),
    "seconds": (False, "{:.3g} s", lambda ours, other: ours["p50_ms"] / 1e3),
}

CLAIMS = (
    Claim(
        "covariance", "mean and covariance of bf16 (8192, 4096) against cuBLAS's X^T X alone with a float32 result",
        "claim_moments", "covariance", (r"\(8192, 4096\)",), (r"\(40, 32\)",), "ours, auto", "torch.addmm",
        "times as fast", 1.5, 1e-5,
    ),
    Claim(
        "moca forward", "MoCa forward, (16384, 4096) bf16, against a copy of the same bytes",
        "claim_moca", "moca forward", (r"\(16384, 4096\)",), (r"\(32, 64\)",), "ours", "copy",
        "of the bandwidth", 0.90, 1e-2,
    ),
    Claim(
        "moca backward", "MoCa backward with the gradients of scale and shift, against a copy of the same bytes",
        "claim_moca", "moca backward", (r"\(16384, 4096\)",), (r"\(32, 64\)",), "ours", "copy",
        "of the bandwidth", 0.85, 1e-2,
    ),
    Claim(
        "fused norm",
        "add + MoCa + RMSNorm against an add + RMSNorm of the same bytes: Liger's where installed, else a plain kernel",
        "claim_moca", "add_moca_rms_norm forward", (r"\(16384, 4096\)",), (r"\(32, 64\)",), "ours",
        r"Liger|add \+ RMSNorm, no MoCa", "as long", 1.03, 1e-2,
    ),
    Claim(
        "small roots", "polar factors of 512 x 64^2 against the same steps by batched cuBLAS, float16 and float32",
        "claim_polar_512", "polar", ("512 x 64.2, float16", "512 x 64.2, float32"),
        ("3 x 8.2, float16", "3 x 8.2, float32"), "ours", "the same steps in torch", "times as fast", 5.0, 3e-2,
    ),
    Claim(
        "middling roots", "polar factors of 256 x 256^2 against the same steps by batched cuBLAS, float16 and float32",
        "claim_polar_256", "polar", ("256 x 256.2, float16", "256 x 256.2, float32"),
        ("2 x 12.2, float16", "2 x 12.2, float32"), "ours", "the same steps in torch", "times as fast", 5.0, 3e-2,
    ),
    Claim(
        "certified trace", "Tr((AB)^(1/2)) of 33 pairs of 4096^2 covariances, certified to 1e-6",
        "claim_trace", "trace_sqrt_product", ("33 x 4096.2",), ("2 x 20.2",), r"ours \(\w+, float32\)", "",
        "seconds", 1.0, 1e-6,
    ),
    Claim(
        "16-bit trace", "the same in 16 bits and without the proof, factors included",
        "claim_trace", "trace_sqrt_product", ("33 x 4096.2",), ("2 x 20.2",), r"ours \(16 bits, without proof\)", "",
        "seconds", 0.25, 2e-3,
    ),
    Claim(
        "MIR of a 7B model", "MIR of 32 layers x 4096, 100 samples of 576 + 64 tokens, from states in memory",
        "claim_mir", "mir", (r"32 layers, d 4096, 100 x \(576 vision \+ 64 text\)",), ("2 layers, d 16",),
        "mir_kernels, streamed", "", "seconds", 1.0, 1e-3,
    ),
    Claim(
        "published script", "MIR from states in memory against the published script's fast mode, 2 layers x 4096",
        "claim_published", "mir", (r"2 layers, d 4096, 20 x",), ("1 layers, d 16",), "mir_kernels, streamed",
        "published, fast", "times as fast", 1.0, 1e-3,
    ),
)  # fmt: skip


STATES = ("not yet measured", "holds", "fails", "wrong")  # the worst last; wrong: no time, or an error above the limit


class Verdict(NamedTuple):
    """The verdict of the rows on a claim. state: one of STATES. value: its figure, None if there is none."""

    claim: Claim
    state: str
    value: float | None
    error: float | None
    device: str

    @property
    def figure(self) -> str:
        """The formatted value."""
        return FIGURES[self.claim.figure][1].format(self.value) if self.value is not None else ""


def verdicts(rows: Sequence[dict], cuda: bool = True) -> list[Verdict]:
    """One verdict per claim, from rows of `harness.read_csv` measured on a GPU, or of a dry run with cuda=False.

    Each device is judged by its own rows. Of several devices, the worst is shown.
    """
    # Only CUDA rows name the driver they ran on.
    rows = [row for row in rows if bool(row["versions"]) == cuda]
    parts = [[row for row in rows if row["device"] == one] for one in dict.fromkeys(row["device"] for row in rows)]
    return [
        max(
            (_verdict(claim, part, claim.cases if cuda else claim.tiny) for part in parts or [[]]),
            key=lambda verdict: STATES.index(verdict.state),
        )
        for claim in CLAIMS
    ]


def _verdict(claim: Claim, rows: Sequence[dict], cases: Sequence[str]) -> Verdict:
    better, _, figure = FIGURES[claim.figure]
    found: list[tuple[float, float, str]] = []
    for case in cases:
        mine = [row for row in rows if row["operation"] == claim.operation and re.search(case, row["case"])]
        ours = [row for row in mine if re.match(claim.ours, row["rival"])]
        if not ours:
            return Verdict(claim, "not yet measured", None, None, "")
        errors = [row["error"] for row in ours if row["error"] is not None]
        right = [row for row in ours if row["p50_ms"] and row["error"] is not None and row["error"] <= claim.error]
        if not right:
            return Verdict(claim, "wrong", None, max(errors, default=None), ours[0]["device"])
        best = min(right, key=lambda row: row["p50_ms"])
        device = best["device"]
        # In order of the names: a rival that is not installed has no row, and the next one replaces it.
        others = [
            row for name in claim.other.split("|") for row in mine if re.match(name, row["rival"]) and row["p50_ms"]
        ]
        if claim.other and not others:
            return Verdict(claim, "not yet measured", None, best["error"], device)
        try:
            found.append((figure(best, others[0] if others else best), best["error"], device))
        except TypeError:  # without a floor
            return Verdict(claim, "not yet measured", None, best["error"], device)
    value, error, device = (min if better else max)(found)
    holds = value >= claim.target if better else value <= claim.target
    return Verdict(claim, "holds" if holds else "fails", value, error, device)


def table(found: Sequence[Verdict]) -> str:
    """Verdicts as a Markdown table."""
    lines = ["| claim | needs | measured | error | device |", "| --- | ---: | ---: | ---: | --- |"]
    for one in found:
        better, text, _ = FIGURES[one.claim.figure]
        needs = f"{'at least' if better else 'at most'} {text.format(one.claim.target)}"
        said = one.state if one.value is None else f"{one.figure}, {one.state}"
        error = "" if one.error is None else f"{one.error:.0e}"
        lines.append(f"| {one.claim.sentence} | {needs} | {said} | {error} | {one.device} |")
    return "\n".join(lines) + "\n"


def of_cards() -> list[Verdict]:
    """Verdicts from the GPU CSVs in benchmarks/data/."""
    return verdicts(rows_of(harness.DATA.glob("*_cuda_*.csv")))


def rows_of(paths: Iterable[Path]) -> list[dict]:
    """The rows of files written by the claims' own benchmarks; ratios across different runs would be meaningless."""
    own = [path for path in sorted(paths) if path.name.startswith(tuple(f"{name}_cuda" for name in BENCHES))]
    return [row for path in own for row in harness.read_csv(path)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("csv", type=Path, nargs="*", help="CSVs of GPU benchmarks; default: those in benchmarks/data/")
    flags = parser.parse_args()
    own = tuple(f"{name}_cuda" for name in BENCHES)
    if wrong := [str(path) for path in flags.csv if not (path.is_file() and path.name.startswith(own))]:
        parser.error(f"csv: expected existing files that begin with {', '.join(own)}, got {', '.join(wrong)}")
    print(table(verdicts(rows_of(flags.csv)) if flags.csv else of_cards()), end="")


if __name__ == "__main__":
    main()
