"""PREDICTED times on GPUs from counted bytes and operations: a roofline, not a measurement.

    python benchmarks/roofline.py                                   # kernels, and a full MIR of 7B, 13B and 34B models
    python benchmarks/roofline.py --samples 200 --vision 2880       # other data
    python benchmarks/roofline.py --measured DIR/summary.csv        # with measured medians next to the predictions

A kernel takes bytes / bandwidth or operations / rate, whichever is longer, at the share of the data sheet's peak that
large copies and products are assumed to reach. Launches, the host, and loading the states are not included.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import NamedTuple

import counts
import harness
from mir_kernels.ops.sqrtm import eager, float64

GOLDEN = Path(__file__).resolve().parent.parent / "tests" / "golden" / "triton_resources.json"
FLOPS_PER_CYCLE = 4096  # of 16-bit products per multiprocessor of sm_90: 989 TFLOP/s on 132 of them at 1.83 GHz


class Gpu(NamedTuple):
    """Data sheet peaks: GB/s; dense TFLOP/s of 16-bit products with float32 sums and of float64 products (on tensor
    cores if available); their source; dense int8 TOP/s, for cards whose float64 runs at 1/64 of float32."""

    bandwidth: float
    bf16: float
    float64: float
    source: str
    int8: float = 0.0


GPUS = {
    "A100": Gpu(2039, 312, 19.5, "NVIDIA A100 Tensor Core GPU data sheet, 80 GB SXM"),
    "H100": Gpu(3350, 989, 67, "NVIDIA H100 Tensor Core GPU data sheet, SXM, without sparsity"),
    "H200": Gpu(4800, 989, 67, "NVIDIA H200 Tensor Core GPU data sheet, SXM, without sparsity"),
    "B200": Gpu(8000, 2250, 40, "NVIDIA HGX B200 data sheet, one of eight, without sparsity"),
}
# Float64 at 1/64 of the float32 rate, which most data sheets omit.
WITHOUT_FLOAT64 = {
    "RTX 4090": Gpu(1008, 165.2, 1.29, "NVIDIA Ada GPU architecture white paper, appendix A", 660.6),
    "L40S": Gpu(864, 362, 1.43, "NVIDIA L40S data sheet, without sparsity", 733),
    "A10": Gpu(600, 125, 0.49, "NVIDIA A10 data sheet, without sparsity", 250),
    "RTX PRO 6000": Gpu(1792, 503.8, 1.97, "NVIDIA RTX Blackwell PRO architecture white paper, Workstation", 1007.6),
}
# Shares of the peak, rounded from H100s: a copy at 3.0 TB/s and a bf16 product at 798 TFLOP/s on random data. The
# shares of float64, whose work includes factors and triangular solves, and of int8 are guesses.
REACHED = {"bandwidth": 0.9, "bf16": 0.8, "float64": 0.4, "int8": 0.6}
FLOAT16_PRODUCTS = 3  # float16 products per float32 product
# {requested precision: precision of the iteration}: the default of `mir` on CUDA, certified to 1e-6, and
# sqrt_precision="bfloat16", certified to 2e-3.
GRADES = {"float32": "float32", "bfloat16": "float16"}
# Layers and hidden size of the language models under LLaVA-1.5-7B, LLaVA-1.5-13B and LLaVA-NeXT-34B.
MODELS = {"7B": (32, 4096), "13B": (40, 5120), "34B": (60, 7168)}
ROWS, WIDTH = 16384, 4096  # of the kernels' table; half of the rows are vision tokens


def seconds(count: counts.Count, gpu: Gpu, unit: str = "bf16") -> float:
    """The longer of the times to move the bytes and to do the operations."""
    moved = count.bytes / (gpu.bandwidth * 1e9 * REACHED["bandwidth"])
    done = count.flops / (getattr(gpu, unit) * 1e12 * REACHED[unit])
    return max(moved, done)


def kernels() -> dict[str, tuple[str, counts.Count]]:
    """{operation as in the benchmarks' CSVs: (case, count)}."""
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
    """Seconds of each part of one MIR."""

    tokens: float
    factors: float
    polar: float
    certificate: float

    @property
    def total(self) -> float:
        return sum(self)


def mir_time(gpu: Gpu, layers: int, d: int, tokens: int, precision: str = "float32") -> MirTime:
    """Norms and covariances of all tokens; for each layer's root the float64 factors, polar steps and certificate."""
    steps = layers * len(eager.steps_for(GRADES[precision]))
    if precision == "float32":
        one = counts.polar_step(d, element=4)
        polar = seconds(counts.Count(one.bytes, FLOAT16_PRODUCTS * one.flops).times(steps), gpu)
    else:
        polar = seconds(counts.polar_step(d).times(steps), gpu)
    return MirTime(
        seconds(counts.mir_tokens(layers, tokens, d), gpu),
        seconds(counts.trace_factors(d).times(layers), gpu, "float64"),
        polar,
        seconds(counts.trace_certificate(d).times(layers), gpu, "float64"),
    )


class WithoutFloat64(NamedTuple):
    """Seconds of one MIR on a card with few float64 units; the float64 work of its roots in float64, and split."""

    rest: float
    float64: float
    split: float


def without_float64(gpu: Gpu, layers: int, d: int, tokens: int) -> WithoutFloat64:
    """Tokens and polar steps; factors and certificate in float64; the same with products split into int8 products."""
    whole = mir_time(gpu, layers, d, tokens)
    digits = seconds(counts.trace_split(d).times(layers), gpu, "int8")
    left = seconds(counts.trace_unsplit(d).times(layers), gpu, "float64")
    return WithoutFloat64(whole.tokens + whole.polar, whole.factors + whole.certificate, digits + left)


def loop_share(loop: dict, warps: int) -> float:
    """The share of the tensor cores' rate that a step of a loop on sm_90 allows, judging by its PTX.

    Each `wgmma` of a step takes a multiprocessor 64 columns 32 / 4096 cycles, in every warpgroup; each line takes one
    of four issue slots per cycle, in every warp. Lines overlap with the products if some stay in flight, and run before
    or after them if the loop waits for all. Memory is not included.
    """
    products = loop["products"] * (warps // 4) * 64 * loop["columns"] * 32 / FLOPS_PER_CYCLE
    others = loop["lines"] * warps / 4
    return products / (max(products, others) if loop["in_flight"] else products + others)


def loops() -> dict[str, float]:
    """{large product: the smallest `loop_share` of its loops}, from the golden table of the compiled kernels."""
    kernels = json.loads(GOLDEN.read_text())["kernels"]["sm_90"]
    return {
        name: min(loop_share(loop, kernel["warps"]) for loop in kernel["loops"])
        for name, kernel in kernels.items()
        if "loops" in kernel and "_polar" not in name
    }


def mir_case(layers: int, d: int, samples: int, vision: int, text: int) -> str:
    """The case as named by bench_mir.py."""
    return f"{layers} layers, d {d}, {samples} x ({vision} vision + {text} text)"


def measured(paths: list[Path], cases: dict[str, str]) -> dict[str, str]:
    """{name: our best median with its device}, from benchmark CSVs; cases: {name: part of the CSV's case}."""
    best: dict[str, tuple[float, str]] = {}
    for path in paths:
        for row in harness.read_csv(path):
            ms = row.get("p50_ms")
            for name, case in cases.items():
                same = row["operation"] == name.partition(":")[0] and case in row["case"]
                if ms is not None and same and row["rival"].startswith(harness.OURS):
                    best[name] = min(best.get(name, (float("inf"), "")), (ms, row["device"]))
    return {name: f"{ms:.4g} ms on {device}" for name, (ms, device) in best.items()}


def report(samples: int, vision: int, text: int, paths: list[Path]) -> str:
    """Both tables and their assumptions, as Markdown."""
    names = list(GPUS)
    cases = {name: case for name, (case, _) in kernels().items()}
    cases |= {f"mir:{model}": mir_case(*shape, samples, vision, text) for model, shape in MODELS.items()}
    beside = measured(paths, cases)
    head = " | ".join(names)
    lines = ["PREDICTION, not a measurement.", ""]
    lines += [f"| kernel (bf16, ms) | {head} | measured |", "| --- |" + " ---: |" * len(names) + " --- |"]
    for name, (case, count) in kernels().items():
        times = " | ".join(f"{1e3 * seconds(count, GPUS[g]):.3g}" for g in names)
        lines.append(f"| {name} {case} | {times} | {beside.get(name, '')} |")
    lines += ["", f"| MIR, {samples} samples of {vision} + {text} tokens (s) | {head} | measured |"]
    lines += ["| --- |" + " ---: |" * len(names) + " --- |"]
    for model, (layers, d) in MODELS.items():
        for precision in GRADES:
            parts = [mir_time(GPUS[g], layers, d, samples * (vision + text), precision) for g in names]
            default = precision == "float32"
            for part in (*(("tokens", "factors", "certificate") if default else ()), "polar", "total"):
                times = " | ".join(f"{getattr(p, part):.3g}" for p in parts)
                grade = f" in {precision}{' (the default)' * default}" if part in ("polar", "total") else ""
                found = beside.get(f"mir:{model}", "") if part == "total" and default else ""
                lines.append(f"| {model} ({layers} layers, d = {d}), {part}{grade} | {times} | {found} |")
    others = list(WITHOUT_FLOAT64)
    lines += ["", f"| MIR where float64 runs at 1/64 of float32 (s) | {' | '.join(others)} |"]
    lines += ["| --- |" + " ---: |" * len(others)]
    for model, (layers, d) in MODELS.items():
        found = [without_float64(WITHOUT_FLOAT64[g], layers, d, samples * (vision + text)) for g in others]
        for name, values in (
            ("factors and certificate in float64", [one.float64 for one in found]),
            ("the same with products split into int8", [one.split for one in found]),
            ("total in float64", [one.rest + one.float64 for one in found]),
            ("total, split", [one.rest + one.split for one in found]),
        ):
            times = " | ".join(f"{value:.3g}" for value in values)
            lines.append(f"| {model} ({layers} layers, d = {d}), {name} | {times} |")
    lines += ["", "| large products on sm_90 | share of the tensor rate that a step's PTX allows |", "| --- | ---: |"]
    lines += [f"| {name} | {share:.2f} |" for name, share in loops().items()]
    steps = {grade: len(eager.steps_for(precision)) for grade, precision in GRADES.items()}
    lines += ["", "Assumptions:"]
    lines += [f"- share of the peak reached: {', '.join(f'{k} {v}' for k, v in REACHED.items())}"]
    for name, g in (GPUS | WITHOUT_FLOAT64).items():
        peaks = f"16 bits {g.bf16}, float64 {g.float64}{f', int8 {g.int8}' if g.int8 else ''} TFLOP/s"
        lines.append(f"- {name}: {g.bandwidth} GB/s, {peaks} ({g.source})")
    lines += [
        "- bytes and operations are minimal (benchmarks/counts.py); half of the kernels' rows are vision tokens",
        f"- a root: float64 Cholesky factors and their product, {steps['float32']} polar steps in float32 by "
        f"{FLOAT16_PRODUCTS} float16 products each, or {steps['bfloat16']} in 16 bits, and the float64 certificate of "
        "either; one precision suffices",
        f"- split: {float64.PARTS * (float64.PARTS + 1) // 2} integer products per float64 product, for all products, "
        "factors and solves except the Cholesky factor that proves a norm and the work within blocks of "
        f"{float64.BLOCK} columns; digits and sums of seven products count as bytes",
        "- hidden states are in GPU memory; launches, the forward pass of the model and the host are not counted",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=100)
    parser.add_argument("--vision", type=int, default=576, help="vision tokens per sample")
    parser.add_argument("--text", type=int, default=64, help="text tokens per sample")
    parser.add_argument("--measured", type=Path, nargs="*", default=sorted(harness.DATA.glob("*_cuda*.csv")))
    flags = parser.parse_args()
    print(report(flags.samples, flags.vision, flags.text, flags.measured))


if __name__ == "__main__":
    main()
