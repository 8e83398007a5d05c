"""MoCa under DDP and FSDP2 with two gloo processes: the parameters of single-process training, saved whole."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from modality_integration.models import moca

SCRIPT = Path(__file__).parents[1] / "moca_processes.py"
PACKAGES = (Path(__file__).parents[2], Path(moca.__file__).parents[2])


@pytest.fixture(scope="module")
def outputs(tmp_path_factory):
    """What both processes printed, after both ended well."""
    folder = tmp_path_factory.mktemp("moca")
    paths = os.pathsep.join(map(str, (*PACKAGES, os.environ.get("PYTHONPATH", ""))))
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    running = [
        subprocess.Popen(
            [sys.executable, str(SCRIPT), str(rank), str(folder / "store"), str(folder)],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in (0, 1)
    ]  # fmt: skip
    try:
        ended = [process.communicate(timeout=240) for process in running]
    finally:
        for process in running:
            process.kill()
    for process, (_, errors) in zip(running, ended, strict=True):
        assert process.returncode == 0, errors[-3000:]
    return [out for out, _ in ended]


@pytest.mark.parametrize(
    "case",
    [
        *("data_parallel", "data_parallel_fused", "fully_sharded", "fully_sharded_float32", "fully_sharded_bf16"),
        "sharded_by_itself",
    ],
)
def test_two_processes_train_moca_as_one_does(outputs, case):
    """Text-only batches on one process included; fully_sharded also saves, loads and refuses a late add_moca."""
    for out in outputs:
        assert f"{case} ok" in out.splitlines()
