"""The token ids of a pass that is given their embeddings alone, because somebody embedded them before it began."""

from __future__ import annotations

import sys
import threading
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

PEFT = "peft.peft_model"
# Families whose generate() embeds the prompt itself and calls the language model past the model's own forward.
EMBEDS_FIRST = ("blip-2", "instructblip", "instructblipvideo")


class Embedded(NamedTuple):
    """ids: (B, T) that were embedded. virtual: how many trained tokens PEFT puts before every row of them.
    channels: (B, T, c), the first channels of their embeddings; None where images are put into those before the pass.
    """

    ids: Tensor
    virtual: int
    channels: Tensor | None

    def is_what(self, inputs_embeds: object) -> bool:
        """Whether a pass is given these embeddings, behind the virtual tokens: not others, made of what else."""
        if self.channels is None:
            return True
        if not isinstance(inputs_embeds, Tensor) or inputs_embeds.dim() != 3:
            return False
        part = inputs_embeds.detach()[:, self.virtual :, : self.channels.shape[2]]
        return part.shape == self.channels.shape and bool((part == self.channels.to(part.device)).all())


class EmbeddedIds:
    """What each thread has embedded last, by a hook on the embedding.

    Ids count only where it is known that a pass on their embeddings follows: PEFT's prompt tuning embeds them and calls
    the model inside, and so does generate() of EMBEDS_FIRST. The hook holds no part of the model but the embedding's
    own: a copy of the embedding alone, which PEFT makes of `modules_to_save`, copies no model along.
    """

    def __init__(self, model: nn.Module) -> None:
        self._merges = getattr(getattr(model, "config", None), "model_type", "") in EMBEDS_FIRST
        self._thread = _Thread()

    def watch(self, model: nn.Module) -> list[RemovableHandle]:
        """Puts the hook on `model`'s embedding, where it has one."""
        get: Any = getattr(model, "get_input_embeddings", None)
        try:
            embedding = get() if callable(get) else None
        except (NotImplementedError, AttributeError):  # of transformers' base class, for models of another structure
            embedding = None
        return [embedding.register_forward_hook(self._note)] if isinstance(embedding, nn.Module) else []

    def take(self) -> Embedded | None:
        """What this thread embedded last, before the pass that begins now; it serves this pass alone."""
        note, self._thread.note = self._thread.note, None
        return note

    def _note(self, module: nn.Module, args: tuple[Any, ...], output: object) -> None:
        if torch.compiler.is_compiling():
            return
        self._thread.note = None  # also where a model, in a pass, embeds its own ids
        caller = _caller()
        if caller is None or not args or not isinstance(output, Tensor) or output.dim() != 3:
            return
        if self._merges and caller.f_code.co_name == "generate":
            self._thread.note = Embedded(args[0], 0, None)
        elif virtual := _virtual_tokens_of(caller):
            self._thread.note = Embedded(args[0], virtual, output.detach()[..., :8].clone())


class _Thread(threading.local):
    """What one thread has embedded."""

    def __init__(self) -> None:
        self.note: Embedded | None = None

    def __reduce__(self) -> tuple[type[_Thread], tuple[()]]:
        return _Thread, ()  # a copy of a model runs nothing


def virtual_tokens(module: nn.Module) -> int:
    """How many tokens PEFT's prompt tuning, P-tuning and CPT put before every row of a model that is called."""
    config = module.active_peft_config if hasattr(module, "active_peft_config") else None
    return getattr(config, "num_virtual_tokens", None) or 0


def _caller() -> FrameType | None:
    """Who called the module that this hook is on."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        module = frame.f_globals.get("__name__", "")
        if module != __name__ and not module.startswith("torch."):
            break
        frame = frame.f_back
    return frame


def _virtual_tokens_of(caller: FrameType) -> int:
    """How many virtual tokens PEFT puts before what it embeds; 0 if `caller` is not PEFT's."""
    if caller.f_globals.get("__name__") != PEFT:  # and look into no other function: that keeps its variables alive
        return 0
    model = caller.f_locals.get("self")
    return virtual_tokens(model) if isinstance(model, nn.Module) else 0
