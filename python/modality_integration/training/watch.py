"""Common base of the callbacks: when to measure MIR during training, the measurements, and whether MIR is flat."""

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
    """Common base of the callbacks: when to measure, the measurements, and plateau detection. See `MIRCallback`."""

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
            raise ValueError(f"name: expected letters, digits and underscores, not starting with a digit, got {name!r}")
        require_count("every", every)
        if patience is not None:
            require_count("patience", patience)
        if not min_delta >= 0:
            raise ValueError(f"min_delta: expected a number >= 0, got {min_delta!r}")
        self.probe, self.every, self.patience, self.min_delta = probe, every, patience, min_delta
        self.name, self.every_save = name, every_save
        self.history: list[tuple[int, MIRResult]] = []
        self._values: dict[str, float] = {}  # MIR by step, of this training run
        self._latest: tuple[int, MIRResult] | None = None  # of the model's current weights
        self._capture = dict(capture or {})
        self._metric = {"groups": 0 if patience is None else 5, **(metric or {})}

    def plateau(self) -> bool:
        """Whether the last `patience` + 1 values are flat: their lowest and highest differ by less than two standard
        errors of the difference, or by at most `min_delta`.
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
        """Measures after `step` steps, adds the result to the history, and returns the values to log."""
        start = time.perf_counter()
        result = self.result_at(model, step)
        if self.patience is not None and not self.history:
            self._warn_of_few(result)
        self.history.append((step, result))
        return {**self.numbers(result), f"{self.name}_seconds": time.perf_counter() - start}

    def result_at(self, model: nn.Module, step: int) -> MIRResult:
        """MIR after `step` steps: the latest measurement if it is of this step, otherwise a new one."""
        if self._latest is None or self._latest[0] != step:
            self._latest = step, measure_mir(model, self.probe, capture=self._capture, metric=self._metric)
        return self._latest[1]

    def numbers(self, result: MIRResult) -> dict[str, float]:
        """The values to log: "mir", "mir_error" if there is one, "mir/layer_01" and so on, with `name` for "mir".

        Loggers group names by the part before the slash and sort by the rest, so layer numbers are zero-padded to at
        least two digits.
        """
        error = {} if result.error is None else {f"{self.name}_error": result.error}
        digits = max(2, len(str(len(result.terms))))
        layers = {f"{self.name}/layer_{k:0{digits}}": value for k, value in enumerate(result.per_layer, 1)}
        return {self.name: result.value, **error, **layers}

    def begin(self) -> None:
        """Discards the measurements of a previous training run."""
        self.history, self._values = [], {}
        self.weights_changed()

    def weights_changed(self) -> None:
        """Discards the latest measurement because the model's weights may have changed."""
        self._latest = None

    def warn_unless_restored(self, model: nn.Module, step: int, value: float, what: str, remedy: str) -> None:
        """Measures `model`, whose weights were loaded from files, and warns unless MIR equals `value`, its value when
        the files were written after `step` steps.

        what: names the model, such as "the resumed training"; remedy: how to load the weights. The tolerance covers
        rounding on another device: 1e-5 if the model computes in 32 bits on a CPU, otherwise 1e-3.
        """
        self.weights_changed()
        now = self.result_at(model, step).value
        slack = 1e-5 if _in_32_bits(model) else 1e-3
        if now != value and not abs(now - value) <= slack and is_first_process():
            warnings.warn(
                f"MIR: {what} has a MIR of {now:.6g}, but it was {value:.6g} when the checkpoint was written after "
                f"{step} steps; unless the probe or its options have changed since, not all weights of the checkpoint "
                f"were loaded. {remedy}",
                stacklevel=2,
            )

    def keep(self) -> None:
        """Records the latest measurement as the value after its step, for `saved`."""
        assert self._latest is not None
        self._values[str(self._latest[0])] = self._latest[1].value

    def value_at(self, step: int) -> float | None:
        """MIR after `step` steps of this training run or the one it was resumed from; None if it was not measured."""
        return self._values.get(str(step))

    def saved(self) -> dict[str, Any]:
        """The measurements that `plateau` needs after resuming, and the values at all steps, as JSON types."""
        measured = [[step, json.loads(result.to_json())] for step, result in self.history[-(self.patience or 1) - 1 :]]
        return {"measurements": measured, "values": dict(self._values)}

    def restore(self, saved: Mapping[str, Any], step: int) -> None:
        """Continues from the result of `saved` at `step`, keeping earlier measurements of the same training run."""
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
                f"MIR: the probe has rows for only {got} of {wanted} groups of samples"
                + ("" if got else ", so MIR has no standard error and only min_delta detects a plateau")
                + "; use a probe with more rows",
                stacklevel=2,
            )


def _in_32_bits(model: nn.Module) -> bool:
    """Whether the whole model computes in 32 bits or more: on a CPU, without autocast, with no narrower weight."""
    device = parameter_device(model).type
    narrow = any(p.element_size() < 4 for p in model.parameters())
    return device == "cpu" and not narrow and not torch.is_autocast_enabled(device)
