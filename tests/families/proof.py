"""Determines vision tokens without the library, and checks the library's masks against them.

Passes differ only in the pixels. All text embeddings are the same, so the positions at which the input of the first
decoder layer differs hold the image's features. Learned marks between an image's features (newlines, separators)
belong to the image but are the same for every image: they are found by changing their parameters.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from families.batches import batch, pixels
from families.pictures import Image, images_of
from families.sizes import AUDIO, LINE_END
from modality_integration import add_moca, capture
from tolerances import RELATIVE, relative_error

# The qualified names of the families' decoder layers.
LAYERS = (
    "model.language_model.layers", "model.text_model.layers", "language_model.model.decoder.layers",
    "language_model.model.layers", "text_model.model.layers", "model.layers",
)  # fmt: skip
# Learned vectors that are inserted between an image's features.
MARKS = (
    "image_newline", "image_begin", "image_end", "image_sep", "view_separator", "global_img_feature_extensor",
    "sub_img_feature_extensor",
)  # fmt: skip


class NotRun(Exception):
    """The model itself, without the library, did not run or does not depend on its image."""


def prove(model: nn.Module, family: str) -> None:
    """Asserts that the vision tokens of capture and MoCa are exactly those that change with the image."""
    picture, *clips = images_of(family)
    vision, received, inputs = roles(model, picture)
    for clip in clips:
        roles(model, clip)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        add_moca(model, std=0.5)
    same("add_moca", changed(stream(model, decoder_layers(model)[1], inputs), received), vision)


def roles(model: nn.Module, image: Image) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """The vision tokens of a batch with one image per row, the input of the second layer, and the batch. Asserts that
    capture agrees."""
    given = batch(model, image, sounds=2 if hears(model) else 0)
    one, *others = (given.inputs | pixels(model, image, seed) for seed in range(1, image.others + 2))
    first, second, *_ = decoder_layers(model)
    vision = of_the_picture(model, first, one, others)
    if not vision.any(-1).all():
        raise NotRun("the image changes nothing")
    received = stream(model, second, one)
    vision_mask, text_mask, states = captured(model, one)
    same("vision_mask", vision_mask, vision)
    same("text_mask", text_mask, behind(vision) & given.kept & (given.inputs["input_ids"] != AUDIO))
    assert torch.equal(states[0], received), "hidden_states: not the second layer's input"
    head = model.get_output_embeddings()
    if head is not None:
        read = stream(model, head, one)
        scale = read.norm() / states[-1].norm()  # Inkling scales the input of its head
        assert relative_error(scale * states[-1], read) < RELATIVE[read.dtype], "hidden_states: not the head's input"
    return vision, received, one


def ids_alone(model: nn.Module) -> None:
    """Asserts that capture marks the configuration's placeholder ids in a pass without pixels."""
    given = batch(model, Image("", 4), sounds=2 if hears(model) else 0)
    run(model, given.inputs)
    vision_mask, text_mask, _ = captured(model, given.inputs)
    same("vision_mask", vision_mask, given.placeholders)
    same("text_mask", text_mask, behind(given.placeholders) & given.kept & (given.inputs["input_ids"] != AUDIO))


def captured(model: nn.Module, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor, list[Tensor]]:
    """The vision mask, text mask and hidden states that capture returns for a pass."""
    with torch.no_grad(), capture(model) as seen:
        model(**inputs)
        return seen.vision_mask, seen.text_mask, seen.hidden_states


def of_the_picture(
    model: nn.Module, first: nn.Module, one: dict[str, Tensor], others: list[dict[str, Tensor]]
) -> Tensor:
    """(B, T) bool: the tokens at which the input of the `first` layer holds the image's features."""
    reference = stream(model, first, one)
    with other_marks(model):
        found = changed(stream(model, first, one), reference)
    for other in others:
        found |= changed(stream(model, first, other), reference)
    return found


@contextmanager
def other_marks(model: nn.Module) -> Iterator[None]:
    """Inside the block, changes the model's learned marks and the embedding of the token that ends an image's lines."""
    marks = [p.data for name, p in model.named_parameters() if name.rpartition(".")[2] in MARKS]
    marks.append(model.get_input_embeddings().weight.data[LINE_END])
    kept = [mark.clone() for mark in marks]
    for mark in marks:
        mark.add_(1)
    yield
    for mark, value in zip(marks, kept, strict=True):
        mark.copy_(value)


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The decoder layers, by the names above; LookupError if the family uses another name."""
    for name in LAYERS:
        try:
            found = model.get_submodule(name)
        except AttributeError:
            continue
        if isinstance(found, nn.ModuleList):
            return found
    raise LookupError(f"no decoder layers under a known name in {type(model).__name__}")


def stream(model: nn.Module, module: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """The input of `module` in a pass over `inputs`, (B, T, d)."""
    seen: list[Tensor] = []

    def before(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        seen.append((args[0] if args else kwargs["hidden_states"]).detach().clone())

    handle = module.register_forward_pre_hook(before, with_kwargs=True)
    try:
        run(model, inputs)
    finally:
        handle.remove()
    (given,) = seen
    return given


def run(model: nn.Module, inputs: dict[str, Tensor]) -> None:
    """Runs a pass over `inputs`; NotRun if the model fails on them."""
    try:
        with torch.no_grad():
            model(**inputs)
    except Exception as error:  # the model may fail in any way
        raise NotRun(f"{type(error).__name__}: {error}") from error


def changed(one: Tensor, other: Tensor) -> Tensor:
    """(B, T) bool: where the vectors (B, T, d) of two passes differ in any element."""
    return (one != other).any(-1)


def behind(vision: Tensor) -> Tensor:
    """(B, T) bool: True after the last vision token of each row, in a plain loop over rows and tokens."""
    rows = []
    for row in vision.tolist():
        last = max((i for i, marked in enumerate(row) if marked), default=len(row))
        rows.append([i > last for i in range(len(row))])
    return torch.tensor(rows)


def hears(model: nn.Module) -> bool:
    """Whether the family has placeholder ids for audio."""
    configs = model.config, getattr(model.config, "audio_config", None)
    return any(AUDIO in vars(config).values() for config in configs if config is not None)


def same(name: str, got: Tensor, expected: Tensor) -> None:
    """Asserts that two masks are equal; the error lists the positions that differ."""
    if got.shape != expected.shape:
        raise AssertionError(f"{name}: shape {tuple(got.shape)}, but the stream has {tuple(expected.shape)}")
    extra, missing = (got & ~expected).nonzero().tolist(), (expected & ~got).nonzero().tolist()
    if extra or missing:
        raise AssertionError(f"{name}: too many {extra}, missing {missing}")
