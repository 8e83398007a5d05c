"""Run everything that needs a GPU in one command: build, tests, sanitizer, ceilings, benchmarks, tuning, summary.

    python benchmarks/gpu_suite.py --out DIR                       # under 9 minutes on an H100, no downloads
    python benchmarks/gpu_suite.py --out DIR --stages build,tests  # selected stages
    python benchmarks/gpu_suite.py --out DIR --dry                 # every stage at tiny size on a CPU

If a GPU is available only for minutes, use two calls of at most 270 s, each of which may run on a fresh machine:

    python benchmarks/gpu_suite.py --out DIR --part first --pack FILE
    python benchmarks/gpu_suite.py --out DIR --part second --resume FILE --pack OTHER

Both parts run the same stages in order of importance: the kernels at one size each, the claims of claims.py, the tests,
tuning, the sanitizer, the other benchmarks. The second part skips everything that passed in the first and starts with
the failures; omit --resume if kernels changed. `--cache KERNELS`, made by gpu_cache.py, saves both some compilation.

Each stage is a separate process with a time limit, so a failed one does not hide the others. Exit code: 1 if a stage
failed, 2 if time ran out before all were done. DIR receives a log and a JSON file per stage, test reports, the
benchmarks' CSVs, tuned.json, tuned.txt, summary.csv, summary.json and decide.txt, which is printed last; files of these
names from an earlier run are deleted first. FILE contains all of DIR except compiler output, at most 16 MiB, and is
rewritten after every stage and every 20 s within one.
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

from gpu_cache import fill
from gpu_suite_build import build, environment
from gpu_suite_checks import check, sanitizer, tests
from gpu_suite_pack import go_on, pack, start_afresh, unpack
from gpu_suite_processes import BENCH, PATIENCE, ROOT, Result, before
from gpu_suite_summary import summary
from gpu_suite_times import bench, ceilings, claims, tune

TOTAL = 530.0  # seconds for all stages of WHOLE together
STAGES: dict[str, tuple[Callable[[Path, bool, float], Result], float]] = {
    "environment": (environment, 12),
    "build": (build, 63),
    "ceilings": (ceilings, 15),
    "check": (check, 55),
    "claims": (claims, 185),
    "tests": (tests, 105),
    "bench": (bench, 200),
    "tune": (tune, 63),
    "sanitizer": (sanitizer, 70),
}
WHOLE = ("environment", "build", "ceilings", "tests", "bench", "tune", "sanitizer")  # tests and bench cover the others
PART = ("environment", "build", "check", "claims", "tests", "tune", "sanitizer", "bench")  # in order of importance
PART_TOTAL = 262.0  # seconds of a part: the rest of 270 is for starting and packing
ALWAYS = ("environment", "build")  # stages that the second part repeats
PACKING = 20.0  # seconds between two archives
ENOUGH = 8.0  # a stage is started only if it has at least this many seconds


def isolated(name: str, out: Path, dry: bool, limit: float, packed: Callable[[], None]) -> Result:
    """Run one stage in its own process group, which is killed at the end."""
    path, start = out / f"{name}.json", time.monotonic()
    path.unlink(missing_ok=True)
    paths = [str(ROOT), str(ROOT / "python"), str(BENCH), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]
    command = [sys.executable, str(Path(__file__).resolve()), "--out", str(out), "--one", name, *(["--dry"] * dry)]
    environ = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    environ |= {} if dry else {"TRITON_CACHE_DIR": str(out / "triton")}
    with (out / f"{name}.log").open("w") as log:
        child = subprocess.Popen(
            [*command, "--until", str(start + limit)], cwd=ROOT, env=environ,
            stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        try:
            while child.poll() is None and (left := start + limit - time.monotonic()) > 0:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    child.wait(min(PACKING, left))
                if child.poll() is None:
                    packed()
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


def run_stages(names: list[str], out: Path, dry: bool, seconds: float, packed: Callable[[], None]) -> dict[str, Result]:
    """Run these stages in order while time is left and return their results; stages that passed before are skipped."""
    end = time.monotonic() + seconds
    results: dict[str, Result] = {name: {"state": "not reached", "note": "", "seconds": 0} for name in names}
    try:
        for name in names:
            done = before(out, name)
            left = min((PATIENCE if dry else 1) * STAGES[name][1], end - time.monotonic())
            if done.get("state") == "passed" and name not in ALWAYS:
                again = "" if done["note"].startswith("in the previous part") else "in the previous part: "
                results[name] = done | {"note": again + done["note"], "seconds": 0}
            elif left >= ENOUGH:
                print(f"{name} (at most {left:.0f} s)", flush=True)
                results[name] = {"state": "cut", "note": f"interrupted, see {name}.log", "seconds": 0}
                results[name] = isolated(name, out, dry, left, packed)
            else:  # the previous part's findings remain the latest
                known = {key: value for key, value in done.items() if key in ("counts", "failures", "files", "offers")}
                results[name] = known | {"state": "not reached", "note": "no time was left", "seconds": 0}
            (out / "summary.json").write_text(json.dumps({"dry": dry, **results}, indent=1) + "\n")
            packed()
    except KeyboardInterrupt:
        print("interrupted", flush=True)
    return results


def stop(*_: object) -> None:
    """Handle SIGTERM like Ctrl-C, so that results so far are still written."""
    raise KeyboardInterrupt


def arguments() -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for logs, CSVs and the summary")
    parser.add_argument("--stages", default=",".join(WHOLE), help=f"comma-separated, of {','.join(STAGES)}")
    parser.add_argument("--part", choices=("first", "second"), help="one of two short calls, instead of --stages")
    parser.add_argument("--pack", type=Path, help="archive of DIR to write")
    parser.add_argument("--resume", type=Path, help="archive of the first part to resume from")
    parser.add_argument("--cache", type=Path, help="archive of precompiled kernels, from gpu_cache.py")
    parser.add_argument(
        "--seconds", type=float, help=f"time limit in total (default {TOTAL:.0f}, for a part {PART_TOTAL:.0f})"
    )
    parser.add_argument("--dry", action="store_true", help="run every stage at tiny size on a CPU")
    parser.add_argument("--one", choices=STAGES, help=argparse.SUPPRESS)
    parser.add_argument("--until", type=float, help=argparse.SUPPRESS)  # in time.monotonic of the parent process
    return parser, parser.parse_args()


def main() -> int:
    parser, flags = arguments()
    out = flags.out.resolve()
    if flags.one:
        found = STAGES[flags.one][0](out, flags.dry, flags.until - time.monotonic())
        arriving = out / f"{flags.one}.json.arriving"
        arriving.write_text(json.dumps(found, indent=1) + "\n")
        os.replace(arriving, out / f"{flags.one}.json")
        return int(found["state"] == "failed")
    names = list(PART) if flags.part else flags.stages.split(",")
    if unknown := sorted(set(names) - set(STAGES)):
        parser.error(f"--stages: expected {','.join(STAGES)}, got {','.join(unknown)}")
    if flags.resume and flags.part != "second":
        parser.error(f"--resume: expected --part second, got --part {flags.part}")
    for name, file in (("--resume", flags.resume), ("--cache", flags.cache)):
        if file and not file.is_file():
            parser.error(f"{name}: expected an archive, but {file} does not exist")
    start = time.monotonic()
    out.mkdir(parents=True, exist_ok=True)
    if flags.cache:
        print(f"{fill(flags.cache, out / 'triton')} precompiled kernels", flush=True)
    if flags.resume:
        unpack(flags.resume, out)
    if flags.part == "second":
        go_on(out)
    else:
        start_afresh(out, names)
        names = [name for name in (PART if flags.part else STAGES) if name in names]
    seconds = flags.seconds or (PATIENCE if flags.dry else 1) * (PART_TOTAL if flags.part else TOTAL)
    signal.signal(signal.SIGTERM, stop)

    def packed() -> None:
        if flags.pack:
            pack(out, flags.pack)

    results = run_stages(names, out, flags.dry, seconds - (time.monotonic() - start), packed)
    summary(results, out, flags.dry, rows_too=flags.part is None)
    if flags.pack and (dropped := pack(out, flags.pack)):
        print(f"{flags.pack} does not contain {', '.join(dropped)}: it would be too large", flush=True)
    states = {r["state"] for r in results.values()}
    return 1 if "failed" in states else 2 if states & {"cut", "not reached"} else 0


if __name__ == "__main__":
    sys.exit(main())
