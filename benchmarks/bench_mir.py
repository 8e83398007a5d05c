"""Benchmark MIR end to end from hidden states: ours, the published recipe, torchmetrics, scipy and plain torch.

    python benchmarks/bench_mir.py                                   # a small model's shape, minutes on a laptop
    python benchmarks/bench_mir.py --layers 32 --hidden 4096 --samples 100 --vision 576 --text 64   # LLaVA-1.5-7B
    python benchmarks/bench_mir.py --streamed --stages      # the same shape on a CPU: one layer measured, minutes, 7 GB

Every rival gets the same synthetic hidden states, one sample at a time and already in memory, and returns MIR. The
error is |MIR - reference|; the reference is float64 (symmetrised product, eigenvalues), over all layers or the first
`--checked`. Peak memory is measured beyond the states: on a CPU in a separate process after a warm-up, on CUDA as
allocated by torch.

`--streamed` runs a different benchmark, mir_streamed.py: nothing is stored, and `--stages` breaks down the time.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

import counts
import harness
import recipes
from modality_integration import ModalityIntegrationRate, mir

Sample = tuple[list[Tensor], Tensor, Tensor]
REFERENCE = "torch float64, eigh"  # the others are checked against it
ACCURATE, FAST = "published, accurate (scipy)", "published, fast"
LIMIT = 1e-3  # largest difference of MIR
SMALL = {"layers": 2, "hidden": 1024, "samples": 20, "vision": 144, "text": 96}
LLAVA = {"layers": 32, "hidden": 4096, "samples": 100, "vision": 576, "text": 80}


def samples(layers: int, hidden: int, samples: int, vision: int, text: int, device: str) -> list[Sample]:
    """One (hidden states of every layer, vision mask, text mask) per sample: bf16, `1 + vision + text` tokens."""
    states = recipes.HiddenStates(layers, hidden, vision, text, device)
    return [(states.sample(), states.vision, states.text) for _ in range(samples)]


def streamed(data: list[Sample]) -> float:
    metric = ModalityIntegrationRate()
    for layers, vision, text in data:
        metric.update(layers, vision, text)
    return metric.compute().value


def listed(data: list[Sample]) -> float:
    layers = range(len(data[0][0]))
    vision = [torch.cat([s[0][k][s[1]] for s in data]) for k in layers]
    text = [torch.cat([s[0][k][s[2]] for s in data]) for k in layers]
    return mir(vision, text).value


def _sum_over_layers(data: list[Sample], distance: Callable[[Tensor, Tensor], float], dtype: torch.dtype) -> float:
    """The published loop: all features in memory, scaled by alpha, 3-sigma outliers dropped, one FID per layer."""
    total = 0.0
    for k in range(len(data[0][0])):
        v = torch.cat([s[0][k][s[1]] for s in data]).to(dtype)
        t = torch.cat([s[0][k][s[2]] for s in data]).to(dtype)
        alpha = 1 / t.norm(dim=-1).mean()
        total += distance(_kept(alpha * v), _kept(alpha * t))
    return math.log10(total)


def _kept(x: Tensor) -> Tensor:
    norm = x.norm(dim=-1)
    return x[(norm - norm.median()).abs() <= 3 * norm.std()]


def _cov(x: Tensor) -> Tensor:
    return (x - x.mean(0)).T @ (x - x.mean(0)) / (len(x) - 1)


def _by(root_trace: Callable[[Tensor, Tensor], Tensor], dtype: torch.dtype) -> Callable[[list[Sample]], float]:
    """MIR by the published loop in `dtype`, with the trace of the root from recipes.py."""

    def fid(v: Tensor, t: Tensor) -> float:
        a, b = _cov(v), _cov(t)
        gap = (v.mean(0) - t.mean(0)).square().sum() + a.trace() + b.trace()
        return gap.item() - 2 * root_trace(a, b).item()

    return lambda data: _sum_over_layers(data, fid, dtype)


RIVALS: dict[str, Callable[[list[Sample]], float]] = {
    "mir_kernels, streamed": streamed,
    "mir_kernels, lists": listed,
    REFERENCE: _by(recipes.eigh_trace, torch.float64),
    "torchmetrics recipe": _by(recipes.torchmetrics_trace, torch.float64),
    ACCURATE: _by(recipes.published_accurate_trace, torch.float32),
    FAST: _by(recipes.published_fast_trace, torch.float32),
}


def rivals_on(
    data: list[Sample], checked: list[Sample], reference: float, peaks: dict[str, float | None]
) -> list[harness.Rival]:
    """The rivals whose peak memory is given, checked against the reference's value of `checked`."""
    return [
        harness.Rival(
            name,
            lambda i, go=RIVALS[name]: go(data),
            lambda go=RIVALS[name]: abs(go(checked) - reference),
            None if name == FAST else LIMIT,  # wrong by construction: timed anyway, and its error is shown
            peak,
        )
        for name, peak in peaks.items()
    ]


def peak_mb(name: str, shape: dict[str, int]) -> float | None:
    """Peak memory of one rival's process beyond the states, in MB; None if it raises."""
    argv = [word for flag, value in shape.items() for word in (f"--{flag}", str(value))]
    command = [sys.executable, __file__, "--device", "cpu", *argv, "--only", name]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        print(f"{name}: no peak memory: {(done.stderr.strip().splitlines() or [f'exit code {done.returncode}'])[-1]}")
        return None
    return json.loads(done.stdout.splitlines()[-1])["peak_mb"]


def own_peak_mb(name: str, shape: dict[str, int]) -> float:
    """Peak memory of this process, after the rival's imports and one-time allocations."""
    with contextlib.suppress(RuntimeError, ValueError):  # the published fast mode may invert a singular matrix
        RIVALS[name](samples(1, 64, 4, 40, 40, "cpu"))
    data = samples(**shape, device="cpu")
    Path("/proc/self/clear_refs").write_text("5")  # reset the high-water mark to current use
    before = _status_kb("VmRSS")
    RIVALS[name](data)
    return (_status_kb("VmHWM") - before) / 1024


def cuda_peak_mb(name: str, data: list[Sample]) -> float | None:
    """Peak memory that torch allocates beyond the states, in MB; None if the rival raises."""
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    with contextlib.suppress(RuntimeError, ValueError):
        RIVALS[name](data)
        return (torch.cuda.max_memory_allocated() - held) / 2**20
    return None


def _status_kb(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))


def stream(flags: argparse.Namespace) -> int:
    """Run mir_streamed.py; `--out` is the CSV of its rows, with the CSV of the stages next to it."""
    import mir_streamed
    import stages

    measured = flags.measured_layers or (1 if flags.device == "cpu" else flags.layers)
    shape = mir_streamed.Shape(*(getattr(flags, name) for name in SMALL), measured, flags.device)
    default = flags.out == harness.DATA / harness.csv_name("mir", flags.device)
    out = flags.out.with_name(f"mir_streamed{flags.out.stem.removeprefix('mir')}.csv") if default else flags.out
    rows, by_stage = mir_streamed.measure(shape, flags.skip, flags.checked != 0, flags.stages)
    harness.print_rows(rows)
    harness.write_csv(rows, out)
    if flags.stages:
        print("\n".join(["", *stages.lines(by_stage)]))
        name = out.name.replace("streamed", "stages", 1) if "streamed" in out.name else f"{out.stem}_stages.csv"
        stages.write(by_stage, out.with_name(name), flags.device)
    return harness.exit_code(rows)


def main() -> int:
    parser = harness.arguments(__doc__.splitlines()[0], "mir")
    for name in SMALL:
        said = f"default {SMALL[name]}, with --streamed {LLAVA[name]}"
        parser.add_argument(
            f"--{name}", type=int, help=f"tokens per sample; {said}" if name in ("vision", "text") else said
        )
    parser.add_argument(
        "--checked", type=int, help="number of layers to check against float64, seconds each; with --streamed 1 or 0"
    )
    parser.add_argument("--streamed", action="store_true", help="generate the states sample by sample, store none")
    parser.add_argument(
        "--measured-layers",
        type=int,
        help="with --streamed: layers to run before scaling the time; default 1 on a CPU, all on a GPU",
    )
    parser.add_argument("--stages", action="store_true", help="with --streamed: also write the time by stage to a CSV")
    parser.add_argument("--only", help=argparse.SUPPRESS)
    flags = parser.parse_args()
    for name, value in (LLAVA if flags.streamed else SMALL).items():
        setattr(flags, name, value if getattr(flags, name) is None else getattr(flags, name))
    if flags.streamed:
        return stream(flags)
    if flags.stages or flags.measured_layers is not None:
        parser.error("--stages and --measured-layers require --streamed")
    shape = {name: getattr(flags, name) for name in SMALL}
    if flags.only:
        print(json.dumps({"peak_mb": own_peak_mb(flags.only, shape)}))
        return 0
    chosen = [name for name in RIVALS if not any(word in name for word in flags.skip)]
    cuda = flags.device == "cuda"
    # First the separate processes, while this one holds no states.
    peaks = {} if cuda else {name: peak_mb(name, shape) for name in chosen}
    data = samples(**shape, device=flags.device)
    checked = [(layers[: flags.checked], *masks) for layers, *masks in data]
    reference = RIVALS[REFERENCE](checked)
    if cuda:
        peaks = {name: cuda_peak_mb(name, data) for name in chosen}
    tokens = counts.mir_tokens(flags.layers, flags.samples * (flags.vision + flags.text), flags.hidden)
    roots = counts.trace_sqrt_on(flags.device, flags.hidden).times(flags.layers)
    rows = harness.compare(
        "mir",
        f"{flags.layers} layers, d {flags.hidden}, {flags.samples} x ({flags.vision} vision + {flags.text} text)",
        rivals_on(data, checked, reference, peaks),
        bytes_moved=tokens.bytes + roots.bytes,
        flops=tokens.flops,
        float64_flops=roots.flops,
        seconds=flags.seconds,
        rounds=(3, 20),
        device=flags.device,
    )
    harness.print_rows(rows)
    harness.write_csv(rows, flags.out)
    return harness.exit_code(rows)


if __name__ == "__main__":
    sys.exit(main())
