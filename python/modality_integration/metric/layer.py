"""Per-layer results from any source of tokens, and their combination into one `MIRResult`."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Protocol

from modality_integration.metric import MODALITIES
from modality_integration.metric.distance import GaussianPair, distances
from modality_integration.metric.options import MetricOptions, SqrtPrecision
from modality_integration.metric.result import LayerTerms
from modality_integration.metric.sink_notes import notes_on_sinks
from modality_integration.metric.tensor_result import MIRTensor

# Precision of the roots with a group left out: its error is far below the change from leaving out a group.
LEFT_OUT_PRECISION: SqrtPrecision = "float32"


def _none() -> dict[str, int]:
    return dict.fromkeys(MODALITIES, 0)


def _nowhere() -> dict[str, dict[int, int]]:
    return {modality: {} for modality in MODALITIES}


@dataclass
class CountedTokens:
    """A layer's tokens after the outlier rule: the inputs of its distance, and counts of kept and removed tokens.

    missed: kept tokens that the rule would have removed had they not been counted already.
    sinks: kept tokens of massive activation in this layer; with sinks left out, those left out.
    sink_positions: number of sinks at each position; empty if positions are unknown.
    without_sinks: the inputs of the distance without any sink; None if that is `pair` or `sinks_known` is False.
    """

    pair: GaussianPair
    kept: dict[str, int]
    removed: dict[str, int]
    missed: dict[str, int] = field(default_factory=_none)
    notes: list[str] = field(default_factory=list)
    sinks: dict[str, int] = field(default_factory=_none)
    sink_positions: dict[str, dict[int, int]] = field(default_factory=_nowhere)
    without_sinks: GaussianPair | None = None
    sinks_known: bool = True


class LeaveGroupOut(Protocol):
    """A layer's tokens, leaving out one group of samples at a time."""

    groups: list[int]

    def pair(self, group: int) -> GaussianPair | None:
        """Without `group`; None if that leaves too few tokens."""


class Layer(Protocol):
    """The tokens of one decoder layer, in any representation."""

    def counted(self) -> CountedTokens:
        """All tokens, after the outlier rule."""

    def leave_group_out(self) -> LeaveGroupOut | None:
        """For the standard error; None without groups of samples."""


@dataclass
class LayerResult:
    """One layer's part of a MIRResult: only numbers, no tokens."""

    terms: LayerTerms
    alpha: float
    kept: dict[str, int]
    removed: dict[str, int]
    missed: dict[str, int]
    notes: list[str]
    left_out: list[float] | None
    sinks: dict[str, int]
    sink_positions: dict[str, dict[int, int]]
    counts_sinks: bool
    without_sinks: float | None


def layer_results(layers: Iterable[Layer], options: MetricOptions, together: int = 1) -> list[LayerResult]:
    """The result of each layer, in order; roots are computed for `together` layers at a time."""
    remaining, results = iter(layers), list[LayerResult]()
    while batch := list(islice(remaining, together)):
        counted = [layer.counted() for layer in batch]
        found = distances([tokens.pair for tokens in counted], options)
        left_out = _left_out(batch, options) if options.groups else [None] * len(batch)
        without_sinks = _without_sinks(counted, [terms for terms, _ in found], options)
        for i, (tokens, (terms, inexact)) in enumerate(zip(counted, found, strict=True)):
            results.append(
                LayerResult(
                    terms=terms,
                    alpha=tokens.pair.alpha,
                    kept=tokens.kept,
                    removed=tokens.removed,
                    missed=tokens.missed,
                    notes=tokens.notes + inexact,
                    left_out=left_out[i],
                    sinks=tokens.sinks,
                    sink_positions=tokens.sink_positions,
                    counts_sinks=tokens.without_sinks is not None,
                    without_sinks=without_sinks[i],
                )
            )
        del counted, tokens  # free them before the next batch is built
    return results


def mir_result(layers: Sequence[LayerResult], options: MetricOptions) -> MIRTensor:
    """Combine the layers' results, in order, into one MIRResult."""
    notes = [note for layer in layers for note in layer.notes]
    left_out = [layer.left_out for layer in layers if layer.left_out is not None]
    if options.groups and len(left_out) < len(layers):
        notes.append(
            "no standard error: it requires samples in at least two groups, and at least 2 tokens of each modality "
            "with any one group left out"
        )
    result = MIRTensor(
        terms=[layer.terms for layer in layers],
        alpha=[layer.alpha for layer in layers],
        kept={m: [layer.kept[m] for layer in layers] for m in MODALITIES},
        removed={m: [layer.removed[m] for layer in layers] for m in MODALITIES},
        missed={m: [layer.missed[m] for layer in layers] for m in MODALITIES},
        left_out=left_out if len(left_out) == len(layers) else None,
        outliers=options.outliers,
        normalize=options.normalize,
        sinks=options.sinks,
        massive={m: [layer.sinks[m] for layer in layers] for m in MODALITIES},
        sink_positions=layers[0].sink_positions,
        without_sinks=_distances_without_sinks(layers),
        notes=notes,
    )
    notes.extend(notes_on_sinks(result))
    if result.value == -math.inf:
        notes.append("every layer's distance is 0, so MIR, its logarithm, is -inf")
    return result


def _without_sinks(
    counted: Sequence[CountedTokens], own: Sequence[LayerTerms], options: MetricOptions
) -> list[float | None]:
    """Each layer's distance without sinks, its own if it has none; None if unknown."""
    pairs = {i: tokens.without_sinks for i, tokens in enumerate(counted) if tokens.without_sinks is not None}
    found = dict(zip(pairs, distances(list(pairs.values()), replace(options, bounds=False)), strict=True))
    return [
        found[i][0].distance if i in found else terms.distance if tokens.sinks_known else None
        for i, (tokens, terms) in enumerate(zip(counted, own, strict=True))
    ]


def _distances_without_sinks(layers: Sequence[LayerResult]) -> list[float] | None:
    """The distances without sinks; None if no layer counts any sinks or if one distance is unknown."""
    known = [layer.without_sinks for layer in layers if layer.without_sinks is not None]
    return known if len(known) == len(layers) and any(layer.counts_sinks for layer in layers) else None


def _left_out(layers: Sequence[Layer], options: MetricOptions) -> list[list[float] | None]:
    """For each layer, its distances with each group of samples left out; None if that leaves too few tokens."""
    parts = [layer.leave_group_out() for layer in layers]
    found: list[list[float] | None] = [None if part is None else [] for part in parts]
    cheaper = replace(options, bounds=False, sqrt_precision=LEFT_OUT_PRECISION)
    for turn in range(max((len(part.groups) for part in parts if part is not None), default=0)):
        pairs: dict[int, GaussianPair] = {}
        for i, part in enumerate(parts):
            if part is None or found[i] is None or turn >= len(part.groups):
                continue
            pair = part.pair(part.groups[turn])
            if pair is None:
                found[i] = None
            else:
                pairs[i] = pair
        for i, (terms, _) in zip(pairs, distances(list(pairs.values()), cheaper), strict=True):
            of_layer = found[i]
            if of_layer is not None:
                of_layer.append(terms.distance)
    return found
