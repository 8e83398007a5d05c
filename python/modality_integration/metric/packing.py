"""Samples packed into shared rows: the position of their tokens, and conversion to one row per sample."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, SupportsIndex, overload

import torch
from torch import Tensor

from mir_kernels import _checks

if TYPE_CHECKING:
    from mir_kernels._arrays import Array


class PackedStates(list[Tensor]):
    """Hidden states of decoder layers 1..K, (B, T, d) each, with several samples per row.

    sample_ids: (B, T), the number of each token's sample within its row; negative for tokens in no sample. Slices,
    copies and sums keep it; a list comprehension over the states loses it.
    """

    def __init__(self, states: Iterable[Tensor], sample_ids: Tensor) -> None:
        super().__init__(states)
        self.sample_ids = sample_ids

    @overload
    def __getitem__(self, key: SupportsIndex) -> Tensor: ...
    @overload
    def __getitem__(self, key: slice) -> PackedStates: ...
    def __getitem__(self, key: SupportsIndex | slice) -> Tensor | PackedStates:
        found = super().__getitem__(key)
        return PackedStates(found, self.sample_ids) if isinstance(found, list) else found

    def __add__(self, others: list[Tensor]) -> PackedStates:  # type: ignore[override]
        return PackedStates([*self, *others], self.sample_ids)

    def __radd__(self, others: list[Tensor]) -> PackedStates:
        return PackedStates([*others, *self], self.sample_ids)

    def copy(self) -> PackedStates:
        return self[:]


def ids_of(hidden_states: Sequence[Tensor], sample_ids: Array | None) -> Array | None:
    """The caller's sample numbers, else those of the hidden states, if any."""
    if sample_ids is None and isinstance(hidden_states, PackedStates):
        return hidden_states.sample_ids
    return sample_ids


class Packing:
    """Mapping between tokens (B, T), numbered row by row, and S samples of at most L tokens; on the CPU.

    places: (S, L) int64, token numbers, -1 past a sample's end.  sample, position: (B, T) int64, the sample of each
    token and its position in it, -1 for tokens in no sample.  Samples are sorted by row, then by their numbers.
    """

    def __init__(self, sample_ids: Array, shape: tuple[int, ...]) -> None:
        if not isinstance(sample_ids, Tensor) and hasattr(sample_ids, "dtype"):
            sample_ids = _checks.tensor("sample_ids", sample_ids)
        if not isinstance(sample_ids, Tensor) or tuple(sample_ids.shape) != shape:
            got = tuple(sample_ids.shape) if isinstance(sample_ids, Tensor) else type(sample_ids).__name__
            raise ValueError(f"sample_ids: expected one number per token, shape {shape}, got {got}")
        if sample_ids.is_floating_point() or sample_ids.is_complex():
            raise TypeError(f"sample_ids: expected whole numbers, got {sample_ids.dtype}")
        ids = sample_ids.detach().to("cpu", torch.int64)
        flat, rows = ids.flatten(), torch.arange(ids.numel(), dtype=torch.int64, device="cpu") // ids.shape[-1]
        token = (flat >= 0).nonzero().flatten()
        pairs = torch.stack([rows[token], flat[token]], 1)
        _, sample, lengths = pairs.unique(dim=0, return_inverse=True, return_counts=True)
        order = sample.argsort(stable=True)
        starts = lengths.cumsum(0) - lengths
        position = torch.arange(len(token), dtype=torch.int64, device="cpu") - starts.repeat_interleave(lengths)
        longest = int(lengths.max()) if len(lengths) else 0
        self.places = torch.full((len(lengths), longest), -1, dtype=torch.int64, device="cpu")
        self.places[sample[order], position] = token[order]
        self.sample, self.position = torch.full_like(flat, -1), torch.full_like(flat, -1)
        self.sample[token[order]], self.position[token[order]] = sample[order], position
        self.sample, self.position = self.sample.view(shape), self.position.view(shape)

    def __len__(self) -> int:
        return len(self.places)

    def unpacked(self, x: Tensor) -> Tensor:
        """(B, T, ...) -> (S, L, ...), zero past each sample's end."""
        lead = self.sample.dim()
        places = self.places.to(x.device)
        rows = x.flatten(0, lead - 1)[places.clamp(min=0)]
        return rows.masked_fill_((places < 0).view(*places.shape, *([1] * (x.dim() - lead))), 0)

    def packed(self, x: Tensor) -> Tensor:
        """(K, S, L) -> (K, B, T), zero for tokens in no sample."""
        inside = self.places >= 0
        out = x.new_zeros((len(x), self.sample.numel()))
        out[:, self.places[inside]] = x[:, inside]
        return out.view(len(x), *self.sample.shape)

    def tokens(self, places: Tensor) -> Tensor:
        """(n, 2) places in (S, L) -> (n, 1 or 2) in (B, T)."""
        number = self.places[tuple(places.unbind(1))]
        columns = self.sample.shape[-1]
        pair = torch.stack([number // columns, number % columns], 1)
        return pair if self.sample.dim() == 2 else pair[:, 1:]
