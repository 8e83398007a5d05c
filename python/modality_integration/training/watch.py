"""When to measure MIR while a model trains, what was measured, and whether it is flat: what the callbacks share."""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from modality_integration.metric.comparison import compare
from modality_integration.metric.result import MIRResult
from modality_integration.training.measure import Probe, check_probe, measure_mir


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


def first_process_says(stop: bool, device: torch.device) -> bool:
    """What the first process decides, on every process: all stop, or none does."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return stop
    decision = torch.tensor(float(stop), device=device, dtype=torch.float32)
    torch.distributed.broadcast(decision, src=0)
    return bool(decision.item())
