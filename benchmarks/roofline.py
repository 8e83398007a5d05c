"""PREDICTED times on GPUs, from the counted bytes and operations: a roofline, no measurement.

    python benchmarks/roofline.py                                   # kernels, and a full MIR of 7B, 13B and 34B models
    python benchmarks/roofline.py --samples 200 --vision 2880       # other data
    python benchmarks/roofline.py --measured DIR/summary.csv        # the measured medians beside the kernels

A kernel takes bytes / bandwidth or operations / rate, whichever is longer, at the share of the data sheet's peak that
large copies and products are assumed to reach. Launches, the host, and reading the states from elsewhere are not in it.
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
FLOPS_PER_CYCLE = 4096  # of 16-bit products on a multiprocessor of sm_90: 989 TFLOP/s, 132 of them, 1.83 GHz


class Gpu(NamedTuple):
    """Data sheet peaks: GB/s, dense TFLOP/s of 16-bit products with float32 sums and of float64 ones (on tensor cores
    where there are any); where they stand; and dense int8 TOP/s, for cards whose float64 runs at 1/64 of float32."""

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
# Float64 at 1/64 of the float32 rate, which the sheets of most leave out.
WITHOUT_FLOAT64 = {
    "RTX 4090": Gpu(1008, 165.2, 1.29, "NVIDIA Ada GPU architecture white paper, appendix A", 660.6),
    "L40S": Gpu(864, 362, 1.43, "NVIDIA L40S data sheet, without sparsity", 733),
    "A10": Gpu(600, 125, 0.49, "NVIDIA A10 data sheet, without sparsity", 250),
    "RTX PRO 6000": Gpu(1792, 503.8, 1.97, "NVIDIA RTX Blackwell PRO architecture white paper, Workstation", 1007.6),
}
# Shares of the peak, rounded from H100s: a copy of 3.0 TB/s and a bf16 product of 798 TFLOP/s on random data. That
# of float64, where factors and triangular solves are among the products, and that of int8 are guesses.
REACHED = {"bandwidth": 0.9, "bf16": 0.8, "float64": 0.4, "int8": 0.6}
FLOAT16_PRODUCTS = 3  # that make one in float32
# What `mir` takes by default on CUDA, certified to 1e-6, and what its sqrt_precision="bfloat16" takes, to 2e-3.
GRADES = {"float32": "float32", "bfloat16": "float16"}  # precision asked for: that of the iteration
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
    certificate: float

    @property
    def total(self) -> float:
        return sum(self)


def mir_time(gpu: Gpu, layers: int, d: int, tokens: int, precision: str = "float32") -> MirTime:
    """Norms and covariances of all tokens; of each layer's root the float64 factors, polar steps and certificate."""
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
    """Seconds of one MIR on a card that hardly has float64, and of its roots' float64 work, both ways."""

    rest: float
    float64: float
    split: float


def without_float64(gpu: Gpu, layers: int, d: int, tokens: int) -> WithoutFloat64:
    """Tokens and polar steps; factors and certificate in float64; the same with products split into int8."""
    whole = mir_time(gpu, layers, d, tokens)
    digits = seconds(counts.trace_split(d).times(layers), gpu, "int8")
    left = seconds(counts.trace_unsplit(d).times(layers), gpu, "float64")
    return WithoutFloat64(whole.tokens + whole.polar, whole.factors + whole.certificate, digits + left)


def loop_share(loop: dict, warps: int) -> float:
    """The share of the tensor cores' rate that a step of a loop on sm_90 allows, by what stands in its PTX.

    A step's `wgmma` take a multiprocessor 64 columns 32 / 4096 cycles each, in every warpgroup; its lines take one
    issue slot each of four a cycle, in every warp. They go on beside the products where some stay in flight, and before
    or after them where the loop waits for all. Memory is not in it.
    """
    products = loop["products"] * (warps // 4) * 64 * loop["columns"] * 32 / FLOPS_PER_CYCLE
    others = loop["lines"] * warps / 4
    return products / (max(products, others) if loop["in_flight"] else products + others)


def loops() -> dict[str, float]:
    """{large product: the smallest `loop_share` of its loops}, as the golden table of the compiled kernels has them."""
    kernels = json.loads(GOLDEN.read_text())["kernels"]["sm_90"]
    return {
        name: min(loop_share(loop, kernel["warps"]) for loop in kernel["loops"])
        for name, kernel in kernels.items()
        if "loops" in kernel and "_polar" not in name
    }


def mir_case(layers: int, d: int, samples: int, vision: int, text: int) -> str:
    """As bench_mir.py names it."""
    return f"{layers} layers, d {d}, {samples} x ({vision} vision + {text} text)"


def measured(paths: list[Path], cases: dict[str, str]) -> dict[str, str]:
    """{name: the best median of ours with its device}, out of benchmark CSVs; cases: {name: part of the CSV's case}."""
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
    lines += [f"- reached of the peak: {', '.join(f'{k} {v}' for k, v in REACHED.items())}"]
    for name, g in (GPUS | WITHOUT_FLOAT64).items():
        peaks = f"16 bits {g.bf16}, float64 {g.float64}{f', int8 {g.int8}' if g.int8 else ''} TFLOP/s"
        lines.append(f"- {name}: {g.bandwidth} GB/s, {peaks} ({g.source})")
    lines += [
        "- bytes and operations are the fewest (benchmarks/counts.py); half of the kernels' rows are vision rows",
        f"- a root: float64 Cholesky factors and their product, {steps['float32']} polar steps in float32 by "
        f"{FLOAT16_PRODUCTS} float16 products each, or {steps['bfloat16']} in 16 bits, and the float64 certificate of "
        "either; one precision suffices",
        f"- split: {float64.PARTS * (float64.PARTS + 1) // 2} products of integers for one of float64, all products, "
        "factors and solves but the Cholesky factor that proves a norm and what lies within blocks of "
        f"{float64.BLOCK} columns; seven products' digits and sums count as bytes",
        "- hidden states lie in GPU memory; launches, the forward pass of the model and the host are not counted",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=100)
    parser.add_argument("--vision", type=int, default=576, help="vision tokens a sample")
    parser.add_argument("--text", type=int, default=64, help="text tokens a sample")
    parser.add_argument("--measured", type=Path, nargs="*", default=sorted(harness.DATA.glob("*_cuda*.csv")))
    flags = parser.parse_args()
    print(report(flags.samples, flags.vision, flags.text, flags.measured))


if __name__ == "__main__":
    main()
