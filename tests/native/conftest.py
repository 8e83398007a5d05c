"""Fixtures for the tests of the compiled module. All tests except those of the build need it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from native import emulated

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def native_module():
    """mir_kernels._C, or a skip that says why it is missing."""
    from mir_kernels import _native

    if _native.C is None:
        pytest.skip(f"no compiled module: {_native.MISSING}")
    return _native.C


@pytest.fixture(scope="session")
def emulated_device(tmp_path_factory):
    """The CUDA kernels on the emulated device, or a skip that says what is missing."""
    if reason := emulated.missing():
        pytest.skip(reason)
    return emulated.Device(emulated.build(tmp_path_factory.mktemp("emulated")))


@pytest.fixture
def run_python():
    """Run a script in a separate process with extra environment variables; returns the completed process."""

    def run(script: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
        path = os.pathsep.join([str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
        env = {**os.environ, "PYTHONPATH": path, **environment}
        command = [sys.executable, "-c", script, *arguments]
        return subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)

    return run
