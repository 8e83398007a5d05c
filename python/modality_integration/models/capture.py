"""`capture`: the true residual stream after every decoder layer and the role of every token, from any forward pass."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from mir_kernels import _checks
from modality_integration.metric.packing import PackedStates
from modality_integration.models.decoder import Decoder, LayerOutput, Layers, find_decoder, refuse_several_streams
from modality_integration.models.forward_watch import ForwardPass, ForwardWatch
from modality_integration.models.token_roles import Mask, is_packed, text_after_vision


@contextmanager
def capture(
    model: nn.Module,
    *,
    last: Literal["normed", "raw"] = "normed",
    text: Literal["after", "all"] = "after",
    audio: Literal["leave out", "text"] = "leave out",
    vision_mask: Mask = None,
    text_mask: Mask = None,
    layers: Layers = None,
) -> Iterator[Capture]:
    """Records the forward passes of `model` inside the block: f_k of Eq. 1 of the MIR paper and the token roles.

        with torch.no_grad(), capture(model) as seen:
            model(**inputs)
        metric.update(seen.hidden_states, seen.vision_mask, seen.text_mask)

    A layer's output is the input of the next layer, so it includes everything added between layers (MoCa, DeepStack
    features). `last`: the last layer's output after the final norm (as published) or before it. `text`: the tokens
    after the last vision token of their row (as published), or all tokens that are neither vision nor padding.

    Roles come from the model's own marker: its image and video ids in `input_ids`, otherwise its token type ids.
    Padding comes from a 2-D `attention_mask`. `vision_mask` and `text_mask` override them: a (B, T) tensor for every
    pass of the block, or the name of the forward argument that carries one. `layers` names the decoder layers (a
    qualified name, or the modules) if they cannot be found by structure.

    Audio features are neither vision nor text, unless `audio="text"` counts them as text.

    A row may pack several samples one after the other. Then `sample_ids` numbers them, text tokens are those after the
    last vision token of their own sample, and `ModalityIntegrationRate.update` counts each sample separately, because
    `hidden_states` carry the numbers. Samples are detected from the forward arguments: `position_ids` that restart,
    `cu_seq_lens_q`, `seq_idx`, or an attention_mask that numbers the samples 1, 2, ....

    Each pass replaces the previous one, except for chunks of one prompt, which are concatenated: passes that continue
    the sequence in the same cache and bring vision tokens or, outside `generate`, more than one token. Decoding steps,
    drafts and guidance passes are not recorded: after `generate`, the capture holds the prefill.
    Errors: ValueError for models without vision tokens in the stream (cross-attention, encoder-decoder) or with several
    streams, for compiled models, and, when masks are read, for rows or samples without an image.
    """
    _checks.choice("last", last, ("normed", "raw"))
    _checks.choice("audio", audio, ("leave out", "text"))
    _checks.choice("text", text, ("after", "all"))
    decoder = find_decoder(model, layers)
    refuse_several_streams(model)
    if decoder.norm is None and last == "normed":
        raise ValueError('last: no final norm was found next to the decoder layers; use last="raw"')
    named = tuple(m for m in (vision_mask, text_mask) if isinstance(m, str))
    watch = ForwardWatch(model, decoder, named=named)
    seen = Capture(decoder, watch, last, _Reading(text, audio, vision_mask, text_mask))
    try:
        yield seen
    finally:
        seen._remove()


class Capture:
    """The latest forward pass: K hidden states (B, T, d) and the masks (B, T) bool of its vision and text tokens.

    Hidden states are detached, share memory with the model's tensors and stay on the device that computed them.
    """

    def __init__(self, decoder: Decoder, watch: ForwardWatch, last: str, reading: _Reading) -> None:
        self.layer_names = list(decoder.names)
        self.passes = 0
        self._watch, self._reading = watch, reading
        self._extends = False  # the pass being recorded continues the previous one
        self._fills = self._filled = _Filled(None)  # the caches of the pass being recorded and of the last one
        self._prompt: int | None = None  # how many tokens of the pass count, if not all
        self._read = False  # states or masks have been read, so they are complete
        self._recording: list[Tensor] | None = None
        self._states: list[Tensor] = []
        self._versions: list[int | None] = []
        self._roles: _Roles | None = None
        first, *rest = decoder.layers
        self._handles = [first.register_forward_pre_hook(self._first, with_kwargs=True)]
        self._handles += [layer.register_forward_pre_hook(self._next, with_kwargs=True) for layer in rest]
        if decoder.norm is None:
            self._handles.append(decoder.layers[-1].register_forward_hook(self._output))
        elif last == "raw":
            self._handles.append(decoder.norm.register_forward_pre_hook(self._final, with_kwargs=True))
        else:
            self._handles.append(decoder.norm.register_forward_hook(self._output))

    @property
    def hidden_states(self) -> list[Tensor]:
        """Outputs of decoder layers 1..K, each (B, T, d), in the model's dtype; PackedStates where rows are packed."""
        roles = self._roles_of_pass()
        for name, state, version in zip(self.layer_names, self._states, self._versions, strict=True):
            if version is not None and state._version != version:
                raise RuntimeError(
                    f"hidden_states: the output of {name} was overwritten in place after it was recorded"
                )
        ids = roles.masks().sample_ids if roles.may_be_packed else None
        return list(self._states) if ids is None else PackedStates(self._states, ids)

    @property
    def vision_mask(self) -> Tensor:
        """(B, T) bool: the vision tokens. ValueError if a row or sample has none, or nothing marks them."""
        return self._roles_of_pass().masks().vision

    @property
    def text_mask(self) -> Tensor:
        """(B, T) bool: the text tokens, without padding. ValueError if a row or sample has no image."""
        return self._roles_of_pass().masks().text

    @property
    def sample_ids(self) -> Tensor | None:
        """(B, T) int64: number of each token's sample in its row, -1 for padding; None if each row is one sample."""
        return self._roles_of_pass().masks().sample_ids

    @property
    def samples(self) -> int:
        """The number of samples in the pass."""
        return len(self._roles_of_pass().masks().first)

    @property
    def image_first(self) -> int:
        """How many samples begin with a vision token, padding aside; virtual tokens of prompt tuning count as first.

        The first token nearly always becomes an attention sink, whatever its role.
        """
        masks = self._roles_of_pass().masks()
        return int(masks.vision[tuple(masks.first.unbind(1))].sum())

    def _roles_of_pass(self) -> _Roles:
        if self._roles is None:
            raise RuntimeError("capture: no forward pass of the model has been recorded in this block")
        self._read = True
        return self._roles

    def _remove(self) -> None:
        self._watch.remove()
        for handle in self._handles:
            handle.remove()
        self._recording = None

    def _first(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = _hidden_input(args, kwargs)
        # Layers that run outside a pass of the model are a checkpoint's recomputation.
        running = self._watch.running
        if running is None:
            self._recording = None
            return
        cache = running.inputs.get("past_key_values")
        filled = _Filled.of(_cache_of_layer(args, kwargs) if cache is None else cache, "past_key_values" in kwargs)
        self._recording = self._begun(running, (x.shape[0], x.shape[1]), filled)

    def _begun(self, running: ForwardPass, shape: tuple[int, int], filled: _Filled) -> list[Tensor] | None:
        """The list to record the beginning pass of `shape` into; None for a step that is not to be recorded."""
        self._extends = False
        continues = running.continues(shape[1])
        generation = running.generation(shape[1])
        if generation is not None and not generation.prefill:
            return None
        self._prompt = shape[1] - generation.beyond if generation is not None and generation.beyond else None
        if continues:
            if generation is None and shape[1] == 1 and not running.has_vision(shape, self._reading.vision_mask):
                return None
            self._extends = self._goes_on(running, shape[0]) and filled.may_be(self._filled)
        self._fills = filled
        return []

    def _goes_on(self, running: ForwardPass, rows: int) -> bool:
        """Whether the cache ends with the last recorded pass, and that pass has not been read yet."""
        if self._read or self._roles is None:
            return False
        before, begin = self._states[0], self._roles.parts[0].running.past
        return (len(before), begin + before.shape[1]) == (rows, running.past)

    def _next(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._recording is not None and self._watch.running is not None:
            self._recording.append(_hidden_input(args, kwargs).detach())

    def _final(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._finish(_hidden_input(args, kwargs))

    def _output(self, module: nn.Module, args: tuple[Any, ...], output: LayerOutput) -> None:
        self._finish(output[0] if isinstance(output, tuple) else output)

    def _finish(self, state: Tensor) -> None:
        running = self._watch.running
        if self._recording is None or running is None:
            return
        states, self._recording = [*self._recording, state.detach()], None
        if len(states) != len(self.layer_names):
            raise RuntimeError(
                f"capture: {len(states)} of {len(self.layer_names)} decoder layers ran in this pass (layer drop?)"
            )
        running.inputs.pop("past_key_values", None)  # so that the cache can be freed
        self._filled = self._fills
        part = _Part(running, (states[0].shape[0], states[0].shape[1]), self._prompt)
        states = [state[:, : part.length] for state in states] if part.length else states
        if self._extends and self._roles is not None:
            states = [torch.cat(both, 1) for both in zip(self._states, states, strict=True)]
            parts = [*self._roles.parts, part]
        else:
            parts = [part]
            self.passes += 1
        self._states, self._roles, self._read = states, _Roles(parts, self._reading), False
        self._versions = [None if s.is_inference() else s._version for s in states]


class _Filled(NamedTuple):
    """A weak reference to the cache that a pass filled.

    refer: returns the cache, or None if it is gone; None where it is unknown whether there is a cache.
    """

    refer: Callable[[], object] | None

    @classmethod
    def of(cls, cache: object, shown: bool) -> _Filled:
        """shown: whether `cache=None` means that there is no cache."""
        if cache is None:
            return cls(_no_cache if shown else None)
        try:
            return cls(weakref.ref(cache))
        except TypeError:  # a tuple
            return cls(None)

    def may_be(self, before: _Filled) -> bool:
        """Whether this may be the cache of the previous pass; True if either is unknown."""
        if before.refer is None or self.refer is None:
            return True
        return before.refer() is self.refer()


def _no_cache() -> None:
    return None


class _Part(NamedTuple):
    """A forward pass, its (B, T), and how many of its T tokens count (None: all)."""

    running: ForwardPass
    shape: tuple[int, int]
    length: int | None


class _Reading(NamedTuple):
    """The options of `capture` that determine the token roles."""

    text: str
    audio: str
    vision_mask: Mask
    text_mask: Mask


class _Masks(NamedTuple):
    """Token roles (B, T) bool, and the numbers of packed samples; first: (S, 2), each sample's first token."""

    vision: Tensor
    text: Tensor
    sample_ids: Tensor | None
    first: Tensor


class _Roles:
    """The masks of one pass, computed on first read, so that a pass whose masks are never read cannot fail.

    parts: its forward passes; more than one if the prompt came in chunks.
    """

    def __init__(self, parts: list[_Part], reading: _Reading) -> None:
        self.parts, self._reading = parts, reading
        self._masks: _Masks | None = None

    @property
    def may_be_packed(self) -> bool:
        """Whether a row may hold several samples, judging by the inputs alone."""
        if self._masks is not None:
            return self._masks.sample_ids is not None
        return len(self.parts) == 1 and is_packed(self.parts[0].running.inputs)

    def masks(self) -> _Masks:
        if self._masks is None:
            self._masks = self._work_out()
            self.parts = []  # frees the inputs
        return self._masks

    def _work_out(self) -> _Masks:
        reading = self._reading
        visions = [p.running.vision(p.shape, reading.vision_mask)[:, : p.length] for p in self.parts]
        device = visions[0].device
        vision = torch.cat([v.to(device) for v in visions], 1)
        given = None
        if reading.text_mask is not None:
            texts = [p.running.given("text_mask", reading.text_mask, p.shape)[:, : p.length] for p in self.parts]
            given = torch.cat([t.to(device) for t in texts], 1)
        both = reading.vision_mask is not None and given is not None
        try:
            kept = torch.cat([p.running.kept(p.shape, device)[:, : p.length] for p in self.parts], 1)
        except ValueError:
            if not both:  # with both masks given, padding does not matter
                raise
            kept = torch.ones_like(vision)
        ids = self.parts[0].running.samples(kept, vision) if len(self.parts) == 1 else None
        if ids is not None:
            kept = kept & (ids >= 0)
        first = _first_of_each(kept, ids)
        if self.parts[0].running.begins_virtual(self.parts[0].shape):
            first[:, 1] = 0
        if both:
            assert given is not None
            return _Masks(vision, given, ids, first)
        if reading.vision_mask is None:
            vision = vision & kept
        _require_images(vision, ids)
        if given is not None:
            return _Masks(vision, given, ids, first)
        text = ~vision & kept
        if reading.audio == "leave out":
            for p, part in zip(self.parts, text.split([v.shape[1] for v in visions], 1), strict=True):
                sounds = p.running.audio(p.shape, device)
                if sounds is not None:
                    part &= ~sounds[:, : p.length]  # a view of `text`
        return _Masks(vision, text & text_after_vision(vision, ids) if reading.text == "after" else text, ids, first)


def _require_images(vision: Tensor, ids: Tensor | None) -> None:
    """Raises ValueError unless every row, or every sample of packed rows, has a vision token."""
    if ids is None:
        bare = (~vision.any(-1)).nonzero().flatten().tolist()
        where = f"row {', '.join(map(str, bare))} of the batch ({len(vision)} rows)"
    else:
        rows = torch.arange(len(ids), device=ids.device, dtype=torch.int64)[:, None].expand(ids.shape)
        every = {tuple(pair) for pair in torch.stack([rows, ids], -1)[ids >= 0].tolist()}
        bare = sorted(every - {tuple(pair) for pair in torch.stack([rows, ids], -1)[vision].tolist()})
        where = f"{', '.join(f'sample {number} of row {row}' for row, number in bare)} of the packed batch"
    if bare:
        raise ValueError(
            f"vision_mask: no vision token in {where}; MIR compares vision tokens with text tokens, so every row or "
            "sample needs at least one image"
        )


def _first_of_each(kept: Tensor, ids: Tensor | None) -> Tensor:
    """(S, 2) int64: row and column of each sample's first token that is not padding; column 0 for a row of padding."""
    if ids is None:
        rows = torch.arange(len(kept), device=kept.device, dtype=torch.int64)
        return torch.stack([rows, kept.int().argmax(-1)], 1)
    begins = ids >= 0
    begins[:, 1:] &= ids[:, 1:] != ids[:, :-1]
    return begins.nonzero()


def _cache_of_layer(args: tuple[Any, ...], kwargs: dict[str, Any]) -> object:
    """The cache passed to a decoder layer, possibly created by the model itself; None if there is none."""
    return next((value for value in (*args, *kwargs.values()) if hasattr(value, "get_seq_length")), None)


def _hidden_input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    state = args[0] if args else kwargs.get("hidden_states")
    if not isinstance(state, Tensor) or state.dim() != 3:
        got = f"shape {tuple(state.shape)}" if isinstance(state, Tensor) else type(state).__name__
        raise ValueError(
            f"layers: expected decoder layers whose first input is hidden states (B, T, d), got {got}; models with "
            "several residual streams per token are not supported"
        )
    return state
