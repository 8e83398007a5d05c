"""Everything that needs a GPU, in one command: build, tests, sanitizer, ceilings, benchmarks, tuning, one table last.

    python benchmarks/gpu_suite.py --out DIR                       # under 9 minutes on an H100, nothing is downloaded
    python benchmarks/gpu_suite.py --out DIR --stages build,tests  # some stages
    python benchmarks/gpu_suite.py --out DIR --dry                 # on a CPU, tiny: every stage is gone through

Each stage is a process of its own with a time limit; one that fails does not hide the others, and the exit code tells.
DIR receives a log and a JSON a stage, the benchmarks' CSVs, tuned.json, tuned.txt, summary.csv and summary.json; what
an earlier run left there under these names goes first.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from gpu_suite_build import build, environment
from gpu_suite_checks import sanitizer, tests
from gpu_suite_processes import BENCH, PATIENCE, ROOT, Result
from gpu_suite_summary import summary
from gpu_suite_times import bench, ceilings, tune

TOTAL = 530.0  # seconds for all stages together
STAGES: dict[str, tuple[Callable[[Path, bool], Result], float]] = {
    "environment": (environment, 15),
    "build": (build, 70),
    "ceilings": (ceilings, 15),
    "tests": (tests, 105),
    "bench": (bench, 195),
    "tune": (tune, 60),
    "sanitizer": (sanitizer, 70),
}


def isolated(name: str, out: Path, dry: bool, limit: float) -> Result:
    """One stage in a process group of its own, whatever it leaves running ended with it."""
    path, start = out / f"{name}.json", time.monotonic()
    path.unlink(missing_ok=True)
    paths = [str(ROOT), str(ROOT / "python"), str(BENCH), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]
    command = [sys.executable, str(Path(__file__).resolve()), "--out", str(out), "--one", name, *(["--dry"] * dry)]
    with (out / f"{name}.log").open("w") as log:
        child = subprocess.Popen(
            command, cwd=ROOT, env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)}, stdout=log,
            stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        try:
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(limit)
        finally:
            stopped = child.poll() is None
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()
    if path.exists():
        found = json.loads(path.read_text())
    else:
        why = f"stopped after {limit:.0f} s" if stopped else f"ended with {child.returncode}"
        found = {"state": "failed", "note": f"{why}, see {name}.log"}
    return found | {"seconds": round(time.monotonic() - start, 1)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for logs, CSVs and the summary")
    parser.add_argument("--stages", default=",".join(STAGES), help=f"of {','.join(STAGES)}")
    parser.add_argument("--dry", action="store_true", help="on a CPU at tiny size: shows that every stage runs")
    parser.add_argument("--one", choices=STAGES, help=argparse.SUPPRESS)
    flags = parser.parse_args()
    out = flags.out.resolve()
    if flags.one:
        found = STAGES[flags.one][0](out, flags.dry)
        (out / f"{flags.one}.json").write_text(json.dumps(found, indent=1) + "\n")
        return int(found["state"] == "failed")
    chosen = flags.stages.split(",")
    if unknown := sorted(set(chosen) - set(STAGES)):
        parser.error(f"--stages: takes {','.join(STAGES)}, got {','.join(unknown)}")
    out.mkdir(parents=True, exist_ok=True)
    for name in ("summary.json", "summary.csv"):
        (out / name).unlink(missing_ok=True)
    patience = PATIENCE if flags.dry else 1
    end, results = time.monotonic() + patience * TOTAL, {}
    for name in (name for name in STAGES if name in chosen):
        left = min(patience * STAGES[name][1], end - time.monotonic())
        if left < 1:
            results[name] = {"state": "failed", "note": "no time was left", "seconds": 0}
            continue
        print(f"{name} (at most {left:.0f} s)", flush=True)
        results[name] = isolated(name, out, flags.dry, left)
    summary(results, out, flags.dry)
    return int(any(r["state"] == "failed" for r in results.values()))


if __name__ == "__main__":
    sys.exit(main())
