"""`capture`: the true residual stream of every decoder layer, and the role of every token, out of any forward pass."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mir_kernels import _checks
from modality_integration.models.decoder import Decoder, LayerOutput, Layers, find_decoder
from modality_integration.models.forward_watch import ForwardPass, ForwardWatch
from modality_integration.models.token_roles import Mask, text_after_vision


@contextmanager
def capture(
    model: nn.Module,
    *,
    last: Literal["normed", "raw"] = "normed",
    text: Literal["after", "all"] = "after",
    vision_mask: Mask = None,
    text_mask: Mask = None,
    layers: Layers = None,
) -> Iterator[Capture]:
    """Records every forward pass of `model` inside the block: f_k of Eq. 1 of the MIR paper and the token roles.

        with torch.no_grad(), capture(model) as seen:
            model(**inputs)
        metric.update(seen.hidden_states, seen.vision_mask, seen.text_mask)

    A layer's output is what the next layer receives, so whatever is added between layers (MoCa, DeepStack features) is
    in it. `last`: the last layer's output after the final norm (as published) or before it. `text`: the tokens after
    the last vision token of their row (as published) or all that are neither vision nor padding.

    Roles come from the model's own marker: its image and video ids in `input_ids`, else its token type ids; padding
    from a 2-D `attention_mask`. `vision_mask` and `text_mask` overrule them: a (B, T) tensor for every pass of the
    block, or the name of the forward argument that carries one. `layers` names the decoder layers (qualified name, or
    the modules) where they are not found by structure.

    Each pass replaces the one before. Decoding steps (one token after a cache) are not passes: after `generate`, the
    prefill is what stands. Errors: ValueError for models without vision tokens in the stream (cross-attention,
    encoder-decoder), for compiled models, and, when masks are read, for rows without an image.
    """
    _checks.choice("last", last, ("normed", "raw"))
    _checks.choice("text", text, ("after", "all"))
    decoder = find_decoder(model, layers)
    if decoder.norm is None and last == "normed":
        raise ValueError('last: no final norm was found beside the decoder layers; take last="raw"')
    named = tuple(m for m in (vision_mask, text_mask) if isinstance(m, str))
    watch = ForwardWatch(model, decoder, named=named)
    seen = Capture(decoder, watch, last, text, vision_mask, text_mask)
    try:
        yield seen
    finally:
        seen._remove()


class Capture:
    """The latest forward pass: K hidden states (B, T, d) and the masks (B, T) bool of its vision and text tokens.

    Hidden states are detached, share memory with the model's own tensors and stay on the device that computed them.
    """

    def __init__(
        self, decoder: Decoder, watch: ForwardWatch, last: str, text: str, vision_mask: Mask, text_mask: Mask
    ) -> None:
        self.layer_names = list(decoder.names)
        self.passes = 0
        self._watch, self._text = watch, text
        self._given_vision, self._given_text = vision_mask, text_mask
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
        """Outputs of decoder layers 1..K, each (B, T, d), in the model's dtype."""
        self._roles_of_pass()
        for name, state, version in zip(self.layer_names, self._states, self._versions, strict=True):
            if version is not None and state._version != version:
                raise RuntimeError(
                    f"hidden_states: the output of {name} was overwritten in place after it was recorded"
                )
        return list(self._states)

    @property
    def vision_mask(self) -> Tensor:
        """(B, T) bool: the vision tokens. ValueError if a row has none, or nothing marks them."""
        return self._roles_of_pass().masks()[0]

    @property
    def text_mask(self) -> Tensor:
        """(B, T) bool: the text tokens, padding left out. ValueError if a row has no image."""
        return self._roles_of_pass().masks()[1]

    @property
    def image_first(self) -> int:
        """How many rows have a vision token as the first of their sequence, padding aside.

        A decoder makes the first token an attention sink in nearly every case, whatever it is.
        """
        roles = self._roles_of_pass()
        vision, _ = roles.masks()
        return int(vision.gather(-1, roles.first.to(vision.device)).sum())

    def _roles_of_pass(self) -> _Roles:
        if self._roles is None:
            raise RuntimeError("capture: no forward pass of the model has been recorded in this block")
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
        self._recording = None if running is None or running.decodes(x.shape[-2]) else []

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
        running.inputs.pop("past_key_values", None)  # not to keep a cache alive
        shape = (states[0].shape[0], states[0].shape[1])
        roles = _Roles(running, shape, self._text, self._given_vision, self._given_text)
        self._states, self._roles = states, roles
        self._versions = [None if s.is_inference() else s._version for s in states]
        self.passes += 1


class _Roles:
    """The masks of one pass, worked out when first read: a pass whose masks nobody reads cannot fail over them."""

    def __init__(
        self, running: ForwardPass, shape: tuple[int, int], text: str, vision_mask: Mask, text_mask: Mask
    ) -> None:
        self._pass: ForwardPass | None = running
        self._shape, self._text = shape, text
        self._vision_mask, self._text_mask = vision_mask, text_mask
        self._masks: tuple[Tensor, Tensor] | None = None
        # (B, 1), once there are masks: the column of each row's first token
        self.first = torch.zeros(0, dtype=torch.int64, device="cpu")

    def masks(self) -> tuple[Tensor, Tensor]:
        if self._masks is None:
            assert self._pass is not None  # it is let go of only once there are masks
            self._masks = self._work_out(self._pass)
            self.first = _first_kept(self._pass, self._shape)
            self._pass = None  # lets go of the inputs and the cache
        return self._masks

    def _work_out(self, running: ForwardPass) -> tuple[Tensor, Tensor]:
        vision = running.vision(self._shape, self._vision_mask)
        if self._vision_mask is not None and self._text_mask is not None:
            return vision, running.given("text_mask", self._text_mask, self._shape).to(vision.device)
        kept = running.kept(self._shape, vision.device)
        if self._vision_mask is None:
            vision = vision & kept
        bare = (~vision.any(-1)).nonzero().flatten().tolist()
        if bare:
            raise ValueError(
                f"vision_mask: no vision token in row {', '.join(map(str, bare))} of the batch ({self._shape[0]} rows):"
                " MIR compares image with text tokens, so every row takes at least one image"
            )
        if self._text_mask is not None:
            return vision, running.given("text_mask", self._text_mask, self._shape).to(vision.device)
        text = ~vision & kept
        return vision, text & text_after_vision(vision) if self._text == "after" else text


def _first_kept(running: ForwardPass, shape: tuple[int, int]) -> Tensor:
    """(B, 1) int64: the first column that is no padding; 0 where nothing shows padding."""
    mask = running.inputs.get("attention_mask")
    if not isinstance(mask, Tensor) or mask.dim() != 2 or mask.shape[0] != shape[0] or mask.shape[1] < shape[1]:
        return torch.zeros(shape[0], 1, dtype=torch.int64, device="cpu")
    return (mask[:, -shape[1] :] != 0).int().argmax(-1, keepdim=True)


def _hidden_input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    state = args[0] if args else kwargs.get("hidden_states")
    if not isinstance(state, Tensor) or state.dim() != 3:
        got = f"shape {tuple(state.shape)}" if isinstance(state, Tensor) else type(state).__name__
        raise ValueError(f"layers: decoder layers take hidden states (B, T, d) first, but one was given {got}")
    return state
