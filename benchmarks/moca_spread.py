"""Measure how the time of MoCa in place on a CPU varies between processes and conditions that the benchmark ignores.

    python benchmarks/moca_spread.py                 # two minutes on a quiet machine

Each condition of CONDITIONS runs the first case of bench_moca.py in several fresh processes, interleaved, so that load
changes affect all conditions alike. A row has quartiles over the processes' medians: of the time, and of its ratio to
each of the two copies in the same process. Every process has a different memory layout of the tensors.
"""

from __future__ import annotations

import argparse
import csv
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

import bench_moca
import harness
import waiting
from mir_kernels import _native

CASE = "moca forward in place"
PLAIN, OURS = "copy of the same bytes", "ours, native"
BUSY = "beside a busy process"
# {condition: environment variables}. The second makes glibc's malloc use huge pages.
CONDITIONS = {
    "as in the benchmark": {},
    "pages of 2 MB": {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"},
    "one thread": {"OMP_NUM_THREADS": "1"},
    "vectors of AVX2": {"MIR_CPU_ISA": "x86-64-v3"},
    BUSY: {},
}
QUARTILES = (25, 50, 75)
COLUMNS = (
    "condition", "processes", *(f"{what}_p{q}" for what in ("ms", "of_copy", "of_past_caches") for q in QUARTILES),
    "waited", *harness.ENVIRONMENT,
)  # fmt: skip


def process(condition: str, flags: argparse.Namespace) -> dict[str, dict]:
    """The rows of one fresh process, by rival."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "moca.csv"
        skip = ("eager", "formula", "indexing", "compile")
        shape = ("--tokens", str(flags.tokens), "--hidden", str(flags.hidden), "--seconds", str(flags.seconds))
        command = [
            sys.executable,
            bench_moca.__file__,
            "--device",
            "cpu",
            "--operations",
            CASE,
            *shape,
            "--skip",
            *skip,
        ]
        other = subprocess.Popen([sys.executable, "-c", "while True: pass"]) if condition == BUSY else None
        try:
            environment = os.environ | CONDITIONS[condition]
            done = subprocess.run([*command, "--out", str(out)], env=environment, capture_output=True, text=True)
        finally:
            if other is not None:
                other.kill()
                other.wait()
        if done.returncode:
            raise RuntimeError(f"{condition}: {(done.stderr.strip().splitlines() or ['no message'])[-1]}")
        return {row["rival"]: row for row in harness.read_csv(out)}


def summary(condition: str, runs: Sequence[dict[str, dict]]) -> dict:
    """One row of the CSV."""
    ours = [run[OURS]["p50_ms"] for run in runs]
    figures = {
        "ms": ours,
        "of_copy": [ms / run[PLAIN]["p50_ms"] for ms, run in zip(ours, runs, strict=True)],
        "of_past_caches": [ms / run[bench_moca.PAST_CACHES]["p50_ms"] for ms, run in zip(ours, runs, strict=True)],
    }
    row = {"condition": condition, "processes": len(runs), "waited": max(run[OURS]["waited"] or 0.0 for run in runs)}
    for name, values in figures.items():
        row |= {f"{name}_p{q}": f"{harness.quantile(sorted(values), q / 100):.4g}" for q in QUARTILES}
    return row | {name: runs[0][OURS][name] for name in harness.ENVIRONMENT}


def runnable() -> list[str]:
    """The conditions that differ on this machine: vectors narrower than its own, one thread if it has more."""
    isas = _native.C.CPU_ISAS
    narrower = isas[isas.index(_native.C.CPU_ISA) + 1 :]
    return [
        name
        for name, variables in CONDITIONS.items()
        if variables.get("MIR_CPU_ISA", "") in ("", *narrower)
        and not ("OMP_NUM_THREADS" in variables and torch.get_num_threads() == 1)
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--processes", type=int, default=5, help="processes per condition")
    parser.add_argument("--seconds", type=float, default=0.5, help="time for each rival in each process")
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--out", type=Path, default=harness.DATA / "moca_spread.csv", help="CSV to write")
    flags = parser.parse_args()
    if _native.C is None:
        sys.exit(f"moca_spread: {_native.MISSING}")
    conditions = runnable()
    runs: dict[str, list[dict[str, dict]]] = {name: [] for name in conditions}
    for _ in range(flags.processes):
        for name in conditions:
            runs[name].append(process(name, flags))
    rows = [summary(name, runs[name]) for name in conditions]
    with flags.out.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    for row in rows:
        times = "{ms_p25} / {ms_p50} / {ms_p75} ms, {of_copy_p50} of a copy".format(**row)
        busy = f", waited {row['waited']:.0%} for a core" if row["waited"] > waiting.BEARABLE else ""
        print(f"{row['condition']:<24}{times}, {row['of_past_caches_p50']} of one past the caches{busy}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
