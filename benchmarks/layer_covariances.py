"""Covariances of vision and text tokens at one decoder layer of the demo's real language model."""

from __future__ import annotations

import torch
from torch import Tensor

from mir_kernels import token_norms
from modality_integration import capture
from modality_integration.app import demo
from modality_integration.app.options import DemoOptions
from modality_integration.app.prompts import encode, truncate
from modality_integration.app.samples import open_image
from modality_integration.metric.outliers import three_sigma

SAMPLES = 96


@torch.inference_mode()
def layer_covariances(layer: int) -> dict[str, tuple[Tensor, Tensor]]:
    """(vision, text) covariances, (d, d) float64: of all tokens, and without the outliers of MIR's 3-sigma rule.

    SmolLM2-135M with the demo's untrained projector, on held-out pictures and unrelated prose.
    layer: 1 to the number of decoder layers; the last one is captured before the final norm.
    """
    demo.check_installed(DemoOptions())
    torch.manual_seed(0)
    model, processor = demo.build(None)
    found: dict[str, list[Tensor]] = {"vision": [], "text": []}
    with capture(model, last="raw") as seen:
        for sample in demo.probe_samples(demo.Pictures(0), SAMPLES, 0):
            prose = truncate(sample.text.content, processor.tokenizer, demo.TEXT_TOKENS)
            model(**encode(processor, open_image(sample.image), prose, "chat"), use_cache=False)
            hidden = seen.hidden_states[layer - 1]
            found["vision"].append(hidden[seen.vision_mask])
            found["text"].append(hidden[seen.text_mask])
    tokens = {modality: torch.cat(parts) for modality, parts in found.items()}
    name = f"SmolLM2-135M, layer {layer}"
    return {
        f"{name}, all tokens": tuple(tokens[m].double().T.cov() for m in ("vision", "text")),
        f"{name}, outliers removed": tuple(ordinary(tokens[m]).double().T.cov() for m in ("vision", "text")),
    }  # type: ignore[return-value]


def ordinary(tokens: Tensor) -> Tensor:
    """The tokens (n, d) that the 3-sigma rule keeps."""
    norms = token_norms(tokens)
    return tokens[three_sigma(norms).keep(norms)]
