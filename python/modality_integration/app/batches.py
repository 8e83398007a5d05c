"""Combine the inputs of several samples into one batch, padded on the right."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from modality_integration.models.token_roles import BOUNDARIES


class CannotBatch(ValueError):
    """These inputs cannot be combined into one forward pass."""


def collated(each: Sequence[dict[str, Any]], tokenizer: Any) -> dict[str, Any]:
    """Combine the inputs of samples, each a batch of one, into one batch.

    Each sample is processed alone, so its tokens and pixels are those of a batch of one. Token ids and other per-token
    inputs are padded on the right, whatever the tokenizer's side: in a causal decoder, tokens do not attend to later
    ones. Pixels are concatenated. In models with pixels of shape (B, images, ...), a sample with fewer images is padded
    with images of zeros, as processors do, and images of different sizes, given by image_sizes, are padded with zeros.
    CannotBatch for anything else.
    """
    names = list(each[0])
    if any(list(inputs) != names for inputs in each):
        raise CannotBatch("their inputs have different names")
    lengths = {inputs["input_ids"].shape[1] for inputs in each}
    if len(lengths) > 1 and "attention_mask" not in names:
        raise CannotBatch("the processor returns no attention_mask to tell padding from tokens")
    return {name: _joined(name, [inputs[name] for inputs in each], each, tokenizer) for name in names}


def _joined(name: str, values: Sequence[Any], each: Sequence[dict[str, Any]], tokenizer: Any) -> Tensor:
    if name in BOUNDARIES:
        raise CannotBatch(f"{name} counts the tokens of one sequence")
    if not all(isinstance(value, Tensor) and value.dim() for value in values):
        raise CannotBatch(f"{name} is a {type(values[0]).__name__}, not a tensor with one row per sample")
    shapes = [tuple(value.shape) for value in values]
    if len({shape[1:] for shape in shapes}) == 1:
        return torch.cat(list(values))
    if any(shape[0] != 1 for shape in shapes) or len({len(shape) for shape in shapes}) != 1:
        raise CannotBatch(f"{name} has the shapes {', '.join(map(str, shapes))}")
    per_token = all(shape == tuple(inputs["input_ids"].shape) for shape, inputs in zip(shapes, each, strict=True))
    if per_token or name.startswith("qformer_"):
        return _padded(values, _filling(name, tokenizer))
    ragged = [axis for axis in range(1, len(shapes[0])) if len({shape[axis] for shape in shapes}) > 1]
    images = "pixel" in name or "image" in name
    if images and (ragged == [1] or "image_sizes" in each[0] or "pixel_attention_mask" in each[0]):
        return _padded(values, 0)
    raise CannotBatch(f"{name} has the shapes {', '.join(map(str, shapes))}")


def _padded(values: Sequence[Tensor], filling: int) -> Tensor:
    """(1, ...) tensors with equally many axes -> (B, ...), each padded at the end of every axis to the longest."""
    longest = [max(sizes) for sizes in zip(*(value.shape for value in values), strict=True)]

    def filled(value: Tensor) -> Tensor:
        missing = [most - size for most, size in zip(longest, value.shape, strict=True)]
        return nn.functional.pad(
            value, [n for missing_here in reversed(missing) for n in (0, missing_here)], value=filling
        )

    return torch.cat([filled(value) for value in values])


def _filling(name: str, tokenizer: Any) -> int:
    if name != "input_ids":
        return 0
    for token in ("pad_token_id", "eos_token_id"):
        if isinstance(found := getattr(tokenizer, token, None), int):
            return found
    return 0
