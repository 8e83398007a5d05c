"""`make soak`: long streams must keep memory flat and end with a correct result. Exits with 1 if one does not.

    moments   StreamingMoments, updates of 1 to 3000 rows, masked and whole, against float64 sums
    metric    ModalityIntegrationRate, one sample at a time and a second pass, against float64 sums by the two-pass rule
    moca      MoCa training steps, forward, backward, optimiser, against the scale and shift of the targets

Memory is the resident size of the process. From a tenth of the stream to its end it may grow by ALLOWED_MB, and for the
metric by 16 bytes per token and layer: the stored norms and groups, and copies of them.
"""

from __future__ import annotations

import argparse
import gc
import math
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from mir_kernels import MoCa, StreamingMoments, frechet_distance
from modality_integration import ModalityIntegrationRate

ALLOWED_MB = 24.0
LAYERS = 2


class Memory:
    """Resident size in MB after a tenth of `total` tokens, and after all of them."""

    def __init__(self, total: int) -> None:
        self.total, self.early, self.late = total, 0.0, 0.0

    def passed(self, tokens: int) -> None:
        if not self.early and tokens >= self.total / 10:
            self.early = self.now()
        if tokens >= self.total:
            self.late = self.now()

    @staticmethod
    def now() -> float:
        gc.collect()
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS")) * 1024 / 1e6


def moments(tokens: int) -> tuple[int, float, float, Memory]:
    d, mean = 192, torch.linspace(-40, 40, 192, dtype=torch.float64)
    generator, memory = torch.Generator().manual_seed(0), Memory(tokens)
    streamed, count, total, gram = StreamingMoments(d), 0, torch.zeros(d).double(), torch.zeros(d, d).double()
    while count < tokens:
        rows = int(torch.randint(1, 3000, (), generator=generator))
        x = (torch.randn(rows, d, generator=generator) + mean).bfloat16()
        mask = torch.rand(rows, generator=generator) < 0.7 if rows % 2 else None
        streamed.update(x, mask)
        kept = (x if mask is None else x[mask]).double() - mean  # centred on a constant, to avoid cancellation
        count, total, gram = count + len(kept), total + kept.sum(0), gram + kept.T @ kept
        memory.passed(count)
    true = (gram - total.outer(total) / count) / (count - 1)
    sigma = true.diagonal().sqrt()
    error = float(((streamed.covariance() - true).abs() / (sigma[:, None] * sigma)).max())
    assert streamed.count == count
    return count, error, 1e-5, memory


def metric(tokens: int) -> tuple[int, float, float, Memory]:
    d, sample = 48, 400
    memory = Memory(tokens)
    vision = torch.arange(sample) < sample // 2

    def stream() -> Iterator[list[Tensor]]:
        generator = torch.Generator().manual_seed(1)
        for _ in range(-(-tokens // sample)):
            layers = [torch.randn(sample, d, generator=generator) + k + vision[:, None] for k in range(LAYERS)]
            layers[0][7] *= 100  # an outlier in every sample
            yield layers

    streamed = ModalityIntegrationRate(hold=500)
    for number, layers in enumerate(stream(), 1):
        streamed.update(layers, vision, ~vision)
        memory.passed(number * sample)
    first, again = streamed.compute(), streamed.second_pass()
    del streamed
    for layers in stream():
        again.update(layers, vision, ~vision)
    second = again.compute()
    assert second.total_missed == 0  # the first pass may miss outliers beyond the rows held back, and reports them
    for modality in ("vision", "text"):
        pairs = zip(first.kept[modality], first.missed[modality], second.kept[modality], strict=True)
        assert all(kept - missed == exact for kept, missed, exact in pairs)
    return number * sample, abs(second.value - _two_passes(stream, vision)), 1e-6, memory


def _two_passes(stream: Callable[[], Iterator[list[Tensor]]], vision: Tensor) -> float:
    """MIR as in the paper, from float64 sums over a stream that can be generated repeatedly."""
    norms: dict[tuple[int, int], list[Tensor]] = {}
    for layers in stream():
        for k, x in enumerate(layers):
            for side, mask in enumerate((vision, ~vision)):
                norms.setdefault((k, side), []).append(x[mask].double().norm(dim=1).float())
    limits = {}
    for key, parts in norms.items():
        joined = torch.cat(parts)
        limits[key] = (joined.median().double(), 3 * joined.double().std())
    sums: dict[tuple[int, int], list[Tensor]] = {}
    for layers in stream():
        for k, x in enumerate(layers):
            for side, mask in enumerate((vision, ~vision)):
                rows = x[mask].double()
                center, radius = limits[k, side]
                rows = rows[(rows.norm(dim=1).float().double() - center).abs() <= radius]
                old = sums.get((k, side), [0, 0, 0])
                sums[k, side] = [old[0] + len(rows), old[1] + rows.sum(0), old[2] + rows.T @ rows]
    total = 0.0
    for k in range(LAYERS):
        alpha = 1 / torch.cat(norms[k, 1]).double().mean()
        gaussians = []
        for n, added, gram in (sums[k, side] for side in (0, 1)):
            mean = added / n
            gaussians += [alpha * mean, alpha**2 * (gram - n * mean.outer(mean)) / (n - 1)]
        total += float(frechet_distance(*gaussians, precision="float64"))
    return math.log10(total)


def moca(tokens: int) -> tuple[int, float, float, Memory]:
    d, batch = 256, 600
    generator, memory = torch.Generator().manual_seed(2), Memory(tokens)
    scale, shift = torch.randn(2, d, generator=generator)
    module = MoCa(d)
    optimiser = torch.optim.Adam(module.parameters(), lr=0.03)
    count = 0
    while count < tokens:
        x = torch.randn(1, batch, d, generator=generator).requires_grad_()
        mask = torch.rand(1, batch, generator=generator) < 0.6
        out = module(x, mask)
        target = torch.where(mask[..., None], scale * x.detach() + shift, x.detach())
        optimiser.zero_grad()
        (out - target).square().mean().backward()
        optimiser.step()
        count += batch
        memory.passed(count)
    error = max(float((p.detach() - true).abs().max()) for p, true in ((module.scale, scale), (module.shift, shift)))
    return count, error, 1e-2, memory


SOAKS: dict[str, tuple[Callable[[int], tuple[int, float, float, Memory]], float, float]] = {
    # Memory per token in MB, and the share of the tokens: the metric makes four passes over its stream.
    "moments": (moments, 0.0, 1.0),
    "metric": (metric, 16e-6 * LAYERS, 0.2),
    "moca": (moca, 0.0, 1.0),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--millions", type=float, default=10.0, help="millions of tokens in the longest stream")
    flags = parser.parse_args()
    failed = 0
    for name, (soak, per_token, share) in SOAKS.items():
        began = time.monotonic()
        count, error, limit, memory = soak(int(flags.millions * share * 1e6))
        growth, allowed = memory.late - memory.early, ALLOWED_MB + per_token * count
        good = error <= limit and growth <= allowed
        failed += not good
        print(
            f"{name:<8} {'good' if good else 'FAILED'}: {count / 1e6:.1f} million tokens in "
            f"{time.monotonic() - began:.0f} s, error {error:.1e} (limit {limit:.0e}), memory {memory.early:.0f} MB "
            f"after a tenth, {growth:+.1f} MB at the end (limit {allowed:+.0f})",
            flush=True,
        )
    print(f"{len(SOAKS) - failed} passed, {failed} failed")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
