"""`MIRCallback`: MIR while transformers' Trainer runs, logged through it, with early stopping on its plateau."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME

from modality_integration.metric.files import written_whole
from modality_integration.metric.result import MIRResult
from modality_integration.models.agreement import from_first
from modality_integration.models.decoder import unwrap
from modality_integration.training.watch import Watch

_SAVED = "MIRHistory"  # where a checkpoint of the trainer keeps what was measured, by the callbacks' names


class MIRCallback(Watch, TrainerCallback):
    """Measures MIR on a fixed probe set before the first step and after every `every` steps, and logs it.

        MIRCallback(probe, every=100, patience=5).attach(trainer)

    probe: batches as the model takes them (mappings of tensors), each row with an image; the same ones every time.
    Logged wherever the trainer logs to, in rows of its own: `mir`, `mir_error` where there is one, `mir/layer_01` and
    on (the distance of each decoder layer, whose sum has `mir` as its log10) and `mir_seconds` (what the probe took).
    Rows go to `state.log_history` and to every callback's `on_log`, past a `log` that a subclass of Trainer overrides:
    TRL's trainers add to the next row whatever they have averaged since the last one, and it stays in theirs.
    patience, min_delta: training stops once MIR has been flat for `patience` measurements: of the last `patience` + 1
    values the lowest and the highest are within two standard errors of their difference, or within `min_delta`, of one
    another. The samples are the same each time, so that error is of differences, group by group: a slow but steady
    change is seen. Without `patience` training is never stopped.
    capture, metric: options of `capture` and of `ModalityIntegrationRate`; with `patience`, samples (rows of the probe)
    are dealt into 5 groups for the standard error unless `metric` has "groups", 0 being without, where `min_delta`
    alone counts. Groups cost memory for covariances once a probe has more tokens than are held back.
    name: what is logged begins with it; another one for each of several callbacks of a trainer.
    `history` holds (step, MIRResult) of what was logged in a training. Resumed from a checkpoint, it goes on with the
    measurements that early stopping needs, measures at the same steps, and stops where it would have without a break.
    every_save: checkpoints between measurements are measured too, once they are written and without a log, for a check
    of their weights: transformers renames those of vision-language models when it writes them, and its Trainer does not
    rename them back. The probe runs again at the start of resumed training, and after training with
    `load_best_model_at_end`, and where MIR is not what it was in the checkpoint, a warning says so.

    TrainingArguments(metric_for_best_model="mir", or "mir/layer_01"): every evaluation has "eval_mir", measured there
    unless the same step was; the lowest is the best. Trainer's own EarlyStoppingCallback then goes by it.
    Errors: ValueError for a name that another callback of the trainer has, TypeError and ValueError for a wrong probe
    or option, and what `capture` and the metric raise while it measures.

    The probe runs as in `measure_mir`, under the trainer's autocast: training goes on to the same bits as without it.
    Under torch.distributed every process runs the whole probe and the first one's value decides.
    """

    _trainer: Trainer | None = None

    def attach(self, trainer: Trainer) -> MIRCallback:
        """Adds this callback to `trainer`, through which it then logs."""
        callbacks = trainer.callback_handler.callbacks
        if self in callbacks:
            return self
        if any(isinstance(other, MIRCallback) and other.name == self.name for other in callbacks):
            raise ValueError(f"name: takes one that no other MIRCallback of the trainer has, got {self.name!r} again")
        self._trainer = trainer
        trainer.add_callback(self)
        # An evaluation gets its MIR from this one: those that read it, early stopping among them, come after it.
        reading = next(i for i, callback in enumerate(callbacks) if callback is self or _reads_evaluations(callback))
        callbacks.insert(reading, callbacks.pop())
        args = trainer.args
        if self._chosen_by(args) and args.greater_is_better:
            warnings.warn(
                f"metric_for_best_model={args.metric_for_best_model!r}: takes greater_is_better=False, for the lower "
                "MIR is the better one; got True, which TrainingArguments makes of every name that does not end in "
                '"loss". It is set to False',
                stacklevel=2,
            )
            args.greater_is_better = False
        return self

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.global_step == 0:
            self.begin()
        else:
            kept = _kept(state)
            self.restore(kept.get(self.name, kept), state.global_step)
        if from_first(bool(self.history)):
            self._warn_unless_restored(state.global_step, "the resumed training", "CHECKPOINT")
        else:
            self._measure(state, control)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.weights_changed()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.global_step % self.every == 0:
            self._measure(state, control)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        # The state that was written has the value of a step that was measured before.
        if not self.every_save or from_first(self.value_at(state.global_step) is not None):
            return
        self._result(state)
        file = Path(args.output_dir or "") / f"checkpoint-{state.global_step}" / TRAINER_STATE_NAME
        if args.should_save and not state.is_hyper_param_search and file.exists():
            with written_whole(file) as partial:
                state.save_to_json(str(partial))

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        chosen = self._chosen_by(args)
        if not chosen or metrics is None:
            return
        trainer = self._logs_through()
        if not trainer.is_in_train or _evaluates_other_weights(trainer):
            self.weights_changed()
        measured = self.numbers(self._result(state))
        if chosen in measured:
            value = {f"eval_{chosen}": from_first(measured[chosen])}
            metrics.update(value)
            self._log(value, control)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        best, checkpoint = state.best_global_step or 0, state.best_model_checkpoint or ""
        loaded = bool(args.load_best_model_at_end and checkpoint and 0 < best != state.global_step)
        if from_first(loaded):
            self._warn_unless_restored(best, "the best model, loaded at the end,", checkpoint)
        self.weights_changed()

    def _measure(self, state: TrainerState, control: TrainerControl) -> None:
        trainer = self._logs_through()
        with trainer.accelerator.autocast():
            logged = self.measure(_model_of(trainer), state.global_step)
        self._keep(state)
        self._log(logged, control)
        if from_first(self.plateau()):
            control.should_training_stop = True

    def _result(self, state: TrainerState) -> MIRResult:
        """MIR at this step, for a checkpoint or an evaluation; neither in the history nor logged."""
        trainer = self._logs_through()
        with trainer.accelerator.autocast():
            result = self.result_at(_model_of(trainer), state.global_step)
        if trainer.is_in_train:
            self._keep(state)
        return result

    def _keep(self, state: TrainerState) -> None:
        """Gives the trainer's state, which checkpoints have, what was measured."""
        self.keep()
        # Nothing else in a checkpoint says where its processor is: with the model that training began with.
        config: Any = getattr(unwrap(_model_of(self._logs_through())), "config", None)
        _kept(state)[self.name] = {**self.saved(), "trained_from": getattr(config, "_name_or_path", "")}

    def _log(self, values: dict[str, float], control: TrainerControl) -> None:
        due = control.should_log  # logging clears it, and the trainer's own log of this step would be lost
        Trainer.log(self._logs_through(), values)  # not what a subclass makes of it, see the class
        control.should_log = due

    def _warn_unless_restored(self, step: int, what: str, checkpoint: str) -> None:
        """Warns where the model should be that of `checkpoint`, written after `step` steps, and its MIR is another."""
        value = from_first(self.value_at(step))
        if value is None:
            return
        trainer = self._logs_through()
        if hasattr(trainer.model, "peft_config"):
            remedy = (
                "Of a PEFT model, Trainer reads the adapter: load_moca for a MoCa that it has not in modules_to_save"
            )
        else:
            remedy = (
                "transformers' Trainer does not read back what from_pretrained renames, as in most vision-language "
                f"models: take from_pretrained({checkpoint!r}), add_moca and load_moca(model, {checkpoint!r}) where it "
                "has MoCa, and go on with that model"
            )
        with trainer.accelerator.autocast():
            self.warn_unless_restored(_model_of(trainer), step, value, what, remedy)

    def _chosen_by(self, args: TrainingArguments) -> str:
        """What is measured here and `args` chooses the best model by, "" where it is something else."""
        name = (args.metric_for_best_model or "").removeprefix("eval_")
        return name if name == self.name or name.startswith(f"{self.name}/layer_") else ""

    def _logs_through(self) -> Trainer:
        if self._trainer is None:
            raise RuntimeError("MIRCallback: add it with .attach(trainer), not through Trainer(callbacks=...)")
        return self._trainer


def _reads_evaluations(callback: TrainerCallback) -> bool:
    """Whether `callback` does something of its own with what an evaluation gives; progress bars only end there."""
    kind = type(callback)
    return kind.on_evaluate is not TrainerCallback.on_evaluate and not kind.__name__.endswith("ProgressCallback")


def _model_of(trainer: Trainer) -> nn.Module:
    """The model as the trainer runs it now: a callback is given the one of before training."""
    model = trainer.model
    assert isinstance(model, nn.Module)
    return model


def _evaluates_other_weights(trainer: Trainer) -> bool:
    """Whether the optimizer trains other weights than it evaluates, as schedule-free ones do."""
    optimizer: Any = trainer.optimizer
    return callable(getattr(getattr(optimizer, "optimizer", optimizer), "eval", None))


def _kept(state: TrainerState) -> dict[str, Any]:
    """What the trainer saves with its state and gives back when it resumes, by the names of these callbacks."""
    kept: Any = state.stateful_callbacks
    found: dict[str, Any] = kept.setdefault(_SAVED, {})
    return found
