"""MoCa under DDP, FSDP2 and FSDP1 with two gloo processes: the parameters of single-process training, saved whole."""

import pytest

from integration import moca_fsdp1_processes, moca_processes
from integration.several_processes import outputs_of


@pytest.fixture(scope="module")
def outputs(tmp_path_factory):
    """What both processes printed, after both ended well."""
    return outputs_of("moca_processes.py", tmp_path_factory.mktemp("moca"))


@pytest.mark.parametrize("case", [case.__name__ for case in moca_processes.CASES])
def test_two_processes_train_moca_as_one_does(outputs, case):
    """Text-only batches on one process included; fully_sharded also saves, loads and refuses a late add_moca."""
    for out in outputs:
        assert f"{case} ok" in out


def test_two_processes_of_fsdp1_train_save_and_load_as_one_does(tmp_path):
    """All in one, as processes take seconds to start; a case that fails is in the failure."""
    for out in outputs_of("moca_fsdp1_processes.py", tmp_path):
        assert [line for line in out if line.endswith(" ok")] == [
            f"{c.__name__} ok" for c in moca_fsdp1_processes.CASES
        ]
