"""Shared by all benchmarks: correctness before speed, rivals side by side, medians, counted bytes, CSV.

A benchmark lists its rivals as `Rival(name, call, error)`. `compare` first checks each rival's error against float64
(beyond the limit no time is printed), then runs all rivals in turn, round after round, so that noise affects all alike.
A rival that raises gets a row with its message and no time. CUDA is timed with events after the L2 cache was filled
with other data, a CPU with a clock; calls that waited for a core count only if there are too few others (waiting.py).
Every row shows its fraction of the floor, the longer of two times measured in the same run: a copy of the minimal bytes
of the job (`copies_of`), and its operations at the rate of a large matrix product (`rate`).
"""

from __future__ import annotations

import argparse
import csv
import functools
import os
import platform
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import waiting
from mir_kernels import _native
from mir_kernels._dispatch import Operation

DATA = Path(__file__).parent / "data"
# Edge of the matrices whose product defines the machine's rate, and bytes read by the largest copy.
MATRIX = {"cpu": 1536, "cuda": 8192}
COPIED = {"cpu": 128 << 20, "cuda": 2 << 30}
REPEATS = 11  # of each product and copy that measures the machine's rates
BEARABLE = 10.0  # seconds for all repeats of one product
FLUSHED = 512 << 20  # bytes read before each CUDA timing: exceeds any L2, and takes longer than a launch from Python
# Dtypes that the products of a job may use. The native second moment multiplies integers; no CUDA kernel does.
UNITS = {
    "cpu": {"any": (torch.bfloat16, torch.float32, torch.int8), "float64": (torch.float64,)},
    "cuda": {"any": (torch.bfloat16, torch.float32), "float64": (torch.float64,)},
}
OURS = ("ours", "mir_kernels")  # name prefixes of our own rivals
ENVIRONMENT = ("device", "threads", "torch", "python", "commit")  # the last columns of every CSV
COLUMNS = (
    "operation", "case", "rival", "p20_ms", "p50_ms", "p80_ms", "error", "limit", "peak_mb", "bytes", "flops", "rounds",
    "waited", "copy_gbs", "matmul_gflops", "float64_gflops", "floor_ms", "of_floor", "failure", "versions",
    *ENVIRONMENT,
)  # fmt: skip
TEXTS = {"operation", "case", "rival", "failure", "versions", *ENVIRONMENT}


@dataclass
class Rival:
    """One way of doing a job.

    call(i): does the job for the i-th time, on another set of inputs if the benchmark has several; drops its result.
    error: relative error against float64, or a function that computes it, whose exceptions count against the rival.
        None if an error is meaningless.
    limit: the largest error that is timed; a larger one is printed instead of a time.
    peak_mb: memory beyond the inputs, if the benchmark measured it.
    """

    name: str
    call: Callable[[int], object]
    error: float | Callable[[], float] | None = None
    limit: float | None = None
    peak_mb: float | None = None

    def found_error(self) -> float | None:
        """The error, computed now if necessary."""
        return self.error() if callable(self.error) else self.error


def compare(
    operation: str,
    case: str,
    rivals: Sequence[Rival],
    *,
    bytes_moved: int = 0,
    flops: int = 0,
    float64_flops: int = 0,
    seconds: float = 2.0,
    rounds: tuple[int, int] = (5, 200),
    device: str = "cpu",
) -> list[dict]:
    """Time all rivals in turn and return one row each (see COLUMNS).

    bytes_moved, flops: the minimum of the job (counts.py), for its fraction of the floor.
    float64_flops: operations that need float64, in addition to `flops`, which any unit of the machine may do.
    seconds: total time of each rival, within `rounds` (fewest, most) repetitions spread over the whole run.
    The row's `waited` is the share of its time that the process waited for a core: above 0.02 the machine was busy.
    """
    clock = _cuda_ms if device == "cuda" else _cpu_ms
    copies, share = copies_of(bytes_moved, device)
    entries = [*rivals, *copies]
    errors: dict[str, float | None] = {}
    failures: dict[str, str] = {}
    turns: dict[str, int] = {}
    for r in entries:
        try:
            errors[r.name] = found = r.found_error()
            if found is None or r.limit is None or found <= r.limit:
                clock(r.call, 0)  # compiles, allocates
                affordable = int(seconds * 1e3 / max(clock(r.call, 1), 1e-3))
                turns[r.name] = max(rounds[0], min(rounds[1], affordable))
        except Exception as problem:  # of a library or a kernel: the other rivals continue
            failures[r.name] = first_line(problem)
    calls: dict[str, list[tuple[float, float | None]]] = {name: [] for name in turns}
    most = max(turns.values(), default=0)
    for i in range(most):
        for r in entries if i % 2 == 0 else reversed(entries):  # no rival always follows the same one
            due = r.name in turns and (i + 1) * turns[r.name] // most > i * turns[r.name] // most
            if due and r.name not in failures:
                try:
                    before = waiting.waited_ms() if device == "cpu" else None
                    ms = clock(r.call, i)
                    calls[r.name].append((ms, None if before is None else (waiting.waited_ms() or 0.0) - before))
                except Exception as problem:
                    failures[r.name] = first_line(problem)
    kept = {name: waiting.undisturbed(t, rounds[0]) for name, t in calls.items() if name not in failures}
    ordered = {name: times for name, (times, _) in kept.items()}
    copied = min((quantile(ordered[c.name], 0.5) for c in copies if c.name in ordered), default=0.0) * share
    rates = rate(device, "any") if flops else None, rate(device, "float64") if float64_flops else None
    floor = max(copied, flops / (rates[0] or 1.0) / 1e6 + float64_flops / (rates[1] or 1.0) / 1e6)
    common = {
        "operation": operation, "case": case, "bytes": bytes_moved, "flops": flops + float64_flops, "floor_ms": floor,
        "copy_gbs": bytes_moved / copied / 1e6 if copied else None,
        "matmul_gflops": rates[0], "float64_gflops": rates[1], "versions": versions(device),
    } | environment_columns(device)  # fmt: skip
    rows = []
    for r in rivals:
        t = ordered.get(r.name, [])
        row = common | {
            "rival": r.name, "error": errors.get(r.name), "limit": r.limit, "peak_mb": r.peak_mb,
            "rounds": len(calls[r.name]) if t else 0, "waited": kept[r.name][1] if t else None,
            "failure": failures.get(r.name, ""), "of_floor": floor / quantile(t, 0.5) if t and floor else None,
        }  # fmt: skip
        row |= {f"p{q}_ms": quantile(t, q / 100) if t else None for q in (20, 50, 80)}
        rows.append({name: row[name] for name in COLUMNS})
    return rows


def without(rivals: Sequence[Rival], words: Sequence[str]) -> list[Rival]:
    """The rivals whose name contains none of the words, for `--skip`."""
    return [rival for rival in rivals if not any(word in rival.name for word in words)]


def backends(operation: Operation, device: str) -> list[str]:
    """The backends of an operation that can run on this device, the default first."""
    return [b for b in operation.orders[device] if operation.reason(b, torch.device(device)) is None]


def compiled(function: Callable, **options: Any) -> Callable:
    """torch.compile(function, **options) at the first call: loading the compiler takes longer than most benchmarks."""
    made = functools.cache(lambda: torch.compile(function, **options))
    return lambda *arguments: made()(*arguments)


def quantile(ordered: Sequence[float], q: float) -> float:
    """The nearest of sorted values, without interpolation: a time that was measured."""
    return ordered[int(q * (len(ordered) - 1) + 0.5)]


def first_line(problem: BaseException) -> str:
    """The type of an exception and the first line of its message, which may be empty."""
    return f"{type(problem).__name__}: {(str(problem).strip().splitlines() or [''])[0][:160]}".rstrip(": ")


def exit_code(rows: Sequence[dict]) -> int:
    """The exit code of a benchmark: 1 if one of ours raised or was wrong."""
    return int(any(r["p50_ms"] is None for r in rows if r["rival"].startswith(OURS)))


def copies_of(moved: int, device: str) -> tuple[list[Rival], float]:
    """Copies of `moved` bytes, read plus written, which `compare` times among the rivals with equally cold caches; and
    the ratio of the job's bytes to the copies', above 1 beyond 2 COPIED.

    They are torch's copy and the native MoCa kernel with an all-false mask, whose stores bypass the caches.
    """
    if not moved:
        return [], 1.0
    source = torch.randn(max(1, min(moved // 2, COPIED[device]) // 4), device=device)
    target = torch.empty_like(source)
    ways = [Rival("(torch's copy)", lambda i: target.copy_(source))]
    d = 1024
    if len(source) >= d and (_native.C is not None if device == "cpu" else _native.cuda_reason() is None):
        from mir_kernels.ops.moca import native

        n = len(source) // d
        vector, mask = source.new_zeros(d), torch.zeros(n, dtype=torch.bool, device=device)
        rows = source[: n * d].view(n, d), vector, vector, mask, target[: n * d].view(n, d)
        ways.append(Rival("(native copy)", lambda i: native.forward(*rows) or target))
    return ways, moved / (8 * len(source))


@functools.cache
def rate(device: str, unit: str) -> float:
    """GFLOP/s of the fastest large product of a unit's dtypes, on random data; dtypes without support count as 0."""
    n = MATRIX[device] // (2 if unit == "float64" else 1)
    small = {dtype: _product_rate(device, dtype, n // 4) for dtype in UNITS[device][unit]}
    # A dtype without hardware instructions would take minutes at full size, and is not the fastest.
    least = min(max(small.values()), 2 * n**3 * REPEATS / BEARABLE / 1e9)
    return max(_product_rate(device, dtype, n) for dtype in small if small[dtype] >= least)


def _product_rate(device: str, dtype: torch.dtype, n: int) -> float:
    a, b = (torch.randn(n, n, device=device).mul_(32).to(dtype) for _ in range(2))
    if dtype == torch.int8:
        calls: Callable[[int], object] = lambda i: torch._int_mm(a, b)  # noqa: E731
    else:
        out = torch.empty_like(a)
        calls = lambda i: torch.mm(a, b, out=out)  # noqa: E731
    try:
        return 2 * n**3 / _median(device, calls) / 1e6
    except (RuntimeError, NotImplementedError):
        return 0.0


def ceilings(device: str) -> dict[str, float]:
    """The machine's ceilings: GB/s of a large copy, read plus written, and GFLOP/s of large products."""
    moved = 2 * COPIED[device]
    ways, _ = copies_of(moved, device)
    copied = moved / min(_median(device, way.call) for way in ways) / 1e6
    return {"copy_gbs": copied, "matmul_gflops": rate(device, "any"), "float64_gflops": rate(device, "float64")}


def _median(device: str, call: Callable[[int], object]) -> float:
    """The median of REPEATS times without the first two, which warm up."""
    clock = _cuda_ms if device == "cuda" else _cpu_ms
    return quantile(sorted([clock(call, i) for i in range(REPEATS)][2:]), 0.5)


def environment(device: str = "cpu") -> tuple[str, int, str, str, str]:
    """Device name, threads, torch version, Python version and commit: ENVIRONMENT."""
    name = torch.cuda.get_device_name() if device == "cuda" else cpu_name()
    return name, torch.get_num_threads(), torch.__version__, platform.python_version(), commit()


def environment_columns(device: str = "cpu") -> dict[str, Any]:
    """The last columns of a row."""
    return dict(zip(ENVIRONMENT, environment(device), strict=True))


@functools.cache
def commit() -> str:
    """The current commit, with "+changes" if the code differs from it; "unknown" without git or a clone."""
    if shutil.which("git") is None:
        return "unknown"
    git = functools.partial(subprocess.run, capture_output=True, text=True, cwd=DATA.parent.parent, check=False)
    head = git(["git", "rev-parse", "--short", "HEAD"]).stdout.strip()
    made = [f":!{path}" for path in ("benchmarks/data", "README.md", "docs")]  # written by the benchmarks themselves
    changed = git(["git", "status", "--porcelain", "--untracked-files=no", "--", ".", *made]).stdout.strip()
    return f"{head}+changes" if head and changed else head or "unknown"


@functools.cache
def versions(device: str) -> str:
    """On CUDA, the versions of the driver, CUDA and triton; else ""."""
    if device != "cuda":
        return ""
    import triton

    try:
        driver = re.search(r"\d+\.\d+[.\d]*", Path("/proc/driver/nvidia/version").read_text())
    except OSError:
        driver = None
    return f"driver {driver[0] if driver else 'unknown'}, CUDA {torch.version.cuda}, triton {triton.__version__}"


def cpu_name() -> str:
    """The processor's model name with the widest vector instructions that torch uses."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        model = platform.processor() or platform.machine()
    return f"{model} ({os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()})"


def print_rows(rows: Sequence[dict]) -> None:
    """Print a table of the rows, with each rival's median relative to the first one of its case."""
    cases = dict.fromkeys((r["operation"], r["case"]) for r in rows)
    for key in cases:
        mine = [r for r in rows if (r["operation"], r["case"]) == key]
        base = mine[0]["p50_ms"]
        print(f"\n{key[0]}  {key[1]}")
        times = f"{'p20 ms':>10}{'p50 ms':>10}{'p80 ms':>10}"
        print(f"  {'rival':<34}{times}{'x base':>8}{'GB/s':>8}{'GFLOP/s':>9}{'of floor':>9}  error")
        for r in mine:
            error = "" if r["error"] is None else f"{r['error']:.1e}"
            if r["p50_ms"] is None:
                why = r.get("failure") or f"not timed: its error exceeds the limit of {r['limit']:.0e}"
                print(f"  {r['rival']:<34}  {why}  {error}")
                continue
            ms = r["p50_ms"]
            rate = f"{r['bytes'] / ms / 1e6:8.1f}" if r["bytes"] else " " * 8
            work = f"{r['flops'] / ms / 1e6:9.0f}" if r["flops"] else " " * 9
            ratio = f"{ms / base:8.2f}" if base else " " * 8
            floor = f"{r['of_floor']:9.2f}" if r.get("of_floor") else " " * 9
            peak = f"  peak {r['peak_mb']:.0f} MB" if r.get("peak_mb") is not None else ""
            busy = f"  waited {r['waited']:.0%} for a core" if (r.get("waited") or 0.0) > waiting.BEARABLE else ""
            medians = f"{r['p20_ms']:10.3f}{ms:10.3f}{r['p80_ms']:10.3f}"
            print(f"  {r['rival']:<34}{medians}{ratio}{rate}{work}{floor}  {error}{peak}{busy}")


def write_csv(rows: Sequence[dict], path: Path) -> None:
    """Write the rows to `path` in the order of COLUMNS, replacing the file. Called after every case, so that a crash of
    the next one loses nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    arriving = path.with_name(f"{path.name}.{os.getpid()}")
    with arriving.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows({k: (f"{v:.6g}" if isinstance(v, float) else v) for k, v in row.items()} for row in rows)
    os.replace(arriving, path)


def read_csv(path: Path) -> list[dict]:
    """The rows of a file written by `write_csv`, with numbers parsed. Files older than a column lack it."""
    numbers = set(COLUMNS) - TEXTS
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    return [{k: (float(v) if v else None) if k in numbers else v for k, v in row.items()} for row in rows]


def csv_name(name: str, device: str) -> str:
    """<name>_cpu.csv, or <name>_cuda_h100.csv with the card, so that two cards do not overwrite each other."""
    if device != "cuda" or not torch.cuda.is_available():
        return f"{name}_{device}.csv"
    return f"{name}_{device}_{card(torch.cuda.get_device_name())}.csv"


def card(device_name: str) -> str:
    """h100 for "NVIDIA H100 80GB HBM3", rtx_4090 for "NVIDIA GeForce RTX 4090": the words up to the first number."""
    words = [w for w in re.split(r"\W+", device_name.lower()) if w not in ("nvidia", "geforce", "tesla", "amd", "")]
    end = next((i for i, word in enumerate(words, 1) if re.search(r"\d", word)), len(words))
    return "_".join(words[:end])


class _Arguments(argparse.ArgumentParser):
    """A parser whose default of `--out` depends on `--device`."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        flags, rest = super().parse_known_args(args, namespace)
        if flags.out == self.get_default("out"):
            flags.out = DATA / csv_name(self.name, flags.device)
        return flags, rest


def arguments(description: str, name: str) -> argparse.ArgumentParser:
    """The flags shared by all benchmarks; `--out` defaults to benchmarks/data/`csv_name`."""
    parser = _Arguments(description=description)
    parser.name = name
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=device, choices=("cpu", "cuda"))
    parser.add_argument("--out", type=Path, default=DATA / csv_name(name, device), help="CSV to write")
    parser.add_argument("--seconds", type=float, default=2.0, help="time for each rival of each case")
    parser.add_argument("--skip", nargs="*", default=[], metavar="WORD", help="skip rivals whose name contains a WORD")
    return parser


def _cpu_ms(call: Callable[[int], object], i: int) -> float:
    start = time.perf_counter()
    call(i)
    return (time.perf_counter() - start) * 1e3


def _cuda_ms(call: Callable[[int], object], i: int) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    # Leaves a cold cache with nothing to write back, and keeps the GPU busy, so that launch time is hidden.
    _flush().sum()
    start.record()
    call(i)
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


@functools.cache
def _flush() -> torch.Tensor:
    return torch.zeros(FLUSHED // 4, device="cuda")
