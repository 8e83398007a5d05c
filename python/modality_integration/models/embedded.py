"""Token ids of a pass that receives only embeddings, because its caller embedded the ids before the pass."""

from __future__ import annotations

import sys
import threading
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

PEFT = "peft.peft_model"
# Families whose generate() embeds the prompt itself and calls the language model, bypassing the model's own forward.
EMBEDS_FIRST = ("blip-2", "instructblip", "instructblipvideo")


class Embedded(NamedTuple):
    """ids: (B, T), the embedded ids. virtual: how many trained tokens PEFT puts before every row.
    channels: (B, T, c), the first channels of the embeddings; None if images are merged into them before the pass.
    """

    ids: Tensor
    virtual: int
    channels: Tensor | None

    def is_what(self, inputs_embeds: object) -> bool:
        """Whether a pass with `inputs_embeds` receives exactly these embeddings after the virtual tokens."""
        if self.channels is None:
            return True
        if not isinstance(inputs_embeds, Tensor) or inputs_embeds.dim() != 3:
            return False
        part = inputs_embeds.detach()[:, self.virtual :, : self.channels.shape[2]]
        return part.shape == self.channels.shape and bool((part == self.channels.to(part.device)).all())


class EmbeddedIds:
    """The ids that each thread embedded last, recorded by a hook on the embedding.

    Ids are recorded only if a pass on their embeddings is known to follow: PEFT's prompt tuning embeds them and then
    calls the inner model, and so does generate() of EMBEDS_FIRST. The hook refers to no part of the model, so that a
    copy of the embedding alone, which PEFT makes for `modules_to_save`, does not copy the whole model.
    """

    def __init__(self, model: nn.Module) -> None:
        self._merges = getattr(getattr(model, "config", None), "model_type", "") in EMBEDS_FIRST
        self._thread = _Thread()

    def watch(self, model: nn.Module) -> list[RemovableHandle]:
        """Registers the hook on `model`'s input embedding, if it has one."""
        get: Any = getattr(model, "get_input_embeddings", None)
        try:
            embedding = get() if callable(get) else None
        except (NotImplementedError, AttributeError):  # transformers' base class raises them for unusual structures
            embedding = None
        return [embedding.register_forward_hook(self._note)] if isinstance(embedding, nn.Module) else []

    def take(self) -> Embedded | None:
        """Returns what this thread embedded last and clears it, so that it serves only the pass that begins now."""
        note, self._thread.note = self._thread.note, None
        return note

    def _note(self, module: nn.Module, args: tuple[Any, ...], output: object) -> None:
        if torch.compiler.is_compiling():
            return
        self._thread.note = None  # also when a model embeds its own ids during a pass
        caller = _caller()
        if caller is None or not args or not isinstance(output, Tensor) or output.dim() != 3:
            return
        if self._merges and caller.f_code.co_name == "generate":
            self._thread.note = Embedded(args[0], 0, None)
        elif virtual := _virtual_tokens_of(caller):
            self._thread.note = Embedded(args[0], virtual, output.detach()[..., :8].clone())


class _Thread(threading.local):
    """The ids that one thread embedded last."""

    def __init__(self) -> None:
        self.note: Embedded | None = None

    def __reduce__(self) -> tuple[type[_Thread], tuple[()]]:
        return _Thread, ()  # a copied model has no state of a running pass


def virtual_tokens(module: nn.Module) -> int:
    """How many virtual tokens PEFT's prompt tuning, P-tuning or CPT puts before every row of this model's input."""
    config = module.active_peft_config if hasattr(module, "active_peft_config") else None
    return getattr(config, "num_virtual_tokens", None) or 0


def _caller() -> FrameType | None:
    """The frame that called the hooked module."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        module = frame.f_globals.get("__name__", "")
        if module != __name__ and not module.startswith("torch."):
            break
        frame = frame.f_back
    return frame


def _virtual_tokens_of(caller: FrameType) -> int:
    """How many virtual tokens PEFT puts before the embedded ids; 0 if `caller` is not PEFT's."""
    if caller.f_globals.get("__name__") != PEFT:  # f_locals of other functions would keep their variables alive
        return 0
    model = caller.f_locals.get("self")
    return virtual_tokens(model) if isinstance(model, nn.Module) else 0
