"""An environment with the versions of a GPU machine, made in a folder, and in it all that needs no GPU.

    python3 benchmarks/gpu_environment.py DIR                            # Linux, 5 GB, half an hour on two cores
    python3 benchmarks/gpu_environment.py DIR --only aot,suite           # some of its steps, and the build

A machine that is at hand for minutes has the Triton, numpy and torch that it has; here is found out before what does
not run with them. DIR/venv gets PINS and is used again; DIR/tree is a copy of what git knows or would add of this
checkout, made anew, so nothing is built beside its sources. CUDA C++ is compiled where there is an nvcc. Each step
writes DIR/STEP.log; counts are printed last, and the exit code is 1 where a step failed.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
PYTHON = "3.12"
PINS = {  # torch from the package index comes with CUDA 13.0
    "torch": "2.11.0",
    "triton": "3.6.0",
    "numpy": "2.5.2",
    "transformers": "5.17.0",
    "torchmetrics": "1.9.0",
    "scipy": "1.18.1",
    "safetensors": "0.8.0",
    "pytest": "9.2.0",
    "pytest-xdist": "3.8.0",
    "pytest-benchmark": "5.3.1",
    "hypothesis": "6.170.17",
    "setuptools": "81.0.0",
    "ninja": "1.13.2",
    "pybind11": "3.1.0",
    "typer": "0.29.2",
    "rich": "15.0.0",
    "matplotlib": "3.11.2",
}
COLLECT = """
import subprocess, sys
import gpu_suite_checks as checks
files = [str(path) for path in checks.gpu_files() if not checks.missing_imports(path)]
print(len(files), "files with tests for a GPU", flush=True)
options = ["-q", "--collect-only", "-o", "addopts=", "-m", "gpu", "-p", "no:cacheprovider", "--import-mode=importlib"]
sys.exit(subprocess.call([sys.executable, "-m", "pytest", *options, *files]))
"""


class Place(NamedTuple):
    """The folder of everything, and the interpreter that the environment is made from."""

    folder: Path
    base: str

    @property
    def python(self) -> str:
        return str(self.folder / "venv" / "bin" / "python")

    @property
    def tree(self) -> Path:
        return self.folder / "tree"


def packages(place: Place) -> list[list[str]]:
    """The environment, where there is none, and PINS in it."""
    file = place.folder / "requirements.txt"
    file.write_text("".join(f"{name}=={version}\n" for name, version in PINS.items()))
    made = [] if Path(place.python).exists() else [[place.base, "-m", "venv", str(place.folder / "venv")]]
    return [*made, [place.python, "-m", "pip", "install", "--quiet", "-r", str(file)]]


def build(place: Place) -> list[list[str]]:
    return [[place.python, "setup.py", "-q", "build_ext", "--inplace", "--build-temp", str(place.folder / "build")]]


def pytest(place: Place, *arguments: str) -> list[str]:
    count = str(os.cpu_count() or 1)
    return [place.python, "-m", "pytest", "-p", "no:cacheprovider", "-n", count, "--tb=short", *arguments]


def aot(place: Place) -> list[list[str]]:
    tests = place.tree / "tests"
    files = [*sorted(tests.rglob("test_*aot.py")), tests / "kernels" / "test_triton_resources.py"]
    return [pytest(place, *(str(path) for path in files))]


def kernels(place: Place) -> list[list[str]]:
    folders = [str(place.tree / "tests" / name) for name in ("kernels", "native")]
    return [pytest(place, *folders, "--ignore-glob=*aot.py", "--ignore-glob=*test_triton_resources.py")]


def collect(place: Place) -> list[list[str]]:
    return [[place.python, "-c", COLLECT]]


def suite(place: Place) -> list[list[str]]:
    """Both parts of the GPU suite, dry: the second in another folder, from the archive of the first."""
    script, out = [place.python, "benchmarks/gpu_suite.py", "--dry"], place.folder / "suite"
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    first, second = ([*script, "--out", str(out / part), "--part", part] for part in ("first", "second"))
    archive = str(out / "first.tgz")
    return [[*first, "--pack", archive], [*second, "--resume", archive, "--pack", str(out / "second.tgz")]]


STEPS: dict[str, Callable[[Place], list[list[str]]]] = {
    "packages": packages,
    "build": build,
    "collect": collect,
    "aot": aot,
    "kernels": kernels,
    "suite": suite,
}


def copy_tree(place: Place) -> None:
    """What git tracks here, and what it would add."""
    shutil.rmtree(place.tree, ignore_errors=True)
    listing = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listing, cwd=ROOT, check=True, capture_output=True, text=True).stdout.split("\0")
    for name in (name for name in names if name and (ROOT / name).is_file()):
        (place.tree / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, place.tree / name)


def run_step(name: str, place: Place) -> tuple[int, str]:
    """The exit code of a step's first command that fails, or 0, and its counts: the lines that say how much passed."""
    path, code = place.folder / f"{name}.log", 0
    paths = [place.tree, place.tree / "python", place.tree / "benchmarks", place.tree / "tests"]
    environ = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, paths)), "OMP_NUM_THREADS": "1"}
    environ["TRITON_CACHE_DIR"] = str(place.folder / "triton")
    commands = STEPS[name](place)
    with path.open("w") as log:
        for command in commands:
            print("+", *command, file=log, flush=True)
            code = subprocess.run(command, cwd=place.tree, env=environ, stdout=log, stderr=subprocess.STDOUT).returncode
            if code:
                break
    return code, counts(path.read_text())


def counts(text: str) -> str:
    """Out of a log: what pytest or a stage of the suite says of how many passed, failed and were skipped."""
    said = re.sub(r"^\+ .*", "", text, flags=re.MULTILINE)  # the commands themselves
    found = re.findall(r"\d+ (?:passed|failed|skipped|errors?|files with tests for a GPU)\b|\d+/\d+ tests", said)
    return ", ".join(found)


def failures(text: str) -> list[str]:
    """Out of a log: the lines of what failed, as pytest and the suite write them."""
    return re.findall(r"^(?:FAILED|ERROR) .*|^\w+ +failed .*|^  \d+x .*", text, flags=re.MULTILINE)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, metavar="DIR", help="where it is made, or is already")
    parser.add_argument(
        "--python", default=f"python{PYTHON}", help="interpreter of the environment (default %(default)s)"
    )
    parser.add_argument("--only", default=",".join(STEPS), help="steps, of %(default)s")
    flags = parser.parse_args()
    names = flags.only.split(",")
    if unknown := sorted(set(names) - set(STEPS)):
        parser.error(f"--only: takes {','.join(STEPS)}, got {','.join(unknown)}")
    place = Place(flags.folder.resolve(), flags.python)
    if "packages" in names and not Path(place.python).exists() and shutil.which(flags.python) is None:
        parser.error(f"--python: takes an interpreter of Python {PYTHON}, found no {flags.python}")
    place.folder.mkdir(parents=True, exist_ok=True)
    copy_tree(place)
    lines, bad = [], False
    for name in (name for name in STEPS if name in names or name == "build"):  # the copy has no module yet
        start = time.monotonic()
        code, counted = run_step(name, place)
        bad |= code != 0
        state = f"failed ({code})" if code else "passed"
        lines.append(f"{name:<10}{state:<14}{time.monotonic() - start:>6.0f} s  {counted}")
        print(lines[-1], flush=True)
        for text in failures((place.folder / f"{name}.log").read_text())[:20]:
            print(f"  {text[:150]}", flush=True)
        if code and name == "packages":
            break
    print("\n".join(["", *lines]))
    return int(bad)


if __name__ == "__main__":
    sys.exit(main())
