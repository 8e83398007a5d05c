"""A layer whose vision and text tokens are in memory, as for `mir`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mir_kernels import _checks, token_norms
from mir_kernels._gate import with_memory
from modality_integration.metric import MODALITIES
from modality_integration.metric.distance import FeatureMoments, GaussianPair
from modality_integration.metric.layer import CountedTokens, LayerResult, layer_results
from modality_integration.metric.options import MetricOptions
from modality_integration.metric.outliers import replace_by_column_medians, three_sigma
from modality_integration.metric.sinks import SinkMarks, concentrated, massive_tokens, tally
from modality_integration.metric.tokens import (
    alpha_of,
    require_finite,
    require_tokens,
    roundings_of_norms,
    sum_of_norms,
)

if TYPE_CHECKING:
    from mir_kernels._arrays import Array


class FeatureLayer:
    """Features (n, d) and (m, d) of layer `layer` (1..K), tensors or arrays; they are not changed.

    marks: which tokens of each modality are attention sinks; None if none are.
    """

    def __init__(
        self,
        vision: Array,
        text: Array,
        layer: int,
        options: MetricOptions,
        marks: Mapping[str, SinkMarks] | None = None,
    ) -> None:
        features: dict[str, Any] = {"vision": vision, "text": text}  # tensors after `check`
        self.features: dict[str, Tensor] = features
        self.layer, self.options, self.marks = layer, options, marks

    def counted(self) -> CountedTokens:
        """Both modalities after the outlier rule. Errors name the layer and the modality."""
        self.check()
        features = {modality: part.detach() for modality, part in self.features.items()}
        if self.marks is None:
            return self._counted(features, self.norms)[0]
        others = {m: ~marks.sink for m, marks in self.marks.items()}
        bare = {m: part[others[m].to(part.device)] for m, part in features.items()}
        bare_norms = {m: norms[others[m]] for m, norms in self.norms.items()}
        # Marks from files have positions, those of `mir` do not.
        positions = {m: tally(marks.positions[marks.sink[: len(marks.positions)]]) for m, marks in self.marks.items()}
        if not self.options.counts_sinks:
            for modality, part in bare.items():
                require_tokens(len(part), self.layer, f"{modality} besides attention sinks")
            counted = self._counted(bare, bare_norms)[0]
            massive = {m: int(marks.massive.sum()) for m, marks in self.marks.items()}
            return replace(counted, sinks=massive, sink_positions=positions)
        counted, outliers = self._counted(features, self.norms)
        massive = {m: int((marks.massive & ~outliers[m]).sum()) for m, marks in self.marks.items()}
        enough = all(len(part) > 1 for part in bare.values())
        known = enough and (not self.options.normalize or bool(bare["text"].any()))  # else alpha is undefined
        without = self._counted(bare, bare_norms)[0].pair if known else None
        return replace(
            counted,
            sinks=massive,
            sink_positions=positions,
            without_sinks=without,
            sinks_known=known,
        )

    def _counted(
        self, features: Mapping[str, Tensor], norms: Mapping[str, Tensor]
    ) -> tuple[CountedTokens, dict[str, Tensor]]:
        """These tokens after the outlier rule, and bool (n,) masks of the outliers, on the CPU."""
        moments, kept, removed, outliers = {}, {}, {}, {}
        for modality in MODALITIES:
            counted, outlier = self._without_outliers(features[modality], norms[modality])
            moments[modality], outliers[modality] = FeatureMoments(counted), outlier
            removed[modality] = int(outlier.sum())
            kept[modality] = len(outlier) - removed[modality]
        alpha, text = 1.0, features["text"]
        if self.options.normalize:
            alpha = alpha_of(sum_of_norms(text), len(text), self.layer)
        roundings = roundings_of_norms(*text.shape)
        pair = GaussianPair(self.layer, moments["vision"], moments["text"], alpha, roundings)
        return CountedTokens(pair, kept, removed), outliers

    def leave_group_out(self) -> None:
        """None: features carry no sample numbers."""
        return None

    def check(self) -> None:
        """Check each modality and that both match. Raises ValueError or TypeError that names layer and modality."""
        layer = self.layer
        for modality in MODALITIES:
            features = _checks.floating(f"{modality}, layer {layer}", self.features[modality])
            if features.dim() != 2:
                raise ValueError(f"layer {layer}, {modality}: expected shape (tokens, d), got {tuple(features.shape)}")
            require_tokens(len(features), layer, modality)
            self.features[modality] = with_memory("mir", f"{modality}, layer {layer}", features)
        vision, text = self.features["vision"], self.features["text"]
        if vision.shape[1] != text.shape[1]:
            raise ValueError(f"layer {layer}: vision has d = {vision.shape[1]}, text has d = {text.shape[1]}")
        _checks.same_device(f"vision, layer {layer}", vision, "text", text)

    @cached_property
    def norms(self) -> dict[str, Tensor]:
        """Float32 norms (n,) by modality, on the CPU.

        ValueError that names the first non-finite token: an overflowed one would be mistaken for a sink.
        """
        found = {m: token_norms(self.features[m].detach(), backend=self.options.backend).cpu() for m in MODALITIES}
        for modality, norms in found.items():
            require_finite(norms, self.layer, modality, lambda index: index)
        return found

    def concentrated(self, places: Tensor) -> Tensor:
        """Bool (n,): `concentrated` for the tokens at places (n, 1), numbering vision tokens first, then text."""
        first = len(self.features["vision"])
        index = places[:, 0].to(self.features["vision"].device)
        found = torch.zeros(len(index), dtype=torch.bool, device=index.device)
        for modality, start, mine in (("vision", 0, index < first), ("text", first, index >= first)):
            found[mine] = concentrated(self.features[modality].detach()[index[mine] - start])
        return found

    def _without_outliers(self, features: Tensor, norms: Tensor) -> tuple[Tensor, Tensor]:
        """The features after the outlier rule, and a bool (n,) mask of the outliers, on the CPU."""
        if self.options.outliers == "none":
            return features, torch.zeros(len(norms), dtype=torch.bool, device="cpu")
        outlier = three_sigma(norms).beyond(norms)
        if self.options.outliers == "median":
            return replace_by_column_medians(features, outlier.to(features.device)), outlier
        return features[~outlier.to(features.device)] if outlier.any() else features, outlier


def feature_layer_result(
    vision: Tensor, text: Tensor, layer: int, options: MetricOptions, marks: Mapping[str, SinkMarks] | None = None
) -> LayerResult:
    """The result of one layer of `mir`."""
    (result,) = layer_results([FeatureLayer(vision, text, layer, options, marks)], options)
    return result


def with_sinks_marked(layers: Sequence[FeatureLayer]) -> Sequence[FeatureLayer]:
    """Mark attention sinks in the layers, treating all tokens as one sample; returns the same layers.

    A token that is massive in one layer is a sink in every layer. This requires that rows are the same tokens in all
    layers; if the layers have different numbers of tokens, each is treated separately.
    """
    for layer in layers:
        layer.check()
    counts = [tuple(len(layer.features[m]) for m in MODALITIES) for layer in layers]
    together = [list(layers)] if len(set(counts)) == 1 else [[layer] for layer in layers]
    for group in together:
        _mark(group)
    return layers


def _mark(layers: Sequence[FeatureLayer]) -> None:
    """Set the marks of layers that share the same tokens."""
    sizes = [len(layers[0].features[m]) for m in MODALITIES]
    is_text = torch.arange(sum(sizes), dtype=torch.int64, device="cpu") >= sizes[0]
    masks = {"vision": ~is_text, "text": is_text}
    norms = torch.stack([torch.cat([layer.norms[m] for m in MODALITIES]) for layer in layers])
    massive = massive_tokens(norms, masks, lambda k, places: layers[k].concentrated(places))
    if massive is None:
        return
    sink, nowhere = massive.any(0), torch.zeros(0, dtype=torch.int32, device="cpu")
    for layer, own in zip(layers, massive, strict=True):
        layer.marks = {m: SinkMarks(sink[mask], own[mask], nowhere) for m, mask in masks.items()}
