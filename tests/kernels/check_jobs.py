"""Every kernel job once in every dtype at odd sizes, against float64 and twice with the same bits, without pytest.

    PYTHONPATH=.:tests python tests/kernels/check_jobs.py --report jobs.xml               # on a GPU
    TRITON_INTERPRET=1 PYTHONPATH=.:tests python tests/kernels/check_jobs.py --report jobs.xml --small   # anywhere

benchmarks/gpu_suite.py runs it where pytest is not installed. The report is JUnit's; exits 1 where a check failed.
"""

from __future__ import annotations

import argparse
import os
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import torch

from kernels.jobs import Job, every_job
from mir_kernels import _native
from tolerances import assert_close

SIZES = [(1, 1), (37, 7), (129, 577), (301, 4096), (65, 8200)]
SMALL = [(1, 1), (13, 37)]
NATIVE_ON_CUDA = ("moca forward", "moca backward")  # the operations that have a CUDA C++ kernel


def skipped(job: Job, device: str) -> str | None:
    """Why a job cannot run there, or None."""
    if not job.module.endswith("native") or device == "cpu":
        return None
    return _native.cuda_reason() if job.name.startswith(NATIVE_ON_CUDA) else "has no CUDA C++ kernel"


def check(job: Job, dtype: torch.dtype, rows: int, d: int, device: str) -> None:
    """Raises where two runs differ, an input changed or the error is beyond the job's tolerance."""
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
    parser.add_argument("--report", type=Path, required=True, help="XML to write")
    parser.add_argument("--shard", default="0/1", metavar="I/N", help="the I-th of N parts")
    parser.add_argument("--small", action="store_true", help="two small sizes")
    flags = parser.parse_args()
    device = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
    part, parts = map(int, flags.shard.split("/"))
    cases = [(job, dtype) for job in every_job() for dtype in job.dtypes][part::parts]
    suite, failed = ET.Element("testsuite"), 0
    for job, dtype in cases:
        for rows, d in SMALL if flags.small else SIZES:
            case = ET.SubElement(suite, "testcase", name=f"{job.name}-{str(dtype)[6:]}-{rows}-{d}")
            if reason := skipped(job, device):
                ET.SubElement(case, "skipped", message=reason)
                continue
            try:
                check(job, dtype, rows, d, device)
            except Exception as problem:  # a wrong result, or whatever triton or the driver raises
                failed += 1
                ET.SubElement(case, "failure", message=f"{type(problem).__name__}: {problem}")
                print(f"{case.get('name')}: {type(problem).__name__}: {problem}", flush=True)
            ET.ElementTree(suite).write(flags.report)  # what is known so far, should time run out
    print(f"{len(suite)} checks on {device}, {failed} failed")
    return int(failed > 0 or not len(suite))


if __name__ == "__main__":
    sys.exit(main())
