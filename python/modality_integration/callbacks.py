"""MIR while a model trains: callbacks for transformers' Trainer and for Lightning that probe, log, and may stop."""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from modality_integration.probe import Probe, check_probe, measure_mir
from modality_integration.report import compare
from modality_integration.result import MIRResult

_SAVED = "MIRHistory"  # where a checkpoint of the trainer keeps what early stopping goes by


class Watch:
    """What the callbacks share: when to measure, what was measured, and whether MIR is flat. See `MIRCallback`."""

    def __init__(
        self,
        probe: Probe,
        *,
        every: int = 100,
        patience: int | None = None,
        min_delta: float = 0.0,
        capture: Mapping[str, Any] | None = None,
        metric: Mapping[str, Any] | None = None,
    ) -> None:
        check_probe(probe)
        for name, value in (("every", every), ("patience", patience)):
            if value is not None and value < 1:
                raise ValueError(f"{name}: takes a whole number >= 1, got {value!r}")
        if not min_delta >= 0:
            raise ValueError(f"min_delta: takes a number >= 0, got {min_delta!r}")
        self.probe, self.every, self.patience, self.min_delta = probe, every, patience, min_delta
        self.history: list[tuple[int, MIRResult]] = []
        self._capture = dict(capture or {})
        self._metric = {"groups": 0 if patience is None else 5, **(metric or {})}

    def plateau(self) -> bool:
        """Whether the last `patience` + 1 values do not differ: their lowest and highest are within two standard errors
        of their difference, or within `min_delta`, of one another.
        """
        if self.patience is None or len(self.history) <= self.patience:
            return False
        results = [result for _, result in self.history[-self.patience - 1 :]]
        low, high = min(results, key=float), max(results, key=float)
        if low.left_out and high.left_out and len(low.left_out[0]) == len(high.left_out[0]):
            both = compare(low, high, paired=True)  # the probe is the same each time
            if both.z is not None and both.z < 2:
                return True
        return high.value == low.value or high.value - low.value <= self.min_delta

    def measure(self, model: nn.Module, step: int) -> dict[str, float]:
        """Measure after `step` steps, into the history; gives what is logged."""
        start = time.perf_counter()
        result = measure_mir(model, self.probe, capture=self._capture, metric=self._metric)
        if self.patience is not None and not self.history:
            self._warn_of_few(result)
        self.history.append((step, result))
        layers = {f"mir_layer_{k}": value for k, value in enumerate(result.per_layer, 1)}
        error = {} if result.error is None else {"mir_error": result.error}
        return {"mir": result.value, **error, **layers, "mir_seconds": time.perf_counter() - start}

    def saved(self) -> list[list[Any]]:
        """The measurements that `plateau` needs next time, of JSON's types."""
        return [[step, json.loads(result.to_json())] for step, result in self.history[-(self.patience or 1) - 1 :]]

    def restore(self, saved: list[list[Any]], step: int) -> None:
        """Go on from what `saved` gave, at `step`; what this object has seen of later steps is forgotten."""
        entries = [(at, MIRResult.from_json(json.dumps(document))) for at, document in saved if at <= step]
        first = entries[0][0] if entries else step
        self.history = [entry for entry in self.history if entry[0] < first] + entries

    def _warn_of_few(self, result: MIRResult) -> None:
        wanted, got = self._metric["groups"], len(result.left_out[0]) if result.left_out else 0
        if got < wanted:
            warnings.warn(
                f"MIR: the probe has rows for {got} of {wanted} groups of samples"
                + ("" if got else ", so MIR has no standard error and only min_delta tells a plateau")
                + ": give it more rows",
                stacklevel=2,
            )


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
        if _first_process_says(self.plateau(), args.device):
            control.should_training_stop = True


def lightning_callback(probe: Probe, *, module: str = "model", **options: Any) -> Any:
    """The same for Lightning: a callback for `Trainer(callbacks=[...])`, with the options of `MIRCallback`.

    module: the attribute of the LightningModule that holds the model which `capture` takes. Logged to the trainer's
    loggers. ModuleNotFoundError unless `lightning` (or `pytorch_lightning`) is installed.
    """
    try:
        from lightning.pytorch import Callback
    except ModuleNotFoundError:
        from pytorch_lightning import Callback

    class MIRLightning(Watch, Callback):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            if not self.history:
                self._measure(trainer, pl_module)

        def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
            step = trainer.global_step
            if step % self.every == 0 and step != self.history[-1][0]:  # several batches may make one step
                self._measure(trainer, pl_module)

        def state_dict(self) -> dict[str, Any]:
            return {"measurements": self.saved()}

        def load_state_dict(self, state_dict: dict[str, Any]) -> None:
            measurements = state_dict["measurements"]
            self.restore(measurements, measurements[-1][0] if measurements else 0)

        def _measure(self, trainer: Any, pl_module: Any) -> None:
            autocast: AbstractContextManager = trainer.precision_plugin.forward_context()
            with autocast:
                logged = self.measure(getattr(pl_module, module), trainer.global_step)
            for logger in trainer.loggers:
                logger.log_metrics(logged, step=trainer.global_step)
            if _first_process_says(self.plateau(), pl_module.device):
                trainer.should_stop = True

    return MIRLightning(probe, **options)


def _kept(state: TrainerState) -> dict[str, Any]:
    """What the trainer saves with its state and gives back when it resumes, by name."""
    kept: Any = state.stateful_callbacks
    return kept


def _first_process_says(stop: bool, device: torch.device) -> bool:
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return stop
    decision = torch.tensor(float(stop), device=device)
    torch.distributed.broadcast(decision, src=0)
    return bool(decision.item())
