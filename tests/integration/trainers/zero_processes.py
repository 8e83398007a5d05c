"""One of the processes that train a model with MoCa with DeepSpeed: zero_processes.py RANK STORE FOLDER STAGE COUNT.

Every case creates an engine with ZeRO's STAGE (0: without ZeRO), trains it with plain SGD, and compares it with
training in one process without DeepSpeed.
"""

import contextlib
import importlib
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import transformers
from safetensors.torch import load_file
from transformers.integrations import HfDeepSpeedConfig

from integration.calibrated_models import PROBE, calibrated
from integration.moca_processes import LEARNING_RATE, freeze_vision, loss_of
from integration.tiny_models import HIDDEN, LAYERS, tiny_batch, tiny_model
from integration.trainers import deepspeed_process
from modality_integration import add_moca, capture, load_moca, measure_mir, moca_parameters, save_moca
from modality_integration.models.moca import NAME, calibrated_layers, moca_of
from tolerances import assert_close


class Run:
    """The rank of this process, the number of processes, and the settings to train with."""

    def __init__(self, rank, folder, stage, processes, **zero):
        self.rank, self.folder, self.stage, self.processes = rank, folder, stage, processes
        self.zero = {"stage": stage, **zero}
        # In step 1 the second process has no image; ZeRO-3 needs all processes to gather the vision tower's weights.
        self.steps = (0, 2, 3) if stage == 3 else (0, 1, 2)

    def engine(self, model, learning_rate=LEARNING_RATE, around=None, **config):
        """An engine that trains the model, or the module that `around` builds from it."""
        model = freeze_vision(model) if around is None else around(freeze_vision(model))
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.SGD(trained, lr=learning_rate)
        options = {
            "train_micro_batch_size_per_gpu": 1,
            "zero_optimization": self.zero,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "gradient_clipping": 0.0,
        }
        return deepspeed.initialize(model=model, optimizer=optimizer, config={**options, **config})[0]

    def train(self, engine, steps):
        for step in steps:
            engine.backward(loss_of(engine, step, self.rank))
            engine.step()

    def train_reference(self, model, steps):
        """Trains in this process alone, on the mean of all processes' losses."""
        optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
        for step in steps:
            optimizer.zero_grad()
            (sum(loss_of(model, step, rank) for rank in range(self.processes)) / self.processes).backward()
            optimizer.step()

    def saved(self, model, name):
        """The vectors that save_moca writes, in the order of the layers."""
        values = load_file(save_moca(model, self.folder / name))
        dist.barrier()
        return [values[f"model.layers.{i}.{NAME}.{part}"] for i in range(LAYERS) for part in ("scale", "shift")]


def gathered(engine):
    """MoCa's parameters as this process uses them in a forward pass."""
    found = [p for layer in calibrated_layers(engine) for p in moca_of(layer).parameters()]
    with deepspeed.zero.GatheredParameters(found):  # no effect below stage 3
        return [parameter.detach().clone() for parameter in found]


def assert_all_close(values, expected, **tolerance):
    for value, wanted in zip(values, expected, strict=True):
        assert_close(value, wanted, **tolerance)


def assert_all_equal(values, expected):
    for value, wanted in zip(values, expected, strict=True):
        assert torch.equal(value, wanted)


def trains_and_saves_as_one_process_does(run):
    reference = freeze_vision(calibrated(dtype=torch.float32))
    start = [parameter.detach().clone() for parameter in moca_parameters(reference)]
    engine = run.engine(calibrated(dtype=torch.float32))
    assert_all_equal(run.saved(engine, "start"), start)
    run.train(engine, run.steps)
    run.train_reference(reference, run.steps)
    values = run.saved(engine, "trained")
    assert [value.shape for value in values] == [(HIDDEN,)] * 2 * LAYERS
    assert_all_close(values, moca_parameters(reference), factor=30)
    assert all(not torch.equal(value, before) for value, before in zip(values, start, strict=True))
    assert_all_equal(run.saved(engine.module, "module"), values)
    assert_all_equal(gathered(engine), values)  # in every process


def loads_what_the_next_steps_go_on_from(run):
    engine = run.engine(calibrated(dtype=torch.float32))
    run.train(engine, run.steps[:1])
    for seed, target in enumerate((engine, engine.module), 1):
        other = calibrated(dtype=torch.float32, seed=seed)
        load_moca(target, save_moca(other, run.folder / f"other{seed}"))
        assert_all_equal(gathered(engine), moca_parameters(other))
        assert_all_equal(run.saved(engine, "again"), moca_parameters(other))
    reference = freeze_vision(calibrated(dtype=torch.float32))
    run.train_reference(reference, run.steps[:1])
    load_moca(reference, run.folder / "other2")
    for _ in range(2):
        run.train(engine, run.steps[1:])
        run.train_reference(reference, run.steps[1:])
    assert_all_close(run.saved(engine, "again"), moca_parameters(reference), factor=100)


def keeps_the_float32_values_of_a_bf16_model(run):
    """DeepSpeed casts the whole model to bf16 and trains float32 copies, which are saved and loaded."""
    engine = run.engine(calibrated(dtype=torch.float32), learning_rate=0.0, bf16={"enabled": True})
    other = calibrated(dtype=torch.float32, seed=1)
    file = save_moca(other, run.folder / "other")
    load_moca(engine, file)
    for _ in range(2):
        assert_all_equal(gathered(engine), [p.to(torch.bfloat16) for p in moca_parameters(other)])
        values = run.saved(engine, "again")
        assert {value.dtype for value in values} == {torch.float32}
        assert_all_equal(values, moca_parameters(other))
        run.train(engine, run.steps)  # with a learning rate of 0, the optimizer only writes its copies back


def copies_of_an_engine_around_the_model(run):
    """The engine holds a module that contains the model; its float32 copies are found from the model alone."""

    class WithLoss(torch.nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

    inner, other = calibrated(dtype=torch.float32), calibrated(dtype=torch.float32, seed=1)
    run.engine(inner, learning_rate=0.0, around=WithLoss, bf16={"enabled": True})
    load_moca(inner, save_moca(other, run.folder / "other"))
    assert_all_equal(run.saved(inner, "again"), moca_parameters(other))
    bare = tiny_model("llava", dtype=torch.float32)
    run.engine(bare, around=WithLoss, bf16={"enabled": True})
    with pytest.raises(ValueError, match="already in a DeepSpeed engine"):
        add_moca(bare)


def float32_copies_that_are_flat(run):
    """If DeepSpeed considers the optimizer fused, it keeps the copies in one flat tensor."""
    engines = importlib.import_module("deepspeed.runtime.engine")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engines, "FusedAdam", torch.optim.SGD)
        keeps_the_float32_values_of_a_bf16_model(run)


def small_parameters_gathered_each_time(run):
    """By default, ZeRO-3 keeps parameters as small as MoCa's gathered after the first time."""
    changed = Run(run.rank, run.folder, run.stage, run.processes, stage3_param_persistence_threshold=0)
    trains_and_saves_as_one_process_does(changed)
    loads_what_the_next_steps_go_on_from(changed)


def loaded_in_parts(run):
    """As transformers loads a model for ZeRO-3: no process ever holds it whole. MoCa is added whole or sharded."""
    reference = freeze_vision(calibrated(dtype=torch.float32))
    start = [parameter.detach().clone() for parameter in moca_parameters(reference)]
    run.train_reference(reference, run.steps)
    if run.rank == 0:
        tiny_model("llava", dtype=torch.float32).save_pretrained(run.folder / "base")
    dist.barrier()
    config = {"zero_optimization": run.zero, "train_micro_batch_size_per_gpu": 1}
    in_force = HfDeepSpeedConfig(config)  # as long as it is alive
    for way in (contextlib.nullcontext(), deepspeed.zero.Init(config_dict_or_path=config)):
        model = transformers.LlavaForConditionalGeneration.from_pretrained(run.folder / "base", dtype=torch.float32)
        assert all(parameter.numel() == 0 for parameter in model.parameters())
        torch.manual_seed(0)
        with way:
            add_moca(model.eval(), std=0.3)
        assert_all_equal(run.saved(model, "start"), start)
        engine = run.engine(model)
        run.train(engine, run.steps)
        assert_all_close(run.saved(engine, "trained"), moca_parameters(reference), factor=30)
        load_moca(engine, run.folder / "start")
        assert_all_equal(gathered(engine), start)
        without = transformers.LlavaForConditionalGeneration.from_pretrained(run.folder / "base", dtype=torch.float32)
        load_moca(without, run.folder / "start")
        assert_all_equal(run.saved(run.engine(without), "again"), start)
    del in_force


def offloaded(run):
    """Parameters (ZeRO-3) and the optimizer's copies are offloaded to separate CPU memory."""
    places = ("offload_optimizer", "offload_param") if run.stage == 3 else ("offload_optimizer",)
    changed = Run(run.rank, run.folder, run.stage, run.processes, **{place: {"device": "cpu"} for place in places})
    trains_and_saves_as_one_process_does(changed)
    loads_what_the_next_steps_go_on_from(changed)
    keeps_the_float32_values_of_a_bf16_model(changed)


def moca_that_is_not_trained(run):
    model, other = calibrated(dtype=torch.float32), calibrated(dtype=torch.float32, seed=1)
    for parameter in moca_parameters(model):
        parameter.requires_grad_(False)
    engine = run.engine(model)
    load_moca(engine, save_moca(other, run.folder / "other"))
    run.train(engine, run.steps)
    assert_all_equal(gathered(engine), moca_parameters(other))
    assert_all_equal(run.saved(engine, "again"), moca_parameters(other))


def has_the_roles_and_mir_of_one_process(run):
    plain = calibrated(dtype=torch.float32)
    batch = tiny_batch(plain, "llava", PROBE)
    expected = measure_mir(plain, [batch.inputs])
    engine = run.engine(calibrated(dtype=torch.float32))
    for given in (engine, engine.module):
        assert measure_mir(given, [batch.inputs]).value == pytest.approx(expected.value, rel=1e-5)
    with torch.no_grad(), capture(engine) as seen:
        engine(**batch.inputs)
    assert torch.equal(seen.vision_mask, batch.vision)
    assert torch.equal(seen.text_mask, batch.text_after)


def refuses_moca_that_comes_too_late(run):
    engine = run.engine(tiny_model("llava", dtype=torch.float32))
    for given in (engine, engine.module):
        with pytest.raises(ValueError, match=r"already in a DeepSpeed engine.*add MoCa before deepspeed.init"):
            add_moca(given)


def cases_of(stage):
    """The cases of a stage, in order."""
    return (
        *(trains_and_saves_as_one_process_does, loads_what_the_next_steps_go_on_from),
        *(keeps_the_float32_values_of_a_bf16_model, moca_that_is_not_trained),
        *(has_the_roles_and_mir_of_one_process, refuses_moca_that_comes_too_late),
        copies_of_an_engine_around_the_model,
        *((float32_copies_that_are_flat,) if stage == 0 else ()),
        *((offloaded,) if stage > 1 else ()),
        *((small_parameters_gathered_each_time, loaded_in_parts) if stage == 3 else ()),
    )


if __name__ == "__main__":
    rank, store, folder, stage, processes = int(sys.argv[1]), sys.argv[2], Path(sys.argv[3]), *map(int, sys.argv[4:])
    deepspeed = deepspeed_process.begin(rank, store, processes)
    for case in cases_of(stage):
        case(Run(rank, folder / case.__name__, stage, processes))
        print(f"{case.__name__} ok", flush=True)
    dist.destroy_process_group()
