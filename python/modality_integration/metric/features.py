"""A layer whose vision and text tokens are in memory, as `mir` takes them."""

from __future__ import annotations

import torch
from torch import Tensor

from mir_kernels import _checks, token_norms
from modality_integration.metric.distance import FeatureMoments, GaussianPair
from modality_integration.metric.layer import CountedTokens, LayerResult, layer_results
from modality_integration.metric.options import MetricOptions
from modality_integration.metric.outliers import replace_by_column_medians, three_sigma
from modality_integration.metric.tokens import alpha_of, require_finite, require_tokens, sum_of_norms


class FeatureLayer:
    """Features (n, d) and (m, d) of layer `layer` (1..K); they stay as they are."""

    def __init__(self, vision: Tensor, text: Tensor, layer: int, options: MetricOptions) -> None:
        self.vision, self.text, self.layer, self.options = vision, text, layer, options

    def counted(self) -> CountedTokens:
        """Both modalities after the outlier rule. ValueError or TypeError that names the layer and the modality."""
        self._check()
        moments, kept, removed = {}, {}, {}
        for modality, features in (("vision", self.vision.detach()), ("text", self.text.detach())):
            counted, outlier = self._without_outliers(modality, features)
            moments[modality] = FeatureMoments(counted)
            removed[modality] = int(outlier.sum())
            kept[modality] = len(outlier) - removed[modality]
        alpha = 1.0
        if self.options.normalize:
            alpha = alpha_of(sum_of_norms(self.text.detach()), len(self.text), self.layer)
        return CountedTokens(GaussianPair(self.layer, moments["vision"], moments["text"], alpha), kept, removed)

    def leave_group_out(self) -> None:
        """Features are of no known samples."""
        return None

    def _check(self) -> None:
        layer, vision, text = self.layer, self.vision, self.text
        for modality, features in (("vision", vision), ("text", text)):
            _checks.floating(f"{modality}, layer {layer}", features)
            if features.dim() != 2:
                raise ValueError(f"layer {layer}: {modality} takes shape (tokens, d), got {tuple(features.shape)}")
            require_tokens(len(features), layer, modality)
        if vision.shape[1] != text.shape[1]:
            raise ValueError(f"layer {layer}: vision has d = {vision.shape[1]}, text has d = {text.shape[1]}")
        _checks.same_device(f"vision, layer {layer}", vision, "text", text)

    def _without_outliers(self, modality: str, features: Tensor) -> tuple[Tensor, Tensor]:
        """The features that count, and which rows (n,) were outliers, on the CPU."""
        norms = token_norms(features, backend=self.options.backend).cpu()
        require_finite(norms, self.layer, modality, lambda index: index)
        if self.options.outliers == "none":
            return features, torch.zeros(len(norms), dtype=torch.bool)
        outlier = ~three_sigma(norms).keep(norms)
        if self.options.outliers == "median":
            return replace_by_column_medians(features, outlier.to(features.device)), outlier
        return features[~outlier.to(features.device)] if outlier.any() else features, outlier


def feature_layer_result(vision: Tensor, text: Tensor, layer: int, options: MetricOptions) -> LayerResult:
    """One layer of `mir`."""
    (result,) = layer_results([FeatureLayer(vision, text, layer, options)], options)
    return result
