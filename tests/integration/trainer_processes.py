"""One of two gloo processes of transformers' Trainer with DDP: python trainer_processes.py RANK STORE FOLDER.

Their probes differ, so if they agree on a value, it must be that of the first process.
"""

import logging
import os
import sys
import warnings
from pathlib import Path

import torch
import torch.distributed as dist

from integration.tiny_models import tiny_model
from integration.tiny_trainers import probe_of, trainer_of
from modality_integration import MIRCallback, add_moca

STEPS = 3


def trainer(folder, steps, **changes):
    model = tiny_model("llava", dtype=torch.float32)
    add_moca(model)
    return trainer_of(folder, model=model, steps=steps, ddp_backend="gloo", lr_scheduler_type="constant", **changes)


def main(rank, folder):
    first = trainer(
        folder, STEPS, save_strategy="steps", save_steps=STEPS, evaluated=True, eval_strategy="steps", eval_steps=1,
        metric_for_best_model="mir", greater_is_better=False,
    )  # fmt: skip
    assert first.args.world_size == 2
    probe = probe_of(first)[: 3 - rank]
    callback = MIRCallback(probe, every=1).attach(first)
    first.train()
    values = torch.tensor([result.value for _, result in callback.history], dtype=torch.float64)
    of_the_first = values.clone()
    dist.broadcast(of_the_first, src=0)
    assert torch.equal(values, of_the_first) == (rank == 0)
    assert first.state.best_metric == of_the_first[1:].min().item()

    resumed = trainer(folder / "rest", STEPS + 1)
    MIRCallback(probe, every=1).attach(resumed)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        resumed.train(resume_from_checkpoint=str(folder / f"checkpoint-{STEPS}"))
    assert sum("the resumed training has a MIR" in str(warning.message) for warning in told) == (rank == 0)


if __name__ == "__main__":
    rank, store, folder = int(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
    # accelerate requires these, but opens no connection if the process group already exists.
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", ACCELERATE_USE_CPU="true")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    logging.disable(logging.WARNING)
    main(rank, folder)
    print("chosen and resumed by the first one's values", flush=True)
    dist.destroy_process_group()
