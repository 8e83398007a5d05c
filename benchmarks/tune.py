"""Block sizes of the Triton kernels by measurement: candidates, a correctness gate against float64, time.

    python benchmarks/tune.py --out tuned.json          # on a GPU: times every candidate, prints the rows to commit
    python benchmarks/tune.py --out tuned.json --dry    # anywhere: two candidates a table, compiled for sm_90

Nothing in the repository changes. A row is offered in place of the shipped one where it is at least 3% faster.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

import harness
from mir_kernels import _triton
from mir_kernels.moca import triton as moca
from mir_kernels.moments import packed
from mir_kernels.moments import triton as moments
from mir_kernels.sqrtm import eager
from mir_kernels.sqrtm import triton as sqrtm

WORTH = 0.97  # of the shipped row's median: what another row must reach to be offered
STEP = (3.2, -2.4, 0.5)
Calls = list[tuple[Callable, tuple]]  # launchers and their arguments


class Job(NamedTuple):
    """A table row to choose: `calls(device)` gives what to time and a function of its error against float64."""

    name: str
    table: dict
    candidates: list[dict]
    calls: Callable[[str], tuple[Calls, Callable[[], float]]]
    limit: float


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


def second_moment(shifted: bool, device: str) -> tuple[Calls, Callable[[], float]]:
    n, d = 4096, 4096
    x = (torch.randn(n, d, device=device) + (64 if shifted else 0)).bfloat16()
    zeros = functools.partial(torch.zeros, dtype=torch.float64, device=device)
    centre = zeros(d) + (64 if shifted else 0)
    second = zeros(packed.entries(d))
    arguments = (second, x, None, centre, zeros(2, d), zeros(2), "auto" if shifted else "fast")

    def error() -> float:
        second.zero_()
        shift, _ = moments.accumulate(*arguments)
        away = x.double() - shift
        return relative(packed.unpack(second, d), away.T @ away)

    return [(moments.accumulate, arguments)], error


def polynomial_step(dtype: torch.dtype, device: str) -> tuple[Calls, Callable[[], float]]:
    d = 2048 if dtype == torch.bfloat16 else 1024
    x = (torch.randn(2, d, d, device=device) / (2 * d**0.5)).to(dtype)

    def error() -> float:
        return relative(sqrtm.polynomial_step(x, STEP), eager.polynomial_step(x.double(), STEP))

    return [(sqrtm.polynomial_step, (x, STEP))], error


def relative(found: Tensor, exact: Tensor) -> float:
    return ((found.double() - exact).norm() / exact.norm()).item()


def grid(**values: tuple) -> list[dict]:
    """Every combination of the values, as changes to a row."""
    return [dict(zip(values, chosen, strict=True)) for chosen in itertools.product(*values.values())]


TILES = grid(tile=(128,), step=(32, 64), warps=(4, 8), stages=(3, 4)) + grid(
    tile=(64,), step=(32, 64), warps=(4,), stages=(3,)
)
BF16, FP32 = torch.bfloat16, torch.float32
JOBS = [
    Job("moca.TABLE", moca.TABLE, grid(tile_bytes=(4096, 8192, 16384), programs=(264, 528, 1056)), moca_rows, 1e-2),
    Job("moca.TABLE", moca.TABLE, grid(row_programs=(132, 264, 528)), moca_fused, 1e-2),
    Job("moments.PLAIN", moments.PLAIN, TILES, functools.partial(second_moment, False), 1e-5),
    Job("moments.SHIFTED", moments.SHIFTED, TILES[-4:], functools.partial(second_moment, True), 1e-5),
    Job("sqrtm.TABLE[bfloat16]", sqrtm.TABLE[BF16], TILES, functools.partial(polynomial_step, BF16), 2e-2),
    Job("sqrtm.TABLE[float32]", sqrtm.TABLE[FP32], TILES[-4:], functools.partial(polynomial_step, FP32), 1e-5),
]


def run_all(calls: Calls, table: dict, architecture: str, row: NamedTuple, i: int = 0) -> None:
    """The calls with `row` in the table; the row stays there."""
    table[architecture] = row
    for launcher, arguments in calls:
        launcher(*arguments)


def choose(job: Job, architecture: str, seconds: float) -> dict:
    """Times every candidate that compiles, fits and is right; the best stays in the table, for the jobs that follow."""
    shipped = job.table[architecture]
    calls, error = job.calls("cuda")
    rivals, rows, refused = [], {}, {}
    for change in [{}, *job.candidates]:
        row = shipped._replace(**change)
        if row in rows.values():
            continue
        name = json.dumps(change) if change else "shipped"
        try:
            job.table[architecture] = row
            found = error()
        except Exception as problem:  # triton raises several kinds where a candidate does not fit
            refused[name] = f"{type(problem).__name__}: {str(problem).splitlines()[0][:90]}"
            continue
        rows[name] = row
        rivals.append(
            harness.Rival(name, functools.partial(run_all, calls, job.table, architecture, row), found, job.limit)
        )
    timed = harness.compare("tune", job.name, rivals, seconds=seconds, rounds=(5, 50), device="cuda")
    medians = {r["rival"]: r["p50_ms"] for r in timed if r["p50_ms"] is not None}
    best = min(medians, key=medians.__getitem__, default="shipped")
    if medians.get(best, 1.0) > WORTH * medians.get("shipped", float("inf")):
        best = "shipped"
    job.table[architecture] = rows.get(best, shipped)
    return {
        "table": job.name, "architecture": architecture, "offer": repr(job.table[architecture]),
        "changed": best != "shipped",
        "shipped_ms": medians.get("shipped"), "best_ms": medians.get(best), "refused": refused,
        "candidates": [{k: r[k] for k in ("rival", "p20_ms", "p50_ms", "p80_ms", "error")} for r in timed],
    }  # fmt: skip


def compile_only(job: Job, architecture: str = "sm_90") -> dict:
    """The shipped row and the first candidate, recorded on tensors without memory and compiled ahead of time."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
    import aot

    shipped = job.table[architecture]
    calls, _ = job.calls("meta")
    candidates = []
    for change in ({}, job.candidates[0]):
        job.table[architecture] = shipped._replace(**change)
        launches = [launch for launcher, args in calls for launch in aot.record(launcher, *args, target=architecture)]
        built = {launch.kernel.__name__: aot.compile_launch(architecture, launch) for launch in launches}
        usage = {
            name: f"{b.registers} registers, {b.shared} B shared, {b.spills} B spills" for name, b in built.items()
        }
        candidates.append({"change": change, **usage})
    job.table[architecture] = shipped
    return {"table": job.name, "architecture": architecture, "offer": repr(shipped), "changed": False,
            "compiled": candidates}  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="JSON to write")
    parser.add_argument("--seconds", type=float, default=0.2, help="time for each candidate")
    parser.add_argument("--only", default="", help="tables whose name contains this")
    parser.add_argument("--dry", action="store_true", help="compile ahead of time, time nothing")
    flags = parser.parse_args()
    torch.manual_seed(0)
    found = []
    for job in (job for job in JOBS if flags.only in job.name):
        if flags.dry:
            found.append(compile_only(job))
        else:
            found.append(choose(job, _triton.architecture(torch.device("cuda")), flags.seconds))
        flags.out.write_text(json.dumps(found, indent=1) + "\n")  # what is known so far, should time run out
        one = found[-1]
        speed = f"{one['shipped_ms']} ms -> {one['best_ms']} ms" if "best_ms" in one else f"{len(one['compiled'])} rows"
        print(f'{one["table"]}: {speed}\n    "{one["architecture"]}": {one["offer"]},')
    return 0


if __name__ == "__main__":
    sys.exit(main())
