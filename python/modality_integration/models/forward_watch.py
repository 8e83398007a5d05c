"""Follows the forward passes of a model and keeps what each was given that marks its tokens."""

from __future__ import annotations

import inspect
import threading
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from modality_integration.models.decoder import Decoder, unwrap
from modality_integration.models.moca_pass import MoCaPass
from modality_integration.models.token_roles import TYPE_IDS, Mask, vision_token_ids

# Families whose generate() embeds the prompt itself and calls the language model past the model's own forward.
EMBEDS_FIRST = ("blip-2", "instructblip", "instructblipvideo")


class ForwardPass:
    """One forward pass: what it was given that marks its tokens, and what MoCa makes of that."""

    def __init__(self, token_ids: tuple[int, ...], type_ids: str) -> None:
        self.token_ids, self.type_ids = token_ids, type_ids
        self.inputs: dict[str, Any] = {}  # the watched arguments by name: tensors, a cache, flags
        self.embedded = False  # input_ids are those the embedding saw before the pass began
        self.moca = MoCaPass()
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
    """The state of each thread that finds the watch in use by another."""

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
        self._handles: list[RemovableHandle] = []
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

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
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

    def _leave(self, module: nn.Module, args: tuple[Any, ...], output: object) -> None:
        state = self._state()
        state.inside.pop()
        if not state.inside:
            state.forward = state.embedded = None
            if state is self._here:
                self._owner.clear()

    def _embed(self, module: nn.Module, args: tuple[Any, ...]) -> None:
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
