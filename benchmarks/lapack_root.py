"""Tr((AB)^(1/2)) by three calls of LAPACK, the rival of the root on a CPU.

A Cholesky factor of B (potrf), the standard form C^T A C (sygst, itype 2) and its eigenvalues (Golub and Van Loan,
Matrix Computations, 8.7.2), in float64. scipy's OpenBLAS does the first two; the eigenvalues come from its syevd or
from torch.linalg.eigvalsh, whichever is faster.

OpenBLAS threads keep spinning for a tenth of a second after a call, on cores that torch threads then have to share:
called in turn, both take up to twice as long. LAPACK therefore runs in a separate process with as many threads, which
times itself: with a PAUSE before each call, and inputs already copied to where they are overwritten. The sum of the
three times is a best case that a program calling them in sequence does not reach.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

import harness
import waiting

NAME = "LAPACK: potrf + sygst + eigvalsh"
PAUSE = 0.15  # seconds until threads stop spinning, also those of the other process
ENOUGH, MOST = 20.0, 25  # a call is repeated for this many ms, but at most this often; the median counts


@dataclass
class SelfTimed(harness.Rival):
    """A rival whose calls append their own time and the time waited for a core, in ms, to `visits`."""

    visits: list[tuple[float, float | None]] = field(default_factory=list)

    def retimed(self, row: dict, fewest: int) -> dict:
        """Its row of `harness.compare` with these times instead of the elapsed ones. fewest: rounds, as there."""
        if row["p50_ms"] is None:
            return row
        times, waited = waiting.undisturbed(self.visits[-row["rounds"] :], fewest)
        found = {f"p{q}_ms": harness.quantile(times, q / 100) for q in (20, 50, 80)}
        return row | found | {"waited": waited, "of_floor": row["floor_ms"] / found["p50_ms"] or None}


def rested(rival: harness.Rival) -> SelfTimed:
    """The rival with a PAUSE after each call, so that OpenBLAS frees the cores for the next rival."""
    visits: list[tuple[float, float | None]] = []

    def call(i: int) -> None:
        one = once(rival.call, i)
        visits.append((one.ms, one.waited))
        time.sleep(PAUSE)

    return SelfTimed(rival.name, call, rival.error, rival.limit, visits=visits)


class LapackRoot:
    """LAPACK's process: started by the first call of a rival, stopped at the end of `with`."""

    def __init__(self, threads: int) -> None:
        self.solver = ""  # the solver of the latest eigenvalues
        self._threads = threads
        self._folder = tempfile.TemporaryDirectory()
        self._child: subprocess.Popen[str] | None = None

    def __enter__(self) -> LapackRoot:
        return self

    def __exit__(self, *_: object) -> None:
        if self._child is not None:
            self._child.communicate()  # closing its input ends it
        self._folder.cleanup()

    def rival(self, a: Tensor, b: Tensor, error: Callable[[Tensor], float], limit: float) -> SelfTimed:
        """A rival on float64 CPU covariances (batch, d, d), valid until the next call. error: of the traces."""
        for path in Path(self._folder.name).iterdir():
            path.unlink()
        path = Path(self._folder.name) / f"{time.monotonic_ns()}.npy"
        np.save(path, torch.stack([a, b]).numpy())
        visits: list[tuple[float, float | None]] = []

        def visit() -> Tensor:
            found = self._visit(path)
            visits.append((found["ms"], found["waited"]))
            self.solver = found["solver"]
            return torch.tensor(found["values"], dtype=torch.float64)

        return SelfTimed(NAME, lambda i: visit(), lambda: error(visit()), limit, visits=visits)

    def _visit(self, path: Path) -> dict[str, Any]:
        """The answer of the process: `Job.visit`."""
        if self._child is None:
            pools = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS")
            self._child = subprocess.Popen(
                [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                env=os.environ | dict.fromkeys(pools, str(self._threads)),
            )  # fmt: skip
        assert self._child.stdin is not None
        assert self._child.stdout is not None
        print(path, file=self._child.stdin, flush=True)
        answer = self._child.stdout.readline()
        found = json.loads(answer) if answer else {"failure": "the LAPACK process has ended"}
        if "failure" in found:
            raise RuntimeError(found["failure"])
        return found


class Timed(NamedTuple):
    """The time of a call and the time it waited for a core, in ms, and its result. The median if repeated."""

    ms: float
    waited: float | None
    result: Any


def once(call: Callable[[Any], Any], given: Any) -> Timed:
    """Time call(given) once."""
    before = waiting.waited_ms()
    start = time.perf_counter()
    result = call(given)
    ms = (time.perf_counter() - start) * 1e3
    return Timed(ms, None if before is None else (waiting.waited_ms() or 0.0) - before, result)


def repeated(prepare: Callable[[], Any], call: Callable[[Any], Any]) -> Timed:
    """Time a call repeatedly. prepare: returns a fresh input, which the call may overwrite."""
    time.sleep(PAUSE)
    times: list[Timed] = []
    while not times or (sum(one.ms for one in times) < ENOUGH and len(times) < MOST):
        times.append(once(call, prepare()))
    return sorted(times, key=lambda one: one.ms)[len(times) // 2]


class Job:
    """One pair of batches in the LAPACK process."""

    def __init__(self, path: Path) -> None:
        from scipy.linalg import lapack

        self.path, self._lapack = path, lapack
        self._a, self._b = np.load(path)
        self.solver: str | None = None

    def visit(self) -> dict[str, Any]:
        """ms: sum of the three calls; waited: the part of it waiting for a core; values: the traces; solver."""
        factor = repeated(lambda: _columns(self._b), self._potrf)
        _check("potrf", factor.result)
        form = repeated(lambda: [*zip(_columns(self._a), (c for c, _ in factor.result), strict=True)], self._sygst)
        _check("sygst", form.result)
        rows = [m.T for m, _ in form.result]
        solvers = {
            "scipy's syevd": lambda: repeated(lambda: _columns(rows), self._syevd),
            # In torch's row-major order the lower triangle is the upper one.
            "torch.linalg.eigvalsh": lambda: repeated(
                lambda: torch.from_numpy(np.stack(rows)), lambda m: torch.linalg.eigvalsh(m, UPLO="U").numpy()
            ),
        }
        if self.solver is None:
            taken = {name: solve().ms for name, solve in solvers.items()}
            self.solver = min(taken, key=taken.__getitem__)
        values = solvers[self.solver]()
        calls = (factor, form, values)
        waits = [one.waited for one in calls if one.waited is not None]
        traces = np.sqrt(np.maximum(values.result, 0)).sum(-1).tolist()
        time.sleep(PAUSE)
        ms, waited = sum(one.ms for one in calls), math.fsum(waits) if waits else None
        return {"ms": ms, "waited": waited, "values": traces, "solver": self.solver}

    def _potrf(self, batch: Sequence[np.ndarray]) -> list[tuple[np.ndarray, int]]:
        return [self._lapack.dpotrf(b, lower=1, clean=0, overwrite_a=1) for b in batch]

    def _sygst(self, batch: Sequence[tuple[np.ndarray, np.ndarray]]) -> list[tuple[np.ndarray, int]]:
        return [self._lapack.dsygst(a, c, itype=2, lower=1, overwrite_a=1) for a, c in batch]

    def _syevd(self, batch: Sequence[np.ndarray]) -> list[np.ndarray]:
        # The default workspace is the minimum, with which LAPACK reduces the matrix one column at a time.
        work, integers, _ = self._lapack.dsyevd_lwork(len(batch[0]), compute_v=0, lower=1)
        options = {"compute_v": 0, "lower": 1, "lwork": int(work), "liwork": int(integers), "overwrite_a": 1}
        found = [self._lapack.dsyevd(m, **options) for m in batch]
        _check("syevd", [(values, info) for values, _, info in found])
        return [values for values, *_ in found]


def _columns(batch: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Copies of symmetric matrices, or of triangles stored by rows, in LAPACK's column-major order."""
    return [x.copy().T for x in batch]


def _check(name: str, results: Sequence[tuple[np.ndarray, int]]) -> None:
    if failed := [info for _, info in results if info]:
        raise np.linalg.LinAlgError(f"{name}: info {failed[0]}")


def serve() -> None:
    """Read file names of batch pairs, one per line, and write one visit as a JSON line each."""
    torch.linalg.eigvalsh(torch.eye(128, dtype=torch.float64))  # the first call loads libraries
    job = None
    for line in sys.stdin:
        path = Path(line.rstrip("\n"))
        try:
            if job is None or job.path != path:
                job = None
                job = Job(path)
            answer = job.visit()
        except Exception as problem:  # reported to the other process, which continues
            answer = {"failure": harness.first_line(problem)}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    serve()
