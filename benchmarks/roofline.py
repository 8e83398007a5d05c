"""PREDICTED times on GPUs, from the counted bytes and operations: a roofline, no measurement.

    python benchmarks/roofline.py                                   # kernels, and a full MIR of 7B, 13B and 34B models
    python benchmarks/roofline.py --samples 200 --vision 2880       # other data
    python benchmarks/roofline.py --measured DIR/summary.csv        # the measured medians beside the kernels

A kernel takes bytes / bandwidth or operations / rate, whichever is longer, at the share of the data sheet's peak that
large copies and products are assumed to reach. Launches, the host, and reading the states from elsewhere are not in it.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import NamedTuple

import counts
import harness
from mir_kernels.sqrtm import eager


class Gpu(NamedTuple):
    """Data sheet peaks: GB/s, and dense TFLOP/s of bf16 and float64 (both on tensor cores); and where they stand."""

    bandwidth: float
    bf16: float
    float64: float
    source: str


GPUS = {
    "A100": Gpu(2039, 312, 19.5, "NVIDIA A100 Tensor Core GPU data sheet, 80 GB SXM"),
    "H100": Gpu(3350, 989, 67, "NVIDIA H100 Tensor Core GPU data sheet, SXM, without sparsity"),
    "H200": Gpu(4800, 989, 67, "NVIDIA H200 Tensor Core GPU data sheet, SXM, without sparsity"),
    "B200": Gpu(8000, 2250, 40, "NVIDIA HGX B200 data sheet, one of eight, without sparsity"),
}
# Shares of the peak, rounded from H100s: a copy of 3.0 TB/s and a bf16 product of 798 TFLOP/s on random data. The
# factorisation's share is a guess.
REACHED = {"bandwidth": 0.9, "bf16": 0.8, "float64": 0.4}
# Layers and hidden size of the language models under LLaVA-1.5-7B, LLaVA-1.5-13B and LLaVA-NeXT-34B.
MODELS = {"7B": (32, 4096), "13B": (40, 5120), "34B": (60, 7168)}
ROWS, WIDTH = 16384, 4096  # of the kernels' table; half of the rows are vision


def seconds(count: counts.Count, gpu: Gpu, unit: str = "bf16") -> float:
    """The longer of moving the bytes and doing the operations."""
    moved = count.bytes / (gpu.bandwidth * 1e9 * REACHED["bandwidth"])
    done = count.flops / (getattr(gpu, unit) * 1e12 * REACHED[unit])
    return max(moved, done)


def kernels() -> dict[str, tuple[str, counts.Count]]:
    """{operation as in the benchmarks' CSVs: the case, and what it takes}."""
    rows = (ROWS, ROWS // 2, WIDTH)
    moca = {
        "moca forward in place": counts.moca_forward_in_place,
        "moca forward": counts.moca_forward,
        "moca backward": counts.moca_backward,
        "add_moca_rms_norm forward": counts.add_moca_rms_norm_forward,
        "add_moca_rms_norm backward": counts.add_moca_rms_norm_backward,
    }
    found = {name: (f"({ROWS}, {WIDTH})", count(*rows)) for name, count in moca.items()}
    found["token_norms"] = (f"(8192, {WIDTH})", counts.token_norms(8192, WIDTH))
    found["covariance"] = (f"(8192, {WIDTH})", counts.covariance(8192, WIDTH))
    found["polar step"] = (f"{WIDTH}^2", counts.polar_step(WIDTH))
    return found


class MirTime(NamedTuple):
    """Seconds of the parts of one MIR."""

    tokens: float
    factors: float
    polar: float

    @property
    def total(self) -> float:
        return sum(self)


def mir_time(gpu: Gpu, layers: int, d: int, tokens: int) -> MirTime:
    """Norms and covariances of all tokens; float64 factors of each layer's covariances; bf16 polar steps."""
    steps = len(eager.steps_for("bfloat16"))
    return MirTime(
        seconds(counts.mir_tokens(layers, tokens, d), gpu),
        seconds(counts.trace_factors(d).times(layers), gpu, "float64"),
        seconds(counts.polar_step(d).times(layers * steps), gpu),
    )


def measured(paths: list[Path]) -> dict[str, str]:
    """{operation: the best median of ours with its device, at this table's sizes}, out of benchmark CSVs."""
    best: dict[str, tuple[float, str]] = {}
    cases = {name: case for name, (case, _) in kernels().items()}
    for path in paths:
        for row in harness.read_csv(path):
            name, ms = row["operation"], row.get("p50_ms")
            if ms is not None and row["rival"].startswith("ours") and name in cases and cases[name] in row["case"]:
                best[name] = min(best.get(name, (float("inf"), "")), (ms, row["device"]))
    return {name: f"{ms:.4g} ms on {device}" for name, (ms, device) in best.items()}


def report(samples: int, vision: int, text: int, paths: list[Path]) -> str:
    """Both tables and their assumptions, as Markdown."""
    names, beside = list(GPUS), measured(paths)
    head = " | ".join(names)
    lines = ["PREDICTION, not a measurement.", ""]
    lines += [f"| kernel (bf16, ms) | {head} | measured |", "| --- |" + " ---: |" * len(names) + " --- |"]
    for name, (case, count) in kernels().items():
        times = " | ".join(f"{1e3 * seconds(count, GPUS[g]):.3g}" for g in names)
        lines.append(f"| {name} {case} | {times} | {beside.get(name, '')} |")
    lines += ["", f"| MIR, {samples} samples of {vision} + {text} tokens (s) | {head} |"]
    lines += ["| --- |" + " ---: |" * len(names)]
    for model, (layers, d) in MODELS.items():
        parts = [mir_time(GPUS[g], layers, d, samples * (vision + text)) for g in names]
        for part in ("tokens", "factors", "polar", "total"):
            times = " | ".join(f"{getattr(p, part):.3g}" for p in parts)
            lines.append(f"| {model} ({layers} layers, d = {d}), {part} | {times} |")
    lines += ["", "Assumptions:"]
    lines += [f"- reached of the peak: {', '.join(f'{k} {v}' for k, v in REACHED.items())}"]
    lines += [
        f"- {n}: {g.bandwidth} GB/s, bf16 {g.bf16}, float64 {g.float64} TFLOP/s ({g.source})" for n, g in GPUS.items()
    ]
    lines += [
        "- bytes and operations are the fewest (benchmarks/counts.py); half of the kernels' rows are vision rows",
        f"- a root: float64 Cholesky factors, their product, then {len(eager.steps_for('bfloat16'))} bf16 polar steps",
        "- hidden states lie in GPU memory; launches, the forward pass of the model and the host are not counted",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=100)
    parser.add_argument("--vision", type=int, default=576, help="vision tokens a sample")
    parser.add_argument("--text", type=int, default=64, help="text tokens a sample")
    parser.add_argument("--measured", type=Path, nargs="*", default=sorted(harness.DATA.glob("*_cuda.csv")))
    flags = parser.parse_args()
    print(report(flags.samples, flags.vision, flags.text, flags.measured))


if __name__ == "__main__":
    main()
