"""MIR while a model trains: a callback for transformers' Trainer that probes, logs, and may stop on a plateau."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from modality_integration.metric import ModalityIntegrationRate
from modality_integration.residual_stream import capture
from modality_integration.result import MIRResult


class MIRCallback(TrainerCallback):
    """Measures MIR on a fixed probe set before the first step and after every `every` steps, and logs it.

        MIRCallback(probe, every=100, patience=5).attach(trainer)

    probe: batches as the model takes them (mappings of tensors), each row with an image; the same ones every time.
    Logged through the trainer, so wherever it logs to: `mir`, `mir_error` where there is one, `mir_layer_{k}` (the
    distance of decoder layer k, whose sum over k has `mir` as its log10) and `mir_seconds` (what the probe took).
    patience, min_delta: training stops once MIR has been flat for `patience` measurements: the last `patience` + 1
    values lie within their standard error (the smallest of theirs), or within `min_delta` if that is more, of one
    another. A change below the error of the probe set says nothing about other samples. Without `patience` training is
    never stopped.
    capture, metric: options of `capture` and of `ModalityIntegrationRate`; with `patience`, samples (rows of the probe)
    are dealt into 5 groups for the standard error unless `metric` has "groups", 0 being without, where `min_delta`
    alone counts. Groups cost memory for covariances once a probe has more tokens than are held back.
    `history` holds (step, MIRResult) of every measurement.

    The probe runs in eval mode without gradients, under the trainer's autocast, and leaves parameters, train modes,
    random states and, on CUDA, the memory it used as they were: training goes on to the same bits as without it. Under
    torch.distributed every process runs the whole probe and the first one's value decides.
    """

    def __init__(
        self,
        probe: Sequence[Mapping[str, Any]],
        *,
        every: int = 100,
        patience: int | None = None,
        min_delta: float = 0.0,
        capture: Mapping[str, Any] | None = None,
        metric: Mapping[str, Any] | None = None,
    ) -> None:
        if len(probe) == 0:
            raise ValueError("probe: takes at least one batch, got none")
        for name, value in (("every", every), ("patience", patience)):
            if value is not None and value < 1:
                raise ValueError(f"{name}: takes a whole number >= 1, got {value!r}")
        if not min_delta >= 0:
            raise ValueError(f"min_delta: takes a number >= 0, got {min_delta!r}")
        self.probe, self.every, self.patience, self.min_delta = probe, every, patience, min_delta
        self.history: list[tuple[int, MIRResult]] = []
        self._capture = dict(capture or {})
        self._metric = {"groups": 0 if patience is None else 5, **(metric or {})}
        self._trainer: Trainer | None = None

    def attach(self, trainer: Trainer) -> MIRCallback:
        """Adds this callback to `trainer`, through which it then logs."""
        self._trainer = trainer
        trainer.add_callback(self)
        return self

    def plateau(self) -> bool:
        """Whether the last `patience` + 1 values lie within their standard error, or `min_delta`, of one another."""
        if self.patience is None or len(self.history) <= self.patience:
            return False
        results = [result for _, result in self.history[-self.patience - 1 :]]
        values = [result.value for result in results]
        error = min(0.0 if result.error is None else result.error for result in results)
        return max(values) - min(values) <= max(self.min_delta, error)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.history = [entry for entry in self.history if entry[0] < state.global_step]
        self._measure(args, state, control, kwargs["model"])

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.global_step % self.every == 0:
            self._measure(args, state, control, kwargs["model"])

    def _measure(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module) -> None:
        if self._trainer is None:
            raise RuntimeError("MIRCallback: add it with .attach(trainer), not through Trainer(callbacks=...)")
        start = time.perf_counter()
        with _undisturbed(model), self._trainer.accelerator.autocast():
            metric = ModalityIntegrationRate(sync_on_compute=False, **self._metric)
            with torch.no_grad(), capture(model, **self._capture) as seen:
                for batch in self.probe:
                    model(**_on(args.device, batch))
                    metric.update(seen.hidden_states, seen.vision_mask, seen.text_mask)
            result = metric.compute()
        self.history.append((state.global_step, result))
        layers = {f"mir_layer_{k}": value for k, value in enumerate(result.per_layer, 1)}
        error = {} if result.error is None else {"mir_error": result.error}
        due = control.should_log  # logging clears it, and the trainer's own log of this step would be lost
        self._trainer.log({"mir": result.value, **error, **layers, "mir_seconds": time.perf_counter() - start})
        control.should_log = due
        if _first_process_says(self.plateau(), args.device):
            control.should_training_stop = True


@contextmanager
def _undisturbed(model: nn.Module) -> Iterator[None]:
    """Eval mode inside; afterwards each module's own mode, every random state and the CUDA memory as before."""
    training = [module for module in model.modules() if module.training]
    cuda = torch.cuda.is_initialized()
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002 - the trainer uses both
    cuda_states = torch.cuda.get_rng_state_all() if cuda else []
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
        random.setstate(states[0])
        np.random.set_state(states[1])  # noqa: NPY002
        torch.set_rng_state(states[2])
        if cuda:
            torch.cuda.set_rng_state_all(cuda_states)
            torch.cuda.empty_cache()


def _on(device: torch.device, batch: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}


def _first_process_says(stop: bool, device: torch.device) -> bool:
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return stop
    decision = torch.tensor(float(stop), device=device)
    torch.distributed.broadcast(decision, src=0)
    return bool(decision.item())
