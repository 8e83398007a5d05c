"""Checks every kernel job in every dtype at odd sizes against float64, and that two runs have the same bits; no pytest.

    export PYTHONPATH=.:tests:benchmarks
    python tests/kernels/check_jobs.py --report jobs.jsonl                                          # on a GPU
    TRITON_INTERPRET=1 python tests/kernels/check_jobs.py --report jobs.jsonl --sizes 1-1,13-37     # anywhere

benchmarks/gpu_suite.py runs it if pytest is not installed. The report gets a line of JSON when a check starts and when
it ends, and checks that it already contains are skipped. Exits with 1 if a check failed, 77 if one lost the CUDA
context.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import torch

import gpu_suite_reports as reports
from kernels.jobs import Job, every_job
from mir_kernels import _native
from tolerances import assert_close

SIZES = "1-1,37-7,129-577,301-4096,65-8200"
NATIVE_ON_CUDA = ("moca forward", "moca backward")  # the operations that have a CUDA C++ kernel


def skipped(job: Job, device: str) -> str | None:
    """Why a job cannot run on `device`, or None."""
    if not job.module.endswith("native") or device == "cpu":
        return None
    return _native.cuda_reason() if job.name.startswith(NATIVE_ON_CUDA) else "has no CUDA C++ kernel"


def check(job: Job, dtype: torch.dtype, rows: int, d: int, device: str) -> None:
    """Raise if two runs differ, an input changed or the error exceeds the job's tolerance."""
    given = {name: tensor.to(device) for name, tensor in job.make(dtype, rows, d).items()}
    before = {name: tensor.clone() for name, tensor in given.items()}
    first, second = ([tensor.clone() for tensor in job.run(given)] for _ in range(2))
    for name, tensor in given.items():
        assert torch.equal(bits(tensor), bits(before[name])), f"the input {name} was changed"
    assert all(torch.equal(bits(a), bits(b)) for a, b in zip(first, second, strict=True)), "two runs differ"
    for found, exact in zip(first, job.exact(given, first), strict=True):
        assert_close(found, exact, dtype=job.arithmetic or dtype, factor=job.factor)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--report", type=Path, required=True, help="file of JSON lines to write or to resume")
    parser.add_argument("--shard", default="0/1", metavar="I/N", help="the I-th of N parts")
    parser.add_argument("--sizes", default=SIZES, help="rows and columns (default %(default)s)")
    flags = parser.parse_args()
    device = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
    part, parts = map(int, flags.shard.split("/"))
    sizes = [tuple(map(int, size.split("-"))) for size in flags.sizes.split(",")]
    cases = [(job, dtype, size) for size in sizes for job in every_job() for dtype in job.dtypes][part::parts]
    known, failed = reports.read([flags.report]), 0
    if not known:
        reports.write(flags.report, {"collected": len(cases)})
    for job, dtype, (rows, d) in cases:
        name = f"{job.name}-{str(dtype)[6:]}-{rows}-{d}"
        if name in known:
            continue
        if reason := skipped(job, device):
            reports.write(flags.report, {"test": name, "outcome": "skipped", "message": reason})
            continue
        reports.write(flags.report, {"test": name, "outcome": "started"})
        line = {"test": name, "outcome": "passed"}
        try:
            check(job, dtype, rows, d, device)
        except Exception as problem:  # a wrong result, or any error of triton or the driver
            failed += 1
            line |= {"outcome": "failed", "message": f"{type(problem).__name__}: {problem}"}
            print(f"{name}: {line['message']}", flush=True)
        reports.write(flags.report, line)
        if line["outcome"] == "failed" and reports.lost_context():
            os._exit(reports.LOST)
    print(f"{len(cases)} checks on {device}, {failed} failed")
    return int(failed > 0 or not cases)


if __name__ == "__main__":
    sys.exit(main())
