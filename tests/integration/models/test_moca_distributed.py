"""MoCa under DDP, FSDP2 and FSDP1 with two gloo processes: trains as in a single process, and is saved whole."""

import pytest

from integration import moca_fsdp1_processes, moca_processes
from integration.several_processes import outputs_of


@pytest.fixture(scope="module")
def outputs(tmp_path_factory):
    """The output of both processes, after both succeeded."""
    return outputs_of("moca_processes.py", tmp_path_factory.mktemp("moca"))


@pytest.mark.parametrize("case", [case.__name__ for case in moca_processes.CASES])
def test_two_processes_train_moca_as_one_does(outputs, case):
    """Includes text-only batches on one process; fully_sharded also saves, loads and rejects a late add_moca."""
    for out in outputs:
        assert f"{case} ok" in out


def test_two_processes_of_fsdp1_train_save_and_load_as_one_does(tmp_path):
    """All cases in one test, because processes take seconds to start; a failure names its case."""
    for out in outputs_of("moca_fsdp1_processes.py", tmp_path):
        assert [line for line in out if line.endswith(" ok")] == [
            f"{c.__name__} ok" for c in moca_fsdp1_processes.CASES
        ]
