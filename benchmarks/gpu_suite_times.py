"""The stages of gpu_suite.py that measure time: the machine's ceilings, the benchmarks, the kernels' block sizes."""

from __future__ import annotations

import json
import shlex
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from gpu_suite_processes import BENCH, GRACE, PATIENCE, Result, before, run, state


class Bench(NamedTuple):
    """One call of a bench_*.py: its arguments on CUDA and in a dry run, and its limit in seconds."""

    script: str
    cuda: str
    tiny: str
    limit: int


# By the name of the CSV. Rivals that take minutes on a GPU are skipped: eigenvalues of general matrices, compilers.
BENCHMARKS = {
    "moca": Bench("moca", "--seconds 0.3", "--tokens 64 --hidden 64", 41),
    "moments": Bench("moments", "--seconds 0.3", "--tokens 64 --d 32", 22),
    # One matrix, and batches of many small ones: where LAPACK and cuSOLVER are slowest.
    "sqrtm": Bench("sqrtm", "--seconds 0.3 --d 512 --skip scipy LAPACK", "--d 16", 24),
    "sqrtm_batch512": Bench(
        "sqrtm",
        '--seconds 0.2 --operations polar trace --d 64 --batch 512 --skip scipy LAPACK torchmetrics compile "(linalg"',
        "--operations polar trace --d 8 --batch 3",
        18,
    ),
    "sqrtm_batch256": Bench(
        "sqrtm", "--seconds 0.2 --operations polar --d 256 --batch 256", "--operations polar --d 12 --batch 2", 27
    ),
    "sqrtm_4096": Bench(
        "sqrtm",
        "--seconds 0.2 --operations polar trace --d 4096 --skip torchmetrics published compile eigh",
        "--operations polar trace --d 20 --skip torchmetrics published eigh",
        20,
    ),
    "mir": Bench(
        "mir",
        "--seconds 0.7 --layers 2 --hidden 2048 --samples 20 --vision 576 --text 64 "
        '--skip "published, accurate (scipy)" "torchmetrics recipe"',
        '--layers 1 --hidden 16 --samples 2 --vision 20 --text 12 --skip "published, accurate (scipy)" '
        '"torchmetrics recipe" "published, fast" "mir_kernels, lists"',
        22,
    ),
}


def ceilings(out: Path, dry: bool, limit: float) -> Result:
    """Copy bandwidth and the rates of the largest matrix products, as in every benchmark."""
    import harness

    found = harness.ceilings("cpu" if dry else "cuda")
    rates = f"{found['matmul_gflops'] / 1e3:.2f} TFLOP/s, in float64 {found['float64_gflops'] / 1e3:.2f}"
    return state(True, f"copy {found['copy_gbs']:.0f} GB/s, matrix product {rates}") | found


def claims(out: Path, dry: bool, limit: float) -> Result:
    """The benchmarks behind the claims of claims.py, the most important first; one line for each claim."""
    end = time.monotonic() + limit
    import harness
    from claims import BENCHES, FIGURES, verdicts

    found = measured("claims", BENCHES, out, dry, end)
    lines = []
    for one in verdicts([row for path in found["files"] for row in harness.read_csv(out / path)], cuda=not dry):
        better, text, _ = FIGURES[one.claim.figure]
        needs = f"needs {'at least' if better else 'at most'} {text.format(one.claim.target)}"
        error = "" if one.error is None else f", error {one.error:.0e}"
        lines.append(f"{one.state:<17}{one.claim.name:<19}{one.figure or 'no figure'}{error}; {needs}")
    return found | {"claims": lines}


def bench(out: Path, dry: bool, limit: float) -> Result:
    """Every benchmark of BENCHMARKS."""
    return measured("bench", BENCHMARKS, out, dry, time.monotonic() + limit)


def measured(stage: str, benches: Mapping[str, Bench], out: Path, dry: bool, end: float) -> Result:
    """Run benchmarks until `end` (in time.monotonic), each with a time limit. Rows written before a stop count, and
    benchmarks that the previous part finished on the same card are skipped."""
    import harness

    device, notes, files, done, late = "cpu" if dry else "cuda", {}, [], [], []
    end -= GRACE + 2
    known = before(out, stage).get("done", [])
    for name, one in benches.items():
        path = out / harness.csv_name(name, device)
        if name in known and path.exists():
            files, done = [*files, path.name], [*done, name]
            continue
        path.unlink(missing_ok=True)
        most = min(one.limit * (PATIENCE if dry else 1), end - time.monotonic())
        if most < 2:
            late.append(name)
            continue
        given = "--seconds 0.01 " + one.tiny if dry else one.cuda
        command = [sys.executable, str(BENCH / f"bench_{one.script}.py"), "--device", device]
        command += ["--out", str(path), *shlex.split(given)]
        # Compilation would dominate a dry run and is not under test.
        environ = {"TORCH_COMPILE_DISABLE": "1", "OMP_NUM_THREADS": "1"} if dry else {}
        code = run(command, limit=most, **environ)
        rows = harness.read_csv(path) if path.exists() else []
        files += [path.name] if rows else []
        if code == 124:
            notes[name] = f"stopped after {most:.0f} s with {len(rows)} rows"
        elif code or not rows:
            notes[name] = f"exit code {code} with {len(rows)} rows"
        if bad := [r["rival"] for r in rows if harness.exit_code([r])]:
            notes[name] = f"{notes.get(name, '')} no time for {', '.join(dict.fromkeys(bad))}".strip()
        if name not in notes:
            done.append(name)
    text = "; ".join(f"{name}: {note}" for name, note in notes.items()) or f"{len(files)} CSVs"
    text += f"; no time was left for {', '.join(late)}" if late else ""
    found = state(not notes, text) | {"files": files, "done": done}
    return found | {"state": "cut"} if late and not notes else found


def tune(out: Path, dry: bool, limit: float) -> Result:
    """Tune block tables by measurement; dry: only compile. Writes tuned.json, and tuned.txt with lines to commit."""
    path = out / "tuned.json"
    path.unlink(missing_ok=True)
    path.with_suffix(".txt").unlink(missing_ok=True)
    command = [sys.executable, str(BENCH / "tune.py"), "--out", str(path), *(["--dry"] if dry else [])]
    code = run(command, limit=limit - GRACE - 2)
    found = json.loads(path.read_text()) if path.exists() else {"of": "all", "tables": []}
    done, changed = len(found["tables"]), [one for one in found["tables"] if one["changed"]]
    note = f"{done} of {found['of']} tables, {len(changed)} with a faster row"
    note += "" if code == 0 else " (stopped at its limit)" if code == 124 else f" (exit code {code})"
    result = state(code == 0 and done == found["of"], note) | {
        "offers": [f'{one["table"]} "{one["architecture"]}": {one["offer"]}' for one in changed]
    }
    return result | {"state": "cut"} if code == 124 and found["tables"] else result
