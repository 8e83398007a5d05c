"""`MIRCallback`: MIR while transformers' Trainer runs, logged through it, with early stopping on its plateau."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from modality_integration.training.watch import Watch, first_process_says

_SAVED = "MIRHistory"  # where a checkpoint of the trainer keeps what early stopping goes by


class MIRCallback(Watch, TrainerCallback):
    """Measures MIR on a fixed probe set before the first step and after every `every` steps, and logs it.

        MIRCallback(probe, every=100, patience=5).attach(trainer)

    probe: batches as the model takes them (mappings of tensors), each row with an image; the same ones every time.
    Logged through the trainer, so wherever it logs to: `mir`, `mir_error` where there is one, `mir_layer_{k}` (the
    distance of decoder layer k, whose sum over k has `mir` as its log10) and `mir_seconds` (what the probe took).
    patience, min_delta: training stops once MIR has been flat for `patience` measurements: of the last `patience` + 1
    values the lowest and the highest are within two standard errors of their difference, or within `min_delta`, of one
    another. The samples are the same each time, so that error is of differences, group by group: a slow but steady
    change is seen. Without `patience` training is never stopped.
    capture, metric: options of `capture` and of `ModalityIntegrationRate`; with `patience`, samples (rows of the probe)
    are dealt into 5 groups for the standard error unless `metric` has "groups", 0 being without, where `min_delta`
    alone counts. Groups cost memory for covariances once a probe has more tokens than are held back.
    `history` holds (step, MIRResult) of every measurement. Resumed from a checkpoint, training goes on with the
    measurements that early stopping needs, measures at the same steps, and stops where it would have without a break.

    The probe runs as in `measure_mir`, under the trainer's autocast: training goes on to the same bits as without it.
    Under torch.distributed every process runs the whole probe and the first one's value decides.
    """

    _trainer: Trainer | None = None

    def attach(self, trainer: Trainer) -> MIRCallback:
        """Adds this callback to `trainer`, through which it then logs."""
        self._trainer = trainer
        trainer.add_callback(self)
        return self

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.restore(_kept(state).get(_SAVED, {}).get("measurements", []), state.global_step)
        if not self.history or state.global_step == 0:
            self._measure(args, state, control, kwargs["model"])

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.global_step % self.every == 0:
            self._measure(args, state, control, kwargs["model"])

    def _measure(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module) -> None:
        if self._trainer is None:
            raise RuntimeError("MIRCallback: add it with .attach(trainer), not through Trainer(callbacks=...)")
        with self._trainer.accelerator.autocast():
            logged = self.measure(model, state.global_step)
        _kept(state)[_SAVED] = {"measurements": self.saved()}
        due = control.should_log  # logging clears it, and the trainer's own log of this step would be lost
        self._trainer.log(logged)
        control.should_log = due
        if first_process_says(self.plateau(), args.device):
            control.should_training_stop = True


def _kept(state: TrainerState) -> dict[str, Any]:
    """What the trainer saves with its state and gives back when it resumes, by name."""
    kept: Any = state.stateful_callbacks
    return kept
