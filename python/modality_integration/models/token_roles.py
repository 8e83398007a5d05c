"""Which tokens are vision, text or padding: the markers named by models' configurations, and masks built from them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from mir_kernels import _checks
from modality_integration.models.decoder import unwrap

if TYPE_CHECKING:
    from mir_kernels._arrays import Array

# A mask (B, T), nonzero at tokens of the role, or the name of the forward argument that carries one.
Mask = Tensor | str | None

# The forward argument whose token type ids are 1 (image) and 2 (video) at vision tokens, for calls without input_ids
# and models without placeholder ids; `mm_token_type_ids` in other families. Per family, because PaliGemma's
# token_type_ids distinguish prompt and answer.
TYPE_IDS = {
    "gemma3": "token_type_ids",
    "kosmos-2": "image_embeds_position_mask",
    "kosmos-2.5": "image_embeds_position_mask",
}

# Configuration names of the placeholder ids of vision and audio features.
VISION_IDS = ("image_token_id", "image_token_index", "video_token_id", "video_token_index")
AUDIO_IDS = ("audio_token_id", "audio_token_index", "sound_context_token_id", "speech_token_id", "speech_token_index")

# Forward arguments of attention kernels whose entries are the boundaries between packed samples.
BOUNDARIES = ("cu_seq_lens_q", "cu_seqlens", "cu_seqlens_q")
# Forward arguments that separate the samples of a row.
PACKING = ("position_ids", "seq_idx", *BOUNDARIES)


def vision_token_ids(model: nn.Module) -> tuple[int, ...]:
    """The placeholder ids of image and video features in `input_ids`, from the model's configuration."""
    return _configured_ids(model, VISION_IDS)


def audio_token_ids(model: nn.Module) -> tuple[int, ...]:
    """The placeholder ids of audio features in `input_ids`: neither vision nor text."""
    return _configured_ids(model, AUDIO_IDS)


def text_after_vision(vision: Tensor, sample_ids: Tensor | None = None) -> Tensor:
    """(B, T) bool -> (B, T) bool: True after the last vision token of each row, or of each sample in it."""
    if sample_ids is None:
        return vision.flip(-1).cumsum(-1).flip(-1) == 0
    numbers = _across_rows(sample_ids)
    columns = torch.arange(vision.shape[1], device=vision.device, dtype=torch.int64).expand(vision.shape)
    return columns > _of_each(numbers, columns.where(vision, -1), "amax")[numbers]


def packed_samples(inputs: Mapping[str, Any], kept: Tensor, vision: Tensor) -> Tensor | None:
    """(B, T) int64: the number of each token's sample in its row, -1 for padding; None if each row is one sample.

    inputs: the arguments of a forward pass. Samples that share a row are separated by `seq_idx`, by the boundaries
    `cu_seq_lens_q` over all rows, by an attention_mask that numbers them 1, 2, ..., or by position ids that restart.
    kept, vision: (B, T) bool, True at tokens that are not padding and at vision tokens. A sample without vision tokens
    that is a single token, or whose position ids do not increase, is filler and gets -1.
    """
    ids = _sample_numbers(inputs, kept, vision)
    if ids is None:
        return None
    ids = ids.masked_fill(~kept, -1)
    numbers = _across_rows(ids)
    rises = _of_each(numbers, torch.ones_like(numbers), "sum") > 1
    positions = _positions(inputs, kept)
    if positions is not None:
        rises &= _of_each(numbers, positions[0], "amax") > _of_each(numbers, positions[0], "amin")
    seen = _of_each(numbers, vision.long(), "amax") > 0
    return ids.masked_fill(~(rises | seen)[numbers], -1)


def is_packed(inputs: Mapping[str, Any]) -> bool:
    """Whether a batch of model inputs marks several samples in one row.

    Also True for filler that only the vision tokens distinguish from samples, because a batch does not mark those.
    """
    if _boundaries(inputs) is not None:
        return True
    mask = inputs.get("attention_mask")
    for name in ("input_ids", "seq_idx", "position_ids"):  # each has the shape (B, T)
        tokens = inputs.get(name)
        if not isinstance(tokens, Tensor) or tokens.dim() not in (2, 3):
            continue
        shape = tokens.shape[-2:]
        if isinstance(given := inputs.get("seq_idx"), Tensor) and given.shape == shape:
            return True
        kept = torch.ones(shape, dtype=torch.bool, device=tokens.device)
        if isinstance(mask, Tensor) and mask.shape == shape:
            kept = mask != 0
        return _sample_numbers(inputs, kept) is not None
    return False


def _configured_ids(model: nn.Module, names: Sequence[str]) -> tuple[int, ...]:
    """The token ids under `names` in the model's configuration or, if it has none, in its sub-configurations."""
    config = getattr(unwrap(model), "config", None)
    parts = [getattr(config, part, None) for part in getattr(config, "sub_configs", {})]
    for configs in ([config], parts):
        found = {getattr(each, name, None) for each in configs for name in names}
        if ids := sorted(i for i in found if isinstance(i, int)):
            return tuple(ids)
    return ()


def _of_each(numbers: Tensor, values: Tensor, reduction: str) -> Tensor:
    """Reduces `values` (B, T) over the tokens with the same number, for every number that `_across_rows` can return."""
    rows, columns = numbers.shape
    out = values.new_zeros(rows * (columns + 1))
    return out.scatter_reduce_(0, numbers.flatten(), values.flatten(), reduction, include_self=False)


def _across_rows(sample_ids: Tensor) -> Tensor:
    """(B, T) sample numbers from 0 to B (T + 1) - 1, distinct across rows, for any numbers of the caller.

    Ranks, because reading the largest number would wait for the GPU, and document ids are too large for a table.
    """
    ordered, order = sample_ids.clamp(min=-1).sort(-1)
    ranks = torch.zeros_like(ordered)
    ranks[:, 1:] = (ordered[:, 1:] != ordered[:, :-1]).long().cumsum(-1)
    ranks += (ordered[:, :1] >= 0).long()  # 0 is for tokens outside any sample
    rows = torch.arange(len(sample_ids), device=sample_ids.device, dtype=torch.int64)
    numbers = torch.empty_like(ranks).scatter_(-1, order, ranks)
    return numbers + (sample_ids.shape[1] + 1) * rows[:, None]


def _sample_numbers(inputs: Mapping[str, Any], kept: Tensor, vision: Tensor | None = None) -> Tensor | None:
    """(B, T) int64 >= -1 on `kept`'s device: sample numbers from the inputs; None if each row is one sample."""
    shape, device = tuple(kept.shape), kept.device
    given = inputs.get("seq_idx")
    if isinstance(given, Tensor) and tuple(given.shape) == shape:
        return given.to(device, torch.int64).clamp(min=-1)
    if (found := _boundaries(inputs)) is not None:
        name, bounds = found
        bounds, end = bounds.to(device, torch.int64), int(bounds[-1])
        if end > kept.numel():
            raise ValueError(f"{name}: ends at token {end}, but the decoder ran on {shape} tokens")
        places = torch.arange(kept.numel(), device=device, dtype=torch.int64)
        numbers = torch.bucketize(places, bounds, right=True) - 1
        return numbers.masked_fill_(places >= end, -1).view(shape)
    mask, positions = inputs.get("attention_mask"), _positions(inputs, kept)
    counts = isinstance(mask, Tensor) and tuple(mask.shape) == shape and mask.dtype != torch.bool
    if positions is None and not counts:
        return None
    numbered = begins = torch.zeros((), dtype=torch.bool, device=device)
    if isinstance(mask, Tensor) and counts:
        mask = mask.to(device)
        numbered = (mask > 1).any()
        if mask.is_floating_point():
            numbered = numbered & ((mask >= 0) & (mask == mask.floor()) & mask.isfinite()).all()
    if positions is not None:
        begins = _begin_anew(positions, kept, vision, inputs.get("mm_token_type_ids"))
    by_mask, by_positions = torch.stack([numbered, begins.any()]).tolist()  # the only wait for the GPU
    if isinstance(mask, Tensor) and by_mask:
        return (mask.to(torch.int64) - 1).clamp(min=-1)
    return begins.long().cumsum(-1) if by_positions else None


def _boundaries(inputs: Mapping[str, Any]) -> tuple[str, Tensor] | None:
    """The name and value (n,) of the boundaries passed to attention kernels."""
    for name in BOUNDARIES:
        bounds = inputs.get(name)
        if isinstance(bounds, Tensor) and bounds.dim() in (1, 2) and bounds.numel() == bounds.shape[-1] > 1:
            return name, bounds.flatten()
    return None


def _positions(inputs: Mapping[str, Any], kept: Tensor) -> Tensor | None:
    """(1, B, T) int64, positions that count the tokens of a sample; (3, B, T) if image positions have three axes.

    With four or more axes, the first one counts tokens.
    """
    positions = inputs.get("position_ids")
    if not isinstance(positions, Tensor) or positions.dim() not in (2, 3):
        return None
    if positions.dim() == 2:
        positions = positions[None]
    elif len(positions) != 3:
        positions = positions[:1]
    if positions.shape[-1] != kept.shape[1] or positions.shape[1] not in (1, len(kept)):
        return None
    return positions.to(kept.device, torch.int64).expand(len(positions), *kept.shape)


def _begin_anew(positions: Tensor, kept: Tensor, vision: Tensor | None, types: Any) -> Tensor:
    """(B, T) bool: the tokens at which the next sample of the row begins, by positions (1 or 3, B, T).

    A sample begins where the position falls, or repeats (then the previous token was a separate sample or filler), to
    at most the row's first position. Only kept tokens count, because generate() gives left padding other positions.
    """
    places = torch.arange(kept.shape[1], device=kept.device, dtype=torch.int64).expand(kept.shape)
    last = places.where(kept, -1).cummax(-1).values  # of the kept tokens up to here
    previous = torch.cat([torch.full_like(last[:, :1], -1), last[:, :-1]], 1)
    inner, previous = kept & (previous >= 0), previous.clamp(min=0)
    before = positions.gather(-1, previous.expand_as(positions))
    start = positions[0].gather(-1, kept.int().argmax(-1, keepdim=True))
    same, falls = (positions == before).all(0), (positions < before).any(0)
    same &= ((positions[0] != start) & kept).any(-1, keepdim=True)  # unless all positions are equal
    if len(positions) == 1:
        if vision is not None:  # in some models, vision tokens share a position
            same &= ~(vision & vision.gather(-1, previous))
        return inner & (same | falls) & (positions[0] <= start)
    # A sample's first token has equal positions on all axes, unlike the later tokens of an image (time, height, width).
    begins = (same | falls) & (positions == positions[:1]).all(0)
    # HunYuanVL's axes are width, height and image number: its first image begins at (0, 0, 0) wherever it is in the
    # row, and continues along the first axis only.
    following = torch.cat([positions[..., 1:], positions[..., -1:]], -1)
    begins &= ~((following[0] > positions[0]) & (following[2] == positions[2]))
    if isinstance(types, Tensor) and types.shape == kept.shape:  # frames of a video within one unit of time
        video = types.to(kept.device) == 2
        begins &= ~(video & video.gather(-1, previous) & (positions[0] == before[0]))
    return inner & begins & (positions[0] <= start)


def expanded_placeholders(
    input_ids: Array,
    placeholder: int,
    lengths: int | Sequence[int],
    *,
    attention_mask: Array | None = None,
    padding: Literal["right", "left"] = "right",
) -> Tensor:
    """(B, T) token ids -> (B, T') bool: the vision tokens after each placeholder is expanded to its image's features.

    For models whose forward replaces one placeholder id by n features (the original LLaVA and its descendants: -200),
    so that `input_ids` are shorter than the decoder's sequence. lengths: n, or one n per placeholder, row by row.
    attention_mask (B, T): ids where it is 0 are padding and are dropped before the expansion, as in those models. T' is
    the length of the longest row; shorter rows are padded with False on the side `padding`. ValueError if the number of
    lengths differs from the number of placeholders.
    """
    _checks.choice("padding", padding, ("right", "left"))
    input_ids = _checks.tensor("input_ids", input_ids)
    if input_ids.dim() != 2:
        raise ValueError(f"input_ids: expected shape (B, T), got {tuple(input_ids.shape)}")
    kept = torch.ones_like(input_ids, dtype=torch.bool)
    if attention_mask is not None:
        kept = _checks.tensor("attention_mask", attention_mask) != 0
    if kept.shape != input_ids.shape:
        raise ValueError(f"attention_mask: expected shape {tuple(input_ids.shape)}, got {tuple(kept.shape)}")
    vision = (input_ids == placeholder) & kept
    count = int(vision.sum())
    sizes = [lengths] * count if isinstance(lengths, int) else list(lengths)
    if len(sizes) != count or min(sizes, default=0) < 0:
        raise ValueError(f"lengths: expected a number >= 0 for each of {count} placeholders {placeholder}, got {sizes}")
    repeats = kept.long()
    repeats[vision] = torch.tensor(sizes, dtype=torch.long, device=input_ids.device)
    rows = [row.repeat_interleave(times) for row, times in zip(vision, repeats, strict=True)]
    return nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=False, padding_side=padding)
