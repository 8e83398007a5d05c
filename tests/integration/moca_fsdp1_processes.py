"""One of two gloo processes that train a model with MoCa under FSDP1: python moca_fsdp1_processes.py RANK STORE FOLDER.

FSDP1 stores parameters as slices of flat ones; with use_orig_params=True, modules expose them under their own names.
"""

import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecision, ShardingStrategy
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from integration.calibrated_models import PROBE, calibrated
from integration.moca_processes import LEARNING_RATE, freeze_vision, loss_of, train_distributed, trained
from integration.tiny_models import HIDDEN, LAYERS, tiny_batch, tiny_model
from mir_kernels.ops.moca import MoCa
from modality_integration import add_moca, capture, load_moca, measure_mir, moca_parameters, save_moca
from modality_integration.models.decoder import unwrap
from modality_integration.models.moca import NAME
from tolerances import assert_close


def sharded(model, *groups, strategy="FULL_SHARD", **options):
    """`model` in FSDP1, with a separate shard for each module of the types `groups`."""
    base = freeze_vision(unwrap(model))
    vision = [base.model.vision_tower, base.model.multi_modal_projector]  # frozen, and unused if there is no image
    return FullyShardedDataParallel(
        model,
        auto_wrap_policy=ModuleWrapPolicy(set(groups)) if groups else None,
        ignored_modules=vision,
        device_id=torch.device("cpu"),
        sharding_strategy=ShardingStrategy[strategy],
        **options,
    )


def whole(model):
    """Every full parameter, by its name in the unsharded model."""
    with FullyShardedDataParallel.summon_full_params(model, writeback=False):
        return {n.replace("_fsdp_wrapped_module.", ""): p.detach().clone() for n, p in model.named_parameters()}


def vectors(values):
    """MoCa's parameters among `values`, by their names in MoCa files."""
    return {n.removeprefix("model.language_model."): v for n, v in values.items() if NAME in n}


def saved(model, folder):
    """The tensors written by save_moca, by names as in `vectors`."""
    file = save_moca(model, folder)
    dist.barrier()
    return {name.removeprefix("model."): value for name, value in load_file(file).items()}


def assert_same(values, expected, **tolerance):
    assert set(values) == set(expected)
    for name, value in values.items():
        assert_close(value, expected[name], **tolerance)


def assert_equal(values, expected):
    assert set(values) == set(expected)
    for name, value in values.items():
        assert torch.equal(value, expected[name]), name


def trains_saves_and_loads(rank, folder, *groups, **options):
    """Training equals that of one process; files are complete; loading sets every layer, and training continues."""
    model = sharded(calibrated(), *groups, **options)
    start = vectors(dict(calibrated().named_parameters()))
    assert_equal(saved(model, folder / "start"), start)  # before the first forward pass
    train_distributed(model, rank)
    reference = trained(freeze_vision(calibrated()))
    assert_same(whole(model), reference, factor=100)
    values = saved(model, folder / "trained")
    assert {tuple(value.shape) for value in values.values()} == {(HIDDEN,)}
    assert len(values) == 2 * LAYERS
    assert_same(values, vectors(reference), factor=100)

    with torch.no_grad():
        loss_of(model, 0, rank)  # leaves full parameters behind with some strategies
    load_moca(model, folder / "start")
    assert_equal(vectors(whole(model)), start)
    assert_equal(saved(model, folder / "again"), start)

    expected = freeze_vision(calibrated())
    expected.load_state_dict({**expected.state_dict(), **reference})
    load_moca(expected, folder / "start")
    take_a_step(model, rank)
    take_a_step(expected, 0, 1)
    assert_same(whole(model), dict(expected.named_parameters()), factor=100)


def take_a_step(model, *ranks):
    """One SGD step on the mean loss of the processes `ranks`."""
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
    optimizer.zero_grad()
    (sum(loss_of(model, 0, rank) for rank in ranks) / len(ranks)).backward()
    optimizer.step()


def flat_parameters(rank, folder):
    trains_saves_and_loads(rank, folder, LlamaDecoderLayer, use_orig_params=False)


def original_parameters(rank, folder):
    trains_saves_and_loads(rank, folder, LlamaDecoderLayer, use_orig_params=True)


def flat_parameters_left_whole(rank, folder):
    trains_saves_and_loads(rank, folder, LlamaDecoderLayer, use_orig_params=False, strategy="SHARD_GRAD_OP")


def original_parameters_left_whole(rank, folder):
    trains_saves_and_loads(rank, folder, LlamaDecoderLayer, use_orig_params=True, strategy="SHARD_GRAD_OP")


def moca_a_shard_of_its_own(rank, folder):
    trains_saves_and_loads(rank, folder, LlamaDecoderLayer, MoCa, use_orig_params=False)


def among_what_peft_saves(rank, folder):
    """MoCa inside PEFT's wrapper for fully trained modules, in a layer's shard or in a separate one."""
    import peft

    def adapted(model):
        torch.manual_seed(1)  # the same adapters in every process
        config = peft.LoraConfig(target_modules=r".*language_model.*\.q_proj", r=2, modules_to_save=[NAME])
        return peft.get_peft_model(freeze_vision(model), config)

    reference = adapted(calibrated())
    trained(reference)
    for groups in ((LlamaDecoderLayer,), (LlamaDecoderLayer, MoCa)):
        model = sharded(adapted(calibrated()), *groups, use_orig_params=True)
        train_distributed(model, rank)
        values = saved(model, folder / "trained")
        for i, expected in enumerate(moca_parameters(reference)):
            assert_close(values[f"layers.{i // 2}.{NAME}.{('scale', 'shift')[i % 2]}"], expected, factor=100)
        load_moca(model, save_moca(calibrated(seed=1), folder / "other"))
        assert_equal(saved(model, folder / "again"), vectors(dict(calibrated(seed=1).named_parameters())))


def the_model_inside(rank, folder):
    """Saving and loading before the first pass must not make an inner module FSDP1's root."""
    for kept in (False, True):
        model, other = sharded(calibrated(), LlamaDecoderLayer, use_orig_params=kept), calibrated(seed=1)
        assert_equal(saved(model.module, folder), vectors(dict(calibrated().named_parameters())))
        load_moca(model.module, save_moca(other, folder / "other"))
        assert_equal(saved(model.module, folder), vectors(dict(other.named_parameters())))
        train_distributed(model, rank)
        assert_same(whole(model), trained(freeze_vision(other)), factor=100)


def one_shard(rank, folder):
    """The whole model in one flat parameter, which only its wrapper can gather."""
    trains_saves_and_loads(rank, folder, use_orig_params=True)
    for inner in (sharded(calibrated(), use_orig_params=kept).module for kept in (False, True)):
        for use in (save_moca, load_moca):
            with pytest.raises(ValueError, match=r"pass the outermost \(FSDP\) wrapper"):
                use(inner, folder / "trained")


def moca_stays_float32(rank, folder):
    """float32 MoCa in a bf16 model, which FSDP1 requires in a separate flat parameter; saved in float32."""
    mixed = MixedPrecision(reduce_dtype=torch.float32)
    model = sharded(
        calibrated(dtype=torch.bfloat16), LlamaDecoderLayer, MoCa, use_orig_params=True, mixed_precision=mixed
    )
    train_distributed(model, rank)
    values = saved(model, folder / "float32")
    assert {value.dtype for value in values.values()} == {torch.float32}
    reference = trained(freeze_vision(calibrated(dtype=torch.bfloat16)))
    assert_same(values, vectors(reference), dtype=torch.bfloat16, factor=3)


def gathered_without_an_image(rank, folder):
    """With frozen MoCa, a process without an image still takes part in gathering its shards."""
    for kept in (False, True):
        model, expected = calibrated(), calibrated()
        for parameter in moca_parameters(model):
            parameter.requires_grad_(False)
        model = sharded(model, LlamaDecoderLayer, MoCa, use_orig_params=kept)
        loss_of(model, 1, rank).backward()
        with torch.no_grad():
            assert_close(loss_of(model, 1, rank), loss_of(expected, 1, rank), factor=100)


def roles_and_mir_of_one_process(rank, folder):
    plain = calibrated()
    batch = tiny_batch(plain, "llava", PROBE)
    expected = measure_mir(plain, [batch.inputs])
    for kept in (False, True):
        model = sharded(calibrated(), LlamaDecoderLayer, use_orig_params=kept)
        assert measure_mir(model, [batch.inputs]).value == pytest.approx(expected.value, rel=1e-9)
        with torch.no_grad(), capture(model) as seen:
            model(**batch.inputs)
        assert torch.equal(seen.vision_mask, batch.vision)
        assert torch.equal(seen.text_mask, batch.text_after)


def parameters_are_listed_or_refused(rank, folder):
    listed = moca_parameters(sharded(calibrated(), LlamaDecoderLayer, use_orig_params=True))
    assert len(listed) == 2 * LAYERS
    count = torch.tensor(sum(parameter.numel() for parameter in listed))
    dist.all_reduce(count)
    assert int(count) == 2 * LAYERS * HIDDEN  # each process has its share of them
    with pytest.raises(ValueError, match="use use_orig_params=True"):
        moca_parameters(sharded(calibrated(), LlamaDecoderLayer, use_orig_params=False))


def moca_is_too_late(rank, folder):
    for kept in (False, True):
        model = sharded(tiny_model("llava"), LlamaDecoderLayer, use_orig_params=kept)
        for given in (model, model.module):
            with pytest.raises(ValueError, match=r"already wrapped by FullyShardedDataParallel.*add MoCa first"):
                add_moca(given)


CASES = (
    *(flat_parameters, original_parameters, flat_parameters_left_whole, original_parameters_left_whole),
    *(moca_a_shard_of_its_own, among_what_peft_saves, the_model_inside, one_shard, moca_stays_float32),
    *(gathered_without_an_image, roles_and_mir_of_one_process, parameters_are_listed_or_refused, moca_is_too_late),
)

if __name__ == "__main__":
    rank, store, folder = int(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    for case in CASES:
        case(rank, folder / case.__name__)
        print(f"{case.__name__} ok", flush=True)
    dist.destroy_process_group()
