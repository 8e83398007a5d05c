"""One of two gloo processes that train a model with MoCa: python moca_processes.py RANK STORE FOLDER."""

import copy
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from integration.calibrated_models import calibrated
from integration.tiny_models import tiny_batch, tiny_model
from modality_integration.models.moca import NAME, add_moca, moca_parameters
from modality_integration.models.moca_files import load_moca, save_moca
from tolerances import assert_close

STEPS = 3
LEARNING_RATE = 0.5


def loss_of(model, step, rank):
    """The loss; in step 1 the second process has no image."""
    row = "ttttt" if (step, rank) == (1, 1) else ("ttittt", "tittit")[rank % 2]
    batch = tiny_batch(_plain(model), "llava", [row], seed=2 * step + rank)
    logits = model(**batch.inputs, use_cache=False).logits
    return logits.double().logsumexp(-1).square().mean()


def trained(model):
    """Reference: parameters after SGD on the mean of both processes' losses, computed in this process."""
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
    for step in range(STEPS):
        optimizer.zero_grad()
        (sum(loss_of(model, step, rank) for rank in (0, 1)) / 2).backward()
        optimizer.step()
    return {name: p.detach() for name, p in model.named_parameters()}


def train_distributed(model, rank):
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
    for step in range(STEPS):
        optimizer.zero_grad()
        loss_of(model, step, rank).backward()
        optimizer.step()


def check(model, reference, *, moca_only=False, **tolerance):
    compared = 0
    for name, parameter in model.named_parameters():
        if moca_only and NAME not in name:
            continue
        value = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
        assert_close(value, reference[name.removeprefix("module.")], **tolerance)
        compared += NAME in name
    assert compared == len(moca_parameters(model))


def data_parallel(rank, folder):
    model = nn.parallel.DistributedDataParallel(freeze_vision(calibrated()))
    train_distributed(model, rank)
    check(model, trained(freeze_vision(calibrated())), factor=100)


def data_parallel_fused(rank, folder):
    """float32, where MoCa is fused with the surrounding additions and norms; in step 1, rank 1 has no image."""
    model = nn.parallel.DistributedDataParallel(freeze_vision(calibrated(dtype=torch.float32)))
    train_distributed(model, rank)
    plain = freeze_vision(tiny_model("llava", dtype=torch.float32))
    torch.manual_seed(0)
    add_moca(plain, std=0.3, fused=False)
    check(model, trained(plain), factor=30)


def fully_sharded_float32(rank, folder):
    """Like data_parallel_fused, but norm weights are still sharded while the previous layer runs."""
    model = freeze_vision(calibrated(dtype=torch.float32))
    for layer in model.model.language_model.layers:
        fully_shard(layer)
    fully_shard(model)
    train_distributed(model, rank)
    check(model, trained(freeze_vision(calibrated(dtype=torch.float32))), factor=30)
    with torch.no_grad():
        loss_of(model, 0, rank)


def fully_sharded(rank, folder):
    model = freeze_vision(calibrated())
    for layer in model.model.language_model.layers:
        fully_shard(layer)
    fully_shard(model)
    train_distributed(model, rank)
    reference = trained(freeze_vision(calibrated()))
    check(model, reference, factor=100)
    file = save_moca(model, folder)
    dist.barrier()
    fresh = tiny_model("llava")
    load_moca(fresh, file)
    check(fresh, {n: reference[n] for n, _ in fresh.named_parameters() if NAME in n}, moca_only=True, factor=100)
    with torch.no_grad():
        for parameter in moca_parameters(model):
            parameter.zero_()
    load_moca(model, file)
    check(model, reference, factor=100)
    with pytest.raises(ValueError, match="add MoCa first"):
        add_moca(sharded_without_moca())


def fully_sharded_bf16(rank, folder):
    """float32 MoCa in a bf16 model, in a separate shard group."""
    model = freeze_vision(calibrated(dtype=torch.bfloat16))
    for layer in model.model.language_model.layers:
        fully_shard(layer.get_submodule(NAME), mp_policy=MixedPrecisionPolicy(reduce_dtype=torch.float32))
        fully_shard(layer)
    fully_shard(model)
    train_distributed(model, rank)
    assert {p.dtype for p in moca_parameters(model)} == {torch.float32}
    check(
        model, trained(freeze_vision(calibrated(dtype=torch.bfloat16))), moca_only=True, dtype=torch.bfloat16, factor=3
    )


def sharded_by_itself(rank, folder):
    """With frozen MoCa, a process without an image still takes part in gathering its shards."""
    model = freeze_vision(calibrated(dtype=torch.bfloat16))
    for parameter in moca_parameters(model):
        parameter.requires_grad_(False)
    expected = copy.deepcopy(model)
    for layer in model.model.language_model.layers:
        fully_shard(layer.get_submodule(NAME))
        fully_shard(layer)
    fully_shard(model)
    loss_of(model, 1, rank).backward()
    with torch.no_grad():
        assert_close(loss_of(model, 1, rank), loss_of(expected, 1, rank), dtype=torch.bfloat16)


def freeze_vision(model):
    """Freeze the vision tower, which a text-only batch gives no gradient: DDP's handling of that is not tested here."""
    model.model.vision_tower.requires_grad_(False)
    model.model.multi_modal_projector.requires_grad_(False)
    return model


def sharded_without_moca():
    model = tiny_model("llava")
    fully_shard(model)
    return model


def _plain(model):
    return model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model


CASES = (
    *(data_parallel, data_parallel_fused, fully_sharded, fully_sharded_float32, fully_sharded_bf16),
    sharded_by_itself,
)

if __name__ == "__main__":
    rank, store, folder = int(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    for case in CASES:
        case(rank, folder)
        print(f"{case.__name__} ok", flush=True)
    dist.destroy_process_group()
