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

    vision, text: one tensor or numpy array (n_k, d) per decoder layer 1..K (without embeddings), f32/bf16/f16/f64. The
    two tensors of a layer share d; their dtypes may differ. Inputs are unchanged.
    outliers: treatment of tokens with |norm - median| > 3 std (ddof 1), per modality and layer: "remove" (the paper's
    text), "median" (replace by the column medians, as in the published code), "none".
    normalize: multiply by alpha_k = s / sum_j ||t_kj|| (Eq. 2), over all text tokens, outliers included.
    bounds: also compute `lower` and `upper`, certified bounds on MIR of the given features.
    sqrt_precision: of Tr((Sigma_v Sigma_t)^(1/2)), see `mir_kernels.trace_sqrt_product`. "float32" guarantees 1e-6 of
    the root: with tensor cores and a check against a dual bound on a GPU, with float64 decompositions on a CPU.
    Means and covariances are always float64. backend: of the kernels, and of the root if it supports that backend.
    sinks: "report" counts attention sinks, as the paper does; `notes` state their effect on the value and
    `without_sinks` holds the distances without them. "leave out" excludes them from every layer before anything else is
    computed. A token is a sink if its activation is massive in any layer: a norm above 20 times the median of the
    layer's tokens, with nine tenths of its square in 4 channels (see `modality_integration.metric.sinks`).
    Raises ValueError or TypeError that names the layer, the modality and, if a single token is at fault, its index.
    """
    options = MetricOptions(
        outliers, normalize, bounds, "exact", sqrt_precision, backend=backend, sinks=sinks
    ).checked()
    vision, text = one_tensor_a_layer("vision", vision), one_tensor_a_layer("text", text)
    if len(vision) != len(text):
        raise ValueError(f"vision and text: expected the same number of layers, got {len(vision)} and {len(text)}")
    layers = [FeatureLayer(v, t, k, options) for k, (v, t) in enumerate(zip(vision, text, strict=True), 1)]
    first = vision[0]
    matrix = isinstance(first, Tensor) and first.dim() == 2  # numpy arrays run on the CPU, without batching
    together = layers_together(first.shape[1], torch.device(first.device)) if matrix else 1
    return mir_result(layer_results(with_sinks_marked(layers), options, together), options)
