"""`MIRCallback` in transformers' Trainer: logged values, early stopping, and no side effects on training."""

import contextlib
import importlib.util
import math
import random
import sys
import types
import warnings

import numpy as np
import pytest
import torch

from integration.tiny_models import LAYERS, tiny_batch, tiny_model
from integration.tiny_trainers import ROWS, probe_of, trainer_of
from modality_integration import (
    LayerTerms,
    MIRCallback,
    MIRResult,
    capture,
    jackknife,
    lightning_callback,
    measure_mir,
    mir,
)


def mir_by_hand(model, probe):
    vision, text = [[] for _ in range(LAYERS)], [[] for _ in range(LAYERS)]
    with torch.no_grad(), capture(model) as seen:
        for batch in probe:
            model(**batch)
            for k, state in enumerate(seen.hidden_states):
                vision[k].append(state[seen.vision_mask].clone())
                text[k].append(state[seen.text_mask].clone())
    return mir([torch.cat(v) for v in vision], [torch.cat(t) for t in text])


def test_training_with_the_callback_gives_the_same_bits_as_without(tmp_path):
    plain = trainer_of(tmp_path)  # seeds the random states
    plain.train()
    probed = trainer_of(tmp_path)
    callback = MIRCallback(probe_of(probed), every=1, patience=50).attach(probed)
    probed.train()
    assert len(callback.history) == 7
    assert callback.history[-1][1].error > 0
    weights = probed.model.state_dict()
    for name, value in plain.model.state_dict().items():
        assert torch.equal(value, weights[name]), name
    losses = [[entry["loss"] for entry in t.state.log_history if "loss" in entry] for t in (plain, probed)]
    assert losses[0] == losses[1]


def test_mir_and_every_layer_are_logged_through_the_trainer(tmp_path):
    trainer = trainer_of(tmp_path, steps=5)
    probe = probe_of(trainer)
    callback = MIRCallback(probe, every=2).attach(trainer)
    before = mir_by_hand(trainer.model, probe)
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "mir" in entry]
    assert [entry["step"] for entry in logged] == [0, 2, 4]
    assert [step for step, _ in callback.history] == [0, 2, 4]
    assert logged[0]["mir"] == pytest.approx(before.value, rel=1e-6)
    for entry, (_, result) in zip(logged, callback.history, strict=True):
        assert entry["mir"] == result.value
        assert [entry[f"mir/layer_{k:02}"] for k in range(1, LAYERS + 1)] == list(result.per_layer)
        assert entry["mir_seconds"] > 0
        assert "mir_error" not in entry
    assert logged[1]["mir"] != logged[0]["mir"]


def test_stops_on_a_plateau_and_not_before(tmp_path):
    still = trainer_of(tmp_path, learning_rate=0.0, steps=20)
    flat = MIRCallback(probe_of(still), every=2, patience=3).attach(still)
    still.train()
    assert [step for step, _ in flat.history] == [0, 2, 4, 6]  # the start and three unchanged measurements
    assert still.state.global_step == 6
    moving = trainer_of(tmp_path, learning_rate=1e-2, steps=8)
    callback = MIRCallback(probe_of(moving, range(10)), every=2, patience=3).attach(moving)
    moving.train()
    assert moving.state.global_step == 8
    assert not callback.plateau()


def test_stops_once_mir_has_moved_and_its_changes_are_within_their_error(tmp_path):
    free = trainer_of(tmp_path, learning_rate=1e-3, steps=16)
    watching = MIRCallback(probe_of(free, range(10)), every=1, metric={"groups": 5}).attach(free)
    free.train()
    logged = [(entry["mir"], entry["mir_error"]) for entry in free.state.log_history if "mir" in entry]
    assert logged == [(result.value, result.error) for _, result in watching.history]
    flat = []
    for end in range(2, 17):
        window = sorted((result for _, result in watching.history[end - 2 : end + 1]), key=float)
        changes = [y - x for x, y in zip(window[0].left_out_values, window[-1].left_out_values, strict=True)]
        flat.append(window[-1].value - window[0].value < 2 * jackknife(changes))
    assert flat.index(True) > 0, "this run is flat from the start, or never: choose one that first changes"

    stopped = trainer_of(tmp_path, learning_rate=1e-3, steps=16)
    callback = MIRCallback(probe_of(stopped, range(10)), every=1, patience=2).attach(stopped)
    stopped.train()
    assert stopped.state.global_step == 2 + flat.index(True)
    assert len({result.value for _, result in callback.history[-3:]}) == 3  # flat, but not equal
    assert [r.to_json() for _, r in callback.history] == [
        r.to_json() for _, r in watching.history[: len(callback.history)]
    ]


def test_a_slow_but_steady_change_is_no_plateau_though_each_value_is_uncertain():
    callback = MIRCallback([{"input_ids": torch.zeros(1)}], patience=5)
    for step in range(12):
        callback.history.append((step, drifting(0.0, 0.01 * step)))
        values = [float(result) for _, result in callback.history[-6:]]
        assert not callback.plateau()
    assert max(values) - min(values) < 0.5 * callback.history[-1][1].error  # no single value is significant
    for step in range(5):
        callback.history.append((12 + step, drifting(0.002 * step, 0.11)))  # from here on, the groups disagree
    assert callback.plateau()


def drifting(apart, down):
    """A result with 6 groups and a standard error of 0.1; half of the groups move up and half down by `apart`."""
    made = MIRResult([LayerTerms(10.0 ** (1 - 0.4 * down), 0.0, 0.0, 0.0)], [1.0], *({"vision": [9], "text": [9]},) * 2)
    moved = [(-1) ** g * 0.1 / math.sqrt(5) + (-1) ** g * apart for g in range(6)]
    made.left_out = [[made.per_layer[0] * 10**each for each in moved]]
    return made


def test_too_few_rows_for_the_groups_are_told_once_where_they_decide(tmp_path):
    for rows, said in (
        ((5,), "rows for only 2 of 5 groups of samples; use"),
        ((), "rows for only 0 of 5 .* only min_delta detects"),
    ):
        trainer = trainer_of(tmp_path, steps=2)
        probe = probe_of(trainer, rows) or [tiny_batch(trainer.model, "llava", ROWS[:1]).inputs]
        MIRCallback(probe, every=1, patience=2).attach(trainer)
        with pytest.warns(UserWarning, match=f"MIR: the probe has {said}") as told:
            trainer.train()
        assert sum("the probe has" in str(warning.message) for warning in told) == 1


def test_min_delta_says_what_flat_is_where_it_is_more_than_the_error(tmp_path):
    trainer = trainer_of(tmp_path, learning_rate=1e-2, steps=8)
    callback = MIRCallback(probe_of(trainer), every=1, patience=2, min_delta=10.0).attach(trainer)
    trainer.train()
    assert trainer.state.global_step == 2
    values = [result.value for _, result in callback.history]
    assert 0 < max(values) - min(values) <= 10.0


def test_random_states_and_each_modules_mode_are_restored(tmp_path):
    trainer = trainer_of(tmp_path, steps=1)
    probe = probe_of(trainer)
    callback = MIRCallback(probe, every=1).attach(trainer)
    model = trainer.model.train()
    model(**probe[0])  # in the first pass, transformers adds hooks to the vision tower
    model.model.vision_tower.eval()  # as for a frozen tower
    modes = {name: module.training for name, module in model.named_modules()}
    seen = []

    def disturb(module, args):
        assert not module.training
        seen.append((random.random(), np.random.rand(), torch.rand(())))  # noqa: NPY002

    handle = model.lm_head.register_forward_pre_hook(disturb)
    states = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()  # noqa: NPY002
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    callback.on_train_begin(trainer.args, trainer.state, trainer.control, model=model)
    assert len(seen) == len(probe)
    assert random.getstate() == states[0]
    assert np.array_equal(np.random.get_state()[1], states[1])  # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), states[2])
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()) == hooks
    assert not any(p.grad is not None for p in model.parameters())
    handle.remove()


def test_options_reach_capture_and_metric(tmp_path):
    trainer = trainer_of(tmp_path, steps=1)
    probe = probe_of(trainer)
    callback = MIRCallback(probe, every=1, capture={"last": "raw"}, metric={"normalize": False}).attach(trainer)
    trainer.train()
    plain = MIRCallback(probe, every=1)
    plain.attach(trainer_of(tmp_path, steps=1))._trainer.train()
    ours, default = callback.history[0][1], plain.history[0][1]
    assert list(ours.alpha) == [1.0] * LAYERS
    assert list(default.alpha) != [1.0] * LAYERS
    assert ours.per_layer[-1] != default.per_layer[-1]


def test_a_probe_row_without_an_image_is_named(tmp_path):
    trainer = trainer_of(tmp_path, steps=1)
    MIRCallback([tiny_batch(trainer.model, "llava", ["titt", "tttt"]).inputs]).attach(trainer)
    with pytest.raises(ValueError, match="no vision token in row 1"):
        trainer.train()


def test_wrong_arguments_are_named_and_a_missing_trainer_too(tmp_path):
    trainer = trainer_of(tmp_path, steps=1)
    probe = probe_of(trainer)
    for options in ({"every": 0}, {"patience": 0}, {"min_delta": -1.0}):
        with pytest.raises(ValueError, match=f"{next(iter(options))}: expected"):
            MIRCallback(probe, **options)
    with pytest.raises(ValueError, match=r"name: expected letters, digits and underscores, .* got 'my mir'"):
        MIRCallback(probe, name="my mir")
    for option in ("every", "patience"):
        for wrong in (0, 1.5, True, "5"):
            with pytest.raises(ValueError, match=f"{option}: expected a whole number >= 1, got {wrong!r}"):
                MIRCallback(probe, **{option: wrong})
    for wrong in ([], probe[0], iter(probe), [probe[0], 3], "probe"):
        with pytest.raises((TypeError, ValueError), match=r"probe(\[1\])?: expected a"):
            MIRCallback(wrong)
    trainer.add_callback(MIRCallback(probe))
    with pytest.raises(RuntimeError, match=r"\.attach\(trainer\)"):
        trainer.train()


def test_the_probe_spares_the_cache_and_the_logits_that_nobody_reads_and_the_loss(tmp_path):
    model = tiny_model("llava", dtype=torch.float32)
    probe = [tiny_batch(model, "llava", ROWS, seed=seed).inputs for seed in range(4)]
    outputs = []
    handle = model.register_forward_hook(lambda module, args, output: outputs.append(output))
    result = measure_mir(model, [{**batch, "labels": batch["input_ids"]} for batch in probe])
    handle.remove()
    assert [tuple(output.logits.shape[:2]) for output in outputs] == [(2, 1)] * 4
    assert not any(output.past_key_values for output in outputs)
    assert all(output.loss is None for output in outputs)
    assert result.value == pytest.approx(mir_by_hand(model, probe).value, rel=1e-9)
    assert result.error > 0


def test_a_probes_batches_are_dealt_into_groups_one_after_the_other_in_a_random_order():
    model = tiny_model("llava", dtype=torch.float32)
    probe = [tiny_batch(model, "llava", ROWS, seed=seed).inputs for seed in range(4)]
    result = measure_mir(model, probe, metric={"groups": 4})
    order = random.Random("order of the probe").sample(range(4), 4)
    assert order != sorted(order)
    rest = [mir_by_hand(model, [batch for i, batch in enumerate(probe) if i != left]) for left in order]
    for k, distances in enumerate(result.left_out):
        assert distances == pytest.approx([other.per_layer[k] for other in rest], rel=1e-6)


def test_a_probe_that_fails_leaves_the_model_as_it_was():
    model = tiny_model("llava", dtype=torch.float32).train()
    model.model.vision_tower.eval()
    modes = {name: module.training for name, module in model.named_modules()}
    states = torch.get_rng_state()
    with pytest.raises(ValueError, match="no vision token in row 1"):
        measure_mir(model, [tiny_batch(model, "llava", ["titt", "tttt"]).inputs])
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert torch.equal(torch.get_rng_state(), states)


@pytest.fixture
def lightning(monkeypatch):
    """A stand-in for `lightning.pytorch` if it is not installed, with the parts that the callback needs."""
    if importlib.util.find_spec("lightning") is not None:
        return
    module = types.ModuleType("lightning.pytorch")
    module.Callback = type("Callback", (), {})
    monkeypatch.setitem(sys.modules, "lightning", types.ModuleType("lightning"))
    monkeypatch.setitem(sys.modules, "lightning.pytorch", module)


class LightningTrainer:
    """The parts of Lightning's Trainer that a callback uses, with two batches per step."""

    def __init__(self, callback, module, steps, start=0):
        self.global_step, self.should_stop, self.logged = start, False, []
        self.loggers = [types.SimpleNamespace(log_metrics=lambda values, step: self.logged.append((step, values)))]
        self.precision_plugin = types.SimpleNamespace(forward_context=contextlib.nullcontext)
        callback.on_train_start(self, module)
        for batch in range(2 * start, 2 * steps):
            self.global_step = (batch + 1) // 2
            callback.on_train_batch_end(self, module, None, None, batch)
            if self.should_stop:
                break


def test_lightning_logs_the_same_and_stops_on_a_plateau(lightning, tmp_path):
    model = tiny_model("llava", dtype=torch.float32)
    probe = [tiny_batch(model, "llava", ROWS, seed=seed).inputs for seed in range(3)]
    module = types.SimpleNamespace(network=model, device=torch.device("cpu"))
    callback = lightning_callback(probe, module="network", every=2, patience=2)
    trainer = LightningTrainer(callback, module, steps=20)
    assert trainer.global_step == 4
    assert [step for step, _ in trainer.logged] == [0, 2, 4]
    assert trainer.logged[0][1]["mir"] == pytest.approx(mir_by_hand(model, probe).value, rel=1e-6)
    assert {f"mir/layer_{k:02}" for k in range(1, LAYERS + 1)} | {"mir_error", "mir_seconds"} < set(
        trainer.logged[0][1]
    )

    again = lightning_callback(probe, module="network", every=2, patience=3)
    again.load_state_dict(callback.state_dict())
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="MIR")
        trainer = LightningTrainer(again, module, steps=20, start=4)
    assert [step for step, _ in trainer.logged] == [6]  # step 4 is not logged again; one more measurement suffices


def test_lightning_tells_of_weights_that_did_not_come_back(lightning, tmp_path):
    model = tiny_model("llava", dtype=torch.float32)
    probe = [tiny_batch(model, "llava", ROWS, seed=seed).inputs for seed in range(3)]
    module = types.SimpleNamespace(model=model, device=torch.device("cpu"))
    callback = lightning_callback(probe, every=2, patience=2)
    LightningTrainer(callback, module, steps=3)
    again = lightning_callback(probe, every=2, patience=5)
    again.load_state_dict(callback.state_dict())
    with torch.no_grad():
        model.model.language_model.layers[0].mlp.down_proj.weight.mul_(1.1)
    with pytest.warns(UserWarning, match="resumed training has a MIR .* after 2 steps.*loading it is strict"):
        LightningTrainer(again, module, steps=3, start=2)
    with warnings.catch_warnings():  # a second fit with weights changed by the user is not a resumed run
        warnings.filterwarnings("error", message="MIR")
        LightningTrainer(again, module, steps=3, start=2)


def test_lightning_begins_anew_with_another_training_and_goes_on_with_the_same(lightning, tmp_path):
    model = tiny_model("llava", dtype=torch.float32)
    probe = [tiny_batch(model, "llava", ROWS, seed=seed).inputs for seed in range(3)]
    module = types.SimpleNamespace(model=model, device=torch.device("cpu"))
    callback = lightning_callback(probe, every=2)
    LightningTrainer(callback, module, steps=5)
    assert [step for step, _ in callback.history] == [0, 2, 4]
    LightningTrainer(callback, module, steps=7, start=5)
    assert [step for step, _ in callback.history] == [0, 2, 4, 6]
    LightningTrainer(callback, module, steps=3)
    assert [step for step, _ in callback.history] == [0, 2]
    assert callback.state_key != lightning_callback(probe, name="held_out").state_key
