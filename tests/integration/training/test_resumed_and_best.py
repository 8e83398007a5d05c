"""`MIRCallback` when the Trainer loads weights from checkpoints: resumed training, and the best model by MIR."""

import json
import warnings
from pathlib import Path

import pytest
import torch
from transformers import EarlyStoppingCallback, LlavaForConditionalGeneration, TrainerCallback

from integration.several_processes import outputs_of
from integration.tiny_models import tiny_model
from integration.tiny_trainers import probe_of, trainer_of
from modality_integration import MIRCallback, add_moca, load_moca, measure_mir, moca_parameters
from modality_integration.training import watch

SAVING = {"save_strategy": "steps", "save_steps": 3}
EVALUATING = {"evaluated": True, "eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2}


def calibrated():
    model = tiny_model("llava", dtype=torch.float32)
    add_moca(model)
    return model


def watched(trainer, probe=None, **options):
    return MIRCallback(probe or probe_of(trainer), **{"every": 1, **options}).attach(trainer)


def values(callback):
    return [(step, result.value) for step, result in callback.history]


@pytest.fixture
def measurements(monkeypatch):
    """A list that grows with every measurement of MIR."""
    made = []

    def counted(*args, **options):
        made.append(measure_mir(*args, **options))
        return made[-1]

    monkeypatch.setattr(watch, "measure_mir", counted)
    return made


@pytest.fixture
def silent():
    """Turns MIR's warnings into errors."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="MIR")
        yield


def test_training_resumed_from_the_weights_of_the_checkpoint_is_training_without_a_break(tmp_path, silent):
    constant = {"lr_scheduler_type": "constant"}  # other schedules depend on the total number of steps
    straight = trainer_of(tmp_path / "whole", model=calibrated(), **constant)
    whole = watched(straight)
    straight.train()
    broken = trainer_of(tmp_path / "half", model=calibrated(), steps=3, **SAVING, **constant)
    watched(broken)
    broken.train()
    checkpoint = str(tmp_path / "half" / "checkpoint-3")

    model = type(broken.model).from_pretrained(checkpoint)
    add_moca(model)
    load_moca(model, checkpoint)
    resumed = trainer_of(tmp_path / "rest", model=model, **constant)
    rest = watched(resumed)
    resumed.train(resume_from_checkpoint=checkpoint)
    assert len({value for _, value in values(whole)}) == 7, "nothing was trained"
    assert values(rest) == values(whole)[2:]
    assert [entry["step"] for entry in resumed.state.log_history if "mir" in entry] == list(range(7))
    for ours, theirs in zip(moca_parameters(model), moca_parameters(straight.model), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("every", [1, 2], ids=["a measured step", "a step between measurements"])
def test_weights_that_did_not_come_back_are_told_with_both_values(tmp_path, every):
    broken = trainer_of(tmp_path, steps=3, **SAVING)
    watched(broken, every=every)
    broken.train()
    then = measure_mir(broken.model, probe_of(broken), metric={"groups": 0}).value
    resumed = trainer_of(tmp_path / "rest", steps=4)
    now = measure_mir(resumed.model, probe_of(resumed), metric={"groups": 0}).value
    callback = watched(resumed, every=every)
    said = f"resumed training has a MIR of {now:.6g}, but it was {then:.6g} .* after 3 steps.*load_moca"
    with pytest.warns(UserWarning, match=said) as told:
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert sum("MIR" in str(warning.message) for warning in told) == 1
    assert [step for step, _ in values(callback)][-1] == 4
    assert 3 not in [entry["step"] for entry in resumed.state.log_history[-1:]]


@pytest.mark.parametrize("strategy", ["epoch", "best"])
def test_checkpoints_between_measurements_are_measured_as_they_are_written(tmp_path, measurements, strategy):
    changes = {"metric_for_best_model": "loss", "eval_strategy": "epoch", "evaluated": True}
    broken = trainer_of(tmp_path, steps=8, learning_rate=1e-3, save_strategy=strategy, **changes)
    callback = watched(broken, every=100)
    broken.train()
    assert [step for step, _ in values(callback)] == [0]
    assert len(measurements) == 3  # at the start, and after each of two epochs of four steps
    checkpoint = max(tmp_path.glob("checkpoint-*"))
    resumed = trainer_of(tmp_path / "rest", steps=9)
    watched(resumed, every=100)
    with pytest.warns(UserWarning, match=f"it was {measurements[-1].value:.6g} when"):
        resumed.train(resume_from_checkpoint=str(checkpoint))


def test_resumed_training_stops_where_it_would_have_without_a_break_and_logs_no_step_twice(tmp_path, silent):
    """With a learning rate of 0, MIR is flat from the start, whatever weights the checkpoint holds."""
    broken = trainer_of(tmp_path / "a", steps=3, learning_rate=0.0, **SAVING)
    watched(broken, patience=4)
    broken.train()
    resumed = trainer_of(tmp_path / "b", steps=20, learning_rate=0.0)
    callback = watched(resumed, patience=4)
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-3"))
    assert resumed.state.global_step == 4  # the start and four measurements without a change
    assert [step for step, _ in values(callback)] == [0, 1, 2, 3, 4]
    assert [entry["step"] for entry in resumed.state.log_history if "mir" in entry] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("name", ["mir", "eval_mir", "mir/layer_02"])
@pytest.mark.parametrize("every", [1, 4])
def test_the_best_model_is_that_of_the_lowest_mir(tmp_path, measurements, name, every):
    changes = {**EVALUATING, "metric_for_best_model": name, "greater_is_better": False}
    trainer = trainer_of(tmp_path, steps=8, **changes)
    callback = watched(trainer, every=every)
    trainer.train()
    evaluated = {e["step"]: v for e in trainer.state.log_history for k, v in e.items() if k.startswith("eval_mir")}
    assert list(evaluated) == [2, 4, 6, 8]
    best = min(evaluated, key=evaluated.get)
    assert trainer.state.best_global_step == best
    assert trainer.state.best_metric == evaluated[best]
    assert Path(trainer.state.best_model_checkpoint).name == f"checkpoint-{best}"
    # A step that is both measured and evaluated is measured once.
    assert len(measurements) == len({*range(0, 9, every), 2, 4, 6, 8})
    shown = {step: result.per_layer[1] if "layer" in name else result.value for step, result in callback.history}
    assert [step for step, _ in values(callback)] == list(range(0, 9, every))
    assert all(evaluated[step] == value for step, value in shown.items() if step in evaluated)


def test_the_trainers_own_early_stopping_goes_by_mir_wherever_it_stands_in_the_list(tmp_path):
    seen = []

    class Reader(TrainerCallback):
        def on_evaluate(self, args, state, control, metrics, **kwargs):
            seen.append(metrics["eval_mir"])

    changes = {**EVALUATING, "eval_steps": 1, "metric_for_best_model": "mir", "greater_is_better": False}
    trainer = trainer_of(
        tmp_path, steps=20, learning_rate=0.0, **changes,
        callbacks=[EarlyStoppingCallback(early_stopping_patience=2), Reader()],
    )  # fmt: skip
    watched(trainer, every=100)
    trainer.train()
    assert trainer.state.global_step == 3  # the best step, and two that are no better
    assert len(seen) == 3


def test_a_greater_mir_is_never_taken_for_the_better_one(tmp_path):
    trainer = trainer_of(tmp_path, **EVALUATING, metric_for_best_model="mir")
    with pytest.warns(UserWarning, match="expected greater_is_better=False, got True.*set to False.*lower MIR"):
        watched(trainer)
    assert trainer.args.greater_is_better is False


def test_a_best_model_that_did_not_come_back_is_told(tmp_path):
    # The largest loss is the first.
    changes = {**EVALUATING, "metric_for_best_model": "loss", "greater_is_better": True, "load_best_model_at_end": True}
    trainer = trainer_of(tmp_path, **changes)
    callback = watched(trainer)
    with pytest.warns(UserWarning, match="the best model, loaded at the end.* from_pretrained.*checkpoint-2"):
        trainer.train()
    assert trainer.state.best_global_step == 2
    assert dict(values(callback))[2] != dict(values(callback))[6]


def test_an_evaluation_after_training_measures_the_model_as_it_is_then(tmp_path):
    trainer = trainer_of(tmp_path, **EVALUATING, metric_for_best_model="mir", greater_is_better=False)
    callback = watched(trainer)
    trainer.train()
    assert trainer.evaluate()["eval_mir"] == callback.history[-1][1].value
    with torch.no_grad():
        trainer.model.model.language_model.layers[0].mlp.down_proj.weight.mul_(3)
    by_hand = measure_mir(trainer.model, callback.probe, metric={"groups": 0}).value
    assert trainer.evaluate()["eval_mir"] == by_hand
    assert by_hand != callback.history[-1][1].value


def test_two_callbacks_of_a_trainer_have_names_and_measurements_of_their_own(tmp_path, silent):
    def two(trainer):
        others = probe_of(trainer, (8, 9))
        return watched(trainer), watched(trainer, others, every=2, name="held_out")

    trainer = trainer_of(tmp_path, steps=2, learning_rate=0.0, **{**SAVING, "save_steps": 2})
    own, others = two(trainer)
    assert own.attach(trainer) is own  # attaching twice has no effect
    with pytest.raises(ValueError, match="name: expected one that no other MIRCallback of the trainer has, got 'mir'"):
        MIRCallback(probe_of(trainer)).attach(trainer)
    trainer.train()
    alone = [measure_mir(trainer.model, each.probe, metric={"groups": 0}).value for each in (own, others)]
    assert alone[0] != alone[1]
    assert values(own) == [(step, alone[0]) for step in (0, 1, 2)]
    assert values(others) == [(step, alone[1]) for step in (0, 2)]
    logged = [entry for entry in trainer.state.log_history if "held_out" in entry]
    assert {f"held_out/layer_{k:02}" for k in (1, 2, 3)} | {"held_out_seconds"} < set(logged[0])

    resumed = trainer_of(tmp_path / "rest", steps=3, learning_rate=0.0)
    own, others = two(resumed)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert {value for _, value in values(own)} == {alone[0]}
    assert {value for _, value in values(others)} == {alone[1]}


def test_a_callback_begins_anew_with_another_training(tmp_path):
    first = trainer_of(tmp_path / "a", steps=3, **SAVING)
    callback = watched(first, patience=3)
    first.train()
    second = trainer_of(tmp_path / "b", steps=2)
    callback.attach(second)
    second.train()
    assert [step for step, _ in values(callback)] == [0, 1, 2]

    without = trainer_of(tmp_path / "c", steps=3, learning_rate=0.0, **SAVING)
    without.train()
    resumed = trainer_of(tmp_path / "d", steps=4, learning_rate=0.0)
    callback.attach(resumed)
    resumed.train(resume_from_checkpoint=str(tmp_path / "c" / "checkpoint-3"))
    assert [step for step, _ in values(callback)] == [3, 4]  # nothing was measured before resuming


def test_a_checkpoint_that_somebody_else_asks_for_is_measured_too(tmp_path, measurements):
    class Saver(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_save = state.global_step == 3

    trainer = trainer_of(tmp_path, steps=4)
    callback = watched(trainer, every=100)
    trainer.add_callback(Saver())
    trainer.train()
    assert [step for step, _ in values(callback)] == [0]
    checkpoint = tmp_path / "checkpoint-3"
    assert not list(checkpoint.glob("*.partial"))
    resumed = trainer_of(tmp_path / "rest", steps=4)
    watched(resumed, every=100)
    with pytest.warns(UserWarning, match=f"it was {measurements[1].value:.6g} when .* after 3 steps"):
        resumed.train(resume_from_checkpoint=str(checkpoint))


def test_without_every_save_only_measured_checkpoints_are_checked(tmp_path, measurements, silent):
    broken = trainer_of(tmp_path, steps=3, **SAVING)
    watched(broken, every=2, every_save=False)
    broken.train()
    assert len(measurements) == 2  # at steps 0 and 2
    resumed = trainer_of(tmp_path / "rest", steps=4)
    callback = watched(resumed, every=2, every_save=False)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert len(measurements) == 3
    assert [step for step, _ in values(callback)] == [0, 2, 4]


class OtherWeightsInEvaluation(torch.optim.SGD):
    """Evaluates weights 10% larger than those it trains, as schedule-free optimizers evaluate an average."""

    factor = 1.0

    def eval(self):
        self._scale(1.1)

    def train(self):
        self._scale(1.0)

    @torch.no_grad()
    def _scale(self, factor):
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.mul_(factor / self.factor)
        self.factor = factor


def test_an_evaluation_measures_the_weights_that_it_evaluates(tmp_path):
    made = trainer_of(
        tmp_path, steps=2, **{**EVALUATING, "eval_steps": 1}, metric_for_best_model="mir", greater_is_better=False
    )
    made.optimizer = OtherWeightsInEvaluation(made.model.parameters(), lr=1e-2)
    callback = watched(made)
    made.train()
    trained = dict(values(callback))
    evaluated = {e["step"]: e["eval_mir"] for e in made.state.log_history if "eval_mir" in e}
    assert list(evaluated) == [1, 2]
    assert all(abs(evaluated[step] - trained[step]) > 1e-4 for step in evaluated)
    assert made.optimizer.optimizer.factor == 1.1  # the model keeps its evaluated weights
    assert evaluated[2] == measure_mir(made.model, callback.probe, metric={"groups": 0}).value


def test_processes_choose_by_the_value_of_the_first_which_alone_tells(tmp_path):
    outputs = outputs_of("trainer_processes.py", tmp_path)
    assert all("chosen and resumed by the first one's values" in out for out in outputs)


def test_a_checkpoint_says_which_folder_its_model_came_from(tmp_path):
    """This folder has the processor, because Trainer saves none unless it was given one."""
    calibrated().save_pretrained(tmp_path / "base")
    model = LlavaForConditionalGeneration.from_pretrained(tmp_path / "base")
    trainer = trainer_of(tmp_path / "out", model=model, steps=3, **SAVING)
    watched(trainer, every=3)
    trainer.train()
    state = json.loads((tmp_path / "out" / "checkpoint-3" / "trainer_state.json").read_text())
    assert state["stateful_callbacks"]["MIRHistory"]["mir"]["trained_from"] == str(tmp_path / "base")
