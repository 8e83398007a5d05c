"""The stages of gpu_suite.py that check results: the GPU tests, and compute-sanitizer over the native kernels."""

from __future__ import annotations

import ast
import contextlib
import functools
import importlib.util
import os
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

from gpu_suite_processes import BENCH, PATIENCE, ROOT, Result, cuda_tool, run, run_together, state

LIMITS = {"tests": 98, "sanitizer": 32}  # seconds of one command of these stages
SANITIZERS = ("memcheck", "racecheck")
INTERPRETED = "tests/kernels/test_guarded.py"  # the GPU checks whose bodies also run on interpreted kernels


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
    tool = cuda_tool("compute-sanitizer")
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
    found = [file for file in (*packages, root.joinpath(*parts).with_suffix(".py")) if file.is_file()]
    parent = root.joinpath(*parts[:-1], "__init__.py")
    home = lazy_names(parent).get(parts[-1]) if len(parts) > 1 and parent.is_file() else None
    return found + (files_of(root, home) if home else [])


@functools.cache
def lazy_names(package: Path) -> dict[str, str]:
    """{name: the module it is loaded from when first used}: what an `__init__.py` imports for type checkers alone."""
    names: dict[str, str] = {}
    for block in ast.parse(package.read_text()).body:
        if isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING":
            for node in block.body:
                if isinstance(node, ast.ImportFrom) and node.module:
                    names |= {alias.asname or alias.name: node.module for alias in node.names}
    return names


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
