"""The Modality Integration Rate: `mir` of features in memory, `ModalityIntegrationRate` of a stream."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities.distributed import gather_all_tensors
from torchmetrics.utilities.exceptions import TorchMetricsUserError

from mir_kernels import _checks
from mir_kernels.moments import token_norms
from modality_integration import state_file
from modality_integration.layer import Options, assemble, layer_steps, layers_together, require_finite, results
from modality_integration.layer_stream import LayerStream
from modality_integration.outliers import sent, three_sigma
from modality_integration.result import MODALITIES, MIRResult
from modality_integration.sync import gathered

# What torchmetrics.Metric takes and keeps under the same name.
_OF_TORCHMETRICS = (
    "compute_on_cpu",
    "dist_sync_on_step",
    "process_group",
    "dist_sync_fn",
    "distributed_available_fn",
    "sync_on_compute",
    "compute_with_cache",
)
_PLACE = re.compile(r"0|[1-9]\d{0,5}", re.ASCII)  # a layer in the keys of a state


def mir(
    vision: Sequence[Tensor],
    text: Sequence[Tensor],
    *,
    outliers: str = "remove",
    normalize: bool = True,
    bounds: bool = False,
    sqrt_precision: str = "float32",
    backend: str | None = None,
) -> MIRResult:
    """MIR = log10 sum_k FID(omega(alpha_k f_k^v), omega(alpha_k f_k^t)), Eq. 3 of the MIR paper.

    vision, text: one tensor (n_k, d) per decoder layer 1..K (embeddings left out), f32/bf16/f16/f64; a layer's two
    tensors share d, dtype may differ. Inputs are unchanged.
    outliers: what happens to tokens with |norm - median| > 3 std (ddof 1), a modality and layer at a time: "remove"
    (the paper's text), "median" (replaced by the column medians, as the published code has it), "none".
    normalize: multiply by alpha_k = s / sum_j ||t_kj|| (Eq. 2), over all text tokens, outliers included.
    bounds: also give `lower` and `upper`, between which MIR lies provably.
    sqrt_precision: of Tr((Sigma_v Sigma_t)^(1/2)), see `mir_kernels.trace_sqrt_product`; "float32" promises 1e-6 of the
    root, by tensor cores on a GPU and checked against a dual bound, and 1e-8 comes of float64 decompositions on a CPU.
    Means and covariances are float64 throughout. backend: of the kernels, and of the root where it has that one.
    Raises ValueError or TypeError that names the layer, the modality and, where one token is at fault, its index.
    """
    options = Options(outliers, normalize, bounds, "exact", sqrt_precision, backend=backend).checked()
    vision, text = _layers("vision", vision), _layers("text", text)
    if len(vision) != len(text):
        raise ValueError(f"vision and text: take as many layers each, got {len(vision)} and {len(text)}")
    tasks = (layer_steps(v, t, k, options) for k, (v, t) in enumerate(zip(vision, text, strict=True), 1))
    first = vision[0]
    matrix = isinstance(first, Tensor) and first.dim() == 2
    return assemble(results(tasks, layers_together(first.shape[1], first.device) if matrix else 1), options)


class ModalityIntegrationRate(Metric):
    """MIR (Eq. 3) of hidden states that pass by once, as a torchmetrics.Metric; no features are kept beyond `hold`.

    The norms of all tokens are kept (5 bytes a token and layer), so the 3-sigma limits are exact at the end. Per layer
    and modality, up to `hold` rows are held back until the end, always the most extreme ones so far, and the others go
    into a mean and a covariance. The result is that of `mir` with the same tokens; should a token that was already
    counted lie beyond the final limits, `missed` and `notes` say so with the count, and `second_pass()` gives a metric
    that makes it exact. With fewer tokens than `hold`, everything is decided and computed from the features themselves.

    outliers: "remove" or "none", as for `mir`; "median" needs all features at once and is refused. normalize, bounds,
    sqrt_precision: as for `mir`; bounds hold for the covariances as accumulated.
    precision: of the accumulation, "fast", "auto" or "exact"; see `mir_kernels.StreamingMoments`.
    hold: rows held back per layer and modality at most; 2048, or hidden size + 1 if that is more (also the least).
    groups: 0, or the number of groups that samples (rows of a batch) are dealt into in turn, for the standard error of
    the value: `MIRResult.error`, by the delete-a-group jackknife, without a second pass. 5 or 10 are usual: the error
    itself is uncertain by a factor of 1 +- 1 / sqrt(2 (groups - 1)), 35 % with 5 and 24 % with 10. With each group left
    out, the outlier limits and alpha are decided anew (limits given by a first pass stay), of the moments the others'
    are merged, and the root is taken to a relative 1e-6 (`precision="float32"` of `mir_kernels.trace_sqrt_product`).
    Costs `groups` times the accumulators' memory and, at the end, `groups` more roots a layer. Samples count as
    independent: an image or text that comes twice makes the error too small.
    backend: of the kernels. The rest goes to torchmetrics.Metric (process_group, sync_on_compute, ...).

    Memory: 2K accumulators of d (d + 1) / 2 float64 numbers at most (times `groups`), 2K hold rows in the features'
    dtype, on the device where a layer's hidden states lie; `held_bytes` tells the latter. `compute()` gives a
    MIRResult, repeatably, and changes nothing; under torch.distributed it is that of all processes' tokens, and a
    process may have none. How samples are split among processes changes the distances by less than 1e-9 of themselves
    with `precision="exact"`, and with "auto" by what that leaves open (1e-5 of sigma_i sigma_j in a covariance); which
    tokens beyond the limits had been counted already, if any, depends on the split: a second pass is exact.
    """

    is_differentiable = False
    higher_is_better = False
    full_state_update = True

    def __init__(
        self,
        *,
        outliers: str = "remove",
        normalize: bool = True,
        bounds: bool = False,
        precision: str = "auto",
        sqrt_precision: str = "float32",
        hold: int | None = None,
        backend: str | None = None,
        groups: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if outliers == "median":
            raise ValueError(
                'outliers: "median" takes the column medians of all tokens, which one pass cannot have; use mir() with '
                'the features in memory, or "remove" (the paper\'s rule) here'
            )
        self.options = Options(outliers, normalize, bounds, precision, sqrt_precision, hold, backend, groups).checked()
        self._streams: list[LayerStream] = []
        self._samples = 0  # seen by this process
        self._limits: list[dict] | None = None

    def update(self, hidden_states: Sequence[Tensor], vision_mask: Tensor, text_mask: Tensor) -> None:
        """Count the tokens of one forward pass.

        hidden_states: one tensor (B, T, d) or (T, d) per decoder layer 1..K, f32/bf16/f16/f64, any strides, each on any
        device. vision_mask, text_mask: bool or uint8 (B, T) or (T,), no token in both; either may be empty.
        Raises ValueError or TypeError if anything does not fit, or a masked token is not finite; then nothing changes.
        """
        try:
            indices, norms = self._check_update(hidden_states, vision_mask, text_mask)
        except Exception:
            self._update_count -= 1  # the wrapper of torchmetrics has counted this call already
            raise
        # Not in inference mode even if the model ran in it: the accumulators outlive it.
        with torch.inference_mode(False), torch.no_grad():
            groups = self._deal(hidden_states[0])
            if not self._streams:
                self._device = hidden_states[0].device
                self._streams = [self._stream(k, h.shape[-1], h.dtype, h.device) for k, h in enumerate(hidden_states)]
            # Once a device, not once a layer.
            places = {
                device: {m: tuple(sent(index, device).unbind(1)) for m, index in indices.items() if len(index)}
                for device in {hidden.device for hidden in hidden_states}
            }
            for k, (stream, hidden) in enumerate(zip(self._streams, hidden_states, strict=True)):
                if stream.device != hidden.device:
                    stream.to(hidden.device)
                for modality, place in places[hidden.device].items():
                    rows = hidden.detach()[place]
                    stream.push(modality, rows, norms[modality][k], groups[indices[modality][:, 0]])

    def compute(self) -> MIRResult:
        """MIR of all tokens so far, as a MIRResult.

        Raises ValueError that names the layer and modality where a covariance is undefined (fewer than two tokens).
        """
        if not self._streams:
            raise ValueError("no hidden states yet: MIR takes at least one update")
        together = layers_together(self._streams[0].hidden_size, self._streams[0].device)
        return assemble(results((s.steps(k) for k, s in enumerate(self._streams, 1)), together), self.options)

    def forward(self, hidden_states: Sequence[Tensor], vision_mask: Tensor, text_mask: Tensor) -> MIRResult:
        """Update, and give the MIR of this call's tokens alone. If they have none (too few tokens), nothing changes."""
        if self._is_synced:
            raise TorchMetricsUserError("the metric is synced: call unsync() before forward()")
        batch = self._sibling()
        batch.sync_on_compute = batch._to_sync = self.dist_sync_on_step
        batch.update(hidden_states, vision_mask, text_mask)
        result = batch.compute()
        self.update(hidden_states, vision_mask, text_mask)
        self._forward_cache: Any = result
        return result

    def second_pass(self) -> ModalityIntegrationRate:
        """A fresh metric with this one's final 3-sigma limits: fed the same tokens again, its result is exact."""
        if self.options.outliers == "none":
            raise ValueError('outliers: with "none" the first pass is exact')
        other = self._sibling()
        other._limits = [
            {modality: three_sigma(stream.tokens[modality].norms) for modality in MODALITIES}
            for stream in self._streams
        ]
        return other

    def reset(self) -> None:
        """Forget every token."""
        super().reset()
        self._streams, self._samples = [], 0

    @property
    def held_bytes(self) -> int:
        """Memory allocated for the rows held back."""
        return sum(stream.tokens[modality].held_bytes for stream in self._streams for modality in MODALITIES)

    def save(self, path: str | Path) -> None:
        """Write the whole state to one safetensors file, in one step: the old file or the new is there, never half."""
        state_file.write(Path(path), self.state_dict(), self.options)

    def load(self, path: str | Path) -> ModalityIntegrationRate:
        """Take over, in place, the state that `save` wrote; goes on with the same bits. Gives the metric itself.

        ValueError if the file is none of ours, has changed since it was written, or was gathered with another outlier
        rule or other groups; then nothing changes.
        """
        try:
            self.load_state_dict(state_file.read(path))
        except RuntimeError as error:
            raise ValueError(f"{path}: {error}") from error
        return self

    @classmethod
    def from_file(cls, path: str | Path, **kwargs: Any) -> ModalityIntegrationRate:
        """A metric with the options and the state that `save` wrote; keyword arguments replace options."""
        return cls(**{**state_file.read_options(path)._asdict(), **kwargs}).load(path)

    def state_dict(self, destination: Any = None, prefix: str = "", keep_vars: bool = False) -> dict[str, Any]:  # type: ignore[override]
        """Plain tensors: `version`, `samples`, and under `layers.<k>.` the state of each layer (see `LayerStream`)."""
        destination = super().state_dict(destination=destination, prefix=prefix, keep_vars=keep_vars)
        return self._state_into(destination, prefix)

    def merge_state(self, incoming_state: dict[str, Any] | Metric) -> None:
        """Count another metric's tokens too: the metric, or its `state_dict()`."""
        if isinstance(incoming_state, Metric):
            if (
                not isinstance(incoming_state, ModalityIntegrationRate)
                or incoming_state.options.outliers != self.options.outliers
                or incoming_state.options.groups != self.options.groups
            ):
                raise ValueError(
                    f'incoming_state: takes a ModalityIntegrationRate with outliers="{self.options.outliers}" and '
                    f"groups={self.options.groups}, got {incoming_state!r}"
                )
            other = incoming_state
        else:
            other = self._sibling()
            other.load_state_dict(incoming_state)
        if not other._streams:
            return
        if not self._streams:
            self._streams = [self._stream(k, s.hidden_size, s.dtype, s.device) for k, s in enumerate(other._streams)]
        self._check_shapes("incoming_state", [(s.hidden_size, s.dtype) for s in other._streams])
        for stream, incoming in zip(self._streams, other._streams, strict=True):
            stream.merge(incoming)
        self._samples += other._samples
        self._computed = None
        self._update_count += max(other._update_count, 1)

    @property
    def metric_state(self) -> dict[str, Any]:
        """The state as plain tensors."""
        return self._state_into({}, "")

    def _check_update(
        self, hidden_states: Sequence[Tensor], vision_mask: Tensor, text_mask: Tensor
    ) -> tuple[dict[str, Tensor], dict[str, list[Tensor]]]:
        """Refuse what does not fit; else each modality's token indices (n, 1 or 2) and norms per layer, on the CPU."""
        hidden_states = _layers("hidden_states", hidden_states)
        lead = hidden_states[0].shape[:-1]
        for k, hidden in enumerate(hidden_states):
            name = f"hidden_states[{k}]"
            _checks.tokens(name, hidden)
            if hidden.dim() not in (2, 3):
                raise ValueError(f"{name}: takes shape (B, T, d) or (T, d), got {tuple(hidden.shape)}")
            if hidden.shape[:-1] != lead:
                raise ValueError(f"{name}: has tokens {tuple(hidden.shape[:-1])}, hidden_states[0] has {tuple(lead)}")
            _require_data(name, hidden)
        masks = dict(zip(MODALITIES, (vision_mask, text_mask), strict=True))
        for modality, mask in masks.items():
            _checks.mask(f"{modality}_mask", mask, tuple(lead))
            _require_data(f"{modality}_mask", mask)
        self._check_shapes("hidden_states", [(hidden.shape[-1], hidden.dtype) for hidden in hidden_states])
        masks = {modality: mask.cpu().bool() for modality, mask in masks.items()}
        both = (masks["vision"] & masks["text"]).nonzero()
        if len(both):
            raise ValueError(f"vision_mask and text_mask: {len(both)} tokens are in both, the first {_place(both, 0)}")

        indices = {modality: mask.nonzero() for modality, mask in masks.items()}
        all_norms = [token_norms(hidden.detach(), backend=self.options.backend) for hidden in hidden_states]
        if len({norms.device for norms in all_norms}) == 1:
            all_norms = list(torch.stack(all_norms).cpu())  # one wait for the device, not one a layer
        norms = {m: [layer.cpu()[tuple(i.unbind(1))] for layer in all_norms] for m, i in indices.items()}
        for k in range(len(hidden_states)):
            for modality, index in indices.items():
                require_finite(norms[modality][k], k + 1, modality, partial(_place, index))
        return indices, norms

    def _deal(self, hidden: Tensor) -> Tensor:
        """The groups of the samples of (B, T, d), by sample, or of (T, d), by token: uint8, dealt in turn."""
        batched = hidden.dim() == 3
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        # Processes begin with different groups: each has few samples, and together they are to fill all groups alike.
        first = self._samples + (torch.distributed.get_rank(self.process_group) if distributed else 0)
        samples = torch.arange(first, first + hidden.shape[0]) if batched else torch.full(hidden.shape[:1], first)
        self._samples += hidden.shape[0] if batched else 1
        return (samples % max(self.options.groups, 1)).to(torch.uint8)

    def _check_shapes(self, name: str, shapes: list[tuple[int, torch.dtype]]) -> None:
        known = [(stream.hidden_size, stream.dtype) for stream in self._streams]
        expected = len(known) or len(self._limits or shapes)
        if len(shapes) != expected:
            raise ValueError(f"{name}: has {len(shapes)} layers, the tokens before had {expected}")
        for k, (new, old) in enumerate(zip(shapes, known, strict=False), 1):
            if new != old:
                raise ValueError(
                    f"{name}: layer {k} has d = {new[0]}, {new[1]}; the tokens before had d = {old[0]}, {old[1]}"
                )

    def _stream(self, k: int, hidden_size: int, dtype: torch.dtype, device: torch.device) -> LayerStream:
        limits = self._limits[k] if self._limits else None
        return LayerStream(hidden_size, dtype, device, self.options, limits)

    def _sibling(self) -> ModalityIntegrationRate:
        other = type(self)(**self.options._asdict(), **{name: getattr(self, name) for name in _OF_TORCHMETRICS})
        other._limits = self._limits
        return other

    def _state_into(self, destination: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
        destination[f"{prefix}version"] = torch.tensor(state_file.VERSION)
        destination[f"{prefix}samples"] = torch.tensor(self._samples)
        for k, stream in enumerate(self._streams):
            destination |= {f"{prefix}layers.{k}.{key}": value for key, value in stream.state_dict().items()}
        return destination

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
        version, samples = own.pop("version", None), own.pop("samples", None)
        if version is None:
            missing.append(f"{prefix}version")
            return
        if samples is None:
            missing.append(f"{prefix}samples")
            return
        try:
            number, seen = _checks.whole_number("version", version), _checks.whole_number("samples", samples)
        except (TypeError, ValueError) as error:
            errors.append(f"{prefix}{error}")
            return
        if number != state_file.VERSION:
            errors.append(f"{prefix}version: takes {state_file.VERSION}, got {number}")
            return
        layers: dict[int, dict[str, Tensor]] = {}
        strange = []
        for key, value in own.items():
            place, _, rest = key.removeprefix("layers.").partition(".")
            if key.startswith("layers.") and _PLACE.fullmatch(place):
                layers.setdefault(int(place), {})[rest] = value
            else:
                strange.append(prefix + key)
        unexpected.extend(strange)
        if strict and strange:
            return  # will be refused: nothing may change
        try:
            streams = [self._loaded(layers, k) for k in range(len(layers))]
        except (TypeError, ValueError) as error:
            errors.append(f"{prefix}{error}")
            return
        if any(stream.keeps_all != (self.options.outliers == "none") for stream in streams):
            errors.append(f'{prefix}: was gathered with another outlier rule than outliers="{self.options.outliers}"')
            return
        self._streams, self._samples, self._computed = streams, seen, None
        self._update_count = max(self._update_count, 1)

    def _loaded(self, layers: dict[int, dict[str, Tensor]], k: int) -> LayerStream:
        """Layer k of a state, or an error that names it."""
        if k not in layers:
            raise ValueError(f"layers.{k}: is missing, of {len(layers)} layers")
        state = layers[k]
        for key in ("vision.held", "text_norms"):
            if not isinstance(state.get(key), Tensor):
                raise ValueError(f"layers.{k}.{key}: takes a tensor, got {type(state.get(key)).__name__}")
        groups, held = state["text_norms"].numel(), state["vision.held"]
        if groups != max(self.options.groups, 1):
            raise ValueError(f"was gathered in {groups} groups, takes groups={self.options.groups}")
        _checks.tokens(f"layers.{k}.vision.held", held)
        stream = LayerStream(held.shape[-1], held.dtype, self._device, self.options)
        try:
            stream.load_state_dict(state)
        except (TypeError, ValueError) as error:
            raise ValueError(f"layers.{k}.{error}") from error
        return stream

    def _copy_state_dict(self) -> dict[str, Any]:
        return {"_streams": self._streams}  # what replaces them, in sync, is made anew

    def _sync_dist(self, dist_sync_fn: Callable = gather_all_tensors, process_group: Any = None) -> None:
        group = process_group or self.process_group
        device = _transport_device(group)
        self._streams = gathered(self._streams, self.options, lambda tensor: dist_sync_fn(tensor, group=group), device)

    def _apply(self, fn: Callable, exclude_state: Sequence[str] = "") -> torch.nn.Module:
        this = super()._apply(fn, exclude_state)
        for stream in self._streams:
            device = fn(torch.empty(0, device=stream.device)).device
            if device != stream.device:
                stream.to(device)
        return this


def _layers(name: str, value: Sequence[Tensor]) -> Sequence[Tensor]:
    if isinstance(value, Tensor) or not isinstance(value, Sequence):
        raise TypeError(f"{name}: takes a list with one tensor per decoder layer, got {type(value).__name__}")
    if not value:
        raise ValueError(f"{name}: takes at least one layer, got an empty list")
    return value


def _require_data(name: str, value: Tensor) -> None:
    if value.is_meta:
        raise ValueError(f"{name}: takes a tensor with data, got one on the meta device")


def _place(indices: Tensor, i: int) -> int | tuple[int, ...]:
    place = tuple(indices[i].tolist())
    return place[0] if len(place) == 1 else place


def _transport_device(group: Any) -> torch.device:
    """Where tensors travel from: the CPU if the group has a backend for it, else (NCCL) this process's GPU.

    Not where the data lie: the processes must agree, and one without data has none.
    """
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    if not distributed or "cpu:" in torch.distributed.get_backend_config(group):
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())
