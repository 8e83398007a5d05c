"""Hidden states to MIR, end to end: ours against the published recipe, torchmetrics + scipy and a plain torch rewrite.

    python benchmarks/bench_mir.py                                   # a small model's shape, minutes on a laptop
    python benchmarks/bench_mir.py --layers 32 --hidden 4096 --samples 100 --vision 576 --text 64   # LLaVA-1.5-7B

Every rival gets the same synthetic hidden states, one sample at a time and already in memory, and returns MIR. The
error is |MIR - reference| with the reference in float64 (symmetrised product, eigenvalues); peak memory is what a
process of its own needs beyond the states, on CUDA what torch allocates beyond them. The states have power-law
spectra, a large mean in a few columns and a massive first token.
"""

from __future__ import annotations

import argparse
import functools
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
from modality_integration import ModalityIntegrationRate, mir

Sample = tuple[list[Tensor], Tensor, Tensor]


def samples(flags: argparse.Namespace) -> list[Sample]:
    """One (hidden states of every layer, vision mask, text mask) per sample: bf16, `vision + text + 1` tokens."""
    generator = torch.Generator().manual_seed(0)
    d, tokens = flags.hidden, 1 + flags.vision + flags.text
    vision = torch.zeros(tokens, dtype=torch.bool)
    vision[1 : 1 + flags.vision] = True
    text = torch.zeros(tokens, dtype=torch.bool)
    text[1 + flags.vision :] = True
    spectrum = torch.arange(1, d + 1) ** -0.75
    means = torch.zeros(d)
    means[:: max(1, d // 4)] = 20.0
    gaps = [torch.randn(d, generator=generator) * spectrum for _ in range(flags.layers)]
    drawn = []
    for _ in range(flags.samples):
        layers = []
        for gap in gaps:
            x = torch.randn(tokens, d, generator=generator) * spectrum + means * spectrum
            x[vision] = x[vision].roll(1, -1) + gap
            x[0] *= 300  # the attention sink that real decoders show
            layers.append(x.to(torch.bfloat16).to(flags.device))
        drawn.append((layers, vision.to(flags.device), text.to(flags.device)))
    return drawn


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
    """The published loop: all features in memory, scaled by alpha, 3-sigma outliers dropped, one FID a layer."""
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


def _fid(v: Tensor, t: Tensor, root_trace: Callable[[Tensor, Tensor], float]) -> float:
    a, b = _cov(v), _cov(t)
    return float((v.mean(0) - t.mean(0)).square().sum() + a.trace() + b.trace()) - 2 * root_trace(a, b)


def published_accurate(data: list[Sample]) -> float:
    from scipy.linalg import sqrtm

    return _sum_over_layers(
        data, lambda v, t: _fid(v, t, lambda a, b: sqrtm((a @ b).cpu().numpy()).real.trace().item()), torch.float32
    )


def published_fast(data: list[Sample]) -> float:
    def root(a: Tensor, b: Tensor, steps: int = 10) -> float:
        product = a @ b
        y, z = product, torch.eye(len(a), device=a.device)
        for _ in range(steps):
            y, z = (y + torch.linalg.inv(z) @ product) / 2, (z + torch.linalg.inv(y) @ product) / 2
        return y.trace().item()

    return _sum_over_layers(data, lambda v, t: _fid(v, t, root), torch.float32)


def torchmetrics_recipe(data: list[Sample]) -> float:
    return _sum_over_layers(
        data, lambda v, t: _fid(v, t, lambda a, b: torch.linalg.eigvals(a @ b).sqrt().real.sum().item()), torch.float64
    )


def plain_torch(data: list[Sample]) -> float:
    def root(a: Tensor, b: Tensor) -> float:
        w, q = torch.linalg.eigh(a)
        half = q * w.clamp_min(0).sqrt()
        return torch.linalg.eigvalsh(half.T @ b @ half).clamp_min(0).sqrt().sum().item()

    return _sum_over_layers(data, lambda v, t: _fid(v, t, root), torch.float64)


RIVALS: dict[str, Callable[[list[Sample]], float]] = {
    "mir_kernels, streamed": streamed,
    "mir_kernels, lists": listed,
    "torch float64, eigh": plain_torch,
    "torchmetrics recipe": torchmetrics_recipe,
    "published, accurate (scipy)": published_accurate,
    "published, fast": published_fast,
}


def peak_mb(name: str, argv: list[str]) -> float:
    """What one rival's process holds at its peak beyond the states themselves, in MB."""
    done = subprocess.run([sys.executable, __file__, *argv, "--only", name], capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])["peak_mb"]


def _status_kb(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))


def main() -> None:
    parser = harness.arguments(__doc__.splitlines()[0], "mir")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--samples", type=int, default=20)
    parser.add_argument("--vision", type=int, default=144, help="vision tokens a sample")
    parser.add_argument("--text", type=int, default=96, help="text tokens a sample")
    parser.add_argument("--skip", nargs="*", default=[], help="rivals to leave out (the slow ones at large sizes)")
    parser.add_argument("--only", help=argparse.SUPPRESS)
    flags = parser.parse_args()
    data = samples(flags)
    if flags.only:
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts over from what is held now
        before = _status_kb("VmRSS")
        RIVALS[flags.only](data)
        print(json.dumps({"peak_mb": (_status_kb("VmHWM") - before) / 1024}))
        return
    reference = plain_torch(data)
    shape = {name: getattr(flags, name) for name in ("layers", "hidden", "samples", "vision", "text")}
    argv = [word for name, value in shape.items() for word in (f"--{name}", str(value))]
    case = f"{flags.layers} layers, d {flags.hidden}, {flags.samples} x ({flags.vision} vision + {flags.text} text)"
    rivals, peaks = [], {}
    for name, run in RIVALS.items():
        if name in flags.skip:
            continue
        if flags.device == "cpu":
            peaks[name] = peak_mb(name, argv)
        else:
            torch.cuda.reset_peak_memory_stats()
            held = torch.cuda.memory_allocated()
        try:
            error = abs(run(data) - reference)
            if flags.device != "cpu":
                peaks[name] = (torch.cuda.max_memory_allocated() - held) / 2**20
        except (RuntimeError, ValueError) as problem:  # the published fast mode inverts what may be singular
            peaks.setdefault(name, math.nan)
            print(f"{name}: {type(problem).__name__}: {problem}")
            error = math.inf
        rivals.append(harness.Rival(name, functools.partial(lambda go, i: go(data), run), error, 1e-3))
    least = counts.mir_tokens(flags.layers, flags.samples * (flags.vision + flags.text), flags.hidden)
    least += counts.trace_sqrt(flags.hidden).times(flags.layers)
    rows = harness.compare(
        "mir", case, rivals, bytes_moved=least.bytes, flops=least.flops,
        seconds=flags.seconds, rounds=(3, 20), device=flags.device,
    )  # fmt: skip
    harness.print_rows(rows)
    print("\n  peak memory beyond the states, MB: " + ", ".join(f"{name} {mb:.0f}" for name, mb in peaks.items()))
    harness.write_csv([{**row, "case": f"{row['case']}; peak {peaks[row['rival']]:.0f} MB"} for row in rows], flags.out)


if __name__ == "__main__":
    main()
