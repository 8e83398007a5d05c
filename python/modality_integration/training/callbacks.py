"""`MIRCallback`: measures and logs MIR while transformers' Trainer runs, with early stopping when it is flat."""

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

_SAVED = "MIRHistory"  # key of the measurements in a run checkpoint, by the callbacks' names


class MIRCallback(Watch, TrainerCallback):
    """Measures MIR on a fixed probe set before the first step and after every `every` steps, and logs it.

        MIRCallback(probe, every=100, patience=5).attach(trainer)

    probe: batches of model inputs (mappings of tensors), each row with an image; the same batches every time.
    Logged to the trainer's loggers, in separate rows: `mir`, `mir_error` if there is one, `mir/layer_01` and so on (the
    distance of each decoder layer; `mir` is the log10 of their sum) and `mir_seconds` (the duration of the probe).
    Rows go to `state.log_history` and to every callback's `on_log`, bypassing a subclass's override of Trainer.log:
    TRL's trainers merge the values averaged since their last row into the next one, and these must stay in theirs.
    patience, min_delta: training stops once MIR has been flat for `patience` measurements: the lowest and the highest
    of the last `patience` + 1 values differ by less than two standard errors of their difference, or by at most
    `min_delta`. The samples are the same each time, so the standard error is paired, group by group, and a slow but
    steady change is detected. Without `patience`, training is never stopped.
    capture, metric: options of `capture` and of `ModalityIntegrationRate`. With `patience`, samples (rows of the probe)
    are divided into 5 groups for the standard error unless `metric` has "groups"; with 0, only `min_delta` counts.
    Groups need memory for covariances once a probe has more tokens than the metric holds back.
    name: prefix of the logged names; must differ between several callbacks of a trainer.
    `history` holds (step, MIRResult) of the logged measurements of one training run. Resuming from a checkpoint
    restores the measurements that early stopping needs, and measures and stops at the same steps as an uninterrupted
    run.
    every_save: also measures checkpoints between measurements, after they are written and without logging, to verify
    their weights: transformers renames the weights of vision-language models when writing them, and its Trainer does
    not rename them back. The probe runs again at the start of resumed training, and after training with
    `load_best_model_at_end`; a warning is issued if MIR differs from its value in the checkpoint.

    TrainingArguments(metric_for_best_model="mir", or "mir/layer_01"): adds "eval_mir" to every evaluation, measured
    unless that step already was; lower is better. Trainer's EarlyStoppingCallback then uses it.
    Errors: ValueError for a name that another callback of the trainer has, TypeError and ValueError for a wrong probe
    or option, and the errors of `capture` and the metric.

    The probe runs as in `measure_mir`, under the trainer's autocast, and leaves training unchanged bit for bit.
    Under torch.distributed every process runs the whole probe, and the first one's value decides.
    """

    _trainer: Trainer | None = None

    def attach(self, trainer: Trainer) -> MIRCallback:
        """Adds this callback to `trainer` and logs through it."""
        callbacks = trainer.callback_handler.callbacks
        if self in callbacks:
            return self
        if any(isinstance(other, MIRCallback) and other.name == self.name for other in callbacks):
            raise ValueError(f"name: expected one that no other MIRCallback of the trainer has, got {self.name!r}")
        self._trainer = trainer
        trainer.add_callback(self)
        # This callback adds MIR to evaluations, so callbacks that read them, such as early stopping, must come later.
        reading = next(i for i, callback in enumerate(callbacks) if callback is self or _reads_evaluations(callback))
        callbacks.insert(reading, callbacks.pop())
        args = trainer.args
        if self._chosen_by(args) and args.greater_is_better:
            warnings.warn(
                f"metric_for_best_model={args.metric_for_best_model!r}: expected greater_is_better=False, got True, "
                'the default of TrainingArguments for names that do not end in "loss"; it is set to False, because a '
                "lower MIR is better",
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
        # A step that was already measured has its value in the state that was written.
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
        """MIR at this step, for a checkpoint or an evaluation; not added to the history and not logged."""
        trainer = self._logs_through()
        with trainer.accelerator.autocast():
            result = self.result_at(_model_of(trainer), state.global_step)
        if trainer.is_in_train:
            self._keep(state)
        return result

    def _keep(self, state: TrainerState) -> None:
        """Stores the measurements in the trainer's state, which is part of checkpoints."""
        self.keep()
        # The processor is with the model that training started from, and nothing else in a checkpoint names it.
        config: Any = getattr(unwrap(_model_of(self._logs_through())), "config", None)
        _kept(state)[self.name] = {**self.saved(), "trained_from": getattr(config, "_name_or_path", "")}

    def _log(self, values: dict[str, float], control: TrainerControl) -> None:
        due = control.should_log  # logging clears it, which would lose the trainer's own row of this step
        Trainer.log(self._logs_through(), values)  # bypasses a subclass's override, see the class docstring
        control.should_log = due

    def _warn_unless_restored(self, step: int, what: str, checkpoint: str) -> None:
        """Warns if the model should equal `checkpoint`, written after `step` steps, but its MIR differs."""
        value = from_first(self.value_at(step))
        if value is None:
            return
        trainer = self._logs_through()
        if hasattr(trainer.model, "peft_config"):
            remedy = "For a PEFT model, Trainer loads only the adapter; use load_moca if MoCa is not in modules_to_save"
        else:
            remedy = (
                "transformers' Trainer does not load weights that from_pretrained renames, as in most vision-language "
                f"models; use from_pretrained({checkpoint!r}), with MoCa also add_moca and load_moca(model, "
                f"{checkpoint!r}), and continue with that model"
            )
        with trainer.accelerator.autocast():
            self.warn_unless_restored(_model_of(trainer), step, value, what, remedy)

    def _chosen_by(self, args: TrainingArguments) -> str:
        """The value by which `args` chooses the best model, if this callback measures it, otherwise ""."""
        name = (args.metric_for_best_model or "").removeprefix("eval_")
        return name if name == self.name or name.startswith(f"{self.name}/layer_") else ""

    def _logs_through(self) -> Trainer:
        if self._trainer is None:
            raise RuntimeError("MIRCallback: add it with .attach(trainer), not through Trainer(callbacks=...)")
        return self._trainer


def _reads_evaluations(callback: TrainerCallback) -> bool:
    """Whether `callback` uses the metrics of an evaluation; progress bars override `on_evaluate` only to close."""
    kind = type(callback)
    return kind.on_evaluate is not TrainerCallback.on_evaluate and not kind.__name__.endswith("ProgressCallback")


def _model_of(trainer: Trainer) -> nn.Module:
    """The model that the trainer currently runs; callbacks receive the one from before training."""
    model = trainer.model
    assert isinstance(model, nn.Module)
    return model


def _evaluates_other_weights(trainer: Trainer) -> bool:
    """Whether the optimizer evaluates other weights than it trains, as schedule-free optimizers do."""
    optimizer: Any = trainer.optimizer
    return callable(getattr(getattr(optimizer, "optimizer", optimizer), "eval", None))


def _kept(state: TrainerState) -> dict[str, Any]:
    """The measurements saved with the trainer's state and restored when it resumes, by the callbacks' names."""
    kept: Any = state.stateful_callbacks
    found: dict[str, Any] = kept.setdefault(_SAVED, {})
    return found
