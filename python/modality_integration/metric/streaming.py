"""`ModalityIntegrationRate`: MIR of streamed hidden states, as a torchmetrics.Metric."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities.distributed import gather_all_tensors

from modality_integration.metric import metric_state, state_file
from modality_integration.metric.accumulator import LayerAccumulator
from modality_integration.metric.dealing import dealt, share
from modality_integration.metric.distance import layers_together
from modality_integration.metric.forward_tokens import ForwardTokens, checked_hidden_states
from modality_integration.metric.guarded_metric import GuardedMetric
from modality_integration.metric.host_memory import HostMemory
from modality_integration.metric.layer import layer_results, mir_result
from modality_integration.metric.memory import MemoryToCome, memory_to_come
from modality_integration.metric.options import Backend, MetricOptions, Outliers, Precision, Sinks, SqrtPrecision
from modality_integration.metric.outliers import Limits
from modality_integration.metric.packing import Packing, ids_of
from modality_integration.metric.sync import gathered, transport_device
from modality_integration.metric.tensor_result import MIRTensor

if TYPE_CHECKING:
    from mir_kernels._arrays import Array

__all__ = ["ModalityIntegrationRate"]

# Arguments of torchmetrics.Metric that it stores under the same name.
_OF_TORCHMETRICS = (
    "compute_on_cpu",
    "dist_sync_on_step",
    "process_group",
    "dist_sync_fn",
    "distributed_available_fn",
    "sync_on_compute",
    "compute_with_cache",
)


class ModalityIntegrationRate(GuardedMetric):
    """MIR (Eq. 3) of streamed hidden states, as a torchmetrics.Metric that stores no features beyond `hold`.

    The norms of all tokens are kept (5 bytes per token and layer), so the final 3-sigma limits are exact. Per layer and
    modality, up to `hold` rows are held back until the end, always the most extreme ones so far; the others go into a
    mean and a covariance. The result equals that of `mir` on the same tokens. If a token that was already counted lies
    beyond the final limits, `missed` and `notes` report the count, and `second_pass()` returns a metric that makes the
    result exact. With fewer tokens than `hold`, everything is decided and computed from the features themselves.

    outliers: "remove" or "none", as for `mir`; "median" needs all features at once and raises an error. normalize,
    bounds, sqrt_precision: as for `mir`; bounds hold for the means and covariances as accumulated.
    precision: of the accumulation, "fast", "auto" or "exact"; see `mir_kernels.StreamingMoments`.
    hold: maximum number of rows held back per layer and modality. Default 2048; at least hidden size + 1.
    groups: 0, or the number of groups of samples (rows of a batch) for the standard error `MIRResult.error`, a
    delete-a-group jackknife that needs no second pass. 5 or 10 are usual: the error itself is uncertain by a factor of
    1 +- 1 / sqrt(2 (groups - 1)), 35 % with 5 and 24 % with 10. With each group left out, the outlier limits and alpha
    are recomputed (limits from a first pass stay), the moments of the other groups are merged, and the root is computed
    to a relative 1e-6 (`precision="float32"` of `mir_kernels.trace_sqrt_product`). Accumulator memory grows by a factor
    of `groups`, and the end needs `groups` more roots per layer. Samples are assumed independent: a repeated image or
    text makes the error too small.
    samples: the total number of samples, if known (more raise an error, fewer add a note). Groups are then consecutive
    instead of round-robin, and on CUDA the accumulators of finished groups move to host memory, so the device holds
    only one group's; results are bit-identical. Samples must come in random order: groups of unlike samples make the
    error too large. If processes sync on compute, it is the total over all of them; process p of P then has
    samples p, p + P, ..., or the same number of others.
    sinks: "report" or "leave out", as for `mir`; attention sinks are detected within each sample, from all layers of an
    update.
    backend: of the kernels. Other arguments go to torchmetrics.Metric (process_group, sync_on_compute, ...).

    As part of a model, the metric adds its state to the model's `state_dict` only after `persistent(True)`; an existing
    state is always loaded. It works with the wrappers of torchmetrics. BootStrapper uses the length of its first
    argument as the number of samples, so name a mask first: `boot.update(vision_mask=..., text_mask=...,
    hidden_states=[...])`. It needs one metric per resample; prefer `groups`.

    Memory: at most 2K accumulators of d (d + 1) / 2 float64 numbers (times `groups`; but see `samples`), and 2K hold
    rows in the features' dtype, on the device of the layer's hidden states. `held_bytes` is the size of these rows;
    `memory_to_come` estimates future needs. `compute()` returns a MIRResult and changes nothing, so it can be repeated.
    Under torch.distributed the result covers all processes' tokens; a process may have none. The split of samples among
    processes changes the distances by less than 1e-9 (relative) with `precision="exact"`, and with "auto" by up to its
    accuracy (1e-5 of sigma_i sigma_j in a covariance). Which tokens beyond the limits were counted early, if any, also
    depends on the split; a second pass is exact.
    """

    is_differentiable = higher_is_better = False
    full_state_update = True

    STATE = ("_layers", "_samples")

    _strict = True  # whether load_state_dict rejects unexpected keys

    def __init__(
        self,
        *,
        outliers: Outliers = "remove",
        normalize: bool = True,
        bounds: bool = False,
        precision: Precision = "auto",
        sqrt_precision: SqrtPrecision = "float32",
        hold: int | None = None,
        backend: Backend | None = None,
        groups: int = 0,
        sinks: Sinks = "report",
        samples: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self._device = torch.device("cpu")  # states load here, whatever the default device is
        if outliers == "median":
            raise ValueError(
                'outliers: expected "remove" or "none", got "median", which needs all tokens at once; use mir() with '
                'the features in memory, or "remove" (the paper\'s rule) here'
            )
        self.options = MetricOptions(
            outliers, normalize, bounds, precision, sqrt_precision, hold, backend, groups, sinks, samples
        ).checked()
        self._host = HostMemory()
        self._layers: list[LayerAccumulator] = []
        self._samples = 0  # seen by this process so far
        self._limits: list[dict[str, Limits]] | None = None

    def update(
        self,
        hidden_states: Sequence[Array],
        vision_mask: Array,
        text_mask: Array,
        sample_ids: Array | None = None,
    ) -> None:
        """Count the tokens of one forward pass.

        hidden_states: one tensor or numpy array (B, T, d) or (T, d) per decoder layer 1..K, f32/bf16/f16/f64, any
        strides, each on any device. vision_mask, text_mask: (B, T) or (T,), bool or 0 and 1, no token in both.
        sample_ids: for rows of several samples (packed, padding-free), integers (B, T) or (T,): each token's sample
        within its row, negative for none. `capture` detects them, and its `hidden_states` carry them.
        Raises ValueError or TypeError if anything does not match or a masked token is not finite, TorchMetricsUserError
        between `sync` and `unsync`; nothing changes then.
        """
        hidden_states = checked_hidden_states(hidden_states)
        self._check_shapes("hidden_states", [(hidden.shape[-1], hidden.dtype) for hidden in hidden_states])
        packing = _packing(hidden_states, sample_ids)
        tokens = ForwardTokens.of(hidden_states, vision_mask, text_mask, self.options.backend, packing)
        count = _sample_count(hidden_states[0], packing)
        groups = self._deal(count)
        # Even if the model runs in inference mode: the accumulators outlive it.
        with torch.inference_mode(False), torch.no_grad():
            self._samples += count
            if not self._layers:
                self._device = hidden_states[0].device
                self._layers = [self._layer(k, h.shape[-1], h.dtype, h.device) for k, h in enumerate(hidden_states)]
            # Once per device, not per layer.
            places = {device: tokens.places_on(device) for device in {hidden.device for hidden in hidden_states}}
            for k, (layer, hidden) in enumerate(zip(self._layers, hidden_states, strict=True)):
                if layer.device != hidden.device:
                    layer.to(hidden.device)
                for modality, place in places[hidden.device].items():
                    rows, of_samples = hidden.detach()[place], groups[tokens.samples[modality]]
                    marks = None if tokens.sinks is None else tokens.sinks[modality][k]
                    layer.push(modality, rows, tokens.norms[modality][k], of_samples, marks)

    def compute(self) -> MIRTensor:
        """MIR of all tokens so far: a `MIRResult` that is also a tensor (`MIRTensor`).

        Raises ValueError that names layer and modality if a covariance is undefined (fewer than two tokens).
        """
        if not self._layers:
            raise ValueError("no hidden states yet: MIR requires at least one update")
        together = layers_together(self._layers[0].hidden_size, self._layers[0].device)
        result = mir_result(layer_results(self._layers, self.options, together), self.options)
        samples = self.own("_samples")
        if result.left_out and self.options.samples and samples < (due := share(self.options.samples, *self._of)):
            result.notes.append(
                f"only {samples} of {due} announced samples arrived, so the groups of the standard error differ in size"
            )
        return result

    def forward(
        self,
        hidden_states: Sequence[Array],
        vision_mask: Array,
        text_mask: Array,
        sample_ids: Array | None = None,
    ) -> MIRTensor:
        """Update, and return the MIR of this call's tokens alone. If it is undefined (too few), nothing changes."""
        self.require_unsynced("forward()")
        hidden_states = checked_hidden_states(hidden_states)
        batch = self._sibling()
        batch.sync_on_compute = batch._to_sync = self.dist_sync_on_step
        if self.options.samples is not None:  # of this call alone, to fill all groups
            packing = _packing(hidden_states, sample_ids)
            samples = max(_sample_count(hidden_states[0], packing) * batch._of[1], 1)
            batch.options = replace(batch.options, samples=samples)
        batch.update(hidden_states, vision_mask, text_mask, sample_ids)
        result = batch.compute()
        self.update(hidden_states, vision_mask, text_mask, sample_ids)
        self._forward_cache: Any = result
        return result

    def second_pass(self) -> ModalityIntegrationRate:
        """A new metric with this one's final 3-sigma limits: given the same tokens again, its result is exact."""
        if self.options.outliers == "none":
            raise ValueError('outliers: expected "remove" for a second pass, got "none", whose first pass is exact')
        other = self._sibling()
        other._limits = [layer.final_limits for layer in self._layers]
        return other

    def reset(self) -> None:
        """Forget every token."""
        super().reset()
        self._layers, self._samples = [], 0

    @property
    def held_bytes(self) -> int:
        """Memory allocated for the rows held back."""
        return sum(layer.held_bytes for layer in self._layers)

    def memory_to_come(self, samples: int, groups: int | None = None) -> MemoryToCome:
        """Estimated bytes that the stream and `compute` will need beyond those held now, after `samples` samples of
        this process like those so far. groups: assume this number of groups. ValueError before the first sample.
        """
        if not self._samples:
            raise ValueError("samples: expected at least one sample seen before the estimate, got none")
        return memory_to_come(self._layers, max(samples / self._samples, 1.0), groups)

    def save(self, path: str | Path) -> None:
        """Write the whole state to one safetensors file atomically: a failed write leaves the old file."""
        state_file.write(Path(path), metric_state.to_tensors(self._layers, self._samples), self.options)

    def load(self, path: str | Path) -> ModalityIntegrationRate:
        """Restore, in place, a state written by `save`; continuing from it is bit-identical. Returns the metric itself.

        ValueError if the file is not such a state, is damaged, or was gathered with a different outlier rule, number of
        groups or handling of sinks; nothing changes then.
        """
        try:
            self.load_state_dict(state_file.read(path))
        except RuntimeError as error:
            raise ValueError(f"{path}: {error}") from error
        return self

    @classmethod
    def from_file(cls, path: str | Path, **kwargs: Any) -> ModalityIntegrationRate:
        """A metric with the options and the state written by `save`; keyword arguments replace options."""
        return cls(**{**asdict(state_file.read_options(path)), **kwargs}).load(path)

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        """Restore a `state_dict` in place. RuntimeError, and nothing changes, for an invalid state, or for unexpected
        keys unless strict is False.
        """
        self._strict = strict  # torch does not pass it on to modules
        try:
            return super().load_state_dict(state_dict, strict, assign)
        finally:
            self._strict = True

    def state_dict(self, destination: Any = None, prefix: str = "", keep_vars: bool = False) -> dict[str, Any]:  # type: ignore[override]
        """Plain tensors: `version`, `samples`, and under `layers.<k>.` the state of each layer. A copy, independent of
        the metric.

        A model's `state_dict` includes them only after `persistent(True)`; after `persistent(False)` none does.
        """
        destination = super().state_dict(destination=destination, prefix=prefix, keep_vars=keep_vars)
        if self.belongs_into(prefix):
            destination.update({f"{prefix}{key}": value for key, value in self.metric_state.items()})
        return destination

    @property
    @torch.inference_mode(False)  # the copy outlives inference mode
    def metric_state(self) -> dict[str, Any]:
        """A copy of the state as plain tensors."""
        return {key: value.clone() for key, value in metric_state.to_tensors(self._layers, self._samples).items()}

    def merge_state(self, incoming_state: dict[str, Any] | Metric) -> None:
        """Also count the tokens of another metric, given as the metric or its `state_dict()`."""
        self.require_unsynced("merge_state()")
        if incoming_state is self:
            raise ValueError("incoming_state: expected another metric, got the same one")
        if isinstance(incoming_state, Metric):
            if (
                not isinstance(incoming_state, ModalityIntegrationRate)
                or incoming_state.options.outliers != self.options.outliers
                or incoming_state.options.groups != self.options.groups
                or incoming_state.options.sinks != self.options.sinks
            ):
                raise ValueError(
                    f'incoming_state: expected a ModalityIntegrationRate with outliers="{self.options.outliers}", '
                    f'groups={self.options.groups} and sinks="{self.options.sinks}", got {incoming_state!r}'
                )
            other = incoming_state
        else:
            other = self._sibling()
            other.load_state_dict(incoming_state)
        if not other._layers:
            return
        self._check_shapes("incoming_state", [(layer.hidden_size, layer.dtype) for layer in other._layers])
        if not self._layers:
            self._layers = [
                self._layer(k, layer.hidden_size, layer.dtype, layer.device) for k, layer in enumerate(other._layers)
            ]
        for layer, incoming in zip(self._layers, other._layers, strict=True):
            layer.merge(incoming)
        self._samples += other._samples
        self._computed = None
        self._update_count += max(other._update_count, 1)

    @property
    def _of(self) -> tuple[int, int]:
        """Rank and number of processes; with announced samples, only processes that `compute` syncs count."""
        alone = self.options.samples is not None and not self.sync_on_compute
        if alone or not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return 0, 1
        return torch.distributed.get_rank(self.process_group), torch.distributed.get_world_size(self.process_group)

    def _deal(self, count: int) -> Tensor:
        """The groups of the next `count` samples: uint8 (count,)."""
        process, processes = self._of
        options = self.options
        return dealt(self._samples, count, options.groups, options.samples, process=process, processes=processes)

    def _check_shapes(self, name: str, shapes: list[tuple[int, torch.dtype]]) -> None:
        known = [(layer.hidden_size, layer.dtype) for layer in self._layers]
        expected = len(known) or len(self._limits or shapes)
        if len(shapes) != expected:
            raise ValueError(f"{name}: has {len(shapes)} layers, earlier tokens had {expected}")
        for k, (new, old) in enumerate(zip(shapes, known, strict=False), 1):
            if new != old:
                raise ValueError(
                    f"{name}: layer {k} has d = {new[0]}, {new[1]}; earlier tokens had d = {old[0]}, {old[1]}"
                )

    def _layer(self, k: int, hidden_size: int, dtype: torch.dtype, device: torch.device) -> LayerAccumulator:
        limits = self._limits[k] if self._limits else None
        return LayerAccumulator(k + 1, hidden_size, dtype, device, self.options, limits, self._host)

    def _sibling(self) -> ModalityIntegrationRate:
        """A new metric with the same options and no tokens."""
        other = type(self)(**asdict(self.options), **{name: getattr(self, name) for name in _OF_TORCHMETRICS})
        other._host = self._host.another()
        other._limits = self._limits
        other._in_state_dict = self._in_state_dict
        return other

    def _load_from_state_dict(
        self,
        state_dict: dict,
        prefix: str,
        local_metadata: dict,
        strict: bool,
        missing: list,
        unexpected: list,
        errors: list,
    ) -> None:
        own = {key.removeprefix(prefix): value for key, value in state_dict.items() if key.startswith(prefix)}
        if prefix and not own:
            return  # a model's state without the metric: keep its tokens
        self.require_unsynced("load_state_dict()")
        strict = self._strict
        read = metric_state.from_tensors(own, self.options, self._device, self._host, strict=strict)
        missing += [prefix + key for key in read.missing]
        unexpected += [prefix + key for key in read.unexpected]
        errors += [] if read.error is None else [prefix + read.error]
        if prefix and read.unexpected:  # whether the model is loaded strictly is unknown here
            errors.append(f"{prefix}: nothing was loaded because of unexpected keys: {read.unexpected[:5]}")
        if not read.whole or (strict and read.unexpected):
            return  # rejected: nothing may change
        self._layers, self._samples, self._computed = read.layers, read.samples, None
        self._update_count = max(self._update_count, 1)

    def _sync_dist(self, dist_sync_fn: Callable = gather_all_tensors, process_group: Any = None) -> None:
        group = process_group or self.process_group
        device = transport_device(group)

        def gather(tensor: Tensor) -> list[Tensor]:
            return dist_sync_fn(tensor, group=group)

        self._layers, self._samples = gathered(self._layers, self._samples, self.options, gather, device, self._host)

    def _apply(self, fn: Callable, exclude_state: Sequence[str] = "") -> torch.nn.Module:
        this = super()._apply(fn, exclude_state)
        for layer in (*self._layers, *(self._cache or {}).get("_layers", ())):
            device = fn(torch.empty(0, dtype=torch.float32, device=layer.device)).device
            if device != layer.device:
                layer.to(device)
        return this


def _packing(hidden_states: Sequence[Tensor], sample_ids: Array | None) -> Packing | None:
    """The packing of samples in these hidden states; None if each row is one sample."""
    ids = ids_of(hidden_states, sample_ids)
    return None if ids is None else Packing(ids, tuple(hidden_states[0].shape[:-1]))


def _sample_count(hidden: Tensor, packing: Packing | None) -> int:
    """Number of samples: B for (B, T, d), 1 for (T, d), unless they are packed."""
    return len(packing) if packing is not None else len(hidden) if hidden.dim() == 3 else 1
