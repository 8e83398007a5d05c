"""The stages of gpu_suite.py that check results: kernels, GPU tests, compute-sanitizer on native kernels."""

from __future__ import annotations

import ast
import contextlib
import functools
import importlib.util
import os
import subprocess
import sys
import time
from pathlib import Path

import gpu_suite_reports as reports
from gpu_suite_processes import BENCH, GRACE, ROOT, Result, cuda_tool, earlier, run, run_together, state

SANITIZERS = ("memcheck", "racecheck")
GUARDED = "tests/kernels/test_guarded.py"  # the GPU checks whose bodies also run on interpreted kernels
ONE = "test_right_twice_the_same_and_nothing_else_is_written and {}"  # selects each kernel at one size
SIZE = {True: "13-37", False: "129-577"}  # dry or not: rows and columns, not multiples of any tile edge


def check(out: Path, dry: bool, limit: float) -> Result:
    """Every kernel in every dtype at one odd size, in guarded memory, twice, against float64: failures show early.

    Without pytest: every kernel job by tests/kernels/check_jobs.py.
    """
    size = SIZE[dry]
    return reported(out, "check", [ROOT / GUARDED], ["-k", ONE.format(size)], dry, limit, [f"--sizes={size}"])


def tests(out: Path, dry: bool, limit: float) -> Result:
    """The GPU tests of files whose imports are installed, in several processes; dry: the same bodies, interpreted.

    Without pytest: every kernel job by tests/kernels/check_jobs.py.
    """
    files = [ROOT / GUARDED] if dry else gpu_files()
    marks = ["-m", "not slow" if dry else "gpu"]
    return reported(out, "tests", files, marks, dry, limit, [f"--sizes=1-1,{SIZE[True]}"] if dry else [])


def reported(
    out: Path, name: str, files: list[Path], chosen: list[str], dry: bool, limit: float, jobs: list[str]
) -> Result:
    """Run tests in several processes with one report each (<name>0.jsonl, ...); failures of earlier parts come first.

    If a test ends its process (a lost CUDA context, a crash), a new process continues after that test.
    """
    end = time.monotonic() + limit - GRACE - 2
    shards = 1 if dry else max(1, min(14, (os.cpu_count() or 1) - 2))  # most of the time is compilation
    before = earlier(out, f"{name}*.jsonl")
    paths = [out / f"{name}{i}.jsonl" for i in range(shards)]
    for path in out.glob(f"{name}*.jsonl"):
        path.unlink()
    left_out: dict[str, list[str]] = {}
    if importlib.util.find_spec("pytest") is None:
        command = [sys.executable, str(ROOT / "tests" / "kernels" / "check_jobs.py"), *jobs]
        how = "without pytest: "
    else:
        lacking = {path: missing_imports(path) for path in files}
        left_out = {path.name: names for path, names in lacking.items() if names}
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-o", "addopts=", "--tb=short"]
        command += ["--import-mode=importlib", "--continue-on-collection-errors", "-p", "shard", *chosen]
        command += [str(path) for path, names in lacking.items() if not names]
        how = ""
    environ = {"TRITON_INTERPRET": "1"} if dry else {}
    environ["MIR_EARLIER"] = os.pathsep.join(map(str, before))
    environ["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // shards))  # the processes share the cores
    todo, codes, ended = list(range(shards)), [0] * shards, 0
    while todo and (left := end - time.monotonic()) > 0:
        shares = {i: {"MIR_SHARD": f"{i}/{shards}", "MIR_REPORT": str(paths[i])} for i in todo}
        scripts = {i: ["--shard", f"{i}/{shards}", "--report", str(paths[i])] if how else [] for i in todo}
        ending = run_together([command + scripts[i] for i in todo], left, [environ | shares[i] for i in todo])
        for i, code in zip(todo, ending, strict=True):
            codes[i] = code
        # 0: all passed, 1: some failed, 5: no tests, 124: stopped at the limit.
        todo = [i for i in todo if codes[i] not in (0, 1, 5, 124) and reports.ended_in_a_test(paths[i], codes[i])]
        ended += len(todo)
    counts = reports.counts(paths, before)
    failed = reports.failures(reports.read([*before, *paths]))
    note = how + ", ".join(f"{n} {what}" for what, n in counts.items() if n or what != "not finished")
    bad = [code for i, code in enumerate(codes) if code not in (0, 1, 5, 124) and i not in todo]
    note += f"; exit codes {sorted(set(bad))} of {len(bad)} of {shards} processes" if bad else ""
    note += f"; {ended} times a test ended its process" if ended else ""
    note += f"; skipped for missing packages: {', '.join(left_out)}" if left_out else ""
    found = state(not (bad or failed) and counts["passed"] > 0, note)
    if found["state"] == "passed" and counts["not finished"]:
        found["state"] = "cut"
    return found | {"counts": counts, "failures": failed, "left_out": left_out}


def sanitizer(out: Path, dry: bool, limit: float) -> Result:
    """compute-sanitizer on the native kernels; dry: print its commands and run the check on the CPU kernels."""
    script = [sys.executable, str(BENCH / "check_native.py"), "--device", "cpu" if dry else "cuda"]
    tool = cuda_tool("compute-sanitizer")
    commands = {
        name: [tool or "compute-sanitizer", "--tool", name, "--error-exitcode", "9", *script] for name in SANITIZERS
    }
    each = limit / len(commands) - GRACE - 1
    if dry:
        print("\n".join("would run: " + " ".join(command) for command in commands.values()))
        built = ["--module", str(out / "built")] if list((out / "built").rglob("_C.*")) else []
        code = run([*script, *built], limit=each)
        return state(code == 0, f"would run {len(commands)} tools; check_native.py on the CPU: exit code {code}")
    if subprocess.run([*script, "--can-run"], cwd=ROOT, check=False).returncode:
        return {"state": "skipped", "note": "the module has no CUDA C++ kernels, see build"}
    if tool is None:
        code = run(script, limit=each)
        note = f"compute-sanitizer is not installed; check_native.py without it: exit code {code}"
        return {"state": "failed" if code else "skipped", "note": note}
    codes = {name: run(command, limit=each, PYTORCH_NO_CUDA_MEMORY_CACHING="1") for name, command in commands.items()}
    return state(not any(codes.values()), f"exit codes {codes} (9: errors found)")


def gpu_files() -> list[Path]:
    """Test files with a gpu mark, or with one in the conftest.py of their folder."""

    def marked(path: Path) -> bool:
        return path.exists() and "mark.gpu" in path.read_text()

    return [
        path
        for path in sorted((ROOT / "tests").rglob("test_*.py"))
        if marked(path) or marked(path.with_name("conftest.py"))
    ]


def missing_imports(path: Path, seen: set[Path] | None = None) -> list[str]:
    """Missing packages that a file imports at its top level, directly or through other files of the repository.

    `pytest.importorskip` does not count: such a file reports itself what it lacks.
    """
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
            with contextlib.suppress(ValueError):  # a module without a spec, put into sys.modules by hand
                missing |= {top} if importlib.util.find_spec(top) is None else set()
    return sorted(missing)


@functools.cache
def head_imports(path: Path) -> set[str]:
    """Dotted names of the imports outside of functions, classes and conditions."""
    names: set[str] = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def files_of(root: Path, name: str) -> list[Path]:
    """The files below `root` that an import of this dotted name runs, including `__init__.py` of its packages."""
    parts = name.split(".")
    packages = [root.joinpath(*parts[:i], "__init__.py") for i in range(1, len(parts) + 1)]
    found = [file for file in (*packages, root.joinpath(*parts).with_suffix(".py")) if file.is_file()]
    parent = root.joinpath(*parts[:-1], "__init__.py")
    home = lazy_names(parent).get(parts[-1]) if len(parts) > 1 and parent.is_file() else None
    return found + (files_of(root, home) if home else [])


@functools.cache
def lazy_names(package: Path) -> dict[str, str]:
    """{name: the module it is lazily loaded from}: the imports of an `__init__.py` under TYPE_CHECKING."""
    names: dict[str, str] = {}
    for block in ast.parse(package.read_text()).body:
        if isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING":
            for node in block.body:
                if isinstance(node, ast.ImportFrom) and node.module:
                    names |= {alias.asname or alias.name: node.module for alias in node.names}
    return names
