"""Run the square root kernels in Triton's interpreter, selected on import, on CPU tensors in a separate process."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

HERE = Path(__file__).parent
FILES = [str(HERE / f"test_{name}_triton.py") for name in ("sqrtm", "products", "polar_promises")]


def test_the_triton_kernels_pass_their_tests_in_the_interpreter():
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *FILES]
    env = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    done = subprocess.run(
        command, cwd=HERE.parents[2], env=env, capture_output=True, text=True, timeout=500, check=False
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) >= 82
