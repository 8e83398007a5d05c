"""What transformers' generate() is at while a forward pass runs: which tokens of the pass are the prompt's."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import FrameType
from typing import NamedTuple

from torch import Tensor

UTILS = "transformers.generation.utils"
# The loops of generate(): each runs the model for the prompt first, then for the tokens that are generated.
LOOPS = ("_sample", "_beam_search", "_assisted_decoding")
# A pass of guidance (UnbatchedClassifierFreeGuidanceLogitsProcessor): it gives the model text alone, of another row.
GUIDANCE = "get_unconditional_logits"
# What of the caller's the loops call between two passes, and may run the model for ends of its own.
CALLED_BETWEEN = ("transformers.generation.logits_process", "transformers.generation.stopping_criteria")


class Generation(NamedTuple):
    """What generate() runs the model for.

    prefill: True for the prompt, or a part of it; False for tokens that were generated, drafted or taken for guidance;
    None where it is not known: in a loop that the caller gave, and in what a logits processor of the caller's runs.
    beyond: how many of a row's last tokens in this pass come after the prompt; None where no token is the prompt's.
    """

    prefill: bool | None
    beyond: int | None = 0


def generation_running(length: int, past: int) -> Generation | None:
    """The generate() that this thread is in, or None.

    length: how many tokens a row has in the pass that runs, virtual ones left out; past: in its cache.
    Told by the functions that are running: nothing in what a forward pass is given tells a chunk of the prompt from
    tokens that a draft proposed, nor an image token of the prompt from its id where that was generated.
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
            if name == "generate":  # an assistant's generate() is called by that of the model it assists
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
    # Assisted decoding has no step for the prompt alone: the first one brings a draft along.
    drafting = frames.get("_assisted_decoding")
    if drafting is not None and drafting.f_locals.get("is_first_iteration"):
        whole = _columns(drafting, "candidate_input_ids")
        brings_draft = whole in (length, past + length)  # not where the prompt came as embeddings
        return Generation(True, whole - _columns(drafting, "input_ids") if brings_draft else 0)
    # Without a cache, each step runs on the prompt again. An assistant of transformers 5.0 has no other prefill.
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
    """T of the token ids (B, T) that a function has under `name`; 0 where it has none."""
    ids = frame.f_locals.get(name)
    return ids.shape[1] if isinstance(ids, Tensor) and ids.dim() == 2 else 0
