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
import ast
import contextlib
import csv
import functools
import importlib.metadata
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
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
BENCH = ROOT / "benchmarks"
TOTAL = 530.0  # seconds for all stages together
GRACE = 3  # seconds in which a command that is interrupted at its limit may write what it has
PATIENCE = 3  # times as long in a dry run: a laptop's two busy cores are no GPU machine
LINES = 90  # of the table printed last, at most
Result = dict[str, Any]  # "state": "passed", "failed" or "skipped"; "note": one line; whatever else the stage found


class Bench(NamedTuple):
    """One call of a bench_*.py: its arguments on CUDA and in a dry run, and its limit in seconds."""

    script: str
    cuda: str
    tiny: str
    limit: int


# By the name of the CSV. Left out is what takes a GPU minutes: eigenvalues of general matrices, compilers twice.
BENCHMARKS = {
    "moca": Bench("moca", "--seconds 0.3", "--tokens 64 --hidden 64", 41),
    "moments": Bench("moments", "--seconds 0.3", "--tokens 64 --d 32", 22),
    # One matrix, and batches of many small ones: where LAPACK and cuSOLVER are slowest.
    "sqrtm": Bench("sqrtm", "--seconds 0.3 --d 512 --skip scipy", "--d 16", 24),
    "sqrtm_batch512": Bench(
        "sqrtm",
        '--seconds 0.2 --operations polar trace --d 64 --batch 512 --skip scipy torchmetrics compile "(linalg"',
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
LIMITS = {"tests": 98, "sanitizer": 32, "tune": 55}  # seconds of one command of these stages
SANITIZERS = ("memcheck", "racecheck")
SETUPTOOLS = 77  # the first that reads pyproject.toml's `license`
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
    if old := old_setuptools():
        parts.append(f"setuptools {old} does not read this pyproject.toml: the build leaves its license out")
    return found | {"state": "passed", "note": "; ".join(parts)}


def build(out: Path, dry: bool) -> Result:
    """The extension in place for the device at hand, its CPU part alone where nvcc is missing; dry: that, into DIR."""
    nvcc = not dry and (shutil.which("nvcc", path=cuda_home()) or shutil.which("nvcc"))
    env = {"MIR_CUDA": "1" if nvcc else "0", "MIR_NATIVE": "1"}
    if nvcc:
        import torch

        major, minor = torch.cuda.get_device_capability()
        env |= {"MIR_CUDA_ARCHS": f"{major}{minor}", "CUDA_HOME": str(Path(nvcc).parent.parent)}
    tree = source_tree(out) if old_setuptools() else ROOT
    command = [sys.executable, "setup.py", "-q", "build_ext", "--build-temp", str(out / "build")]
    built = out / "built"
    shutil.rmtree(built, ignore_errors=True)
    code = run([*command, "--build-lib", str(built)], folder=tree, **env)
    modules = list(built.rglob("_C.*"))
    if code == 0 and not dry:
        for module in modules:
            arriving = ROOT / "mir_kernels" / f"{module.name}.arriving"
            shutil.copy2(module, arriving)
            os.replace(arriving, ROOT / "mir_kernels" / module.name)  # a process may be running the old one
    what = "with CUDA C++" if nvcc else "the CPU part; CUDA C++ WAS NOT BUILT" + ("" if dry else ": there is no nvcc")
    return state(code == 0 and bool(modules), f"{what} ({env}: exit code {code})") | {"cuda": bool(nvcc)}


def cuda_home() -> str:
    return str(Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin")


def old_setuptools() -> str:
    """The version of a setuptools that refuses `license = "Apache-2.0"`, or ""."""
    try:
        version = importlib.metadata.version("setuptools")
    except importlib.metadata.PackageNotFoundError:
        return ""
    return version if int(version.partition(".")[0]) < SETUPTOOLS else ""


def source_tree(out: Path) -> Path:
    """What a build reads, with a pyproject.toml that older setuptools understands."""
    tree = out / "source"
    shutil.rmtree(tree, ignore_errors=True)
    for name in ("csrc", "mir_kernels", "python"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("*.so", "__pycache__", "*.egg-info"))
    for name in ("setup.py", "README.md"):
        shutil.copy2(ROOT / name, tree / name)
    project = (ROOT / "pyproject.toml").read_text()
    (tree / "pyproject.toml").write_text(re.sub(r"^license.*\n", "", project, flags=re.MULTILINE))
    return tree


def tests(out: Path, dry: bool) -> Result:
    """The GPU tests of the files whose imports are here, in several processes; dry: the same bodies, interpreted.

    Without pytest: every kernel job by tests/kernels/check_jobs.py.
    """
    shards = 1 if dry else max(1, min(8, (os.cpu_count() or 1) // 2))  # compilation takes most of the time
    reports = [out / f"tests{i}.xml" for i in range(shards)]
    for report in out.glob("tests*.xml"):
        report.unlink()
    left_out: dict[str, list[str]] = {}
    if importlib.util.find_spec("pytest") is None:
        script = [sys.executable, str(ROOT / "tests" / "kernels" / "check_jobs.py"), *(["--small"] * dry)]
        commands = [[*script, "--report", str(r), "--shard", f"{i}/{shards}"] for i, r in enumerate(reports)]
        how = "without pytest: "
    else:
        files = [ROOT / INTERPRETED] if dry else gpu_files()
        lacking = {path: missing_imports(path) for path in files}
        left_out = {path.name: names for path, names in lacking.items() if names}
        pytest = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-o", "addopts=", "--tb=short"]
        pytest += ["--import-mode=importlib", "--continue-on-collection-errors", "-p", "shard"]
        pytest += ["-m", "not slow" if dry else "gpu", *(str(path) for path, names in lacking.items() if not names)]
        commands = [[*pytest, f"--junitxml={report}"] for report in reports]
        how = ""
    environ = {"TRITON_INTERPRET": "1"} if dry else {}
    environs = [environ | {"MIR_SHARD": f"{i}/{shards}"} for i in range(shards)]
    codes = run_together(commands, LIMITS["tests"] * (PATIENCE if dry else 1), environs)
    counts, failures = {"passed": 0, "failed": 0, "skipped": 0}, []
    for report in (report for report in reports if report.exists()):
        more, failed = read_junit(report)
        counts = {name: counts[name] + more[name] for name in counts}
        failures += failed
    failures = list(dict.fromkeys(failures))  # a file that cannot be collected fails in every process
    note = how + ", ".join(f"{n} {what}" for what, n in counts.items())
    bad = {i: code for i, code in enumerate(codes) if code not in (0, 1, 5)}  # 1: failures, 5: an empty shard
    note += f"; exit codes {sorted(set(bad.values()))} of {len(bad)} of {shards} processes" if bad else ""
    note += f"; left out for missing packages: {', '.join(left_out)}" if left_out else ""
    passed = not bad and not failures and counts["failed"] == 0 and counts["passed"] > 0
    return state(passed, note) | {"counts": counts, "failures": failures, "left_out": left_out}


def sanitizer(out: Path, dry: bool) -> Result:
    """compute-sanitizer over the native kernels; dry: says what it would run and runs it on the CPU kernels."""
    script = [sys.executable, str(BENCH / "check_native.py"), "--device", "cpu" if dry else "cuda"]
    tool = shutil.which("compute-sanitizer", path=cuda_home()) or shutil.which("compute-sanitizer")
    commands = {
        name: [tool or "compute-sanitizer", "--tool", name, "--error-exitcode", "9", *script] for name in SANITIZERS
    }
    if dry:
        print("\n".join("would run: " + " ".join(command) for command in commands.values()))
        code = run(script)
        return state(code == 0, f"would run {len(commands)} tools; check_native.py on the CPU: exit code {code}")
    if subprocess.run([*script, "--can-run"], cwd=ROOT, check=False).returncode:
        return {"state": "skipped", "note": "the module has no CUDA C++: see build"}
    if tool is None:
        code = run(script, limit=LIMITS["sanitizer"])
        note = f"compute-sanitizer is not installed; check_native.py without it: exit code {code}"
        return {"state": "failed" if code else "skipped", "note": note}
    codes = {
        name: run(command, limit=LIMITS["sanitizer"], PYTORCH_NO_CUDA_MEMORY_CACHING="1")
        for name, command in commands.items()
    }
    return state(not any(codes.values()), f"exit codes {codes} (9: an error was found)")


def ceilings(out: Path, dry: bool) -> Result:
    """Copy bandwidth and the largest matrix rates, as every benchmark measures them."""
    import harness

    found = harness.ceilings("cpu" if dry else "cuda")
    rates = f"{found['matmul_gflops'] / 1e3:.2f} TFLOP/s, in float64 {found['float64_gflops'] / 1e3:.2f}"
    return state(True, f"copy {found['copy_gbs']:.0f} GB/s, matrix product {rates}") | found


def bench(out: Path, dry: bool) -> Result:
    """Every line of BENCHMARKS with its time limit; what was written before one stopped counts."""
    import harness

    device, notes, files = "cpu" if dry else "cuda", {}, []
    for name, one in BENCHMARKS.items():
        path = out / harness.csv_name(name, device)
        path.unlink(missing_ok=True)
        given = "--seconds 0.01 " + one.tiny if dry else one.cuda
        command = [sys.executable, str(BENCH / f"bench_{one.script}.py"), "--device", device]
        command += ["--out", str(path), *shlex.split(given)]
        # Compilers take longest of all in a dry run, and are not ours to check.
        environ = {"TORCH_COMPILE_DISABLE": "1", "OMP_NUM_THREADS": "1"} if dry else {}
        code = run(command, limit=one.limit * (PATIENCE if dry else 1), **environ)
        rows = harness.read_csv(path) if path.exists() else []
        files += [str(path)] if rows else []
        if code == 124:
            notes[name] = f"stopped after {one.limit} s with {len(rows)} rows"
        elif code or not rows:
            notes[name] = f"exit code {code} with {len(rows)} rows"
        if bad := [r["rival"] for r in rows if harness.exit_code([r])]:
            notes[name] = f"{notes.get(name, '')} no time for {', '.join(dict.fromkeys(bad))}".strip()
    text = "; ".join(f"{name}: {note}" for name, note in notes.items())
    return state(not notes, text or f"{len(files)} CSVs") | {"files": files}


def tune(out: Path, dry: bool) -> Result:
    """Block tables by measurement; dry: compiled ahead of time. Writes tuned.json, and tuned.txt to commit."""
    path = out / "tuned.json"
    path.unlink(missing_ok=True)
    path.with_suffix(".txt").unlink(missing_ok=True)
    command = [sys.executable, str(BENCH / "tune.py"), "--out", str(path), *(["--dry"] if dry else [])]
    code = run(command, limit=None if dry else LIMITS["tune"])
    found = json.loads(path.read_text()) if path.exists() else {"of": "all", "tables": []}
    done, changed = len(found["tables"]), [one for one in found["tables"] if one["changed"]]
    note = f"{done} of {found['of']} tables, {len(changed)} with a faster row"
    note += "" if code == 0 else " (stopped at its limit)" if code == 124 else f" (exit code {code})"
    return state(code == 0 and done == found["of"], note) | {
        "offers": [f'{one["table"]} "{one["architecture"]}": {one["offer"]}' for one in changed]
    }


STAGES: dict[str, tuple[Callable[[Path, bool], Result], float]] = {
    "environment": (environment, 15),
    "build": (build, 70),
    "ceilings": (ceilings, 15),
    "tests": (tests, 105),
    "bench": (bench, 195),
    "tune": (tune, 60),
    "sanitizer": (sanitizer, 70),
}


def state(passed: bool, note: str) -> Result:
    return {"state": "passed" if passed else "failed", "note": note}


def words(*command: str) -> str:
    """What a command prints, or nothing where it is missing or fails."""
    if shutil.which(command[0]) is None:
        return ""
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()


def run(command: list[str], *, limit: float | None = None, folder: Path = ROOT, **environ: str) -> int:
    """Exit code of a command run in the repository, its output in the stage's log; 124 where it was stopped."""
    return run_together([command], limit, [environ], folder)[0]


def run_together(
    commands: list[list[str]], limit: float | None, environs: list[dict[str, str]], folder: Path = ROOT
) -> list[int]:
    """Exit codes of commands that run at the same time.

    At the limit each is interrupted, as by Ctrl-C, and has GRACE seconds to write what it has: pytest its report.
    """
    children = []
    for command, environ in zip(commands, environs, strict=True):
        print("+", *(f"{k}={v}" for k, v in environ.items()), *command, flush=True)
        children.append(subprocess.Popen(command, cwd=folder, env=os.environ | environ))
    end = None if limit is None else time.monotonic() + limit
    codes = []
    for child in children:
        try:
            codes.append(child.wait(None if end is None else max(0.0, end - time.monotonic())))
        except subprocess.TimeoutExpired:
            codes.append(124)
    stopped = [child for child in children if child.poll() is None]
    if stopped:
        print(f"stopped after {limit} s", flush=True)
    for child in stopped:
        child.send_signal(signal.SIGINT)
    end = time.monotonic() + GRACE
    for child in stopped:
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(max(0.0, end - time.monotonic()))
        child.kill()
        child.wait()
    return codes


def gpu_files() -> list[Path]:
    """Test files with a gpu mark of their own, or of a conftest.py beside them."""

    def marked(path: Path) -> bool:
        return path.exists() and "mark.gpu" in path.read_text()

    return [
        path
        for path in sorted((ROOT / "tests").rglob("test_*.py"))
        if marked(path) or marked(path.with_name("conftest.py"))
    ]


def missing_imports(path: Path, seen: set[Path] | None = None) -> list[str]:
    """Packages that are not installed and that a file, or a file of the repository that it imports, imports at its
    head. `pytest.importorskip` is no import: such a file says itself what it lacks."""
    seen = set() if seen is None else seen
    seen.add(path)
    missing: set[str] = set()
    roots = (ROOT, ROOT / "tests", ROOT / "python", BENCH, path.parent)
    for name in head_imports(path):
        for file in (file for root in roots for file in files_of(root, name)):
            if file not in seen:
                missing |= set(missing_imports(file, seen))
        top = name.partition(".")[0]
        if not any((root / top).is_dir() or (root / f"{top}.py").is_file() for root in roots):
            with contextlib.suppress(ValueError):  # a module that somebody made up and put into sys.modules
                missing |= {top} if importlib.util.find_spec(top) is None else set()
    return sorted(missing)


@functools.cache
def head_imports(path: Path) -> set[str]:
    """Dotted names of what a file imports outside of functions, classes and conditions."""
    names: set[str] = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def files_of(root: Path, name: str) -> list[Path]:
    """The files below `root` that an import of this dotted name runs, the packages' own ones among them."""
    parts = name.split(".")
    packages = [root.joinpath(*parts[:i], "__init__.py") for i in range(1, len(parts) + 1)]
    return [file for file in (*packages, root.joinpath(*parts).with_suffix(".py")) if file.is_file()]


def read_junit(path: Path) -> tuple[dict[str, int], list[str]]:
    """Counts, and a line for each test that failed."""
    counts, failures = {"passed": 0, "failed": 0, "skipped": 0}, []
    for case in ET.parse(path).getroot().iter("testcase"):
        tags = {child.tag: child for child in case}
        bad = tags.get("failure", tags.get("error"))
        if bad is not None:
            message = (bad.get("message") or "").strip().splitlines() or ["no message"]
            failures.append(f"{case.get('name')}: {message[0][:110]}")
        counts["failed" if bad is not None else "skipped" if "skipped" in tags else "passed"] += 1
    return counts, failures


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


def summary(results: dict[str, Result], out: Path, dry: bool) -> None:
    """summary.json, summary.csv and the table."""
    (out / "summary.json").write_text(json.dumps({"dry": dry, **results}, indent=1) + "\n")
    rows = []
    for path in results.get("bench", {}).get("files", []):
        with open(path, newline="") as file:
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
        ms = f"{float(r['p50_ms']):10.4g}" if r["p50_ms"] else f"{'raised' if r['failure'] else 'red':>10}"
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
