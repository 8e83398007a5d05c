"""Everything that needs a GPU, in one command: build, tests, sanitizer, ceilings, benchmarks, tuning, one table last.

    python benchmarks/gpu_suite.py --out DIR                       # under 9 minutes on an H100, nothing is downloaded
    python benchmarks/gpu_suite.py --out DIR --stages build,tests  # some stages
    python benchmarks/gpu_suite.py --out DIR --dry                 # on a CPU, tiny: every stage is gone through

Each stage is a process of its own with a time limit; one that fails does not hide the others, and the exit code tells.
DIR receives a log and a JSON a stage, the benchmarks' CSVs, tuned.json, summary.csv and summary.json.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import importlib.util
import json
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
BENCH = ROOT / "benchmarks"
TOTAL = 530.0  # seconds for all stages together
PATIENCE = 3  # times as long in a dry run: a laptop's two busy cores are no GPU machine
LINES = 90  # of the table printed last, at most
Result = dict[str, Any]  # "state": "passed", "failed" or "skipped"; "note": one line; whatever else the stage found

BENCHMARKS = {  # arguments on CUDA, arguments of a dry run, seconds
    "moca": ("--seconds 0.3", "--tokens 64 --hidden 64", 75),
    "moments": ("--seconds 0.5", "--tokens 64 --d 32", 35),
    "sqrtm": ("--seconds 0.3 --d 512", "--d 16", 35),
    "mir": (
        '--seconds 1 --layers 2 --hidden 2048 --samples 20 --vision 576 --text 64 --skip "published, accurate (scipy)" '
        '"torchmetrics recipe"',
        '--layers 1 --hidden 16 --samples 2 --vision 20 --text 12 --skip "published, accurate (scipy)" '
        '"torchmetrics recipe" "published, fast" "mir_kernels, lists"',
        40,
    ),
}
INTERPRETED = "tests/kernels/test_guarded.py"  # the GPU checks whose bodies also run on interpreted kernels


def environment(out: Path, dry: bool) -> Result:
    """Device, driver, versions, commit; and which optional packages are missing."""
    import torch

    found: Result = {"python": platform.python_version(), "torch": torch.__version__, "cuda": torch.version.cuda}
    optional = ("pytest", "hypothesis", "xdist", "scipy", "torchmetrics", "safetensors", "transformers", "mpmath")
    found["missing"] = [name for name in optional if importlib.util.find_spec(name) is None]
    for name in ("triton", "pybind11", "ninja", "setuptools"):
        module = importlib.util.find_spec(name) and importlib.import_module(name)
        found[name] = getattr(module, "__version__", "here") if module else None
    found["nvcc"] = shutil.which("nvcc")
    found["commit"] = words("git", "rev-parse", "--short", "HEAD") or "unknown"
    found["driver"] = words(
        "nvidia-smi", "--query-gpu=driver_version,name,memory.total", "--format=csv,noheader"
    ).partition("\n")[0]
    if torch.cuda.is_available():
        one = torch.cuda.get_device_properties(0)
        found |= {"device": one.name, "capability": f"{one.major}{one.minor}", "devices": torch.cuda.device_count()}
        found |= {"memory_gb": one.total_memory / 2**30, "multiprocessors": one.multi_processor_count}
    elif not dry:
        return found | {"state": "failed", "note": "torch sees no CUDA device; --dry runs without one"}
    parts = [f"{n} {found[n]}" for n in ("device", "driver", "torch", "triton", "commit") if found.get(n)]
    parts += [f"missing: {', '.join(found['missing'])}"] if found["missing"] else []
    return found | {"state": "passed", "note": "; ".join(parts)}


def build(out: Path, dry: bool) -> Result:
    """The extension in place for the device at hand; dry: its CPU part, into DIR."""
    command = [sys.executable, "setup.py", "-q", "build_ext"]
    if dry:
        env = {"MIR_CUDA": "0", "MIR_NATIVE": "1"}
        command += ["--build-temp", str(out / "build"), "--build-lib", str(out / "built")]
    else:
        import torch

        major, minor = torch.cuda.get_device_capability()
        env = {"MIR_CUDA": "1", "MIR_NATIVE": "1", "MIR_CUDA_ARCHS": f"{major}{minor}"}
        command += ["--inplace"]
    code = run(command, **env)
    return state(code == 0, f"{env}: exit code {code}")


def tests(out: Path, dry: bool) -> Result:
    """pytest -m gpu over the files whose imports are here; dry: the same bodies on interpreted kernels."""
    if importlib.util.find_spec("pytest") is None:
        return {"state": "failed", "note": "pytest is not installed"}
    files = [ROOT / INTERPRETED] if dry else sorted((ROOT / "tests").rglob("test_*.py"))
    lacking = {path: missing_imports(path) for path in files}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-o", "addopts=", "--tb=short"]
    command += ["--import-mode=importlib", f"--junitxml={out / 'tests.xml'}", "-m", "not slow" if dry else "gpu"]
    if not dry and importlib.util.find_spec("xdist"):
        command += ["-n", str(max(1, min(8, (os.cpu_count() or 1) // 2)))]  # compilation takes most of the time
    command += [str(path) for path, names in lacking.items() if not names]
    env = {"TRITON_INTERPRET": "1"} if dry else {}
    code = run(command, limit=None if dry else 140, **env)
    left_out = {path.name: names for path, names in lacking.items() if names}
    if not (out / "tests.xml").exists():
        return {"state": "failed", "note": f"pytest ended with {code} and no report", "left_out": left_out}
    counts, failures = read_junit(out / "tests.xml")
    note = ", ".join(f"{n} {what}" for what, n in counts.items())
    if left_out:
        note += f"; left out for missing packages: {', '.join(left_out)}"
    return state(code == 0 and counts["passed"] > 0, note) | {"failures": failures, "left_out": left_out}


def sanitizer(out: Path, dry: bool) -> Result:
    """compute-sanitizer over the native kernels; dry: says what it would run and runs it on the CPU kernels."""
    script = [sys.executable, str(BENCH / "check_native.py"), "--device", "cpu" if dry else "cuda"]
    tool = shutil.which("compute-sanitizer")
    commands = [
        [tool or "compute-sanitizer", "--tool", name, "--error-exitcode", "9", *script]
        for name in ("memcheck", "racecheck")
    ]
    if dry:
        print("\n".join("would run: " + " ".join(command) for command in commands))
        code = run(script)
        return state(code == 0, f"would run {len(commands)} tools; check_native.py on the CPU: exit code {code}")
    if tool is None:
        code = run(script)
        return {
            "state": "failed" if code else "skipped",
            "note": f"compute-sanitizer is not installed; plain run: {code}",
        }
    codes = {command[2]: run(command, limit=35, PYTORCH_NO_CUDA_MEMORY_CACHING="1") for command in commands}
    return state(not any(codes.values()), f"exit codes {codes} (9: an error was found)")


def ceilings(out: Path, dry: bool) -> Result:
    """Copy bandwidth and the largest matrix rate, as every benchmark measures them."""
    import harness

    found = harness.ceilings("cpu" if dry else "cuda")
    note = f"copy {found.copy_gbs:.0f} GB/s, matrix product {found.matmul_gflops / 1e3:.2f} TFLOP/s"
    return state(True, note) | found._asdict()


def bench(out: Path, dry: bool) -> Result:
    """Every bench_*.py, each with its time limit."""
    codes = {}
    for name, (cuda, tiny, limit) in BENCHMARKS.items():
        device = "cpu" if dry else "cuda"
        given = "--seconds 0.01 " + tiny if dry else cuda
        command = [sys.executable, str(BENCH / f"bench_{name}.py"), "--device", device]
        command += ["--out", str(out / f"{name}_{device}.csv"), *shlex.split(given)]
        # Compilers take longest of all in a dry run, and are not ours to check.
        codes[name] = run(
            command,
            limit=limit * (PATIENCE if dry else 1),
            **({"TORCH_COMPILE_DISABLE": "1", "OMP_NUM_THREADS": "1"} if dry else {}),
        )
    return state(not any(codes.values()), f"exit codes {codes} (124: stopped at its limit)")


def tune(out: Path, dry: bool) -> Result:
    """Block tables by measurement; dry: compiled ahead of time. Writes tuned.json."""
    path = out / "tuned.json"
    code = run(
        [sys.executable, str(BENCH / "tune.py"), "--out", str(path), *(["--dry"] if dry else [])],
        limit=None if dry else 57,
    )
    found = json.loads(path.read_text()) if path.exists() else []
    changed = [one for one in found if one["changed"]]
    return state(code in (0, 124) and bool(found), f"{len(found)} tables, {len(changed)} with a faster row") | {
        "offers": [f'{one["table"]} "{one["architecture"]}": {one["offer"]}' for one in changed]
    }


STAGES: dict[str, tuple[Callable[[Path, bool], Result], float]] = {
    "environment": (environment, 30),
    "build": (build, 80),
    "ceilings": (ceilings, 20),
    "tests": (tests, 150),
    "bench": (bench, 170),
    "tune": (tune, 60),
    "sanitizer": (sanitizer, 80),
}


def state(passed: bool, note: str) -> Result:
    return {"state": "passed" if passed else "failed", "note": note}


def words(*command: str) -> str:
    """What a command prints, or nothing where it is missing or fails."""
    if shutil.which(command[0]) is None:
        return ""
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()


def run(command: list[str], *, limit: float | None = None, **environ: str) -> int:
    """Exit code of a command run in the repository, its output in the stage's log; 124 where it was stopped.

    At its limit a command is interrupted, as by Ctrl-C, and has seconds to write what it has: pytest its report.
    """
    print("+", *(f"{k}={v}" for k, v in environ.items()), *command, flush=True)
    child = subprocess.Popen(command, cwd=ROOT, env=os.environ | environ)
    try:
        return child.wait(limit)
    except subprocess.TimeoutExpired:
        print(f"stopped after {limit} s", flush=True)
        child.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(8)
        child.kill()
        child.wait()
        return 124


def missing_imports(path: Path) -> list[str]:
    """Top-level packages that a test file imports at its head and that are not installed."""
    names = re.findall(r"^(?:import|from) (\w+)", path.read_text(), re.MULTILINE)
    local = {p.stem for p in (ROOT / "tests").rglob("*.py")} | {"integration", "kernels"}
    return sorted({n for n in names if n not in local and importlib.util.find_spec(n) is None})


def read_junit(path: Path) -> tuple[dict[str, int], list[str]]:
    """Counts, and a line for each test that failed."""
    counts, failures = {"passed": 0, "failed": 0, "skipped": 0}, []
    for case in ET.parse(path).getroot().iter("testcase"):
        tags = {child.tag: child for child in case}
        bad = tags.get("failure", tags.get("error"))
        if bad is not None:
            failures.append(f"{case.get('name')}: {(bad.get('message') or '').splitlines()[0][:110]}")
        counts["failed" if bad is not None else "skipped" if "skipped" in tags else "passed"] += 1
    return counts, failures


def isolated(name: str, out: Path, dry: bool, limit: float) -> Result:
    """One stage in a process group of its own, whatever it leaves running ended with it."""
    path, start = out / f"{name}.json", time.monotonic()
    path.unlink(missing_ok=True)
    paths = [str(ROOT), str(ROOT / "python"), str(BENCH), os.environ.get("PYTHONPATH", "")]
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


def summary(results: dict[str, Result], out: Path, dry: bool) -> None:
    """summary.json, summary.csv and the table."""
    (out / "summary.json").write_text(json.dumps({"dry": dry, **results}, indent=1) + "\n")
    rows = []
    for path in sorted(out.glob("*_cpu.csv" if dry else "*_cuda.csv")):
        with path.open(newline="") as file:
            rows += list(csv.DictReader(file))
    if rows:
        with (out / "summary.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    lines = [f"{'stage':<12}{'state':<9}{'s':>6}  note{'  (dry run on a CPU: no figure counts)' * dry}"]
    lines += [f"{name:<12}{r['state']:<9}{r['seconds']:>6}  {r['note'][:150]}" for name, r in results.items()]
    lines += [f"  failed: {text}" for text in results.get("tests", {}).get("failures", [])[:12]]
    lines += [f"  offer: {text}" for text in results.get("tune", {}).get("offers", [])]
    if rows:
        lines.append(f"{'operation':<28}{'rival':<36}{'p50 ms':>10}{'of floor':>9}{'error':>9}  case")
    for r in rows:
        ms = f"{float(r['p50_ms']):10.4g}" if r["p50_ms"] else f"{'red':>10}"
        floor = f"{float(r['of_floor']):9.2f}" if r["of_floor"] else " " * 9
        error = f"{float(r['error']):9.0e}" if r["error"] else " " * 9
        lines.append(f"{r['operation']:<28}{r['rival'][:35]:<36}{ms}{floor}{error}  {r['case'][:40]}")
    if len(lines) > LINES:
        lines = [*lines[:LINES], f"... {len(lines) - LINES} more rows in {out / 'summary.csv'}"]
    print("\n".join(lines), flush=True)


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
