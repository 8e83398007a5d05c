"""One layer: the Fréchet distance between its vision and text tokens, from features or from moments, and its terms.

What needs a root of two covariances is a generator that yields them and is sent the root: `results` runs many at once
and takes the roots of layers of one size together, where that is faster.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import islice
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from mir_kernels import _checks
from mir_kernels.frechet import OPERATION as ROOT
from mir_kernels.frechet import trace_sqrt_from_features, trace_sqrt_product
from mir_kernels.moments import StreamingMoments, token_norms
from modality_integration.outliers import replace_by_column_medians, three_sigma
from modality_integration.result import MODALITIES, LayerTerms, MIRResult

OUTLIERS = ("remove", "median", "none")
MOST_GROUPS = 255  # a token's group is kept in a byte
# Of the covariances of layers whose roots are taken by one call on a GPU: as many as mir_kernels works on at a time.
MOST_TOGETHER = 1 << 24  # numbers

T = TypeVar("T")


@dataclass
class LayerResult:
    """One layer's share of a MIRResult."""

    terms: LayerTerms
    alpha: float
    kept: dict[str, int]
    removed: dict[str, int]
    notes: list[str] = field(default_factory=list)
    missed: dict[str, int] = field(default_factory=lambda: dict.fromkeys(MODALITIES, 0))
    left_out: list[float] | None = None


class Options(NamedTuple):
    """What a computation of MIR is asked for; see `mir` and `ModalityIntegrationRate`."""

    outliers: str = "remove"
    normalize: bool = True
    bounds: bool = False
    precision: str = "auto"
    sqrt_precision: str = "float32"
    hold: int | None = None
    backend: str | None = None
    groups: int = 0

    def checked(self) -> Options:
        """Itself, once every option is one that exists."""
        _checks.choice("outliers", self.outliers, OUTLIERS)
        _checks.choice("precision", self.precision, ("fast", "auto", "exact"))
        _checks.choice("sqrt_precision", self.sqrt_precision, ("bfloat16", "float32", "float64"))
        if self.hold is not None and self.hold < 2:
            raise ValueError(f"hold: takes 2 rows or more, got {self.hold}")
        if self.groups != 0 and not 2 <= self.groups <= MOST_GROUPS:
            raise ValueError(f"groups: takes 0 (no standard error) or 2 to {MOST_GROUPS}, got {self.groups}")
        return self


class Covariances(NamedTuple):
    """What a root is asked of: two float64 matrices (d, d) on one device."""

    vision: Tensor
    text: Tensor
    options: Options

    def alike(self, other: Covariances) -> bool:
        """Whether one call can take both roots."""
        mine, others = self.vision, other.vision
        return (mine.shape, mine.device, self.options) == (others.shape, others.device, other.options)


Roots = Generator[Covariances, Any, T]  # yields what it needs the root of, is sent that, and returns a T


def results(tasks: Iterable[Roots[T]], together: int) -> list[T]:
    """What the tasks return, in order; `together` of them run at once."""
    tasks, found = iter(tasks), []
    while batch := list(islice(tasks, together)):
        found += _results_of(batch)
    return found


def _results_of(tasks: list[Roots[T]]) -> list[T]:
    returned: dict[int, T] = {}
    asked: dict[int, Covariances] = {}

    def advance(i: int, step: Callable[[], Covariances]) -> None:
        try:
            asked[i] = step()
        except StopIteration as end:
            returned[i] = end.value

    for i, task in enumerate(tasks):
        advance(i, partial(next, task))
    while asked:
        alike = [i for i, covariances in asked.items() if covariances.alike(next(iter(asked.values())))]
        # Not kept while the next ones are made: they are as large as everything else.
        roots = _roots([asked.pop(i) for i in alike])
        for i, root in zip(alike, roots, strict=True):
            advance(i, partial(tasks[i].throw if isinstance(root, Exception) else tasks[i].send, root))
    return [returned[i] for i in range(len(tasks))]


def layers_together(hidden_size: int, device: torch.device) -> int:
    """How many layers' roots to take by one call: on a CPU one, where LAPACK has no use for more."""
    return max(1, MOST_TOGETHER // max(hidden_size, 1) ** 2) if device.type == "cuda" else 1


def layer_result(vision: Tensor, text: Tensor, layer: int, options: Options) -> LayerResult:
    """One layer of `mir`: features (n, d) and (m, d) to its share of the result; `layer` (1..K) is for messages."""
    (result,) = results([layer_steps(vision, text, layer, options)], 1)
    return result


def layer_steps(vision: Tensor, text: Tensor, layer: int, options: Options) -> Roots[LayerResult]:
    """`layer_result`, for `results`."""
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
    terms, notes = yield from distance_terms(sides["vision"], sides["text"], alpha, layer, options)
    return LayerResult(terms, alpha, kept, removed, notes)


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
) -> Roots[tuple[LayerTerms, list[str]]]:
    """The terms of Eq. 3 for one layer, scaled by alpha, and notes on what was not exact in them."""
    (mean_vision, trace_vision), (mean_text, trace_text) = vision.mean_and_trace(), text.mean_and_trace()
    try:
        root, notes = yield from _root(vision, text, layer, options)
    except (ValueError, torch.linalg.LinAlgError) as error:  # finite, but no covariances: a state made by hand
        raise ValueError(f"layer {layer}: of its covariances no root can be taken ({error})") from error
    value, lower, upper = (float(entry) for entry in root) if options.bounds else (float(root), None, None)
    square = alpha * alpha
    mean = (mean_vision - mean_text).square().sum().item()
    terms = LayerTerms(
        *(square * entry for entry in (mean, trace_vision, trace_text, value)),
        *(None if entry is None else square * entry for entry in (lower, upper)),
    )
    if not math.isfinite(terms.distance):
        raise ValueError(f"layer {layer}: the distance is not finite ({terms})")
    return terms, notes


def _root(vision: Counted, text: Counted, layer: int, options: Options) -> Roots[tuple[Any, list[str]]]:
    """Tr((Sigma_v Sigma_t)^(1/2)), with its bounds if asked for, and notes."""
    if isinstance(vision, CountedFeatures) and isinstance(text, CountedFeatures) and (vision.short or text.short):
        root = partial(trace_sqrt_from_features, precision=options.sqrt_precision, backend=_root_backend(options))
        return root(vision.features, text.features, bounds=options.bounds), []
    covariances = {"vision": vision.covariance(), "text": text.covariance()}
    notes = [
        f"layer {layer}, {modality}: the covariance lacks rank to the precision it was accumulated in, so its "
        'smallest directions are rounding; precision="exact" resolves them'
        for modality, (_, mended) in covariances.items()
        if mended
    ]
    root = yield Covariances(covariances.pop("vision")[0], covariances.pop("text")[0], options)
    return root, notes


def _roots(asked: list[Covariances]) -> list[Any]:
    """For each, the root, with its bounds if asked for, or the error that it has none; all of one size and device."""
    options = asked[0].options
    backend = _root_backend(options)
    root = partial(trace_sqrt_product, precision=options.sqrt_precision, bounds=options.bounds, backend=backend)
    if len(asked) == 1:
        try:
            return [root(asked[0].vision, asked[0].text)]
        except (ValueError, torch.linalg.LinAlgError) as error:
            return [error]
    try:
        found = root(torch.stack([pair.vision for pair in asked]), torch.stack([pair.text for pair in asked]))
    except (ValueError, torch.linalg.LinAlgError):  # of one of them: of which?
        return [one for pair in asked for one in _roots([pair])]
    return list(zip(*found, strict=True)) if options.bounds else list(found)


def _root_backend(options: Options) -> str | None:
    """A backend of the token kernels alone ("native") leaves the root's to be chosen."""
    return options.backend if options.backend in ROOT.names() else None


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
    left_out = [layer.left_out for layer in layers if layer.left_out is not None]
    if options.groups and len(left_out) < len(layers):
        notes.append(
            "no standard error: it takes samples in two groups or more, and without any one of them at least 2 tokens "
            "of each modality"
        )
    result = MIRResult(
        terms=[layer.terms for layer in layers],
        alpha=[layer.alpha for layer in layers],
        kept={m: [layer.kept[m] for layer in layers] for m in MODALITIES},
        removed={m: [layer.removed[m] for layer in layers] for m in MODALITIES},
        missed={m: [layer.missed[m] for layer in layers] for m in MODALITIES},
        left_out=left_out if len(left_out) == len(layers) else None,
        outliers=options.outliers,
        normalize=options.normalize,
        notes=notes,
    )
    if result.value == -math.inf:
        notes.append("every layer's distance is 0, so MIR, its logarithm, is -inf")
    return result
