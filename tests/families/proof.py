"""Which tokens are vision tokens, without asking the product, and whether the product says the same.

Passes differ in the pixels alone. The embeddings of all text are the same in them, so that the positions where the
first decoder layer is given something else hold what was made of the picture. Learned marks that stand between a
picture's features (newlines, separators) belong to it and are the same for every picture: they are found by changing
their parameters.
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

# Where families keep their decoder layers, by their published names.
LAYERS = (
    "model.language_model.layers", "model.text_model.layers", "language_model.model.decoder.layers",
    "language_model.model.layers", "text_model.model.layers", "model.layers",
)  # fmt: skip
# Learned vectors that stand among a picture's features.
MARKS = (
    "image_newline", "image_begin", "image_end", "image_sep", "view_separator", "global_img_feature_extensor",
    "sub_img_feature_extensor",
)  # fmt: skip


class NotRun(Exception):
    """The model by itself, without the product, did not run, or does not see its picture."""


def prove(model: nn.Module, family: str) -> None:
    """AssertionError unless capture and MoCa take for vision tokens those that the picture changes, and no others."""
    picture, *clips = images_of(family)
    vision, received, inputs = roles(model, picture)
    for clip in clips:
        roles(model, clip)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        add_moca(model, std=0.5)
    same("add_moca", changed(stream(model, decoder_layers(model)[1], inputs), received), vision)


def roles(model: nn.Module, image: Image) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """The vision tokens of a batch with one image a row, what the second layer is given, and the batch; AssertionError
    unless capture says the same."""
    given = batch(model, image, sounds=2 if hears(model) else 0)
    one, *others = (given.inputs | pixels(model, image, seed) for seed in range(1, image.others + 2))
    first, second, *_ = decoder_layers(model)
    vision = of_the_picture(model, first, one, others)
    if not vision.any(-1).all():
        raise NotRun("the picture changes nothing")
    received = stream(model, second, one)
    vision_mask, text_mask, states = captured(model, one)
    same("vision_mask", vision_mask, vision)
    same("text_mask", text_mask, behind(vision) & given.kept & (given.inputs["input_ids"] != AUDIO))
    assert torch.equal(states[0], received), "hidden_states: another stream than the second layer is given"
    head = model.get_output_embeddings()
    if head is not None:
        read = stream(model, head, one)
        scale = read.norm() / states[-1].norm()  # Inkling's head is given a multiple
        assert relative_error(scale * states[-1], read) < RELATIVE[read.dtype], "hidden_states: not what the head reads"
    return vision, received, one


def ids_alone(model: nn.Module) -> None:
    """AssertionError unless capture marks the placeholders of the configuration in a pass without pixels."""
    given = batch(model, Image("", 4), sounds=2 if hears(model) else 0)
    run(model, given.inputs)
    vision_mask, text_mask, _ = captured(model, given.inputs)
    same("vision_mask", vision_mask, given.placeholders)
    same("text_mask", text_mask, behind(given.placeholders) & given.kept & (given.inputs["input_ids"] != AUDIO))


def captured(model: nn.Module, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor, list[Tensor]]:
    """What the product says of a pass: the vision mask, the text mask, the hidden states."""
    with torch.no_grad(), capture(model) as seen:
        model(**inputs)
        return seen.vision_mask, seen.text_mask, seen.hidden_states


def of_the_picture(
    model: nn.Module, first: nn.Module, one: dict[str, Tensor], others: list[dict[str, Tensor]]
) -> Tensor:
    """(B, T) bool: where the `first` layer is given what was made of the picture."""
    reference = stream(model, first, one)
    with other_marks(model):
        found = changed(stream(model, first, one), reference)
    for other in others:
        found |= changed(stream(model, first, other), reference)
    return found


@contextmanager
def other_marks(model: nn.Module) -> Iterator[None]:
    """Inside the block, the learned marks of the model are others, and so is the token that ends a picture's lines."""
    marks = [p.data for name, p in model.named_parameters() if name.rpartition(".")[2] in MARKS]
    marks.append(model.get_input_embeddings().weight.data[LINE_END])
    kept = [mark.clone() for mark in marks]
    for mark in marks:
        mark.add_(1)
    yield
    for mark, value in zip(marks, kept, strict=True):
        mark.copy_(value)


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The decoder layers, by the names above; LookupError where the family has another."""
    for name in LAYERS:
        try:
            found = model.get_submodule(name)
        except AttributeError:
            continue
        if isinstance(found, nn.ModuleList):
            return found
    raise LookupError(f"no decoder layers under a known name in {type(model).__name__}")


def stream(model: nn.Module, module: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """What `module` is given in a pass over `inputs`, (B, T, d)."""
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
    """A pass over `inputs`; NotRun where the model does not take them."""
    try:
        with torch.no_grad():
            model(**inputs)
    except Exception as error:  # whatever the model makes of the inputs
        raise NotRun(f"{type(error).__name__}: {error}") from error


def changed(one: Tensor, other: Tensor) -> Tensor:
    """(B, T) bool: where the vectors (B, T, d) of two passes differ, in any bit."""
    return (one != other).any(-1)


def behind(vision: Tensor) -> Tensor:
    """(B, T) bool: behind the last vision token of each row, one row and one token at a time."""
    rows = []
    for row in vision.tolist():
        last = max((i for i, marked in enumerate(row) if marked), default=len(row))
        rows.append([i > last for i in range(len(row))])
    return torch.tensor(rows)


def hears(model: nn.Module) -> bool:
    """Whether the family has placeholders for sound."""
    configs = model.config, getattr(model.config, "audio_config", None)
    return any(AUDIO in vars(config).values() for config in configs if config is not None)


def same(name: str, got: Tensor, expected: Tensor) -> None:
    """AssertionError, with the places, where two masks differ."""
    if got.shape != expected.shape:
        raise AssertionError(f"{name}: shape {tuple(got.shape)}, where the stream has {tuple(expected.shape)}")
    extra, missing = (got & ~expected).nonzero().tolist(), (expected & ~got).nonzero().tolist()
    if extra or missing:
        raise AssertionError(f"{name}: too many {extra}, missing {missing}")
