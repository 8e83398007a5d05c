"""The tokens of one forward pass: checked and split by modality, with their norms in every layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from mir_kernels import _checks, token_norms
from mir_kernels._gate import with_memory
from modality_integration.metric import MODALITIES
from modality_integration.metric.options import Backend
from modality_integration.metric.packing import PackedStates, Packing
from modality_integration.metric.sinks import SinkMarks, concentrated, massive_tokens
from modality_integration.metric.tokens import one_tensor_a_layer, require_finite, sent

if TYPE_CHECKING:
    from mir_kernels._arrays import Array


class ForwardTokens(NamedTuple):
    """Indices of each modality's tokens in (T,) or (B, T), and their norms per layer, on the CPU.

    indices: int64 (n, 1 or 2).  norms: float32 (n,) per layer.  sinks: the attention sinks per layer; None if there are
    none.  samples: the number of each token's sample, int64 (n,), from 0.
    """

    indices: dict[str, Tensor]
    norms: dict[str, list[Tensor]]
    sinks: dict[str, list[SinkMarks]] | None
    samples: dict[str, Tensor]

    @classmethod
    def of(
        cls,
        hidden_states: Sequence[Tensor],
        vision_mask: Array,
        text_mask: Array,
        backend: Backend | None,
        packing: Packing | None = None,
    ) -> ForwardTokens:
        """Collect the tokens. ValueError or TypeError if hidden states and masks do not match, or a masked token is not
        finite.

        packing: the samples within rows; if None, each row of (B, T), or all of (T,), is one sample.
        """
        masks = _masks(hidden_states, vision_mask, text_mask)
        indices = {modality: mask.nonzero() for modality, mask in masks.items()}
        every = [token_norms(hidden.detach(), backend=backend) for hidden in hidden_states]
        one_device = len({norms.device for norms in every}) == 1
        # If possible, wait for the device once and not once per layer.
        every = list(torch.stack(every).cpu()) if one_device else [norms.cpu() for norms in every]
        norms = {m: [layer[tuple(i.unbind(1))] for layer in every] for m, i in indices.items()}
        for k in range(len(hidden_states)):
            for modality, index in indices.items():
                require_finite(norms[modality][k], k + 1, modality, partial(_place, index))
        if packing is None:
            massive = massive_tokens(torch.stack(every), masks, partial(_concentrated, hidden_states))
            of_rows = masks["vision"].dim() == 2
            samples = {m: i[:, 0] if of_rows else torch.zeros_like(i[:, 0]) for m, i in indices.items()}
            return cls(indices, norms, None if massive is None else _marks(massive, indices), samples)
        samples = {m: packing.sample[tuple(i.unbind(1))] for m, i in indices.items()}
        if outside := sum(int((numbers < 0).sum()) for numbers in samples.values()):
            raise ValueError(
                f"sample_ids: expected a number >= 0 for every token in the masks, got {outside} that are negative"
            )
        massive = massive_tokens(
            torch.stack([packing.unpacked(layer) for layer in every]),
            {m: packing.unpacked(mask) for m, mask in masks.items()},
            lambda layer, places: _concentrated(hidden_states, layer, packing.tokens(places)),
        )
        marks = None if massive is None else _marks(packing.packed(massive), indices, packing.position)
        return cls(indices, norms, marks, samples)

    def places_on(self, device: torch.device) -> dict[str, tuple[Tensor, ...]]:
        """Indices into a layer's hidden states on `device`, for each modality that has tokens."""
        return {m: tuple(sent(index, device).unbind(1)) for m, index in self.indices.items() if len(index)}


def checked_hidden_states(hidden_states: Sequence[Array]) -> Sequence[Tensor]:
    """Check for one tensor or array (B, T, d) or (T, d) per layer, all of the same tokens; returns tensors."""
    given = one_tensor_a_layer("hidden_states", hidden_states)
    states = [_checks.tokens(f"hidden_states[{k}]", hidden) for k, hidden in enumerate(given)]
    lead = states[0].shape[:-1]
    for k, hidden in enumerate(states):
        name = f"hidden_states[{k}]"
        if hidden.dim() not in (2, 3):
            raise ValueError(f"{name}: expected shape (B, T, d) or (T, d), got {tuple(hidden.shape)}")
        if hidden.shape[:-1] != lead:
            raise ValueError(f"{name}: has tokens {tuple(hidden.shape[:-1])}, hidden_states[0] has {tuple(lead)}")
        _require_data(name, hidden)
    return PackedStates(states, given.sample_ids) if isinstance(given, PackedStates) else states


def _masks(hidden_states: Sequence[Tensor], vision_mask: Array, text_mask: Array) -> dict[str, Tensor]:
    """Both masks as bool on the CPU, after checking that no token is in both."""
    masks: dict[str, Tensor] = {}
    for modality, given in zip(MODALITIES, (vision_mask, text_mask), strict=True):
        _require_data(f"{modality}_mask", given)
        masks[modality] = _checks.mask(f"{modality}_mask", given, tuple(hidden_states[0].shape[:-1]))
    masks = {modality: mask.cpu().bool() for modality, mask in masks.items()}
    both = (masks["vision"] & masks["text"]).nonzero()
    if len(both):
        raise ValueError(f"vision_mask and text_mask: {len(both)} tokens are in both, the first {_place(both, 0)}")
    return masks


def _concentrated(hidden_states: Sequence[Tensor], layer: int, places: Tensor) -> Tensor:
    hidden = hidden_states[layer].detach()
    return concentrated(hidden[tuple(sent(places, hidden.device).unbind(1))])


def _marks(
    massive: Tensor, indices: Mapping[str, Tensor], position: Tensor | None = None
) -> dict[str, list[SinkMarks]]:
    """The result of `massive_tokens` by modality and layer. position: (B, T), each token's position in its sample; the
    column if None.
    """
    sink = massive.any(0)
    marks: dict[str, list[SinkMarks]] = {}
    for modality, index in indices.items():
        place = tuple(index.unbind(1))
        positions = (index[:, -1] if position is None else position[place]).to(torch.int32)
        marks[modality] = [SinkMarks(sink[place], layer[place], positions) for layer in massive]
    return marks


def _require_data(name: str, value: Array) -> None:
    value = _checks.tensor(name, value)
    if value.is_meta:
        raise ValueError(f"{name}: expected a tensor with data, got one on the meta device")
    with_memory("ModalityIntegrationRate", name, value)


def _place(indices: Tensor, i: int) -> int | tuple[int, ...]:
    place = tuple(indices[i].tolist())
    return place[0] if len(place) == 1 else place
