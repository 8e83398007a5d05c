"""A process that trains with transformers' Trainer and DeepSpeed: python trainer_process.py 0 STORE FOLDER STAGE.

The Trainer creates the engine. MIR is measured during training, used in evaluation, and continued after resuming from
a checkpoint of the engine. accelerate counts one process if DeepSpeed runs on CPUs, so more are not tested.
"""

import sys
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from integration.tiny_models import HIDDEN, LAYERS, tiny_model
from integration.tiny_trainers import probe_of, trainer_of
from integration.trainers import deepspeed_process
from modality_integration import MIRCallback, add_moca, load_moca, measure_mir, moca_parameters, save_moca

STEPS, MORE = 3, 2


def trainer(folder, stage, steps, **changes):
    model = tiny_model("llava", dtype=torch.float32)
    add_moca(model)
    config = {
        "zero_optimization": {"stage": stage},
        "train_micro_batch_size_per_gpu": 2,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}},
        "zero_force_ds_cpu_optimizer": False,
    }
    return trainer_of(
        folder, model=model, steps=steps, deepspeed=config, use_cpu=False, lr_scheduler_type="constant", **changes
    )  # fmt: skip


def main(folder, stage):
    first = trainer(
        folder, stage, STEPS, save_strategy="steps", save_steps=STEPS, evaluated=True, eval_strategy="steps",
        eval_steps=1, metric_for_best_model="mir", greater_is_better=False,
    )  # fmt: skip
    probe = probe_of(first)
    before = measure_mir(first.model, probe, metric={"groups": 0}).value
    callback = MIRCallback(probe, every=1).attach(first)
    first.train()
    assert first.is_deepspeed_enabled
    values = [result.value for _, result in callback.history]
    assert values[0] == pytest.approx(before, rel=1e-6)
    assert len(set(values)) == STEPS + 1, "nothing was trained"
    assert first.state.best_metric == min(values[1:])

    written = load_file(save_moca(first.model, folder / "moca.safetensors"))
    assert {tuple(vector.shape) for vector in written.values()} == {(HIDDEN,)}
    assert len(written) == 2 * LAYERS
    plain = tiny_model("llava", dtype=torch.float32)
    load_moca(plain, folder / "moca.safetensors")
    assert all((scale != 1).all() for scale in moca_parameters(plain)[::2])

    resumed = trainer(folder / "rest", stage, STEPS + MORE)
    again = MIRCallback(probe, every=1).attach(resumed)
    with warnings.catch_warnings():  # DeepSpeed loads its own checkpoints completely
        warnings.filterwarnings("error", message="MIR")
        resumed.train(resume_from_checkpoint=str(folder / f"checkpoint-{STEPS}"))
    assert [step for step, _ in again.history][-MORE:] == [STEPS + 1, STEPS + 2]
    assert again.history[-1][1].value != values[-1]


if __name__ == "__main__":
    store, folder, stage = sys.argv[2], Path(sys.argv[3]), int(sys.argv[4])
    deepspeed_process.begin(0, store, 1)  # before the Trainer detects its environment
    main(folder, stage)
    print("trained, chosen, saved and resumed", flush=True)
    dist.destroy_process_group()
