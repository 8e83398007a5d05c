"""Checks the token roles of every family that transformers maps to image-text-to-text: `make families`.

proved      the positions that change with the image are capture's vision mask, and MoCa changes exactly those
ids alone   no pixels are generated for the family here: capture marks the placeholder ids of the configuration
refused     the library rejects the family, with a reason that is known to be true of it
not built   transformers needs a package or a configuration that is missing
not run     the tiny model did not run, or does not depend on its image
wrong       the library accepts the family and marks other tokens, or fails otherwise
"""

from __future__ import annotations

import sys
import warnings
from dataclasses import dataclass

import transformers
from torch import nn

from families import proof
from families.pictures import IMAGES
from families.shrunken import FAMILIES, tiny_model
from modality_integration import capture

VERDICTS = ("proved", "ids alone", "refused", "not built", "not run", "wrong")

_CROSS = "reads the image through cross-attention"
_TWO_STACKS = "has an encoder-decoder language model"
_STREAMS = "residual streams per token"
_UNCLEAR = "no single list of decoder layers"
# The families that the library rejects, with a part of the expected reason. Any other rejection is wrong.
REFUSALS = {
    "blip": _CROSS,
    "diffusion_gemma": _TWO_STACKS,
    "evolla": _CROSS,
    "florence2": _TWO_STACKS,
    "gemma3n": _STREAMS,
    "git": _UNCLEAR,
    "glm5_next": _STREAMS,
    "idefics": _CROSS,
    "mistral4": "the model's configuration names no image token",
    "mllama": _CROSS,
    "pi0": _UNCLEAR,
    "pix2struct": _TWO_STACKS,
    "pp_formulanet": _TWO_STACKS,
    "qwen4_exp": _STREAMS,
    "t5gemma2": _TWO_STACKS,
    "udop": _TWO_STACKS,
    "vision-encoder-decoder": _TWO_STACKS,
}


@dataclass(frozen=True)
class Row:
    """The verdict on one family."""

    family: str
    verdict: str
    reason: str = ""

    def __str__(self) -> str:
        return f"{self.family:24} {self.verdict:10} {self.reason}".rstrip()


def judge(family: str) -> Row:
    """Builds the family's model, determines its vision tokens, and compares the library's masks with them."""
    try:
        model = tiny_model(family)
    except Exception as error:  # a configuration or a missing package may raise anything
        return Row(family, "not built", _short(error))
    try:
        verdict = _compared(model, family)
    except proof.NotRun as error:
        return Row(family, "not run", _short(error))
    except ValueError as error:
        known = REFUSALS.get(family)
        return Row(family, "refused" if known is not None and known in str(error) else "wrong", _short(error))
    except Exception as error:  # failures of the library are what this walk looks for
        return Row(family, "wrong", f"{type(error).__name__}: {_short(error)}")
    if family in REFUSALS:
        return Row(family, "wrong", f"accepted, but should be refused: {REFUSALS[family]}")
    return Row(family, verdict)


def _compared(model: nn.Module, family: str) -> str:
    with capture(model):
        pass
    if family in IMAGES:
        proof.prove(model, family)
        return "proved"
    proof.ids_alone(model)
    return "ids alone"


def _short(error: Exception) -> str:
    """The message on one line, without characters that break a table."""
    return " ".join(f"{error or type(error).__name__}".split())[:200].replace("|", "/")


def main() -> int:
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    rows = []
    for family in FAMILIES:
        rows.append(judge(family))
        print(rows[-1], flush=True)
    counts = {verdict: sum(row.verdict == verdict for row in rows) for verdict in VERDICTS}
    print(f"\ntransformers {transformers.__version__}, {len(rows)} families: {counts}")
    return 1 if counts["wrong"] else 0


if __name__ == "__main__":
    sys.exit(main())
