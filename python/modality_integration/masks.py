"""Which tokens of a forward pass are vision, text or padding: read from the model's own markers as the pass begins."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mir_kernels import _checks
from modality_integration.decoder import Decoder, unwrap

# A mask (B, T), nonzero where the role holds, or the name of the forward argument that carries one.
Mask = Tensor | str | None

# Where the families differ. Token type ids that mark vision with 1 (image) and 2 (video), for calls that pass no
# input_ids; PaliGemma's token_type_ids tell prompt from answer, so the name alone does not say.
TYPE_IDS = {"gemma3": "token_type_ids"}
# generate() embeds the prompt itself and calls the language model, past the model's own forward.
EMBEDS_FIRST = ("blip-2", "instructblip", "instructblipvideo")


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


class ForwardPass:
    """What one forward pass was given that marks its tokens."""

    def __init__(self, token_ids: tuple[int, ...], type_ids: str) -> None:
        self.token_ids, self.type_ids = token_ids, type_ids
        self.inputs: dict[str, Any] = {}
        self.embedded = False  # input_ids are those the embedding saw before the pass began
        self.found: dict[str, Any] = {}  # for whoever works something out once a pass
        self.differentiable = torch.is_grad_enabled()

    def decodes(self, length: int) -> bool:
        """Whether this pass is a decoding step: one new token after a cache."""
        if length != 1:
            return False
        mask, cache = self.inputs.get("attention_mask"), self.inputs.get("past_key_values")
        if isinstance(mask, Tensor) and mask.shape[-1] > 1:
            return True
        return cache is not None and int(cache.get_seq_length()) > 0

    def vision(self, shape: tuple[int, int], given: Mask = None) -> Tensor:
        """(B, T) bool, True at vision tokens; ValueError where nothing in this pass says which those are."""
        if given is not None:
            return self.given("vision_mask", given, shape)
        ids, types = self.inputs.get("input_ids"), self.inputs.get(self.type_ids)
        if ids is not None and self.token_ids:
            if self.embedded and ids.shape[0] != shape[0] and shape[0] % ids.shape[0] == 0:
                ids = ids.repeat_interleave(shape[0] // ids.shape[0], 0)  # as generate repeats rows for its beams
            if tuple(ids.shape) != shape:
                raise ValueError(
                    f"vision_mask: input_ids has shape {tuple(ids.shape)}, but the decoder ran on {shape} tokens: the "
                    "model expands its image placeholders, so only the caller knows where they went; give vision_mask"
                )
            vision = ids == self.token_ids[0]
            for token_id in self.token_ids[1:]:
                vision = vision | (ids == token_id)
            return vision
        if types is not None and tuple(types.shape) == shape:
            return (types == 1) | (types == 2)
        why = (
            f"no input_ids or {self.type_ids} were passed, and inputs_embeds alone do not say"
            if self.token_ids
            else "the model's configuration names no image token"
        )
        raise ValueError(f"vision_mask: nothing in this forward pass marks its vision tokens ({why}); give vision_mask")

    def kept(self, shape: tuple[int, int], device: torch.device) -> Tensor:
        """(B, T) bool, False at padding, from attention_mask; all True where none was passed."""
        mask = self.inputs.get("attention_mask")
        if mask is None:
            return torch.ones(shape, dtype=torch.bool, device=device)
        if not isinstance(mask, Tensor) or mask.dim() != 2:
            got = f"shape {tuple(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
            raise ValueError(
                f"text_mask: attention_mask ({got}) does not show padding; takes (B, T), or give text_mask"
            )
        if mask.shape[0] != shape[0] or mask.shape[1] < shape[1]:
            raise ValueError(f"attention_mask: takes shape {shape}, got {tuple(mask.shape)}")
        return mask[:, -shape[1] :].to(device).bool()  # with a cache, the columns before are the cache's

    def given(self, name: str, mask: Tensor | str, shape: tuple[int, int]) -> Tensor:
        """The caller's own mask, or the one in the forward argument it names, as (B, T) bool."""
        if isinstance(mask, str):
            if self.inputs.get(mask) is None:
                raise ValueError(f"{name}: no argument {mask!r} was passed to the model's forward")
            mask = self.inputs[mask]
        if not isinstance(mask, Tensor) or tuple(mask.shape) != shape:
            got = f"shape {tuple(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
            raise ValueError(f"{name}: takes one entry per token, shape {shape}, got {got}")
        return mask != 0


class _Running:
    """The forward pass that a thread is in."""

    def __init__(self) -> None:
        self.forward: ForwardPass | None = None
        self.inside: list[int] = []  # places on the decoder's path of the modules that are being called
        self.embedded: Tensor | None = None


class _Elsewhere(threading.local):
    """The same for each thread that finds the watch in use by another."""

    def __init__(self) -> None:
        self.running = _Running()

    def __reduce__(self) -> tuple[type[_Elsewhere], tuple[()]]:
        return _Elsewhere, ()  # a copy of a model runs nothing


class ForwardWatch:
    """Follows the forward passes of a model and keeps what marks the tokens of the running one.

    Hooks sit on every module from the model down to its decoder, because wrappers call some of them past their hooks
    (PEFT runs `base.forward`); the outermost call that names an input wins. All hooks are methods of this object, so a
    deep copy of the model gets a watch of its own.
    """

    def __init__(self, model: nn.Module, decoder: Decoder, *, named: tuple[str, ...] = ()) -> None:
        model_type = getattr(getattr(unwrap(model), "config", None), "model_type", "")
        self.token_ids = vision_token_ids(model)
        self.type_ids = TYPE_IDS.get(model_type, "mm_token_type_ids")
        self.watched = ("input_ids", "attention_mask", "past_key_values", self.type_ids, *named)
        self._here, self._elsewhere = _Running(), _Elsewhere()
        self._owner: dict[str, int] = {}  # the thread that has `_here`, under one key: a dict claims it atomically
        self._arguments = {type(module): _argument_names(module) for module in decoder.path}
        self._path = decoder.path
        self._handles = []
        for module in decoder.path:
            self._handles.append(module.register_forward_pre_hook(self._enter, with_kwargs=True))
            self._handles.append(module.register_forward_hook(self._leave, always_call=True))
        if model_type in EMBEDS_FIRST:
            inner: Any = unwrap(model)
            embedding = inner.get_input_embeddings()
            self._handles.append(embedding.register_forward_pre_hook(self._embed))

    @property
    def running(self) -> ForwardPass | None:
        """The forward pass that this thread is in, or None."""
        return self._state().forward

    def remove(self) -> None:
        """Takes the hooks off the model."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _enter(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        state, place = self._state(claim=True), self._place(module)
        if state.inside and state.inside[-1] >= place:  # what an interrupt (Ctrl-C) left behind: no hook saw its end
            state.inside.clear()
            state.forward = None
        if state.forward is None:
            state.forward = ForwardPass(self.token_ids, self.type_ids)
        state.inside.append(place)
        inputs = state.forward.inputs
        names = self._arguments.get(type(module)) or _argument_names(module)
        for name, value in (*zip(names, args, strict=False), *kwargs.items()):
            if name not in self.watched or value is None or name in inputs:
                continue
            if name == "attention_mask" and len(state.inside) > 1 and not _is_matrix(value):
                continue  # the causal mask that an outer module built
            inputs[name] = value
        if state.embedded is not None and "input_ids" not in inputs:
            inputs["input_ids"] = state.embedded
            state.forward.embedded = True

    def _leave(self, module: nn.Module, args: tuple, output: Any) -> None:
        state = self._state()
        state.inside.pop()
        if not state.inside:
            state.forward = state.embedded = None
            if state is self._here:
                self._owner.clear()

    def _embed(self, module: nn.Module, args: tuple) -> None:
        state = self._state(claim=True)
        if not state.inside:
            state.embedded = args[0]

    def _state(self, *, claim: bool = False) -> _Running:
        """This thread's state: a plain one for the first thread to come and for torch.compile, which knows no other."""
        if torch.compiler.is_compiling():
            return self._here
        elsewhere, me = self._elsewhere.running, threading.get_ident()
        if elsewhere.inside or elsewhere.embedded is not None:  # in the middle of a pass, whoever has left meanwhile
            return elsewhere
        owner = self._owner.setdefault("thread", me) if claim else self._owner.get("thread", me)
        return self._here if owner == me else elsewhere

    def _place(self, module: nn.Module) -> int:
        return next(i for i, other in enumerate(self._path) if other is module)


def _is_matrix(value: object) -> bool:
    return isinstance(value, Tensor) and value.dim() == 2


def _argument_names(module: nn.Module) -> tuple[str, ...]:
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return tuple(p.name for p in inspect.signature(module.forward).parameters.values() if p.kind in kinds)
