"""One layer: its vision and text tokens on their way into two covariances, and the Fréchet distance between them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mir_kernels import _checks
from mir_kernels.frechet import trace_sqrt_from_features, trace_sqrt_product
from mir_kernels.moments import StreamingMoments, token_norms
from modality_integration.outliers import Limits, OnePass, replace_by_column_medians, three_sigma
from modality_integration.result import MODALITIES, LayerTerms, MIRResult

OUTLIERS = ("remove", "median", "none")
# Rows held back in a stream while they might turn out to be outliers; at least one more than the hidden size, so that
# a covariance short of rank is never formed: its root is taken from the features instead.
HOLD = 2048
KEEP_ALL = Limits(0.0, math.inf)


@dataclass
class LayerResult:
    """One layer's share of a MIRResult."""

    terms: LayerTerms
    alpha: float
    kept: dict[str, int]
    removed: dict[str, int]
    notes: list[str] = field(default_factory=list)


class Options(NamedTuple):
    """What a computation of MIR is asked for; see `mir` and `ModalityIntegrationRate`."""

    outliers: str = "remove"
    normalize: bool = True
    bounds: bool = False
    precision: str = "auto"
    sqrt_precision: str = "float64"
    hold: int | None = None
    backend: str | None = None

    def checked(self) -> Options:
        """Itself, once every option is one that exists."""
        _checks.choice("outliers", self.outliers, OUTLIERS)
        _checks.choice("precision", self.precision, ("fast", "auto", "exact"))
        _checks.choice("sqrt_precision", self.sqrt_precision, ("bfloat16", "float32", "float64"))
        if self.hold is not None and self.hold < 2:
            raise ValueError(f"hold: takes 2 rows or more, got {self.hold}")
        return self


def layer_result(vision: Tensor, text: Tensor, layer: int, options: Options) -> LayerResult:
    """One layer of `mir`: features (n, d) and (m, d) to its share of the result; `layer` (1..K) is for messages."""
    for modality, features in (("vision", vision), ("text", text)):
        _checks.floating(f"{modality}, layer {layer}", features)
        if features.dim() != 2:
            raise ValueError(f"layer {layer}: {modality} takes shape (tokens, d), got {tuple(features.shape)}")
        require_tokens(len(features), layer, modality)
    if vision.shape[1] != text.shape[1]:
        raise ValueError(f"layer {layer}: vision has d = {vision.shape[1]}, text has d = {text.shape[1]}")
    _checks.same_device(f"vision, layer {layer}", vision, "text", text)

    sides, kept, removed = {}, {}, {}
    for modality, features in (("vision", vision.detach()), ("text", text.detach())):
        norms = token_norms(features, backend=options.backend).cpu()
        require_finite(norms, layer, modality, lambda index: index)
        keep = (
            torch.ones(len(norms), dtype=torch.bool) if options.outliers == "none" else three_sigma(norms).keep(norms)
        )
        kept[modality] = int(keep.sum())
        removed[modality] = len(norms) - kept[modality]
        if options.outliers == "median":
            features = replace_by_column_medians(features, ~keep.to(features.device))
        elif removed[modality]:
            features = features[keep.to(features.device)]
        sides[modality] = CountedFeatures(features)
    alpha = alpha_of(sum_of_norms(text.detach()), len(text), layer) if options.normalize else 1.0
    terms, notes = distance_terms(sides["vision"], sides["text"], alpha, layer, options)
    return LayerResult(terms, alpha, kept, removed, notes)


class LayerStream:
    """Both modalities of one layer: `push` rows as they come, `result` at any time.

    Holds two accumulators (one triangle of d^2 float64 numbers each), made when the first rows are released, and at
    most `hold` rows a modality. limits: the outlier limits of a first pass over the same tokens, by modality.
    """

    def __init__(
        self, hidden_size: int, dtype: torch.dtype, device: torch.device, options: Options, limits: dict | None = None
    ) -> None:
        self.hidden_size, self.dtype, self.device, self.options = hidden_size, dtype, device, options
        hold = max(options.hold or HOLD, hidden_size + 1)
        everything = KEEP_ALL if options.outliers == "none" else None
        self.tokens = {
            m: OnePass(hidden_size, dtype, hold=hold, limits=limits[m] if limits else everything) for m in MODALITIES
        }
        self.moments: dict[str, StreamingMoments] = {}
        self.text_norms = torch.zeros((), dtype=torch.float64, device=device)  # their sum

    @property
    def keeps_all(self) -> bool:
        """Whether no token counts as an outlier."""
        return all(self.tokens[m].limits == KEEP_ALL for m in MODALITIES)

    def push(self, modality: str, rows: Tensor, norms: Tensor) -> None:
        """Take rows (n, d), which the stream then owns, and their norms (n,), float32 on the CPU."""
        rows = rows.to(self.device)
        if modality == "text":
            self.text_norms = self.text_norms + sum_of_norms(rows)
        released = self.tokens[modality].push(rows, norms)
        if released is not None:
            if modality not in self.moments:
                self.moments[modality] = self.accumulator(self.options.precision)
            self.moments[modality].update(released)

    def result(self, layer: int) -> LayerResult:
        """The distance over all that was pushed; the stream stays as it is. `layer` (1..K) is for messages."""
        for modality in MODALITIES:
            require_tokens(len(self.tokens[modality].norms), layer, modality)
        count = len(self.tokens["text"].norms)
        alpha = alpha_of(self.text_norms, count, layer) if self.options.normalize else 1.0
        decisions = {m: self.tokens[m].decide() for m in MODALITIES}
        sides: dict[str, Counted] = {}
        for modality, decision in decisions.items():
            require_tokens(decision.kept, layer, f"{modality} within the outlier limits")
            rows = decision.rows.to(self.device)
            if self.tokens[modality].all_held:
                sides[modality] = CountedFeatures(rows)
            else:
                counted = self.accumulator("exact")
                counted.load_state_dict(self.moments[modality].state_dict())
                counted.update(rows)
                # Float64 features are accumulated in float64 in every precision but "fast".
                precision = self.options.precision
                rounded = precision == "fast" or (precision == "auto" and self.dtype != torch.float64)
                sides[modality] = Counted(counted, rounded)
        notes = [
            f"layer {layer}, {modality}: {decision.missed} tokens beyond the final 3-sigma limits had already been "
            "counted (the norms moved while the stream passed): a larger hold, or a second pass, makes this exact"
            for modality, decision in decisions.items()
            if decision.missed
        ]
        notes += [
            f"layer {layer}, {modality}: the second pass saw other tokens than the first pass, whose limits it applied"
            for modality, tokens in self.tokens.items()
            if tokens.limits not in (None, KEEP_ALL) and not tokens.limits.close_to(three_sigma(tokens.norms))
        ]
        terms, inexact = distance_terms(sides["vision"], sides["text"], alpha, layer, self.options)
        kept = {m: decisions[m].kept for m in MODALITIES}
        return LayerResult(terms, alpha, kept, {m: decisions[m].removed for m in MODALITIES}, notes + inexact)

    def merge(self, other: LayerStream) -> None:
        """Take over another stream of the same layer."""
        self.text_norms = self.text_norms + other.text_norms
        for modality in MODALITIES:
            self.tokens[modality].merge(other.tokens[modality])
            if modality in other.moments:
                if modality not in self.moments:
                    self.moments[modality] = self.accumulator(self.options.precision)
                self.moments[modality].merge(other.moments[modality])

    def to(self, device: torch.device) -> None:
        """Move rows and accumulators."""
        state = self.state_dict()
        self.device = device
        self.load_state_dict({key: value.to(device) for key, value in state.items()})

    def state_dict(self) -> dict[str, Tensor]:
        """Plain tensors: `text_norms`, the keys of OnePass after `vision.` and `text.`, and those of StreamingMoments
        after `vision.moments.` and `text.moments.` once there are any.
        """
        state = {"text_norms": self.text_norms}
        for modality in MODALITIES:
            state |= {f"{modality}.{key}": value for key, value in self.tokens[modality].state_dict().items()}
            if modality in self.moments:
                moments = self.moments[modality].state_dict()
                state |= {f"{modality}.moments.{key}": value for key, value in moments.items()}
        return state

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take over what `state_dict` gave; goes on with the same bits."""
        self.moments = {}
        self.text_norms = state["text_norms"].to(self.device, copy=True)
        for modality in MODALITIES:
            part = {key.removeprefix(f"{modality}."): v for key, v in state.items() if key.startswith(f"{modality}.")}
            self.tokens[modality].load_state_dict(part)
            self.tokens[modality].to(self.device)
            moments = {key.removeprefix("moments."): v for key, v in part.items() if key.startswith("moments.")}
            if moments:
                self.moments[modality] = self.accumulator(self.options.precision)
                self.moments[modality].load_state_dict(moments)

    def accumulator(self, precision: str) -> StreamingMoments:
        """A fresh one for either modality."""
        return StreamingMoments(self.hidden_size, device=self.device, precision=precision, backend=self.options.backend)


class Counted:
    """The counted tokens of one modality as a mean and a covariance with ddof 1, in float64.

    rounded: the moments carry more than float64's rounding, so that a covariance short of rank may come out indefinite.
    """

    def __init__(self, moments: StreamingMoments, rounded: bool = False) -> None:
        self.moments, self.rounded = moments, rounded

    def mean_and_trace(self) -> tuple[Tensor, float]:
        """The mean (d,) and the trace of the covariance."""
        return self.moments.mean, self.moments.covariance(ddof=1).trace().item()

    def covariance(self) -> tuple[Tensor, bool]:
        """(d, d), positive semi-definite to float64's rounding; and whether it had to be made so."""
        covariance = self.moments.covariance(ddof=1)
        if not self.rounded or torch.linalg.cholesky_ex(covariance).info == 0:
            return covariance, False
        return nearest_semidefinite(covariance), True


class CountedFeatures(Counted):
    """The same with the features (n, d) themselves at hand; accumulated only if the covariance is asked for."""

    def __init__(self, features: Tensor) -> None:
        self.features, self.rounded = features, False

    @property
    def short(self) -> bool:
        """Whether there are too few tokens for a covariance of full rank."""
        return len(self.features) <= self.features.shape[-1]

    @cached_property
    def moments(self) -> StreamingMoments:  # type: ignore[override]
        """Accumulated in float64."""
        moments = StreamingMoments(self.features.shape[-1], device=self.features.device, precision="exact")
        moments.update(self.features)
        return moments

    def mean_and_trace(self) -> tuple[Tensor, float]:
        """The mean (d,) and the trace of the covariance."""
        if not self.short:
            return super().mean_and_trace()
        mean = self.features.double().mean(dim=0)
        return mean, (self.features.double() - mean).square().sum().item() / (len(self.features) - 1)


def distance_terms(
    vision: Counted, text: Counted, alpha: float, layer: int, options: Options
) -> tuple[LayerTerms, list[str]]:
    """The terms of Eq. 3 for one layer, scaled by alpha, and notes on what was not exact in them."""
    (mean_vision, trace_vision), (mean_text, trace_text) = vision.mean_and_trace(), text.mean_and_trace()
    precision, bounds = options.sqrt_precision, options.bounds
    notes: list[str] = []
    root: Any
    if isinstance(vision, CountedFeatures) and isinstance(text, CountedFeatures) and (vision.short or text.short):
        root = trace_sqrt_from_features(vision.features, text.features, precision=precision, bounds=bounds)
    else:
        covariances = {"vision": vision.covariance(), "text": text.covariance()}
        notes = [
            f"layer {layer}, {modality}: the covariance lacks rank to the precision it was accumulated in, so its "
            'smallest directions are rounding; precision="exact" resolves them'
            for modality, (_, mended) in covariances.items()
            if mended
        ]
        pair = (covariance for covariance, _ in covariances.values())
        root = trace_sqrt_product(*pair, precision=precision, bounds=bounds)
    value, lower, upper = (float(entry) for entry in root) if bounds else (float(root), None, None)
    square = alpha * alpha
    mean = (mean_vision - mean_text).square().sum().item()
    terms = LayerTerms(
        *(square * entry for entry in (mean, trace_vision, trace_text, value)),
        *(None if entry is None else square * entry for entry in (lower, upper)),
    )
    if not math.isfinite(terms.distance):
        raise ValueError(f"layer {layer}: the distance is not finite ({terms})")
    return terms, notes


def nearest_semidefinite(covariance: Tensor) -> Tensor:
    """A covariance (d, d), float64, with the negative eigenvalues of its correlation matrix set to zero."""
    scale = covariance.diagonal().sqrt()
    scale = torch.where(scale > 0, scale, 1.0)
    values, vectors = torch.linalg.eigh(covariance / scale / scale[:, None])
    root = vectors * values.clamp(min=0.0).sqrt() * scale[:, None]
    return root @ root.mT


def sum_of_norms(rows: Tensor) -> Tensor:
    """Sum of the l2 norms of rows (n, d), a float64 scalar: alpha is as exact as the distances it scales."""
    parts = [part.double().norm(dim=-1).sum() for part in rows.split(4096)]
    return torch.stack(parts).sum()


def alpha_of(text_norms: Tensor, count: int, layer: int) -> float:
    """Eq. 2: the number of text tokens over the sum of their norms, before any outlier is taken out."""
    total = text_norms.item()
    if total == 0.0:
        raise ValueError(
            f"layer {layer}: every text token is zero, so alpha (Eq. 2) is undefined; normalize=False does without"
        )
    return count / total


def require_tokens(count: int, layer: int, modality: str) -> None:
    """A covariance with ddof 1 takes at least two tokens."""
    if count < 2:
        found = "1 token" if count else "no token"
        raise ValueError(f"layer {layer}: {found} of {modality}, and a covariance takes at least 2")


def require_finite(norms: Tensor, layer: int, modality: str, where: Callable[[int], object]) -> None:
    """Every norm is finite; `where(i)` gives the token's index for the message."""
    bad = (~torch.isfinite(norms)).nonzero()
    if len(bad):
        raise ValueError(
            f"layer {layer}: {modality} token {where(int(bad[0]))} is not finite: "
            f"its norm in float32 is {norms[bad[0]].item()}"
        )


def assemble(layers: list[LayerResult], options: Options) -> MIRResult:
    """The layers' results, in order, as one MIRResult."""
    notes = [note for layer in layers for note in layer.notes]
    result = MIRResult(
        terms=[layer.terms for layer in layers],
        alpha=[layer.alpha for layer in layers],
        kept={m: [layer.kept[m] for layer in layers] for m in MODALITIES},
        removed={m: [layer.removed[m] for layer in layers] for m in MODALITIES},
        outliers=options.outliers,
        normalize=options.normalize,
        notes=notes,
    )
    if result.value == -math.inf:
        notes.append("every layer's distance is 0, so MIR, its logarithm, is -inf")
    return result
