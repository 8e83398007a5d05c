"""Tune block sizes of the Triton kernels by measurement: candidates, a correctness check against float64, timing.

    python benchmarks/tune.py --out tuned.json          # on a GPU: times every candidate, writes the rows to commit
    python benchmarks/tune.py --out tuned.json --dry    # anywhere: two candidates per table, compiled for sm_90

All candidates are first compiled ahead of time, in as many processes as there are cores. Those that spill or do not fit
into shared memory are rejected; a launch finds the others in Triton's cache. The repository is not changed. A row that
is at least 3% faster replaces the shipped one in tuned.json, and in tuned.txt as lines to commit.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import functools
import itertools
import json
import multiprocessing
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

import harness
from mir_kernels import _triton
from mir_kernels.ops.moca import triton as moca
from mir_kernels.ops.moments import packed
from mir_kernels.ops.moments import triton as moments
from mir_kernels.ops.sqrtm import eager
from mir_kernels.ops.sqrtm import triton as sqrtm
from mir_kernels.ops.sqrtm import triton_products as products

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
WORTH = 0.97  # fraction of the shipped row's median below which another row is offered
STEP = (3.2, -2.4, 0.5)
Calls = list[tuple[Callable, tuple]]  # launchers and their arguments


class Job(NamedTuple):
    """A table row to choose. `calls(device)` returns the calls to time and a function that returns their error."""

    name: str
    table: dict
    candidates: Callable[[NamedTuple], list[dict]]  # changes to the shipped row
    calls: Callable[[str], tuple[Calls, Callable[[], float]]]
    limit: float

    def rows(self, architecture: str) -> dict[str, NamedTuple]:
        """{name: row}, the shipped one first, without duplicates."""
        shipped = self.table[architecture]
        found = {"shipped": shipped}
        for change in self.candidates(shipped):
            row = shipped._replace(**change)
            if row not in found.values():
                found[json.dumps(change)] = row
        return found


def moca_rows(device: str) -> tuple[Calls, Callable[[], float]]:
    x, grad = (torch.randn(16384, 4096, device=device).bfloat16() for _ in range(2))
    scale, shift = (torch.randn(4096, device=device) for _ in range(2))
    mask, out, dx = torch.rand(16384, device=device) < 0.5, torch.empty_like(x), torch.empty_like(x)

    def error() -> float:
        moca.forward(x, scale, shift, mask, out)
        dscale, _ = moca.backward(grad, x, scale, mask, dx)
        return max(
            relative(out[mask][:999], x[mask][:999].double() * scale + shift),
            relative(dscale, (grad[mask].double() * x[mask].double()).sum(0)),
        )

    return [(moca.forward, (x, scale, shift, mask, out)), (moca.backward, (grad, x, scale, mask, dx))], error


def moca_fused(device: str) -> tuple[Calls, Callable[[], float]]:
    x, residual, grad, h, dx = (torch.randn(16384, 4096, device=device).bfloat16() for _ in range(5))
    scale, weight = (torch.randn(4096, device=device) for _ in range(2))
    mask, rstd = torch.rand(16384, device=device) < 0.5, torch.rand(16384, device=device)
    arguments = (grad, None, h, x, residual, scale, mask, weight, rstd, dx)

    def error() -> float:
        dweight = moca.add_rms_backward(*arguments)[2]
        return relative(dweight, (grad.double() * (h.double() * rstd[:, None])).sum(0))

    return [(moca.add_rms_backward, arguments)], error


def second_moment(device: str) -> tuple[Calls, Callable[[], float]]:
    n, d = 4096, 4096
    x = torch.randn(n, d, device=device).bfloat16()
    zeros = functools.partial(torch.zeros, dtype=torch.float64, device=device)
    second = zeros(packed.entries(d))
    calls = [
        (moments.accumulate, (second, x, None, zeros(d) + mean, zeros(2, d), zeros(2), precision))
        for mean, precision in ((0, "fast"), (64, "auto"))
    ]  # whole products, and split ones as for large means

    def error() -> float:
        found = []
        for launcher, arguments in calls:
            second.zero_()
            shift, _ = launcher(*arguments)
            away = x.double() - shift
            found.append(relative(packed.unpack(second, d), away.T @ away))
        return max(found)

    return calls, error


def polynomial_step(dtype: torch.dtype, d: int, device: str) -> tuple[Calls, Callable[[], float]]:
    x = (torch.randn(2 if d >= products.LARGE else 64, d, d, device=device) / (2 * d**0.5)).to(dtype)
    held: dict[bool, Tensor] = {}  # split once, so that only the step is timed

    def step() -> Tensor:
        tiles = products.tiles_for(d, d, dtype, x.device)
        whole = tiles.halves == "none"
        if whole not in held:
            held[whole] = products.split(x, tiles)
        return products.polynomial_step(held[whole], STEP, tiles)

    def error() -> float:
        return relative(products.join(step(), d, d)[:2], eager.polynomial_step(x[:2].double(), STEP))

    return [(step, ())], error


def small_polar(dtype: torch.dtype, d: int, device: str) -> tuple[Calls, Callable[[], float]]:
    x = (torch.randn(528, d, d, device=device) / (2 * d**0.5)).to(dtype)

    def error() -> float:
        exact = eager.polynomial_step(eager.polynomial_step(x.double(), STEP), STEP)
        return relative(sqrtm.small_polar(x, (STEP, STEP)), exact)

    return [(sqrtm.small_polar, (x, (STEP,) * 8))], error


def relative(found: Tensor, exact: Tensor) -> float:
    return ((found.double() - exact).norm() / exact.norm()).item()


def grid(**values: tuple) -> Callable[[NamedTuple], list[dict]]:
    """Every combination of the values, as changes to a row."""
    changes = [dict(zip(values, chosen, strict=True)) for chosen in itertools.product(*values.values())]
    return lambda row: changes


def warps_at(edge: int) -> Callable[[NamedTuple], list[dict]]:
    """Numbers of warps of the kernel that keeps a matrix of this edge in registers."""
    return lambda row: [{"small": {**row.small, edge: warps}} for warps in (1, 2, 4, 8)]


def either(*parts: Callable[[NamedTuple], list[dict]]) -> Callable[[NamedTuple], list[dict]]:
    return lambda row: [change for part in parts for change in part(row)]


def waves(row: NamedTuple) -> list[dict]:
    """Half and twice the number of programs in the kernels that loop over rows."""
    return [{"processors": row.processors // 2}, {"processors": row.processors * 2}]


# In covariance kernels a tile has a total besides its accumulator: 128^2 is the largest that fits in registers.
LARGE = either(
    grid(tile=(128,), step=(32, 64), warps=(4, 8), stages=(3, 4)),
    grid(tile=(64,), step=(32, 64), warps=(4,), stages=(3,)),
)


# rows, columns, step, warps, stages of the large products, by `Tiles.halves`.
SHAPES = {
    "none": ((128, 256, 64, 8, 3), (128, 256, 64, 8, 4), (128, 128, 64, 8, 3), (128, 128, 64, 8, 4),
             (128, 128, 32, 8, 4), (64, 128, 64, 4, 3), (64, 64, 64, 4, 3)),
    "together": ((128, 128, 64, 8, 3), (128, 128, 32, 8, 3), (128, 128, 32, 8, 4), (64, 128, 64, 4, 3),
                 (64, 128, 32, 4, 3), (64, 64, 64, 4, 3)),
    "in turn": ((128, 256, 64, 8, 3), (128, 256, 64, 8, 4), (128, 128, 64, 8, 4), (64, 128, 64, 4, 4)),
    "chained": ((128, 128, 32, 8, 3), (64, 128, 32, 8, 3)),
}  # fmt: skip


def tiles(row: NamedTuple) -> list[dict]:
    """Shapes of the large products; for the shipped one also other bands, and tiles loaded by the threads."""
    ways = ("none",) if row.halves == "none" else tuple(SHAPES)[1:]
    names = ("rows", "columns", "step", "warps", "stages")
    shapes = [{**dict(zip(names, shape, strict=True)), "halves": way} for way in ways for shape in SHAPES[way]]
    return [*shapes, {"band": 16}, {"band": 4}, *([{"descriptors": False}] if row.descriptors else [])]


JOBS = [
    Job("moca.triton.TABLE", moca.TABLE, either(grid(tile_bytes=(4096, 8192, 16384)), waves), moca_rows, 1e-2),
    Job("moca.triton.TABLE", moca.TABLE, waves, moca_fused, 1e-2),
    Job("moments.triton.TABLE", moments.TABLE, LARGE, second_moment, 1e-5),
    *(
        Job(
            f"sqrtm.triton_products.{name}[{dtype}]", table[dtype], tiles, functools.partial(polynomial_step, dtype, d),
            1e-5 if dtype == torch.float32 else 2e-2,
        )
        for name, table, d in (("TABLE", products.TABLE, 4096), ("TABLE_BELOW", products.TABLE_BELOW, 256))
        for dtype in (torch.float32, torch.float16)
    ),
    *(
        Job(
            f"sqrtm.triton.TABLE[{dtype}]", sqrtm.TABLE[dtype], candidates, functools.partial(small_polar, dtype, d),
            1e-5 if dtype == torch.float32 else 2e-2,
        )
        for dtype in (torch.float32, torch.float16)
        for candidates, d in (
            (warps_at(32), 32),
            *([] if dtype == torch.float32 else [(warps_at(64), 64)]),
            (grid(looped=(16, 32) if dtype == torch.float32 else (32, 64)), 128),
        )
    ),
]  # fmt: skip


def needs(number: int, name: str, architecture: str, shared: int) -> tuple[str, str]:
    """Compile one candidate of one job ahead of time. Returns why it cannot run, or "", and its resources."""
    import aot

    job = JOBS[number]
    shipped = job.table[architecture]
    used = []
    try:
        job.table[architecture] = job.rows(architecture)[name]
        for launcher, arguments in job.calls("meta")[0]:
            for launch in aot.record(launcher, *arguments, target=architecture):
                used.append((launch.kernel.__name__, aot.compile_launch(architecture, launch)))
    except Exception as problem:  # triton raises several kinds
        return harness.first_line(problem), ""
    finally:
        job.table[architecture] = shipped
    text = ", ".join(f"{n} {b.registers} registers, {b.shared} B shared, {b.spills} B spills" for n, b in used)
    if any(b.spills for _, b in used):
        return f"spills: {text}", text
    return ("" if all(b.shared <= shared for _, b in used) else f"too much shared memory: {text}"), text


def compiled(
    numbers: Sequence[int], architecture: str, shared: int, most: int | None = None
) -> dict[tuple[int, str], tuple[str, str]]:
    """`needs` of the first `most` rows of these jobs, every process compiling some."""
    rows = [(number, name) for number in numbers for name in list(JOBS[number].rows(architecture))[:most]]
    workers = max(1, min(len(rows), os.cpu_count() or 1))
    if workers == 1:
        return {row: needs(*row, architecture, shared) for row in rows}
    # Spawned, because a fork would inherit the CUDA context.
    with concurrent.futures.ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        found = [pool.submit(needs, *row, architecture, shared) for row in rows]
        return dict(zip(rows, (one.result() for one in found), strict=True))


def run_all(calls: Calls, table: dict, architecture: str, row: NamedTuple, i: int = 0) -> None:
    """Run the calls with `row` in the table, where it stays."""
    table[architecture] = row
    for launcher, arguments in calls:
        launcher(*arguments)


def choose(job: Job, architecture: str, seconds: float, refused: dict[str, str]) -> dict:
    """Time every correct candidate that was not rejected; the best stays in the table for the jobs that follow."""
    shipped = job.table[architecture]
    calls, error = job.calls("cuda")
    rows = {name: row for name, row in job.rows(architecture).items() if name not in refused}

    def error_of(row: NamedTuple) -> float:
        job.table[architecture] = row
        return error()

    rivals = [
        harness.Rival(
            name,
            functools.partial(run_all, calls, job.table, architecture, row),
            functools.partial(error_of, row),
            job.limit,
        )
        for name, row in rows.items()
    ]
    timed = harness.compare("tune", job.name, rivals, seconds=seconds, rounds=(5, 50), device="cuda")
    best = fastest({r["rival"]: r["p50_ms"] for r in timed if r["p50_ms"] is not None})
    job.table[architecture] = rows.get(best, shipped)
    medians = {r["rival"]: r["p50_ms"] for r in timed}
    return {
        "table": job.name, "architecture": architecture, "shipped": repr(shipped),
        "offer": repr(job.table[architecture]), "changed": best != "shipped",
        "shipped_ms": medians.get("shipped"), "best_ms": medians.get(best), "refused": refused,
        "candidates": [{k: r[k] for k in ("rival", "p20_ms", "p50_ms", "p80_ms", "error", "failure")} for r in timed],
    }  # fmt: skip


def fastest(medians: dict[str, float]) -> str:
    """The name of the best row: the shipped one unless another reaches WORTH."""
    best = min(medians, key=medians.__getitem__, default="shipped")
    return best if medians.get(best, 1.0) <= WORTH * medians.get("shipped", float("inf")) else "shipped"


def lines_to_commit(found: Sequence[dict], before: dict[str, str]) -> str:
    """For each table that changes, its row before and after: `before` and the last offer."""
    last = {one["table"]: one for one in found}
    text = []
    for table, one in last.items():
        if one["offer"] != before[table]:
            folder, module, name = table.split(".", 2)
            text += [f"mir_kernels/ops/{folder}/{module}.py, {name}"]
            text += [
                f'{sign}    "{one["architecture"]}": {row},'
                for sign, row in (("-", before[table]), ("+", one["offer"]))
            ]
    return "\n".join(text) + "\n" if text else ""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--out", type=Path, required=True, help="JSON to write; the lines to commit are written next to it as .txt"
    )
    parser.add_argument("--seconds", type=float, default=0.1, help="time for each candidate")
    parser.add_argument("--only", default="", help="only tables whose name contains this")
    parser.add_argument("--dry", action="store_true", help="only compile ahead of time, without timing")
    flags = parser.parse_args()
    torch.manual_seed(0)
    numbers = [number for number, job in enumerate(JOBS) if flags.only in job.name]
    architecture, shared = "sm_90", 227 << 10
    if not flags.dry:
        architecture = _triton.architecture(torch.device("cuda"))
        shared = torch.cuda.get_device_properties(0).shared_memory_per_block_optin
    before = {JOBS[number].name: repr(JOBS[number].table[architecture]) for number in numbers}
    resources = compiled(numbers, architecture, shared, 2 if flags.dry else None)
    found: list[dict] = []
    for number in numbers:
        job = JOBS[number]
        mine = {name: text for (of, name), text in resources.items() if of == number}
        refused = {name: why for name, (why, _) in mine.items() if why}
        if flags.dry:
            row = repr(job.table[architecture])
            found.append({"table": job.name, "architecture": architecture, "shipped": row, "offer": row,
                          "changed": False, "refused": refused,
                          "compiled": {name: text for name, (_, text) in mine.items()}})  # fmt: skip
        else:
            found.append(choose(job, architecture, flags.seconds, refused))
        # Written after every job, in case time runs out.
        flags.out.write_text(json.dumps({"of": len(numbers), "tables": found}, indent=1) + "\n")
        flags.out.with_suffix(".txt").write_text(lines_to_commit(found, before))
        one = found[-1]
        speed = f"{one['shipped_ms']} ms -> {one['best_ms']} ms" if "best_ms" in one else f"{len(mine)} rows"
        print(f'{one["table"]}: {speed}, {len(refused)} rejected\n    "{architecture}": {one["offer"]},', flush=True)
    print(lines_to_commit(found, before) or "no row changes")
    return int(any("shipped" in one["refused"] for one in found))


if __name__ == "__main__":
    sys.exit(main())
