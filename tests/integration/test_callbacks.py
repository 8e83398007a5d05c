"""`MIRCallback` in transformers' Trainer: what it logs, when it stops training, and that it disturbs nothing."""

import random

import numpy as np
import pytest
import torch
from transformers import Trainer, TrainingArguments

from integration.tiny_models import LAYERS, tiny_batch, tiny_model
from modality_integration.callbacks import MIRCallback
from modality_integration.metric import mir
from modality_integration.residual_stream import capture

ROWS = ["tittttttt", "ttitttttt"]


class Captions(torch.utils.data.Dataset):
    """Eight rows with an image each."""

    def __init__(self, model):
        self.batch = tiny_batch(model, "llava", ["ttitttt"] * 8)

    def __len__(self):
        return 8

    def __getitem__(self, i):
        row = {name: value[i] for name, value in self.batch.inputs.items()}
        return {**row, "labels": row["input_ids"].masked_fill(self.batch.vision[i], -100)}


def trainer_of(tmp_path, *, learning_rate=1e-2, steps=6):
    model = tiny_model("llava", dtype=torch.float32)
    for layer in model.model.language_model.layers:
        layer.self_attn.attention_dropout = 0.2  # so that the random state matters
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=steps, per_device_train_batch_size=2, learning_rate=learning_rate,
        use_cpu=True, report_to=[], save_strategy="no", logging_steps=1, disable_tqdm=True, seed=3,
    )  # fmt: skip
    return Trainer(model, arguments, train_dataset=Captions(model))


def probe_of(trainer, seeds=(5, 6)):
    return [tiny_batch(trainer.model, "llava", ROWS, seed=seed).inputs for seed in seeds]


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
        assert [entry[f"mir_layer_{k}"] for k in range(1, LAYERS + 1)] == list(result.per_layer)
        assert entry["mir_seconds"] > 0
        assert "mir_error" not in entry
    assert logged[1]["mir"] != logged[0]["mir"]


def test_stops_on_a_plateau_and_not_before(tmp_path):
    still = trainer_of(tmp_path, learning_rate=0.0, steps=20)
    flat = MIRCallback(probe_of(still), every=2, patience=3).attach(still)
    still.train()
    assert [step for step, _ in flat.history] == [0, 2, 4, 6]  # the start and three measurements without a change
    assert still.state.global_step == 6
    moving = trainer_of(tmp_path, learning_rate=1e-2, steps=8)
    callback = MIRCallback(probe_of(moving), every=2, patience=3, metric={"groups": 0}).attach(moving)
    moving.train()
    assert moving.state.global_step == 8
    assert not callback.plateau()


def test_stops_once_mir_has_moved_and_is_flat_within_its_error(tmp_path):
    free = trainer_of(tmp_path, steps=8)
    watching = MIRCallback(probe_of(free, range(20)), every=1, metric={"groups": 5}).attach(free)
    free.train()
    logged = [(entry["mir"], entry["mir_error"]) for entry in free.state.log_history if "mir" in entry]
    assert logged == [(result.value, result.error) for _, result in watching.history]
    windows = [logged[end - 2 : end + 1] for end in range(2, 9)]
    flat = [max(v for v, _ in w) - min(v for v, _ in w) <= min(e for _, e in w) for w in windows]
    assert flat.index(True) > 0, "the stand-in is flat from the start: choose one that moves"

    stopped = trainer_of(tmp_path, steps=8)
    callback = MIRCallback(probe_of(stopped, range(20)), every=1, patience=2).attach(stopped)
    stopped.train()
    assert stopped.state.global_step == 2 + flat.index(True)
    assert len({result.value for _, result in callback.history[-3:]}) == 3  # flat, and yet not the same
    assert [r.to_json() for _, r in callback.history] == [
        r.to_json() for _, r in watching.history[: len(callback.history)]
    ]


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
    model(**probe[0])  # transformers puts hooks of its own on the vision tower in the first pass
    model.model.vision_tower.eval()  # as one does with a frozen tower
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
        with pytest.raises(ValueError, match=f"{next(iter(options))}: takes"):
            MIRCallback(probe, **options)
    with pytest.raises(ValueError, match="probe: takes at least one batch"):
        MIRCallback([])
    trainer.add_callback(MIRCallback(probe))
    with pytest.raises(RuntimeError, match=r"\.attach\(trainer\)"):
        trainer.train()
