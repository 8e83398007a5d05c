"""`mir`: the Modality Integration Rate of features in memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from modality_integration.metric.distance import layers_together
from modality_integration.metric.features import FeatureLayer, with_sinks_marked
from modality_integration.metric.layer import layer_results, mir_result
from modality_integration.metric.options import Backend, MetricOptions, Outliers, Sinks, SqrtPrecision
from modality_integration.metric.result import MIRResult
from modality_integration.metric.tokens import one_tensor_a_layer

if TYPE_CHECKING:
    from mir_kernels._arrays import Array

__all__ = ["mir"]


def mir(
    vision: Sequence[Array],
    text: Sequence[Array],
    *,
    outliers: Outliers = "remove",
    normalize: bool = True,
    bounds: bool = False,
    sqrt_precision: SqrtPrecision = "float32",
    backend: Backend | None = None,
    sinks: Sinks = "report",
) -> MIRResult:
    """MIR = log10 sum_k FID(omega(alpha_k f_k^v), omega(alpha_k f_k^t)), Eq. 3 of the MIR paper.

    vision, text: one tensor (n_k, d) per decoder layer 1..K (embeddings left out), f32/bf16/f16/f64; a layer's two
    tensors share d, dtype may differ. numpy arrays are taken as well. Inputs are unchanged.
    outliers: what happens to tokens with |norm - median| > 3 std (ddof 1), a modality and layer at a time: "remove"
    (the paper's text), "median" (replaced by the column medians, as the published code has it), "none".
    normalize: multiply by alpha_k = s / sum_j ||t_kj|| (Eq. 2), over all text tokens, outliers included.
    bounds: also give `lower` and `upper`, between which MIR of the features as they are lies provably.
    sqrt_precision: of Tr((Sigma_v Sigma_t)^(1/2)), see `mir_kernels.trace_sqrt_product`; "float32" promises 1e-6 of the
    root, by tensor cores on a GPU and checked against a dual bound, by float64 decompositions on a CPU.
    Means and covariances are float64 throughout. backend: of the kernels, and of the root where it has that one.
    sinks: "report" counts attention sinks as the paper does, and says in `notes` what they make of the value, with the
    distances without them in `without_sinks`; "leave out" takes them out of every layer, before anything else is
    computed. A token is one if its activation is massive in any layer: a norm above 20 times the median of the
    layer's tokens, nine tenths of its square in 4 channels (see `modality_integration.metric.sinks`).
    Raises ValueError or TypeError that names the layer, the modality and, where one token is at fault, its index.
    """
    options = MetricOptions(
        outliers, normalize, bounds, "exact", sqrt_precision, backend=backend, sinks=sinks
    ).checked()
    vision, text = one_tensor_a_layer("vision", vision), one_tensor_a_layer("text", text)
    if len(vision) != len(text):
        raise ValueError(f"vision and text: take as many layers each, got {len(vision)} and {len(text)}")
    layers = [FeatureLayer(v, t, k, options) for k, (v, t) in enumerate(zip(vision, text, strict=True), 1)]
    first = vision[0]
    matrix = isinstance(first, Tensor) and first.dim() == 2  # an array lies on the CPU
    together = layers_together(first.shape[1], torch.device(first.device)) if matrix else 1
    return mir_result(layer_results(with_sinks_marked(layers), options, together), options)
