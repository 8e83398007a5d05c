"""The guarded checks on interpreted kernels, in a process of their own: the interpreter is chosen before the import."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

from kernels.conftest import interpreter_reason

HERE = Path(__file__).parent


def test_every_kernel_passes_its_guarded_checks_in_the_interpreter():
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", str(HERE / "test_guarded.py")]
    env = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=HERE.parents[1], env=env, capture_output=True, text=True, timeout=500, check=False
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) >= 50


def test_versions_that_cannot_interpret_are_skipped_with_a_reason():
    assert interpreter_reason("3.6.0", "2.4.1").endswith("needs numpy < 2.4, here is 2.4.1; triton 3.7 takes either")
    assert interpreter_reason("3.6.0", "2.3.5") is interpreter_reason("3.7.0", "2.4.6") is None
    assert interpreter_reason("3.10.0+git1", "2.10.0") is None
