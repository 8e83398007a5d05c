"""Follows the forward passes of a model and keeps what each was given that marks its tokens."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Mapping
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from modality_integration.models.decoder import Decoder, unwrap
from modality_integration.models.embedded import EmbeddedIds, virtual_tokens
from modality_integration.models.generation import Generation, generation_running
from modality_integration.models.moca_pass import MoCaPass
from modality_integration.models.token_roles import (
    PACKING,
    TYPE_IDS,
    Mask,
    audio_token_ids,
    packed_samples,
    vision_token_ids,
)


class ForwardPass:
    """One forward pass: what it was given that marks its tokens, and what MoCa makes of that."""

    def __init__(
        self, token_ids: tuple[int, ...], type_ids: str, virtual: int = 0, audio_ids: tuple[int, ...] = ()
    ) -> None:
        self.token_ids, self.audio_ids, self.type_ids = token_ids, audio_ids, type_ids
        self.virtual = virtual  # how many trained tokens PEFT's prompt tuning may put before every row
        self.inputs: dict[str, Any] = {}  # the watched arguments by name: tensors, a cache, flags
        self.embedded = False  # input_ids are those the embedding saw before the pass began
        self.cached = False  # there is a cache, be it empty
        self.past = 0  # tokens in the cache when the pass began
        self.moca = MoCaPass()
        self.differentiable = torch.is_grad_enabled()
        self._generation: tuple[Generation | None] | None = None  # once it has been asked for

    def generation(self, length: int) -> Generation | None:
        """What generate() runs this pass, of `length` tokens a row, for; asked first while it runs. None outside of
        generate() and in compiled code, which does not see who runs it."""
        if torch.compiler.is_compiling():
            return None
        if self._generation is None:
            ids = self.inputs.get("input_ids")
            length = ids.shape[1] if _is_matrix(ids) else length
            self._generation = (generation_running(length, self.past),)
        return self._generation[0]

    def continues(self, length: int) -> bool:
        """Whether this pass, of `length` tokens a row, goes on with sequences that a cache holds."""
        mask = self.inputs.get("attention_mask")
        return self.past > 0 or (_is_matrix(mask) and mask.shape[1] > length)

    def has_vision(self, shape: tuple[int, int], given: Mask = None) -> bool:
        """Whether a token of this pass is a vision token; False where nothing says so."""
        try:
            return bool(self.vision(shape, given).any())
        except ValueError:
            return False

    def is_marked(self, given: Mask = None) -> bool:
        """Whether anything in this pass says which tokens are vision tokens."""
        named = self.inputs.get(given) if isinstance(given, str) else given
        if given is not None:
            return named is not None
        return (self.inputs.get("input_ids") is not None and bool(self.token_ids)) or (
            self.inputs.get(self.type_ids) is not None
        )

    def vision(self, shape: tuple[int, int], given: Mask = None) -> Tensor:
        """(B, T) bool, True at vision tokens; ValueError where nothing in this pass says which those are."""
        if given is not None:
            return self.given("vision_mask", given, shape)
        ids = self._behind_virtual(self.inputs.get("input_ids"), shape, -1)
        types = self._behind_virtual(self.inputs.get(self.type_ids), shape, 0)
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
        if (types := self._of_pass(types, shape)) is not None:
            return (types == 1) | (types == 2)
        why = (
            f"no input_ids or {self.type_ids} were passed, and inputs_embeds alone do not say"
            if self.token_ids
            else "the model's configuration names no image token"
        )
        raise ValueError(f"vision_mask: nothing in this forward pass marks its vision tokens ({why}); give vision_mask")

    def audio(self, shape: tuple[int, int], device: torch.device) -> Tensor | None:
        """(B, T) bool, True at audio features; None where nothing says that there are any."""
        ids = self._behind_virtual(self.inputs.get("input_ids"), shape, -1)
        if ids is not None and self.audio_ids and tuple(ids.shape) == shape:
            found = [ids == token_id for token_id in self.audio_ids]
            return torch.stack(found).any(0).to(device)
        types = self._of_pass(self._behind_virtual(self.inputs.get(self.type_ids), shape, 0), shape)
        return None if types is None or ids is not None else (types > 2).to(device)

    def samples(self, kept: Tensor, vision: Tensor) -> Tensor | None:
        """(B, T) int64: the number of each token's sample, where a row is several; see `packed_samples`."""
        return None if self.past or self.virtual else packed_samples(self.inputs, kept, vision)

    def kept(self, shape: tuple[int, int], device: torch.device) -> Tensor:
        """(B, T) bool, False at virtual tokens and, by attention_mask, at padding, of which is none without one."""
        kept = self._no_padding(shape, device)
        if self.begins_virtual(shape):
            kept = kept.clone()
            kept[:, : self.virtual] = False  # they are no text
        return kept

    def begins_virtual(self, shape: tuple[int, int]) -> bool:
        """Whether the rows (B, T) that the decoder ran on begin with virtual tokens."""
        marks = self.inputs.get("input_ids"), self.inputs.get("attention_mask")
        return self.virtual > 0 and any(_is_matrix(m) and m.shape[1] + self.virtual == shape[1] for m in marks)

    def _no_padding(self, shape: tuple[int, int], device: torch.device) -> Tensor:
        mask = self._behind_virtual(self.inputs.get("attention_mask"), shape, 1)
        if mask is None:
            return torch.ones(shape, dtype=torch.bool, device=device)
        if not _is_matrix(mask):
            mask = _columns_seen(mask)
        if mask is None:  # a mask of attention that hides nothing
            return torch.ones(shape, dtype=torch.bool, device=device)
        if not _is_matrix(mask):
            got = f"shape {tuple(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
            raise ValueError(
                f"text_mask: attention_mask ({got}) does not show padding; takes (B, T), or give text_mask"
            )
        if mask.shape[0] != shape[0] or mask.shape[1] < shape[1]:
            raise ValueError(f"attention_mask: takes shape {shape}, got {tuple(mask.shape)}")
        # With a cache, the columns before are the cache's; those after are room that a static one has left.
        first = self.past if self.past + shape[1] <= mask.shape[1] else mask.shape[1] - shape[1]
        return mask[:, first : first + shape[1]].to(device).bool()

    def _of_pass(self, marks: object, shape: tuple[int, int]) -> Tensor | None:
        """The columns of this pass in what marks the tokens (B, S) so far; None if there are none."""
        if not _is_matrix(marks) or len(marks) != shape[0] or marks.shape[1] < self.past + shape[1]:
            return marks if _is_matrix(marks) and tuple(marks.shape) == shape else None
        return marks[:, self.past : self.past + shape[1]]

    def _behind_virtual(self, marks: Tensor | None, shape: tuple[int, int], fill: int) -> Tensor | None:
        """What marks the tokens (B, T), with `fill` for the virtual tokens where the decoder ran on those as well."""
        if not self.virtual or not _is_matrix(marks) or marks.shape[1] + self.virtual != shape[1]:
            return marks
        return torch.cat([marks.new_full((marks.shape[0], self.virtual), fill), marks], 1)

    def given(self, name: str, mask: Tensor | str, shape: tuple[int, int]) -> Tensor:
        """The caller's own mask, or the one in the forward argument it names, as (B, T) bool."""
        if isinstance(mask, str):
            if self.inputs.get(mask) is None:
                raise ValueError(f"{name}: no argument {mask!r} was passed to the model's forward")
            mask = self.inputs[mask]
        if isinstance(mask, Tensor) and mask.dim() == 2:
            behind = self._behind_virtual(self._before_generated(mask, shape), shape, 0)
            assert behind is not None  # a tensor, as it was
            mask = self._fitted(behind, shape)
        if not isinstance(mask, Tensor) or tuple(mask.shape) != shape:
            got = f"shape {tuple(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
            raise ValueError(f"{name}: takes one entry per token, shape {shape}, got {got}")
        return mask != 0

    def _before_generated(self, mask: Tensor, shape: tuple[int, int]) -> Tensor:
        """A mask of the prompt with False for what was generated, where generate() runs on all of it again."""
        generation = None if self.cached else self.generation(shape[1])
        if generation is None or not generation.beyond:
            return mask
        whole = mask.shape[1] + generation.beyond
        return nn.functional.pad(mask, (0, generation.beyond)) if shape[1] - whole in (0, self.virtual) else mask

    def _fitted(self, mask: Tensor, shape: tuple[int, int]) -> Tensor:
        """A mask of the prompt, as generate() needs it: its rows repeated for beams, the columns of this pass alone."""
        if torch.compiler.is_compiling() or tuple(mask.shape) == shape:
            return mask
        rows = shape[0] // max(len(mask), 1)
        if rows > 1 and len(mask) * rows == shape[0] and self.generation(shape[1]) is not None:
            mask = mask.repeat_interleave(rows, 0)
        if not self.cached or mask.shape[0] != shape[0]:
            return mask
        part = mask[:, self.past : self.past + shape[1]]  # what is generated has no vision tokens
        return torch.cat([part, part.new_zeros((shape[0], shape[1] - part.shape[1]))], 1)


class _Running:
    """The forward pass that a thread is in."""

    def __init__(self) -> None:
        self.forward: ForwardPass | None = None
        self.inside: list[int] = []  # places on the decoder's path of the modules that are being called


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
        self.token_ids, self.audio_ids = vision_token_ids(model), audio_token_ids(model)
        self.type_ids = TYPE_IDS.get(model_type, "mm_token_type_ids")
        self.watched = ("input_ids", "attention_mask", "past_key_values", *PACKING, self.type_ids, *named)
        self._here, self._elsewhere = _Running(), _Elsewhere()
        self._owner: dict[str, int] = {}  # the thread that has `_here`, under one key: a dict claims it atomically
        self._arguments = {type(module): _argument_names(module) for module in decoder.path}
        self._path = decoder.path
        self._handles: list[RemovableHandle] = []
        for module in decoder.path:
            self._handles.append(module.register_forward_pre_hook(self._enter, with_kwargs=True))
            self._handles.append(module.register_forward_hook(self._leave, always_call=True))
        self._embedded = EmbeddedIds(unwrap(model))
        self._handles += self._embedded.watch(unwrap(model))

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
            state.forward = ForwardPass(self.token_ids, self.type_ids, virtual_tokens(module), self.audio_ids)
        state.inside.append(place)
        inputs = state.forward.inputs
        names = self._arguments.get(type(module)) or _argument_names(module)
        given = (*zip(names, args, strict=False), *kwargs.items())
        for name, value in given:
            if name not in self.watched or value is None or name in inputs:
                continue
            if name == "attention_mask" and len(state.inside) > 1 and not _is_matrix(value):
                continue  # the causal mask that an outer module built
            if name in PACKING and len(state.inside) > 1:
                continue  # what an outer module worked out
            inputs[name] = value
            if name == "past_key_values" and not torch.compiler.is_compiling():
                state.forward.cached, state.forward.past = True, _cached_tokens(value)
        if len(state.inside) == 1 and not torch.compiler.is_compiling():
            before = self._embedded.take()
            if "input_ids" not in inputs and before is not None and before.is_what(dict(given).get("inputs_embeds")):
                inputs["input_ids"], state.forward.virtual = before.ids, before.virtual
                state.forward.embedded = True

    def _leave(self, module: nn.Module, args: tuple[Any, ...], output: object) -> None:
        state = self._state()
        if state.inside:  # else its beginning was refused
            state.inside.pop()
        if not state.inside:
            state.forward = None
            if state is self._here:
                self._owner.clear()

    def _state(self, *, claim: bool = False) -> _Running:
        """This thread's state: a plain one for the first thread to come and for torch.compile, which knows no other."""
        if torch.compiler.is_compiling():
            return self._here
        elsewhere, me = self._elsewhere.running, threading.get_ident()
        if elsewhere.inside:  # in the middle of a pass, whoever has left meanwhile
            return elsewhere
        owner = self._owner.setdefault("thread", me) if claim else self._owner.get("thread", me)
        return self._here if owner == me else elsewhere

    def _place(self, module: nn.Module) -> int:
        for i, other in enumerate(self._path):
            if other is module:
                return i
        # nn.DataParallel copies the module's attributes, its hooks among them, into the replica of each thread.
        raise RuntimeError(
            f"model: {type(module).__name__} runs as a copy that shares this model's hooks, as nn.DataParallel's "
            "replicas do, and MoCa and capture follow one model; take DistributedDataParallel"
        )


def _is_matrix(value: object) -> TypeGuard[Tensor]:
    return isinstance(value, Tensor) and value.dim() == 2


def _cached_tokens(cache: Any) -> int:
    """How many tokens a cache holds; 0 where it does not say."""
    try:
        return int(cache.get_seq_length())
    except (AttributeError, ValueError):
        return 0


def _columns_seen(mask: object) -> Any:
    """(B, S) bool: the columns that an attention mask (B, 1, T, S) lets any token see, which padding is not; of masks
    by kind of layer, that of full attention. None for none; `mask` itself where it is none of these."""
    if isinstance(mask, Mapping):
        return _columns_seen(mask.get("full_attention", next(iter(mask.values()), None)))
    if not isinstance(mask, Tensor) or mask.dim() != 4:
        return mask
    seen = mask if mask.dtype == torch.bool else mask == 0
    return seen.any(1).any(1)


def _argument_names(module: nn.Module) -> tuple[str, ...]:
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return tuple(p.name for p in inspect.signature(module.forward).parameters.values() if p.kind in kinds)
