"""`make wheel`: builds, repairs and tests one wheel with the settings of [tool.cibuildwheel], without a container.

    python tests/wheel.py DIR

Writes the wheel for this Python and platform to DIR/wheels, with the platform tag of this machine's C library;
cibuildwheel uses containers to support older ones. As in cibuildwheel, the wheel and `test-requires` are then installed
into an empty environment (DIR/venv), `test-sources` are copied to DIR/tests, and `test-command` runs there, so that no
test can import the package from its sources. The version of torch is that of constraints.txt.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from versions import copy_tree

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent


def settings() -> dict[str, Any]:
    """[tool.cibuildwheel] with the table of this platform merged in."""
    whole = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["cibuildwheel"]
    return whole | whole.get("macos" if sys.platform == "darwin" else "linux", {})


def run(command: list[str], folder: Path, **environment: str) -> None:
    """Run and show a command; exit with its status if it fails."""
    print("+", shlex.join(command), flush=True)
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    status = subprocess.run(command, cwd=folder, env=os.environ | {"PATH": path} | environment).returncode
    if status:
        sys.exit(status)


def build(folder: Path, wanted: dict[str, Any]) -> Path:
    """The repaired wheel in folder/wheels, built from a copy of the files that git tracks or would add."""
    source, built, wheels = (folder / name for name in ("source", "built", "wheels"))
    for stale in (built, wheels):
        shutil.rmtree(stale, ignore_errors=True)
    copy_tree(source)
    command = [sys.executable, "-m", "build", "--wheel", "--outdir", str(built), str(source)]
    run(command, folder, PIP_CONSTRAINT=str(ROOT / "constraints.txt"), **wanted["environment"])
    (wheel,) = built.glob("*.whl")
    if repair := wanted.get("repair-wheel-command"):
        run(shlex.split(repair.format(dest_dir=shlex.quote(str(wheels)), wheel=shlex.quote(str(wheel)))), folder)
    else:
        shutil.copytree(built, wheels)
    (repaired,) = wheels.glob("*.whl")
    return repaired


def test(wheel: Path, folder: Path, wanted: dict[str, Any]) -> None:
    """Run `test-command` in an environment with only the wheel and `test-requires`, on copies of `test-sources`."""
    environment, tests = folder / "venv", folder / "tests"
    for stale in (environment, tests):
        shutil.rmtree(stale, ignore_errors=True)
    run([sys.executable, "-m", "venv", str(environment)], folder)
    pip = [str(environment / "bin" / "python"), "-m", "pip", "install", "--quiet", "-c", str(ROOT / "constraints.txt")]
    run([*pip, str(wheel), *wanted["test-requires"]], folder)
    tests.mkdir()
    for name in wanted["test-sources"]:
        copied = folder / "source" / name
        (shutil.copytree if copied.is_dir() else shutil.copy2)(copied, tests / name)
    path = os.pathsep.join([str(environment / "bin"), os.environ["PATH"]])
    run(["sh", "-c", wanted["test-command"]], tests, PATH=path, **wanted["test-environment"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="folder for the wheel, the environment and the tests")
    folder = parser.parse_args().folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    wanted = settings()
    wheel = build(folder, wanted)
    test(wheel, folder, wanted)
    print(f"tested {wheel}")


if __name__ == "__main__":
    main()
