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
from modality_integration.metric.options import require_count
from modality_integration.metric.result import MIRResult
from modality_integration.models.placement import is_first_process, parameter_device
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
        name: str = "mir",
        every_save: bool = True,
    ) -> None:
        check_probe(probe)
        if not isinstance(name, str) or not name.isidentifier():
            raise ValueError(f"name: takes letters, digits and underscores, no digit first, got {name!r}")
        require_count("every", every)
        if patience is not None:
            require_count("patience", patience)
        if not min_delta >= 0:
            raise ValueError(f"min_delta: takes a number >= 0, got {min_delta!r}")
        self.probe, self.every, self.patience, self.min_delta = probe, every, patience, min_delta
        self.name, self.every_save = name, every_save
        self.history: list[tuple[int, MIRResult]] = []
        self._values: dict[str, float] = {}  # MIR by the step after which it was measured, of this training
        self._latest: tuple[int, MIRResult] | None = None  # of the model as it is, while it trains
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
        if low.groups == high.groups > 0:
            both = compare(low, high, paired=True)  # the probe is the same each time
            if both.z is not None and both.z < 2:
                return True
        return high.value == low.value or high.value - low.value <= self.min_delta

    def measure(self, model: nn.Module, step: int) -> dict[str, float]:
        """Measure after `step` steps, into the history; gives what is logged."""
        start = time.perf_counter()
        result = self.result_at(model, step)
        if self.patience is not None and not self.history:
            self._warn_of_few(result)
        self.history.append((step, result))
        return {**self.numbers(result), f"{self.name}_seconds": time.perf_counter() - start}

    def result_at(self, model: nn.Module, step: int) -> MIRResult:
        """MIR after `step` steps: what was measured there, if the model was measured there, else measured now."""
        if self._latest is None or self._latest[0] != step:
            self._latest = step, measure_mir(model, self.probe, capture=self._capture, metric=self._metric)
        return self._latest[1]

    def numbers(self, result: MIRResult) -> dict[str, float]:
        """What is logged of a measurement: "mir", "mir_error" where there is one, "mir/layer_01" and on, after `name`.

        Loggers make a group of what has the same name before a slash, and sort by the rest: layers have as many digits
        as the last, two or more.
        """
        error = {} if result.error is None else {f"{self.name}_error": result.error}
        digits = max(2, len(str(len(result.terms))))
        layers = {f"{self.name}/layer_{k:0{digits}}": value for k, value in enumerate(result.per_layer, 1)}
        return {self.name: result.value, **error, **layers}

    def begin(self) -> None:
        """Forget another training's measurements."""
        self.history, self._values = [], {}
        self.weights_changed()

    def weights_changed(self) -> None:
        """Whoever holds the model may have changed its weights: what was measured last says nothing of it any more."""
        self._latest = None

    def warn_unless_restored(self, model: nn.Module, step: int, value: float, what: str, remedy: str) -> None:
        """Measure `model`, whose weights have been read from files, and warn unless MIR is `value` again, what it was
        when these were written after `step` steps.

        what: "the resumed training", say; remedy: how to have the weights. What rounding may make on another device is
        no difference: 1e-5 where the model computes in 32 bits on a CPU, else 1e-3.
        """
        self.weights_changed()
        now = self.result_at(model, step).value
        slack = 1e-5 if _in_32_bits(model) else 1e-3
        if now != value and not abs(now - value) <= slack and is_first_process():
            warnings.warn(
                f"MIR: {what} has a MIR of {now:.6g}, and it was {value:.6g} when its checkpoint was written after "
                f"{step} steps: unless the probe or its options have changed since, not all weights of the checkpoint "
                f"are in the model. {remedy}",
                stacklevel=2,
            )

    def keep(self) -> None:
        """Let `saved` have what was measured last, as the value of the weights after that step."""
        assert self._latest is not None
        self._values[str(self._latest[0])] = self._latest[1].value

    def value_at(self, step: int) -> float | None:
        """MIR after `step` steps of this training, or of what it was resumed from, where it was measured."""
        return self._values.get(str(step))

    def saved(self) -> dict[str, Any]:
        """The measurements that `plateau` needs next time, and the values at all steps, of JSON's types."""
        measured = [[step, json.loads(result.to_json())] for step, result in self.history[-(self.patience or 1) - 1 :]]
        return {"measurements": measured, "values": dict(self._values)}

    def restore(self, saved: Mapping[str, Any], step: int) -> None:
        """Go on from what `saved` gave, at `step`; of what this object has seen, that training's earlier part stays."""
        documents = saved.get("measurements", [])
        entries = [(at, MIRResult.from_json(json.dumps(document))) for at, document in documents if at <= step]
        first = entries[0][0] if entries else step
        values = {str(at): result.value for at, result in entries} | dict(saved.get("values", {}))
        own = [(at, result) for at, result in self.history if at < first and values.get(str(at)) == result.value]
        self.begin()
        self.history, self._values = own + entries, {at: v for at, v in values.items() if int(at) <= step}

    def _warn_of_few(self, result: MIRResult) -> None:
        wanted, got = self._metric["groups"], result.groups
        if got < wanted:
            warnings.warn(
                f"MIR: the probe has rows for {got} of {wanted} groups of samples"
                + ("" if got else ", so MIR has no standard error and only min_delta tells a plateau")
                + ": give it more rows",
                stacklevel=2,
            )


def _in_32_bits(model: nn.Module) -> bool:
    """Whether all of the model is computed in 32 bits or more: on a CPU, without autocast, no weight narrower."""
    device = parameter_device(model).type
    narrow = any(p.element_size() < 4 for p in model.parameters())
    return device == "cpu" and not narrow and not torch.is_autocast_enabled(device)
