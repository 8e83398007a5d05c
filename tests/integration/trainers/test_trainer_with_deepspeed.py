"""MIRCallback and MoCa in transformers' Trainer with DeepSpeed."""

import pytest

from integration.several_processes import outputs_of

pytest.importorskip("deepspeed")
pytestmark = pytest.mark.slow


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_mir_is_measured_chosen_by_and_resumed(stage, tmp_path):
    (output,) = outputs_of("trainers/trainer_process.py", tmp_path, stage, processes=1)
    assert "trained, chosen, saved and resumed" in output
