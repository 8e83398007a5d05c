"""A short `make soak`: half a million tokens through each stream, with flat memory and correct results."""

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads memory from /proc")


@pytest.mark.slow
def test_long_streams_keep_memory_flat_and_end_right():
    command = [sys.executable, str(Path(__file__).parent / "soak.py"), "--millions", "0.5"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "3 passed, 0 failed" in done.stdout
