"""MIR of hidden states saved to files, one layer at a time: needs memory for one layer's accumulators and one tensor.

File layout (safetensors), one file per forward pass or batch:

    layer.1 ... layer.K   (T, d) or (B, T, d), f32/bf16/f16/f64: the output of each decoder layer, without embeddings
    vision_mask           (T,) or (B, T), bool or uint8: the vision tokens
    text_mask             likewise: the text tokens; a token is in at most one mask (prompt and padding are in neither)

`save_states` writes it. Any number of files form one sample set; they share K, d and the dtype of each layer.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mir_kernels import _checks, token_norms
from modality_integration.metric import MODALITIES
from modality_integration.metric.accumulator import LayerAccumulator
from modality_integration.metric.features import feature_layer_result
from modality_integration.metric.files import written_whole
from modality_integration.metric.forward_tokens import checked_hidden_states
from modality_integration.metric.layer import LayerResult, mir_result
from modality_integration.metric.options import Backend, MetricOptions, Outliers, Precision, Sinks, SqrtPrecision
from modality_integration.metric.outliers import Limits
from modality_integration.metric.packing import Packing, ids_of
from modality_integration.metric.result import MIRResult
from modality_integration.metric.sinks import SinkMarks, concentrated, massive_tokens, no_sinks
from modality_integration.metric.tokens import require_finite, require_tokens

if TYPE_CHECKING:
    from mir_kernels._arrays import Array


def save_states(
    path: str | Path,
    hidden_states: Sequence[Array],
    vision_mask: Array,
    text_mask: Array,
    sample_ids: Array | None = None,
) -> None:
    """Write the hidden states of decoder layers 1..K and the token roles in the layout above.

    Arguments and errors are those of `ModalityIntegrationRate.update`; packed samples are written as one row each.
    """
    states = checked_hidden_states(hidden_states)
    lead = tuple(states[0].shape[:-1])
    masks = {n: _checks.mask(n, m, lead) for n, m in (("vision_mask", vision_mask), ("text_mask", text_mask))}
    if (ids := ids_of(states, sample_ids)) is not None:
        packing = Packing(ids, lead)
        states = [packing.unpacked(hidden.detach()) for hidden in states]
        masks = {name: packing.unpacked(mask) for name, mask in masks.items()}
    tensors = {f"layer.{k}": hidden.detach().contiguous() for k, hidden in enumerate(states, 1)}
    tensors |= {name: mask.contiguous() for name, mask in masks.items()}
    with written_whole(Path(path)) as partial:
        save_file({name: tensor.cpu().clone() for name, tensor in tensors.items()}, partial)


def mir_of_states(
    paths: Sequence[str | Path],
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
    device: torch.device | str = "cpu",
    progress: Callable[[int, int], None] = lambda layer, layers: None,
) -> MIRResult:
    """MIR of all tokens in `paths`; arguments as for `ModalityIntegrationRate`, plus outliers="median" as for `mir`.

    Every file is read completely once to find attention sinks, which depend on all layers, and then once per layer. A
    layer is read again if its outlier limits moved during reading, so the outlier rule is always exact.
    outliers="median" needs the column medians, so it holds one layer's features in memory; it does not support groups.
    groups: each (T, d), and each row of a (B, T, d), is one sample.
    device: where the arithmetic runs. progress(layer, layers) is called before each layer, 1..K.
    A file that is listed twice, or has the same states as another, counts once, and a note says so.
    Raises ValueError that names the file, the layer and, if a single token is at fault, its index.
    """
    options = MetricOptions(
        outliers, normalize, bounds, precision, sqrt_precision, hold, backend, groups, sinks
    ).checked()
    if groups and outliers == "median":
        raise ValueError(
            f'groups: expected 0 with outliers="median", got {groups}; a standard error requires "remove" or "none"'
        )
    if not paths:
        raise ValueError("paths: expected at least one file, got none")
    states = [_States(Path(path)) for path in paths]
    for other in states[1:]:
        if other.layers != states[0].layers:
            raise ValueError(
                f"{other.path} has {other.layers} layers, {states[0].path} has {states[0].layers}: all must agree"
            )
    for state in states:
        state.find_sinks(options, torch.device(device))
    states, notes = _each_once(states)
    results = []
    for layer in range(1, states[0].layers + 1):
        progress(layer, states[0].layers)
        whole = _whole_layer if outliers == "median" else _streamed_layer
        results.append(whole(states, layer, options, torch.device(device)))
    result = mir_result(results, options)
    result.notes.extend(notes)
    return result


def _each_once(states: list[_States]) -> tuple[list[_States], list[str]]:
    """The files without duplicates, and a note on each duplicate.

    Files are compared by the norms of all tokens in all layers. A sample counted twice would have double weight and be
    in two groups of the standard error, which assumes independent samples.
    """
    first: dict[tuple[object, bytes], _States] = {}
    notes = []
    for state in states:
        hashed = hashlib.sha256()
        for tensor in (*(state.masks[modality] for modality in MODALITIES), *state.norms):
            hashed.update(tensor.numpy())
        if (other := first.setdefault((state.lead, hashed.digest()), state)) is not state:
            same = (
                "it was listed twice" if state.path.samefile(other.path) else f"it has the same states as {other.path}"
            )
            notes.append(f"{state.path} counts once: {same}")
    return list(first.values()), notes


def _streamed_layer(states: list[_States], layer: int, options: MetricOptions, device: torch.device) -> LayerResult:
    result, accumulator = _pass(states, layer, options, device, None)
    if sum(result.missed.values()):  # read the layer again with its final limits
        result, _ = _pass(states, layer, options, device, accumulator.final_limits)
    return result


def _pass(
    states: list[_States], layer: int, options: MetricOptions, device: torch.device, limits: dict[str, Limits] | None
) -> tuple[LayerResult, LayerAccumulator]:
    accumulator: LayerAccumulator | None = None
    for path, modality, rows, norms, groups, marks in _rows(states, layer, options, device):
        if accumulator is None:
            accumulator = LayerAccumulator(layer, rows.shape[1], rows.dtype, device, options, limits)
        if (rows.shape[1], rows.dtype) != (accumulator.hidden_size, accumulator.dtype):
            raise ValueError(
                f"{path}: layer {layer} has d = {rows.shape[1]}, {rows.dtype}; earlier files had "
                f"d = {accumulator.hidden_size}, {accumulator.dtype}"
            )
        accumulator.push(modality, rows, norms, groups, marks)
    if accumulator is None:
        raise ValueError(f"layer {layer}: no token of vision or text in any file")
    return accumulator.result(), accumulator


def _whole_layer(states: list[_States], layer: int, options: MetricOptions, device: torch.device) -> LayerResult:
    parts: dict[str, list[Tensor]] = {modality: [] for modality in MODALITIES}
    marked: dict[str, list[SinkMarks]] = {modality: [] for modality in MODALITIES}
    for _, modality, rows, _, _, marks in _rows(states, layer, options, device):
        parts[modality].append(rows)
        marked[modality].append(marks or no_sinks(len(rows)))
    for modality in MODALITIES:
        require_tokens(sum(len(rows) for rows in parts[modality]), layer, modality)
    joined = {m: SinkMarks(*map(torch.cat, zip(*of_files, strict=True))) for m, of_files in marked.items()}
    found = joined if any(bool(joined[m].sink.any()) for m in MODALITIES) else None
    return feature_layer_result(torch.cat(parts["vision"]), torch.cat(parts["text"]), layer, options, found)


def _rows(
    states: list[_States], layer: int, options: MetricOptions, device: torch.device
) -> Iterator[tuple[Path, str, Tensor, Tensor, Tensor, SinkMarks | None]]:
    """Yield (file, modality, rows, norms, groups of their samples, sink marks), file by file."""
    samples = 0
    for state in states:
        hidden = state.hidden(layer)
        for modality in MODALITIES:
            index = state.masks[modality].flatten().nonzero().flatten()
            if len(index):
                rows = hidden.index_select(0, index).to(device)
                norms = state.norms[layer - 1][index]
                try:
                    require_finite(norms, layer, modality, partial(state.place, index))
                except ValueError as error:
                    raise ValueError(f"{state.path}: {error}") from None
                groups = (samples + index // state.lead[-1]) % max(options.groups, 1)
                yield state.path, modality, rows, norms, groups.to(torch.uint8), state.marks(layer, index)
        samples += math.prod(state.lead[:-1])


class _States:
    """One file: its masks, and its layers read on demand."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.norms: list[Tensor] = []  # (tokens,) per layer, set by find_sinks
        self._massive: Tensor | None = None  # (K, tokens), likewise; None if no token is massive
        try:
            with safe_open(path, framework="pt") as file:
                names = set(file.keys())
                self.layers = sum(name.startswith("layer.") for name in names)
                expected = {f"layer.{k}" for k in range(1, self.layers + 1)} | {f"{m}_mask" for m in MODALITIES}
                if names != expected or not self.layers:
                    odd = sorted(names ^ expected) or ["layer.1"]
                    raise ValueError(
                        f"{path}: expected the tensors layer.1 ... layer.K, vision_mask and text_mask; missing or "
                        f"unexpected: {', '.join(odd[:5])}"
                    )
                self.masks = {m: file.get_tensor(f"{m}_mask") for m in MODALITIES}
                self.lead = tuple(self.masks["vision"].shape)
                for k in range(1, self.layers + 1):
                    shape = tuple(file.get_slice(f"layer.{k}").get_shape())
                    if len(shape) not in (2, 3) or shape[:-1] != self.lead or shape[-1] < 1:
                        raise ValueError(
                            f"{path}: layer.{k}: expected (T, d) or (B, T, d) to match masks {self.lead}, got {shape}"
                        )
        except SafetensorError as error:
            raise ValueError(f"{path}: is not a readable safetensors file ({error})") from error
        for modality, mask in self.masks.items():
            try:
                _checks.mask(f"{path}: {modality}_mask", mask, self.lead)
            except TypeError as error:  # for a file, a wrong dtype is a wrong value
                raise ValueError(str(error)) from error
        self.masks = {modality: mask.bool() for modality, mask in self.masks.items()}
        both = int((self.masks["vision"] & self.masks["text"]).sum())
        if both:
            raise ValueError(f"{path}: {both} tokens are in both vision_mask and text_mask")

    def hidden(self, layer: int) -> Tensor:
        """Layer 1..K as (tokens, d)."""
        try:
            with safe_open(self.path, framework="pt") as file:
                hidden = file.get_tensor(f"layer.{layer}")
            _checks.floating(f"{self.path}: layer.{layer}", hidden)
        except SafetensorError as error:
            raise ValueError(f"{self.path}: layer.{layer} cannot be read ({error})") from error
        except TypeError as error:
            raise ValueError(str(error)) from error
        return hidden.flatten(0, -2)

    def find_sinks(self, options: MetricOptions, device: torch.device) -> None:
        """Search all layers for tokens of massive activation."""
        self.norms = [
            token_norms(self.hidden(layer).to(device), backend=options.backend).cpu()
            for layer in range(1, self.layers + 1)
        ]

        def concentrated_at(k: int, places: Tensor) -> Tensor:
            return concentrated(self.hidden(k + 1).view(*self.lead, -1)[tuple(places.unbind(1))])

        massive = massive_tokens(torch.stack(self.norms).view(-1, *self.lead), self.masks, concentrated_at)
        self._massive = None if massive is None else massive.flatten(1)

    def marks(self, layer: int, index: Tensor) -> SinkMarks | None:
        """The sink marks of the tokens with flat indices `index`; None if the file has no sinks."""
        if self._massive is None:
            return None
        positions = (index % self.lead[-1]).to(torch.int32)
        return SinkMarks(self._massive[:, index].any(0), self._massive[layer - 1, index], positions)

    def place(self, index: Tensor, i: int) -> int | tuple[int, ...]:
        """The index in (T,) or (B, T) of the token with flat index `index[i]`."""
        place = tuple(int(axis) for axis in torch.unravel_index(index[i], self.lead))
        return place[0] if len(place) == 1 else place
