"""Runs a script in several processes at once and checks that all succeed."""

import os
import subprocess
import sys
import time
from pathlib import Path

import modality_integration

HERE = Path(__file__).parent
PACKAGES = (HERE.parent, Path(modality_integration.__file__).parents[1])


def outputs_of(script, folder, *arguments, processes=2, timeout=240):
    """The lines printed by each process of `script RANK STORE FOLDER *arguments`; STORE is for a FileStore.

    If one fails, the others, which may be waiting for it, are killed, and the test fails with the end of its stderr.
    """
    paths = os.pathsep.join(map(str, (*PACKAGES, os.environ.get("PYTHONPATH", ""))))
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    files = [(folder / f"{rank}.out", folder / f"{rank}.err") for rank in range(processes)]
    running = []
    try:
        for rank, (out, err) in enumerate(files):
            command = [sys.executable, HERE / script, rank, folder / "store", folder, *arguments]
            with out.open("w") as stdout, err.open("w") as stderr:
                running.append(subprocess.Popen([*map(str, command)], env=environment, stdout=stdout, stderr=stderr))
        failed = _first_to_fail(running, time.monotonic() + timeout)
    finally:
        for process in running:
            process.kill()
            process.wait()
    assert failed is None, f"process {failed}: {files[failed][1].read_text()[-3000:]}"
    return [out.read_text().splitlines() for out, _ in files]


def _first_to_fail(running, deadline):
    """The index of the first process that fails or times out; None if all succeed."""
    while True:
        codes = [process.poll() for process in running]
        for rank, code in enumerate(codes):
            if code or (code is None and time.monotonic() > deadline):
                return rank
        if None not in codes:
            return None
        time.sleep(0.05)
