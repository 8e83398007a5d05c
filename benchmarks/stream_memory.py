"""Measure the memory of a stream of LLaVA-1.5-7B's shape through `ModalityIntegrationRate`: the peak and its parts.

    python benchmarks/stream_memory.py                          # 32 layers, d 4096, 100 samples: twenty minutes
    python benchmarks/stream_memory.py --layers 2 --hidden 512 --samples 20 --out FILE  # seconds
    python benchmarks/stream_memory.py --device cuda --out FILE

Synthetic hidden states (those of bench_mir.py), one sample at a time with all layers, as returned by a forward pass.
The peak is the process memory beyond its use before the first sample, read from the kernel (for a GPU, from torch)
after the last sample and after `compute()`; the parts are counted from the tensors. Apart from one sample's states,
memory is the same for every layer. The accumulators of 5 groups, the default of `mir compute` for the standard error,
are therefore measured with an eighth of the layers. Accumulators of finished groups move from a GPU to the host. On a
CPU they stay; to count how much a GPU would hold at once, a further case moves them to another place in CPU memory.
Each case runs in a separate process.
"""

from __future__ import annotations

import argparse
import csv
import multiprocessing
import sys
import time
from pathlib import Path

import torch

import harness
import recipes
from modality_integration import ModalityIntegrationRate
from modality_integration.metric.host_memory import HostMemory

TRIANGLES = "accumulators: means and triangles, float64"
GATHERED = "rows gathered for the next product"
AT_ONCE, PUT_AWAY = "accumulators on the device, at most at once", "put into the host's memory"
STREAMING, COMPUTING = "peak while streaming", "peak in compute()"
GROUPS = 5  # the default of `mir compute`
COLUMNS = ("case", "part", "mb", *harness.ENVIRONMENT)


def measure(flags: argparse.Namespace, layers: int, groups: int, moving: bool) -> dict[str, float]:
    """MB by part, see the module docstring. moving: move accumulators of finished groups, also from a CPU."""
    states, memory = recipes.HiddenStates(layers, flags.hidden, flags.vision, flags.text), _Memory(flags.device)
    _warm_up(memory)
    before = memory.now()
    began = time.monotonic()
    metric = ModalityIntegrationRate(groups=groups, samples=flags.samples)
    if moving:
        metric._host = HostMemory(of=("cpu", "cuda"))
    at_once = 0.0
    for number in range(1, flags.samples + 1):
        sample = [layer.to(flags.device) for layer in states.sample()]
        sample_bytes = sum(layer.nbytes for layer in sample)
        metric.update([layer[None] for layer in sample], states.vision[None], states.text[None])
        del sample
        at_once = max(at_once, _parts(metric)[TRIANGLES])
        if number % 10 == 0:
            print(f"{number} samples, {time.monotonic() - began:.0f} s, {memory.now() - before:.0f} MB", flush=True)
    streaming = memory.peak() - before
    parts = _parts(metric) | {"one sample's hidden states, all layers": sample_bytes / 1e6}
    parts["rest: copies of a layer's rows, products"] = streaming - sum(parts.values())
    memory.start_peak_over()
    resting = memory.now() - before
    result = metric.compute()
    computing = memory.peak() - before
    print(f"{result}\n{time.monotonic() - began:.0f} s in total")
    features = layers * flags.samples * (flags.vision + flags.text) * flags.hidden
    return parts | {
        AT_ONCE: at_once,
        PUT_AWAY: sum(layer.moments.away_bytes for layer in metric._layers) / 1e6,
        STREAMING: streaming,
        "held between two samples": resting,
        COMPUTING: computing,
        "for comparison: all features kept, bf16": features * 2 / 1e6,
        "for comparison: all features kept, float32": features * 4 / 1e6,
    }


def _parts(metric: ModalityIntegrationRate) -> dict[str, float]:
    """Buffers as allocated; the public state has only their contents."""
    triangles = gathered = norms = 0
    for layer in metric._layers:
        for moments in layer.moments.here:
            waiting = 0 if moments._pending is None else moments._pending.nbytes
            gathered += waiting
            triangles += moments.memory_bytes - waiting
        for tokens in layer.tokens.values():
            norms += tokens.others.norms.nbytes + tokens.others.count()  # plus one byte each for the group
    return {
        TRIANGLES: triangles / 1e6,
        GATHERED: gathered / 1e6,
        "rows held back": metric.held_bytes / 1e6,
        "norms and groups of all tokens": norms / 1e6,
    }


class _Memory:
    """MB of this process, or of a GPU's tensors: now, and the peak since its last reset."""

    def __init__(self, device: str) -> None:
        self.device = device

    def now(self) -> float:
        return _status_mb("VmRSS") if self.device == "cpu" else torch.cuda.memory_allocated() / 1e6

    def peak(self) -> float:
        return _status_mb("VmHWM") if self.device == "cpu" else torch.cuda.max_memory_allocated() / 1e6

    def start_peak_over(self) -> None:
        if self.device == "cpu":
            Path("/proc/self/clear_refs").write_text("5")
        else:
            torch.cuda.reset_peak_memory_stats()


def _warm_up(memory: _Memory) -> None:
    """Do the one-time allocations of BLAS, LAPACK and the kernels, which are not part of the stream."""
    states = recipes.HiddenStates(1, 64, 80, 80)
    metric = ModalityIntegrationRate(hold=2)
    for _ in range(2):
        metric.update([layer.to(memory.device) for layer in states.sample()], states.vision, states.text)
    metric.compute()
    memory.start_peak_over()


def _alone(flags: argparse.Namespace, layers: int, groups: int, moving: bool) -> dict[str, float]:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(measure, (flags, layers, groups, moving))


def _status_mb(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024 / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--samples", type=int, default=100)
    parser.add_argument("--vision", type=int, default=576, help="vision tokens per sample")
    parser.add_argument("--text", type=int, default=80, help="text tokens per sample")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--out", type=Path, default=harness.DATA / "stream_memory.csv", help="CSV to write")
    flags = parser.parse_args()
    if flags.device == "cpu" and not Path("/proc/self/clear_refs").exists():
        sys.exit("stream_memory: measuring the peak requires /proc, which only Linux has")
    parts = _alone(flags, flags.layers, 0, False)
    parts = {part: mb for part, mb in parts.items() if part not in (AT_ONCE, PUT_AWAY)}
    fewer = max(1, flags.layers // 8)
    said = f"groups={GROUPS}, {fewer} layer{'s' * (fewer > 1)}"
    stays = _alone(flags, fewer, GROUPS, False) if flags.device == "cpu" else {}
    parts |= {f"{said}, on a CPU: {part}": stays[part] for part in (TRIANGLES, GATHERED, STREAMING, COMPUTING) if stays}
    moves = _alone(flags, fewer, GROUPS, True)
    counted = (AT_ONCE, PUT_AWAY) if flags.device == "cpu" else (AT_ONCE, PUT_AWAY, STREAMING, COMPUTING)
    parts |= {f"{said}, moving: {part}": moves[part] for part in counted}
    case = (
        f"{flags.layers} layers, d {flags.hidden}, {flags.samples} x ({flags.vision} vision + {flags.text} text), bf16"
    )
    with flags.out.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        for part, mb in parts.items():
            print(f"{part:<70}{mb:>10.0f} MB")
            writer.writerow((case, part, f"{mb:.1f}", *harness.environment(flags.device)))


if __name__ == "__main__":
    main()
