"""Which tokens are vision, text or padding: the markers that models' configurations name, and masks made of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from mir_kernels import _checks
from modality_integration.models.decoder import unwrap

# A mask (B, T), nonzero where the role holds, or the name of the forward argument that carries one.
Mask = Tensor | str | None

# The forward argument whose token type ids are 1 (image) and 2 (video) at vision tokens, for calls without input_ids;
# `mm_token_type_ids` in other families. By family, because PaliGemma's token_type_ids tell prompt from answer.
TYPE_IDS = {"gemma3": "token_type_ids"}


def vision_token_ids(model: nn.Module) -> tuple[int, ...]:
    """The token ids that stand for image and video features in `input_ids`, by the model's configuration."""
    config = getattr(unwrap(model), "config", None)
    names = ("image_token_id", "image_token_index", "video_token_id", "video_token_index")
    found = {getattr(config, name, None) for name in names}
    return tuple(sorted(i for i in found if isinstance(i, int)))


def text_after_vision(vision: Tensor) -> Tensor:
    """(B, T) bool -> (B, T) bool: True after the last vision token of each row."""
    return vision.flip(-1).cumsum(-1).flip(-1) == 0


def expanded_placeholders(
    input_ids: Tensor,
    placeholder: int,
    lengths: int | Sequence[int],
    *,
    attention_mask: Tensor | None = None,
    padding: Literal["right", "left"] = "right",
) -> Tensor:
    """(B, T) token ids -> (B, T') bool: the vision tokens, once each placeholder has become its image's features.

    For models that put n features in the place of one id inside their forward (the original LLaVA and what grew out of
    it: -200), so that `input_ids` are shorter than the decoder's sequence. lengths: n, or one n for each placeholder,
    row after row. attention_mask (B, T): ids where it is 0 are padding and are dropped before the expansion, as those
    models do. T' is the longest row's length; shorter rows are filled with False on the side that `padding` names.
    ValueError where the lengths are not as many as the placeholders.
    """
    _checks.choice("padding", padding, ("right", "left"))
    if input_ids.dim() != 2:
        raise ValueError(f"input_ids: takes shape (B, T), got {tuple(input_ids.shape)}")
    kept = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask != 0
    if kept.shape != input_ids.shape:
        raise ValueError(f"attention_mask: takes shape {tuple(input_ids.shape)}, got {tuple(kept.shape)}")
    vision = (input_ids == placeholder) & kept
    count = int(vision.sum())
    sizes = [lengths] * count if isinstance(lengths, int) else list(lengths)
    if len(sizes) != count or min(sizes, default=0) < 0:
        raise ValueError(f"lengths: takes a number >= 0 for each of {count} placeholders {placeholder}, got {sizes}")
    repeats = kept.long()
    repeats[vision] = torch.tensor(sizes, dtype=torch.long, device=input_ids.device)
    rows = [row.repeat_interleave(times) for row, times in zip(vision, repeats, strict=True)]
    return nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=False, padding_side=padding)
