"""Benchmark MIR on hidden states generated sample by sample and never stored, with a breakdown of the time.

Ours processes one sample at a time; only the time of `update` and `compute` counts, and generation is reported
separately. `measured` layers are run and the time is scaled to all layers, which cost the same. The published recipes
keep all features of a layer: they run on one stored layer, and their time is scaled likewise. The names of cases and
rivals state the scaling.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

import bench_mir
import counts
import harness
import recipes
import stages
import waiting
from modality_integration import ModalityIntegrationRate

GROUPS = 5  # the default of `mir compute`
RUNS: dict[str, dict[str, Any]] = {
    "value only": {},
    "value and error": {"groups": GROUPS},
    "with bounds": {"bounds": True},
}
RECIPES = (bench_mir.ACCURATE, bench_mir.FAST)


@dataclass(frozen=True)
class Shape:
    """Hidden states of `layers` layers, of which `measured` are run. vision, text: tokens per sample."""

    layers: int
    hidden: int
    samples: int
    vision: int
    text: int
    measured: int
    device: str = "cpu"

    def __post_init__(self) -> None:
        if not 1 <= self.measured <= self.layers:
            raise ValueError(f"measured-layers: expected 1 to {self.layers}, the number of layers, got {self.measured}")

    @property
    def case(self) -> str:
        """The case of the rows."""
        scaled = f"; {self.measured} measured, time x {self.layers / self.measured:g}"
        return (
            f"{self.layers} layers, d {self.hidden}, {self.samples} x ({self.vision} vision + {self.text} text), "
            f"generated{scaled * (self.measured < self.layers)}"
        )

    @property
    def tokens(self) -> stages.Tokens:
        """The tokens of the layers that are run."""
        n = self.samples * (self.vision + self.text)
        return stages.Tokens(n, self.samples * self.text, self.hidden, self.measured)

    def states(self, layers: int) -> recipes.HiddenStates:
        """A new generator of the same samples."""
        return recipes.HiddenStates(layers, self.hidden, self.vision, self.text, self.device)

    def stored(self) -> list[bench_mir.Sample]:
        """All samples of one layer."""
        states = self.states(1)
        return [(states.sample(), states.vision, states.text) for _ in range(self.samples)]


class Streamed(NamedTuple):
    """One run: its value, and ms counted, spent generating states, and waiting for a core (None: not known)."""

    value: float
    ms: float
    generating_ms: float
    waited_ms: float | None


def streamed(shape: Shape, options: dict[str, Any], watch: contextlib.AbstractContextManager) -> Streamed:
    """MIR of the measured layers; counted time runs within `watch`."""
    states, metric = shape.states(shape.measured), ModalityIntegrationRate(**options)
    counted = generating = 0.0
    before = waiting.waited_ms()
    for _ in range(shape.samples):
        began = _now(shape.device)
        sample = states.sample()
        ready = _now(shape.device)
        with watch:
            metric.update([layer[None] for layer in sample], states.vision[None], states.text[None])
        counted += _now(shape.device) - ready
        generating += ready - began
    ready = _now(shape.device)
    with watch:
        result = metric.compute()
    counted += _now(shape.device) - ready
    waited = None if before is None else (waiting.waited_ms() or 0.0) - before
    return Streamed(result.value, counted, generating, waited)


def reference(data: Sequence[bench_mir.Sample]) -> float:
    """MIR of one stored layer in float64, by two passes with one sample's tokens in float64 at a time."""
    (vision_mean, vision), (text_mean, text), alpha = _float64_moments(data)
    gap = (vision_mean - text_mean).square().sum() + vision.trace() + text.trace()
    distance = (gap - 2 * recipes.eigh_trace(vision, text)) * alpha**2
    return distance.log10().item()


def _float64_moments(data: Sequence[bench_mir.Sample]) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor], float]:
    """Mean and covariance of each modality's tokens within 3 sigma, and alpha."""
    found, alpha = [], 0.0
    for index in (1, 2):
        norms = torch.cat([rows.norm(dim=-1) for rows in _rows(data, index)])
        alpha = 1 / norms.mean().item()  # the last iteration leaves the text's
        center, radius = norms.median(), 3 * norms.std()

        def kept(index: int = index, center: Tensor = center, radius: Tensor = radius) -> Iterator[Tensor]:
            for rows in _rows(data, index):
                yield rows[(rows.norm(dim=-1) - center).abs() <= radius]

        count = sum(map(len, kept()))
        mean = sum(rows.sum(0) for rows in kept()) / count
        second = torch.zeros(len(mean), len(mean), dtype=torch.float64, device=mean.device)
        for rows in kept():
            second.addmm_((rows - mean).mT, rows - mean)
        found.append((mean, second / (count - 1)))
    return found[0], found[1], alpha


def _rows(data: Sequence[bench_mir.Sample], index: int) -> Iterator[Tensor]:
    """Each sample's vision (1) or text (2) tokens, float64."""
    for sample in data:
        yield sample[0][0][sample[index]].double()


def measure(shape: Shape, skip: Sequence[str], checked: bool, by_stage: bool) -> tuple[list[dict], list[dict]]:
    """The rows of the CSV, and the rows of the stages if `by_stage`.

    checked: check the values against float64, which takes as long as three runs of ours. by_stage: watching adds a
    microsecond per Python call to the times, negligible if a layer takes seconds.
    """
    ceilings = harness.ceilings(shape.device)
    truth = reference(shape.stored()) if checked else None
    made, found = [], []
    for name, options in RUNS.items():
        rival = f"mir_kernels, {name}"
        if any(word in rival for word in skip):
            continue
        _warm_up(shape, options)
        watch = stages.Watch() if by_stage else contextlib.nullcontext()
        run = streamed(shape, options, watch)
        print(f"{rival}: {run.ms / 1e3:.2f} s counted, {run.generating_ms / 1e3:.2f} s generating", flush=True)
        error = None
        if truth is not None:  # the reference covers one layer
            one = (
                run if shape.measured == 1 else streamed(replace(shape, measured=1), options, contextlib.nullcontext())
            )
            error = abs(one.value - truth)
        row = _row(shape, rival, run.ms * shape.layers / shape.measured, error, ceilings)
        made.append(row | {"waited": None if run.waited_ms is None else run.waited_ms / run.ms})
        if isinstance(watch, stages.Watch):
            found += stages.rows(shape.case, name, watch, shape.tokens, ceilings)
    data: list[bench_mir.Sample] = []
    for name in RECIPES:
        if not any(word in name for word in skip):
            data = data or shape.stored()
            made.append(_of_recipe(shape, name, data, truth, ceilings))
    return made, found


def _of_recipe(
    shape: Shape, name: str, data: list[bench_mir.Sample], truth: float | None, ceilings: dict[str, float]
) -> dict:
    scaled = f"{name}; 1 layer, time x {shape.layers}" if shape.layers > 1 else name
    began = _now(shape.device)
    try:
        value = bench_mir.RIVALS[name](data)
    except (RuntimeError, ValueError) as problem:
        return _row(shape, scaled, None, None, ceilings) | {"failure": harness.first_line(problem)}
    ms = (_now(shape.device) - began) * shape.layers
    error = None if truth is None else abs(value - truth)
    return _row(shape, scaled, ms, error, ceilings)


def _row(shape: Shape, rival: str, ms: float | None, error: float | None, ceilings: dict[str, float]) -> dict:
    """A row of harness.COLUMNS with ms and floor of all layers. If the error exceeds the limit, it has no time."""
    limit = None if bench_mir.FAST in rival else bench_mir.LIMIT
    if error is not None and limit is not None and not error <= limit:
        ms = None
    n = shape.tokens.n
    tokens = counts.mir_tokens(shape.layers, n, shape.hidden)
    roots = counts.trace_sqrt_on(shape.device, shape.hidden).times(shape.layers)
    moved = (tokens.bytes + roots.bytes) / ceilings["copy_gbs"] / 1e6
    work = tokens.flops / ceilings["matmul_gflops"] / 1e6 + roots.flops / ceilings["float64_gflops"] / 1e6
    floor = max(moved, work)
    row = dict.fromkeys(harness.COLUMNS) | {f"p{q}_ms": ms for q in (20, 50, 80)} | ceilings
    return row | harness.environment_columns(shape.device) | {
        "operation": "mir of a stream", "case": shape.case, "rival": rival, "error": error, "limit": limit,
        "rounds": int(ms is not None), "bytes": tokens.bytes + roots.bytes, "flops": tokens.flops + roots.flops,
        "floor_ms": floor, "of_floor": floor / ms if ms else None, "failure": "",
        "versions": harness.versions(shape.device),
    }  # fmt: skip


def _warm_up(shape: Shape, options: dict[str, Any]) -> None:
    """Load, compile and allocate everything that happens once, outside the timing."""
    small = replace(shape, layers=1, measured=1, hidden=64, samples=2 * GROUPS, vision=80, text=40)
    streamed(small, options, contextlib.nullcontext())


def _now(device: str) -> float:
    """Current time in ms, after the device has finished all work."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() * 1e3
