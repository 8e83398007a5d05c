"""`build_probe`: image-text batches for `MIRCallback` and `measure_mir`, made like the samples of `mir compute`."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from modality_integration.app.batches import CannotBatch, collated
from modality_integration.app.errors import InputError
from modality_integration.app.options import MeasureOptions, Template
from modality_integration.app.prompts import encode, truncate
from modality_integration.app.samples.choosing import Chosen, choose_among, seed_of, why_none
from modality_integration.app.samples.images import choose_images, open_image
from modality_integration.app.samples.pairing import pair
from modality_integration.app.samples.sample import Text
from modality_integration.app.samples.texts import choose_texts
from modality_integration.metric.options import require_count


def build_probe(
    processor: Any,
    images: str | Path | Sequence[str | Path | Image.Image],
    text: str | Path | Sequence[str],
    *,
    samples: int = 40,
    batch_size: int = 1,
    seed: int = 0,
    text_tokens: int | None = 512,
    template: Template = "auto",
    groups: int = MeasureOptions.groups,
    dtype: torch.dtype | None = None,
) -> list[dict[str, Tensor]]:
    """Batches of a random image followed by unrelated prose, as paired in the MIR paper (section 3.2), for a probe.

    processor: of the model, with its tokenizer. images: a folder or file as for `mir compute --images`, or a list of
    pictures and files. text: likewise, or a list of pieces of prose (strings in a list are never file names). samples:
    number of pairs; if there are too few images or texts, they repeat within one of `groups` groups of samples, so that
    the groups behind a standard error stay independent. batch_size: samples per batch, padded on the right. seed: for
    choice and pairing. text_tokens: truncate prose to this many, None keeps it whole. template: "chat", "plain",
    "published", or "auto" (chat if there is one). dtype: of pixels, if the model does not accept float32.

    Returns the processor's outputs on the CPU. Broken files are skipped with a warning. Raises ValueError for unusable
    inputs, and for samples that do not fit into one batch.
    """
    require_count("samples", samples)
    require_count("batch_size", batch_size)
    if not hasattr(processor, "tokenizer") or not hasattr(processor, "image_processor"):
        raise InputError(
            "processor: expected one with a tokenizer and an image processor, as AutoProcessor returns for a "
            f"vision-language model, got {type(processor).__name__}"
        )
    pictures = _chosen("images", images, samples, seed)
    prose = _chosen("text", text, samples, seed)
    keys = pictures.digests, prose.digests
    pairs = pair(pictures.items, prose.items, samples, seed, groups, keys=keys, digests=keys)
    batches = []
    for start in range(0, samples, batch_size):
        each = []
        for sample in pairs[start : start + batch_size]:
            words = truncate(sample.text.content, processor.tokenizer, text_tokens)
            each.append(encode(processor, open_image(sample.image), words, template))
        try:
            batch = each[0] if len(each) == 1 else collated(each, processor.tokenizer)
        except CannotBatch as error:
            raise InputError(f"batch_size: samples do not fit into one batch ({error}); use 1") from error
        batches.append({name: _of_dtype(value, dtype) for name, value in batch.items()})
    return batches


def _chosen(name: str, source: Any, count: int, seed: int) -> Chosen[Any]:
    """Images or texts from a folder, a file or a list."""
    if isinstance(source, str | Path):
        choose = choose_images if name == "images" else choose_texts
        chosen: Chosen[Any] = choose(source, count, seed, distinct=True)
    else:
        chosen = _chosen_of_list(name, source, count, seed)
    for broken, reason in chosen.skipped:
        warnings.warn(f"{name}: skipped {broken}: {reason}", stacklevel=3)
    if not chosen.items:
        raise InputError(f"{name}: nothing usable found: {why_none(chosen, 'it is empty')}")
    return chosen


def _chosen_of_list(name: str, source: Any, count: int, seed: int) -> Chosen[Any]:
    kinds = (str, Path, Image.Image) if name == "images" else (str,)
    accepted = "a folder, a file, or a list of " + ("pictures and files" if name == "images" else "pieces of prose")
    if not isinstance(source, Sequence) or not source:
        raise InputError(
            f"{name}: expected {accepted}, got {'none' if isinstance(source, Sequence) else type(source).__name__}"
        )
    for index, item in enumerate(source):
        if not isinstance(item, kinds) or (isinstance(item, str) and not item.strip()):
            raise InputError(f"{name}[{index}]: expected {accepted}, got {item!r:.80}")
    items: list[Any] = [Text(f"text[{i}]", item) for i, item in enumerate(source)] if name == "text" else list(source)
    items = [Path(item) if isinstance(item, str) else item for item in items]
    check = open_image if name == "images" else lambda item: None
    return choose_among(items, count, seed_of(seed, name), lambda item: item, check, _name)


def _name(item: Any) -> str:
    return "a picture in memory" if isinstance(item, Image.Image) else str(getattr(item, "name", item))


def _of_dtype(value: Any, dtype: torch.dtype | None) -> Any:
    return value.to(dtype) if dtype is not None and isinstance(value, Tensor) and value.is_floating_point() else value
