"""Batches for every family: token ids with known roles, and the images or videos of their placeholders."""

from __future__ import annotations

import inspect
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from families.pictures import FORMS, VIDEO_NAMES, Image
from families.sizes import AUDIO, BOS, FIRST_MARK, FIRST_WORD, LAST_WORD, PAD


@dataclass(frozen=True)
class Batch:
    """Two rows, the second padded on the right, with the roles from which they were built, (B, T) bool."""

    inputs: dict[str, Tensor]
    placeholders: Tensor
    kept: Tensor


def batch(model: nn.Module, image: Image, *, sounds: int = 0) -> Batch:
    """Token ids with the placeholders of one image per row, then those of `sounds` audio features; without pixels."""
    generator = torch.Generator().manual_seed(3)

    def words(n: int) -> list[int]:
        return torch.randint(FIRST_WORD, LAST_WORD, (n,), generator=generator).tolist()

    places, heard = [image.placeholder] * image.tokens, [AUDIO] * sounds
    # Begin and end marks are not vision tokens: some appear in the text.
    rows = [
        [BOS, *words(3), *places, *words(2), *heard, FIRST_MARK + 2, *words(4)],
        [BOS, *words(1), *places, *words(1), *heard, *words(2)],
    ]
    length = max(map(len, rows))
    ids = torch.tensor([row + [PAD] * (length - len(row)) for row in rows])
    kept = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows])
    vision = ids == image.placeholder
    types = (2 if image.video else 1) * vision.long() + 3 * (ids == AUDIO).long()
    marks = {"mm_token_type_ids": types, "token_type_ids": types, "image_embeds_position_mask": vision.long()}
    return Batch(accepted(model, {"input_ids": ids, "attention_mask": kept, **marks}), vision, kept.bool())


def pixels(model: nn.Module, image: Image, seed: int) -> dict[str, Tensor]:
    """The image inputs that the model's forward accepts, for one random image per row."""
    inputs = FORMS[image.form](torch.Generator().manual_seed(seed))
    if image.video:
        inputs = {VIDEO_NAMES.get(name, name): value for name, value in inputs.items()}
    return accepted(model, inputs)


def accepted(model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Those of `inputs` that are arguments of the model's forward."""
    names = inspect.signature(model.forward).parameters
    return {name: value for name, value in inputs.items() if name in names}
