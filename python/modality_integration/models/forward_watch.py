"""Follows the forward passes of a model and keeps the inputs that mark their tokens."""

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
    """One forward pass: the inputs that mark its tokens, and MoCa's state derived from them."""

    def __init__(
        self, token_ids: tuple[int, ...], type_ids: str, virtual: int = 0, audio_ids: tuple[int, ...] = ()
    ) -> None:
        self.token_ids, self.audio_ids, self.type_ids = token_ids, audio_ids, type_ids
        self.virtual = virtual  # number of trained tokens that PEFT's prompt tuning may put before every row
        self.inputs: dict[str, Any] = {}  # the watched arguments by name: tensors, a cache, flags
        self.embedded = False  # input_ids were recorded by the embedding before the pass began
        self.cached = False  # there is a cache, possibly empty
        self.past = 0  # tokens in the cache when the pass began
        self.moca = MoCaPass()
        self.differentiable = torch.is_grad_enabled()
        self._generation: tuple[Generation | None] | None = None  # set by the first call of `generation`

    def generation(self, length: int) -> Generation | None:
        """The purpose for which generate() runs this pass of `length` tokens per row; the first call must be made
        during the pass. None outside generate() and in compiled code, which cannot inspect its callers."""
        if torch.compiler.is_compiling():
            return None
        if self._generation is None:
            ids = self.inputs.get("input_ids")
            length = ids.shape[1] if _is_matrix(ids) else length
            self._generation = (generation_running(length, self.past),)
        return self._generation[0]

    def continues(self, length: int) -> bool:
        """Whether this pass, of `length` tokens per row, continues sequences held in a cache."""
        mask = self.inputs.get("attention_mask")
        return self.past > 0 or (_is_matrix(mask) and mask.shape[1] > length)

    def has_vision(self, shape: tuple[int, int], given: Mask = None) -> bool:
        """Whether any token of this pass is a vision token; False if nothing marks them."""
        try:
            return bool(self.vision(shape, given).any())
        except ValueError:
            return False

    def is_marked(self, given: Mask = None) -> bool:
        """Whether anything in this pass marks its vision tokens."""
        named = self.inputs.get(given) if isinstance(given, str) else given
        if given is not None:
            return named is not None
        return (self.inputs.get("input_ids") is not None and bool(self.token_ids)) or (
            self.inputs.get(self.type_ids) is not None
        )

    def vision(self, shape: tuple[int, int], given: Mask = None) -> Tensor:
        """(B, T) bool, True at vision tokens; ValueError if nothing in this pass marks them."""
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
                    "model expands its image placeholders, so their positions are known only to the caller; pass "
                    "vision_mask"
                )
            vision = ids == self.token_ids[0]
            for token_id in self.token_ids[1:]:
                vision = vision | (ids == token_id)
            return vision
        if (types := self._of_pass(types, shape)) is not None:
            return (types == 1) | (types == 2)
        why = (
            f"no input_ids or {self.type_ids} were passed, and inputs_embeds alone do not mark them"
            if self.token_ids
            else "the model's configuration names no image token"
        )
        raise ValueError(f"vision_mask: nothing in this forward pass marks its vision tokens ({why}); pass vision_mask")

    def audio(self, shape: tuple[int, int], device: torch.device) -> Tensor | None:
        """(B, T) bool, True at audio features; None if nothing marks any."""
        ids = self._behind_virtual(self.inputs.get("input_ids"), shape, -1)
        if ids is not None and self.audio_ids and tuple(ids.shape) == shape:
            found = [ids == token_id for token_id in self.audio_ids]
            return torch.stack(found).any(0).to(device)
        types = self._of_pass(self._behind_virtual(self.inputs.get(self.type_ids), shape, 0), shape)
        return None if types is None or ids is not None else (types > 2).to(device)

    def samples(self, kept: Tensor, vision: Tensor) -> Tensor | None:
        """(B, T) int64: the number of each token's sample if rows are packed; see `packed_samples`."""
        return None if self.past or self.virtual else packed_samples(self.inputs, kept, vision)

    def kept(self, shape: tuple[int, int], device: torch.device) -> Tensor:
        """(B, T) bool, False at virtual tokens and at padding (attention_mask; without one, there is no padding)."""
        kept = self._no_padding(shape, device)
        if self.begins_virtual(shape):
            kept = kept.clone()
            kept[:, : self.virtual] = False  # they are not text
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
        if mask is None:  # an attention mask that hides nothing
            return torch.ones(shape, dtype=torch.bool, device=device)
        if not _is_matrix(mask):
            got = f"shape {tuple(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
            raise ValueError(
                f"text_mask: attention_mask ({got}) does not show padding; pass one of shape (B, T), or text_mask"
            )
        if mask.shape[0] != shape[0] or mask.shape[1] < shape[1]:
            raise ValueError(f"attention_mask: expected shape {shape}, got {tuple(mask.shape)}")
        # With a cache, earlier columns are the cached tokens and later ones the unused room of a static cache.
        first = self.past if self.past + shape[1] <= mask.shape[1] else mask.shape[1] - shape[1]
        return mask[:, first : first + shape[1]].to(device).bool()

    def _of_pass(self, marks: object, shape: tuple[int, int]) -> Tensor | None:
        """This pass's columns of `marks` (B, S), which cover all tokens so far; None if it has none."""
        if not _is_matrix(marks) or len(marks) != shape[0] or marks.shape[1] < self.past + shape[1]:
            return marks if _is_matrix(marks) and tuple(marks.shape) == shape else None
        return marks[:, self.past : self.past + shape[1]]

    def _behind_virtual(self, marks: Tensor | None, shape: tuple[int, int], fill: int) -> Tensor | None:
        """`marks` (B, T), preceded by `fill` for the virtual tokens if the decoder ran on those as well."""
        if not self.virtual or not _is_matrix(marks) or marks.shape[1] + self.virtual != shape[1]:
            return marks
        return torch.cat([marks.new_full((marks.shape[0], self.virtual), fill), marks], 1)

    def given(self, name: str, mask: Tensor | str, shape: tuple[int, int]) -> Tensor:
        """The caller's mask, or the one in the forward argument that it names, as (B, T) bool."""
        if isinstance(mask, str):
            if self.inputs.get(mask) is None:
                raise ValueError(f"{name}: no argument {mask!r} was passed to the model's forward")
            mask = self.inputs[mask]
        if isinstance(mask, Tensor) and mask.dim() == 2:
            behind = self._behind_virtual(self._before_generated(mask, shape), shape, 0)
            assert behind is not None  # it was a tensor
            mask = self._fitted(behind, shape)
        if not isinstance(mask, Tensor) or tuple(mask.shape) != shape:
            got = f"shape {tuple(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
            raise ValueError(f"{name}: expected one entry per token, shape {shape}, got {got}")
        return mask != 0

    def _before_generated(self, mask: Tensor, shape: tuple[int, int]) -> Tensor:
        """A mask of the prompt, extended by False for generated tokens if generate() reruns the whole sequence."""
        generation = None if self.cached else self.generation(shape[1])
        if generation is None or not generation.beyond:
            return mask
        whole = mask.shape[1] + generation.beyond
        return nn.functional.pad(mask, (0, generation.beyond)) if shape[1] - whole in (0, self.virtual) else mask

    def _fitted(self, mask: Tensor, shape: tuple[int, int]) -> Tensor:
        """A mask of the prompt, adapted to generate(): rows repeated for beams, only the columns of this pass."""
        if torch.compiler.is_compiling() or tuple(mask.shape) == shape:
            return mask
        rows = shape[0] // max(len(mask), 1)
        if rows > 1 and len(mask) * rows == shape[0] and self.generation(shape[1]) is not None:
            mask = mask.repeat_interleave(rows, 0)
        if not self.cached or mask.shape[0] != shape[0]:
            return mask
        part = mask[:, self.past : self.past + shape[1]]  # generated tokens are not vision tokens
        return torch.cat([part, part.new_zeros((shape[0], shape[1] - part.shape[1]))], 1)


class _Running:
    """The forward pass that a thread is running."""

    def __init__(self) -> None:
        self.forward: ForwardPass | None = None
        self.inside: list[int] = []  # positions on the decoder's path of the modules being called


class _Elsewhere(threading.local):
    """The state of each thread that finds the watch in use by another thread."""

    def __init__(self) -> None:
        self.running = _Running()

    def __reduce__(self) -> tuple[type[_Elsewhere], tuple[()]]:
        return _Elsewhere, ()  # a copied model has no state of a running pass


class ForwardWatch:
    """Follows the forward passes of a model and keeps the inputs that mark the tokens of the running one.

    Hooks sit on every module from the model down to its decoder, because wrappers call some of them without running
    their hooks (PEFT runs `base.forward`); for each input, the outermost call that passes it wins. All hooks are
    methods of this object, so a deep copy of the model gets a separate watch.
    """

    def __init__(self, model: nn.Module, decoder: Decoder, *, named: tuple[str, ...] = ()) -> None:
        model_type = getattr(getattr(unwrap(model), "config", None), "model_type", "")
        self.token_ids, self.audio_ids = vision_token_ids(model), audio_token_ids(model)
        self.type_ids = TYPE_IDS.get(model_type, "mm_token_type_ids")
        self.watched = ("input_ids", "attention_mask", "past_key_values", *PACKING, self.type_ids, *named)
        self._here, self._elsewhere = _Running(), _Elsewhere()
        self._owner: dict[str, int] = {}  # thread that uses `_here`, under one key: setdefault is atomic
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
        """The forward pass that this thread is running, or None."""
        return self._state().forward

    def remove(self) -> None:
        """Removes the hooks from the model."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        state, place = self._state(claim=True), self._place(module)
        if state.inside and state.inside[-1] >= place:  # left by an interrupt (Ctrl-C), which skips hooks
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
                continue  # computed by an outer module
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
        if state.inside:  # empty if `_enter` raised
            state.inside.pop()
        if not state.inside:
            state.forward = None
            if state is self._here:
                self._owner.clear()

    def _state(self, *, claim: bool = False) -> _Running:
        """This thread's state: the plain one for the first thread and for torch.compile, which supports no other."""
        if torch.compiler.is_compiling():
            return self._here
        elsewhere, me = self._elsewhere.running, threading.get_ident()
        if elsewhere.inside:  # mid-pass: keep it, even if `_here` has become free
            return elsewhere
        owner = self._owner.setdefault("thread", me) if claim else self._owner.get("thread", me)
        return self._here if owner == me else elsewhere

    def _place(self, module: nn.Module) -> int:
        for i, other in enumerate(self._path):
            if other is module:
                return i
        # nn.DataParallel copies the module's attributes, including its hooks, into the replica of each thread.
        raise RuntimeError(
            f"model: {type(module).__name__} runs as a copy that shares this model's hooks, as nn.DataParallel's "
            "replicas do, but MoCa and capture follow a single model; use DistributedDataParallel"
        )


def _is_matrix(value: object) -> TypeGuard[Tensor]:
    return isinstance(value, Tensor) and value.dim() == 2


def _cached_tokens(cache: Any) -> int:
    """How many tokens a cache holds; 0 if unknown."""
    try:
        return int(cache.get_seq_length())
    except (AttributeError, ValueError):
        return 0


def _columns_seen(mask: object) -> Any:
    """(B, S) bool: the columns of an attention mask (B, 1, T, S) that any token attends to, which excludes padding. A
    mapping of masks by layer type is read at full attention. None for None; any other `mask` is returned as it is."""
    if isinstance(mask, Mapping):
        return _columns_seen(mask.get("full_attention", next(iter(mask.values()), None)))
    if not isinstance(mask, Tensor) or mask.dim() != 4:
        return mask
    seen = mask if mask.dtype == torch.bool else mask == 0
    return seen.any(1).any(1)


def _argument_names(module: nn.Module) -> tuple[str, ...]:
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return tuple(p.name for p in inspect.signature(module.forward).parameters.values() if p.kind in kinds)
