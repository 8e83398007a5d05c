"""The stage of transformers' generate() during a forward pass: which tokens of the pass belong to the prompt."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import FrameType
from typing import NamedTuple

from torch import Tensor

UTILS = "transformers.generation.utils"
# The loops of generate(): each runs the model on the prompt first, then on the generated tokens.
LOOPS = ("_sample", "_beam_search", "_assisted_decoding")
# A guidance pass (UnbatchedClassifierFreeGuidanceLogitsProcessor): runs the model on a different, text-only row.
GUIDANCE = "get_unconditional_logits"
# Modules through which the loops call the user's objects between passes; these may run the model for other purposes.
CALLED_BETWEEN = ("transformers.generation.logits_process", "transformers.generation.stopping_criteria")


class Generation(NamedTuple):
    """The purpose of a forward pass inside generate().

    prefill: True for the prompt or a part of it; False for generated, drafted or guidance tokens; None if unknown: in
    a custom generation loop, and in passes run by a user's logits processor.
    beyond: how many of a row's last tokens in this pass come after the prompt; None if no token is the prompt's.
    """

    prefill: bool | None
    beyond: int | None = 0


def generation_running(length: int, past: int) -> Generation | None:
    """The purpose of the running pass inside this thread's generate(), or None outside one.

    length: tokens per row in the running pass, without virtual ones; past: tokens per row in its cache.
    Inspects the call stack, because the inputs of a forward pass do not distinguish a chunk of the prompt from drafted
    tokens, nor an image token of the prompt from a generated token with the same id.
    """
    frames: dict[str, FrameType] = {}
    between = False
    for frame in _frames_outwards():
        module, name = frame.f_globals.get("__name__"), frame.f_code.co_name
        if module in CALLED_BETWEEN:
            between = True
            if name == GUIDANCE:
                frames.setdefault(name, frame)
        elif module == UTILS:
            frames.setdefault(name, frame)
            if name == "generate":  # innermost: an assistant's generate() runs inside another
                break
    if "generate" not in frames:
        return None
    if GUIDANCE in frames:
        return Generation(False, None)
    if between:
        return Generation(None)
    if "_prefill" in frames:
        return Generation(True)
    if not any(loop in frames for loop in LOOPS):
        return Generation(None)
    # Assisted decoding has no step for the prompt alone: its first step includes a draft.
    drafting = frames.get("_assisted_decoding")
    if drafting is not None and drafting.f_locals.get("is_first_iteration"):
        whole = _columns(drafting, "candidate_input_ids")
        brings_draft = whole in (length, past + length)  # False if the prompt came as embeddings
        return Generation(True, whole - _columns(drafting, "input_ids") if brings_draft else 0)
    # Without a cache, each step reruns the prompt. In transformers 5.0, an assistant has no other prefill.
    prompt = _columns(frames["generate"], "input_ids")
    if past == 0 and 0 < prompt <= length:
        return Generation(prompt == length, length - prompt)
    return Generation(False, None)


def _frames_outwards() -> Iterator[FrameType]:
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        yield frame
        frame = frame.f_back


def _columns(frame: FrameType, name: str) -> int:
    """T of the token ids (B, T) in the local variable `name` of a frame; 0 if there are none."""
    ids = frame.f_locals.get(name)
    return ids.shape[1] if isinstance(ids, Tensor) and ids.dim() == 2 else 0
