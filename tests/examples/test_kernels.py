"""examples/kernels.py, and examples/fresh_environment.sh, which runs it in a new environment."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="module")
def printed():
    done = subprocess.run([sys.executable, EXAMPLES / "kernels.py"], capture_output=True, text=True, check=True)
    return done.stdout


def number(pattern, text):
    return float(re.search(pattern + r" ([\d.e+-]+)", text)[1].rstrip("."))


def test_each_operation_is_as_good_as_it_says(printed):
    assert number(r"C\| / \|C\| =", printed) < 1e-5
    trace, lower = number("=", printed.split("Tr")[1]), number("between", printed)
    assert abs(trace - lower) < 1e-4 * trace
    assert number("Frechet distance", printed) == pytest.approx(16.0, rel=0.02)
    assert number("after training:", printed) < 1e-6


@pytest.mark.slow
def test_a_fresh_environment_runs_it_and_its_types_hold(tmp_path):
    source = tmp_path / "source"
    subprocess.run(["git", "clone", "-q", EXAMPLES.parent, source], check=True)  # builds leave files
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    done = subprocess.run(
        ["bash", source / "examples" / "fresh_environment.sh", tmp_path / "fresh"],
        capture_output=True, text=True, env=environment, cwd=tmp_path, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert "typer is not installed: pip install" in done.stderr
    assert "Success: no issues found in 1 source file" in done.stdout
    assert "0 errors" in done.stdout
