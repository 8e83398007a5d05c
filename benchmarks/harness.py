"""What every benchmark shares: correctness before speed, rivals side by side, medians, counted bytes, CSV.

A benchmark lists its rivals as `Rival(name, call, error)`. `compare` first looks at each one's error against float64 (a
red check prints no time), then runs all of them in turn, round after round, so that a noisy machine is noisy for all
alike. On CUDA it times with events, over rotating inputs, with the L2 cache flushed; on a CPU with a clock. Every row
shows its fraction of the floor: the bytes that the job takes at least over the copy bandwidth, or its operations over
the largest matrix product's rate, whichever is longer, both measured in the same run (`ceilings`).
"""

from __future__ import annotations

import argparse
import csv
import functools
import os
import platform
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

DATA = Path(__file__).parent / "data"
# Edge of the matrices whose product's rate counts as the machine's, and bytes that the copy reads.
MATRIX = {"cpu": 1536, "cuda": 8192}
COPIED = {"cpu": 128 << 20, "cuda": 2 << 30}
FLUSHED = 512 << 20  # bytes written before each CUDA timing: past any L2, and longer than a launch takes from Python
COLUMNS = (
    "operation", "case", "rival", "p20_ms", "p50_ms", "p80_ms", "error", "limit", "bytes", "flops", "rounds",
    "copy_gbs", "matmul_gflops", "floor_ms", "of_floor", "device", "threads", "torch", "python", "commit",
)  # fmt: skip


@dataclass
class Rival:
    """One way of doing a job.

    call(i): does the job on the i-th set of inputs (rotate among them); its result is dropped.
    error: relative error against float64, computed by the benchmark before timing; None where it has no meaning.
    limit: what the error may be at most; a larger one is printed in place of a time.
    """

    name: str
    call: Callable[[int], object]
    error: float | None = None
    limit: float | None = None


def compare(
    operation: str,
    case: str,
    rivals: Sequence[Rival],
    *,
    bytes_moved: int = 0,
    flops: int = 0,
    seconds: float = 2.0,
    rounds: tuple[int, int] = (5, 200),
    device: str = "cpu",
) -> list[dict]:
    """Time all rivals in turn and return one row each (see COLUMNS).

    bytes_moved, flops: the fewest that the job takes (counts.py), so that a row tells its fraction of the floor.
    seconds: how long each rival is run in all, within `rounds` (fewest, most) repetitions.
    """
    red = {r.name for r in rivals if r.error is not None and r.limit is not None and not r.error <= r.limit}
    green = [r for r in rivals if r.name not in red]
    clock = _cuda_ms if device == "cuda" else _cpu_ms
    first = {r.name: (clock(r.call, 0), clock(r.call, 1))[1] for r in green}  # the first call only warms up
    slowest = max(first.values(), default=0.0)
    count = max(rounds[0], min(rounds[1], int(seconds * 1e3 / max(slowest, 1e-3))))
    times: dict[str, list[float]] = {r.name: [] for r in green}
    for i in range(count):
        for r in green if i % 2 == 0 else reversed(green):  # alternate the order: no rival always follows the same one
            times[r.name].append(clock(r.call, i))
    top = ceilings(device)
    floor = max(bytes_moved / top.copy_gbs, flops / top.matmul_gflops) / 1e6
    rows = []
    for r in rivals:
        t = sorted(times.get(r.name, ()))
        p20, p50, p80 = (t[int(q * (len(t) - 1) + 0.5)] for q in (0.2, 0.5, 0.8)) if t else (None, None, None)
        rows.append(
            dict(zip(COLUMNS, (operation, case, r.name, p20, p50, p80, r.error, r.limit, bytes_moved, flops, len(t),
                               *top, floor, floor / p50 if p50 else None, *environment(device)), strict=True))
        )  # fmt: skip
    return rows


class Ceilings(NamedTuple):
    """What the machine reached in this run: a copy, bytes read plus written, and the faster of two matrix products."""

    copy_gbs: float
    matmul_gflops: float


@functools.cache
def ceilings(device: str) -> Ceilings:
    """Measured once a process, on random data: the median of nine copies, and of nine products in bf16 and float32."""
    clock = _cuda_ms if device == "cuda" else _cpu_ms
    source = torch.randint(0, 255, (COPIED[device],), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copied = 2 * COPIED[device] / _median(clock, functools.partial(_copy, source, target)) / 1e6
    del source, target
    n, rates = MATRIX[device], []
    for dtype in (torch.bfloat16, torch.float32):
        a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
        out = torch.empty_like(a)
        rates.append(2 * n**3 / _median(clock, functools.partial(_multiply, a, b, out)) / 1e6)
    return Ceilings(copied, max(rates))


def _copy(source: torch.Tensor, target: torch.Tensor, i: int) -> torch.Tensor:
    return target.copy_(source)


def _multiply(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor, i: int) -> torch.Tensor:
    return torch.mm(a, b, out=out)


def _median(clock: Callable, call: Callable[[int], object], repeats: int = 9) -> float:
    clock(call, 0), clock(call, 1)
    return sorted(clock(call, i) for i in range(repeats))[repeats // 2]


def environment(device: str = "cpu") -> tuple[str, int, str, str, str]:
    """Device name, threads, torch version, Python version and commit, as the last columns of a row."""
    name = torch.cuda.get_device_name() if device == "cuda" else cpu_name()
    command = ["git", "rev-parse", "--short", "HEAD"]
    git = subprocess.run(command, capture_output=True, text=True, cwd=DATA.parent, check=False)
    return name, torch.get_num_threads(), torch.__version__, platform.python_version(), git.stdout.strip() or "unknown"


def cpu_name() -> str:
    """The processor's model name with the widest vector instructions torch uses on it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        model = platform.processor() or platform.machine()
    return f"{model} ({os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()})"


def print_rows(rows: Sequence[dict], *, baseline: str | None = None) -> None:
    """A table of the rows, with each rival's median against the baseline's (the first rival unless named)."""
    cases = dict.fromkeys((r["operation"], r["case"]) for r in rows)
    for key in cases:
        mine = [r for r in rows if (r["operation"], r["case"]) == key]
        base = next((r["p50_ms"] for r in mine if r["rival"] == (baseline or mine[0]["rival"])), None)
        print(f"\n{key[0]}  {key[1]}")
        times = f"{'p20 ms':>10}{'p50 ms':>10}{'p80 ms':>10}"
        print(f"  {'rival':<34}{times}{'x base':>8}{'GB/s':>8}{'GFLOP/s':>9}{'of floor':>9}  error")
        for r in mine:
            error = "" if r["error"] is None else f"{r['error']:.1e}"
            if r["p50_ms"] is None:
                print(
                    f"  {r['rival']:<34}{'not timed: its error is beyond the limit of':>46} {r['limit']:.0e}  {error}"
                )
                continue
            ms = r["p50_ms"]
            rate = f"{r['bytes'] / ms / 1e6:8.1f}" if r["bytes"] else " " * 8
            work = f"{r['flops'] / ms / 1e6:9.0f}" if r["flops"] else " " * 9
            ratio = f"{ms / base:8.2f}" if base else " " * 8
            floor = f"{r['of_floor']:9.2f}" if r.get("of_floor") else " " * 9
            medians = f"{r['p20_ms']:10.3f}{ms:10.3f}{r['p80_ms']:10.3f}"
            print(f"  {r['rival']:<34}{medians}{ratio}{rate}{work}{floor}  {error}")


def write_csv(rows: Sequence[dict], path: Path) -> None:
    """Write the rows to `path` in the order of COLUMNS, replacing what was there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows({k: (f"{v:.6g}" if isinstance(v, float) else v) for k, v in row.items()} for row in rows)


def read_csv(path: Path) -> list[dict]:
    """The rows of a file that `write_csv` wrote, numbers as numbers. Files older than a column lack it."""
    numbers = set(COLUMNS[COLUMNS.index("p20_ms") : COLUMNS.index("device")])
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    return [{k: (float(v) if v else None) if k in numbers else v for k, v in row.items()} for row in rows]


def arguments(description: str, name: str) -> argparse.ArgumentParser:
    """The flags that all benchmarks share; `--out` defaults to benchmarks/data/<name>_<device kind>.csv."""
    parser = argparse.ArgumentParser(description=description)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=device, choices=("cpu", "cuda"))
    parser.add_argument("--out", type=Path, default=DATA / f"{name}_{device}.csv", help="CSV to write")
    parser.add_argument("--seconds", type=float, default=2.0, help="time for each rival of each case")
    return parser


def _cpu_ms(call: Callable[[int], object], i: int) -> float:
    start = time.perf_counter()
    call(i)
    return (time.perf_counter() - start) * 1e3


def _cuda_ms(call: Callable[[int], object], i: int) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    _flush().zero_()  # a cold cache, and a running queue before the first event: launch time is then hidden
    start.record()
    call(i)
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


@functools.cache
def _flush() -> torch.Tensor:
    return torch.empty(FLUSHED, dtype=torch.uint8, device="cuda")
