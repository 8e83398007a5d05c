"""MoCa under DeepSpeed, with and without ZeRO: trains as in one process, is saved whole, and loaded values persist."""

import pytest

from integration.several_processes import outputs_of
from integration.trainers import zero_processes

pytest.importorskip("deepspeed")
pytestmark = pytest.mark.slow


# With three processes, the last one's shard of a vector of 32 ends with padding.
@pytest.mark.parametrize(("stage", "processes"), [(0, 1), (1, 1), (2, 1), (3, 1), (0, 2), (2, 2), (3, 2), (3, 3)])
def test_deepspeed_trains_saves_and_loads_moca(stage, processes, tmp_path):
    outputs = outputs_of("trainers/zero_processes.py", tmp_path, stage, processes, processes=processes, timeout=500)
    for out in outputs:
        assert [line for line in out if line.endswith(" ok")] == [
            f"{case.__name__} ok" for case in zero_processes.cases_of(stage)
        ]
