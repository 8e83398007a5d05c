"""The Fréchet distance between the vision and the text tokens of a layer, and its terms (Eq. 3 of the MIR paper).

`distances` takes several layers: each is prepared, the roots of layers of one size are taken by one call (which a GPU
is faster at), and each is finished.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from mir_kernels import StreamingMoments
from mir_kernels.ops.frechet import TraceSqrt, trace_sqrt_from_features, trace_sqrt_product, trace_sqrt_report
from mir_kernels.ops.frechet.launch import CHUNK, TRACE_SQRT_PRODUCT
from mir_kernels.ops.frechet.report import warn_if_missed
from modality_integration.metric import MODALITIES
from modality_integration.metric.options import MetricOptions
from modality_integration.metric.result import LayerTerms


class TokenMoments:
    """The counted tokens of one modality as a mean and a covariance with ddof 1, in float64.

    rounded: the moments carry more than float64's rounding, so that a covariance short of rank may come out indefinite.
    """

    def __init__(self, moments: StreamingMoments, rounded: bool = False) -> None:
        self._moments, self._rounded = moments, rounded

    @property
    def moments(self) -> StreamingMoments:
        """Count, mean and second moment."""
        return self._moments

    def mean_and_covariance(self) -> tuple[Tensor, Tensor]:
        """(d,) and (d, d)."""
        return self.moments.mean, self.moments.covariance(ddof=1)

    def semidefinite(self, covariance: Tensor) -> tuple[Tensor, bool]:
        """The covariance, positive semi-definite to float64's rounding; and whether it had to be made so."""
        if not self._rounded or torch.linalg.cholesky_ex(covariance).info == 0:
            return covariance, False
        return nearest_semidefinite(covariance), True


class FeatureMoments(TokenMoments):
    """The same with the features (n, d) themselves at hand; accumulated only if the covariance is asked for."""

    def __init__(self, features: Tensor) -> None:
        self.features, self._rounded = features, False

    @property
    def short(self) -> bool:
        """Whether there are too few tokens for a covariance of full rank."""
        return len(self.features) <= self.features.shape[-1]

    @cached_property
    def moments(self) -> StreamingMoments:
        """Accumulated in float64."""
        moments = StreamingMoments(self.features.shape[-1], device=self.features.device, precision="exact")
        moments.update(self.features)
        return moments

    def mean_and_trace(self) -> tuple[Tensor, float]:
        """The mean (d,) and the trace of the covariance."""
        if not self.short:
            mean, covariance = self.mean_and_covariance()
            return mean, covariance.trace().item()
        mean = self.features.double().mean(dim=0)
        return mean, (self.features.double() - mean).square().sum().item() / (len(self.features) - 1)


class GaussianPair(NamedTuple):
    """Both modalities of a layer, with the scale alpha of Eq. 2; `layer` (1..K) is for messages."""

    layer: int
    vision: TokenMoments
    text: TokenMoments
    alpha: float


class _Root(NamedTuple):
    """Tr((Sigma_v Sigma_t)^(1/2)), with its bounds if asked for."""

    value: float
    lower: float | None = None
    upper: float | None = None


class _Prepared(NamedTuple):
    """A pair with everything but its root, or the root already; `covariances` are vision's and text's, (d, d)."""

    pair: GaussianPair
    mean: float
    traces: tuple[float, float]
    covariances: tuple[Tensor, Tensor] | None
    root: _Root | None
    notes: list[str]


def distances(pairs: Sequence[GaussianPair], options: MetricOptions) -> list[tuple[LayerTerms, list[str]]]:
    """For each pair the terms of Eq. 3, scaled by its alpha, and notes on what was not exact in them."""
    prepared = [_prepare(pair, options) for pair in pairs]
    return [_terms(one, root) for one, root in zip(prepared, _roots(prepared, options), strict=True)]


def layers_together(hidden_size: int, device: torch.device) -> int:
    """How many layers' roots to take by one call: on a CPU one, where LAPACK has no use for more; on a GPU as many as
    mir_kernels works on at a time."""
    return max(1, CHUNK // max(hidden_size, 1) ** 2) if device.type == "cuda" else 1


def nearest_semidefinite(covariance: Tensor) -> Tensor:
    """A covariance (d, d), float64, with the negative eigenvalues of its correlation matrix set to zero."""
    scale = covariance.diagonal().sqrt()
    scale = torch.where(scale > 0, scale, 1.0)
    values, vectors = torch.linalg.eigh(covariance / scale / scale[:, None])
    root = vectors * values.clamp(min=0.0).sqrt() * scale[:, None]
    return root @ root.mT


def _prepare(pair: GaussianPair, options: MetricOptions) -> _Prepared:
    vision, text = pair.vision, pair.text
    covariances: tuple[Tensor, Tensor] | None
    root: _Root | None
    if isinstance(vision, FeatureMoments) and isinstance(text, FeatureMoments) and (vision.short or text.short):
        (mean_vision, trace_vision), (mean_text, trace_text) = vision.mean_and_trace(), text.mean_and_trace()
        root = _root_of_features(pair.layer, vision.features, text.features, options)
        covariances = None
    else:
        (mean_vision, cov_vision), (mean_text, cov_text) = vision.mean_and_covariance(), text.mean_and_covariance()
        trace_vision, trace_text = cov_vision.trace().item(), cov_text.trace().item()
        covariances, root = (cov_vision, cov_text), None
    mean = (mean_vision - mean_text).square().sum().item()
    return _Prepared(pair, mean, (trace_vision, trace_text), covariances, root, notes=[])


def _roots(prepared: Sequence[_Prepared], options: MetricOptions) -> list[_Root]:
    """The root of each; those of one size on one device by one call."""
    roots = [one.root for one in prepared]
    alike: dict[tuple[int, torch.device], list[int]] = {}
    for i, one in enumerate(prepared):
        if one.covariances is not None:
            alike.setdefault((one.covariances[0].shape[0], one.covariances[0].device), []).append(i)
    for places in alike.values():
        for i, root in zip(places, _roots_of_one_size([prepared[i] for i in places], options), strict=True):
            roots[i] = root
    return [root for root in roots if root is not None]


def _roots_of_one_size(prepared: Sequence[_Prepared], options: MetricOptions) -> list[_Root]:
    """Their roots. A covariance that its accumulation left short of rank is mended first, with a note.

    That is looked for before roots with bounds. A root alone says whether its Cholesky factors ran through, which is
    the same question; only where they did not are they taken for themselves.
    """
    if options.bounds:
        prepared = [_mended(one) for one in prepared]
    vision, text = zip(*(one.covariances for one in prepared if one.covariances is not None), strict=True)
    together, backend = len(prepared) > 1, _root_backend(options)
    pair = (torch.stack(vision), torch.stack(text)) if together else (vision[0], text[0])
    try:
        if options.bounds:
            return _as_roots(trace_sqrt_product(*pair, precision=options.sqrt_precision, bounds=True, backend=backend))
        found = trace_sqrt_report(*pair, precision=options.sqrt_precision, backend=backend)
    except (ValueError, torch.linalg.LinAlgError) as error:
        if together:  # of one of them: of which?
            return [root for one in prepared for root in _roots_of_one_size([one], options)]
        mended = _mended(prepared[0])
        if mended is not prepared[0]:
            return _roots_of_one_size([mended], options)
        raise _no_root(prepared[0].pair.layer, error) from error
    roots = _as_roots(found.value)
    for i, (one, path) in enumerate(zip(prepared, found.path, strict=True)):
        if "cholesky" not in path and (mended := _mended(one)) is not one:
            (roots[i],) = _roots_of_one_size([mended], options)
    warn_if_missed("trace_sqrt_product", found.error, options.sqrt_precision, stacklevel=2)
    return roots


def _mended(prepared: _Prepared) -> _Prepared:
    """With covariances that are positive semi-definite to float64's rounding; itself where they are."""
    if prepared.covariances is None:
        return prepared
    sides = []
    for modality, moments, covariance in zip(MODALITIES, prepared.pair[1:3], prepared.covariances, strict=True):
        try:
            side, mended = moments.semidefinite(covariance)
        except (ValueError, torch.linalg.LinAlgError) as error:
            raise _no_root(prepared.pair.layer, error) from error
        sides.append(side)
        if mended:
            prepared.notes.append(
                f"layer {prepared.pair.layer}, {modality}: the covariance lacks rank to the precision it was "
                'accumulated in, so its smallest directions are rounding; precision="exact" resolves them'
            )
    if all(side is covariance for side, covariance in zip(sides, prepared.covariances, strict=True)):
        return prepared
    return prepared._replace(covariances=(sides[0], sides[1]))


def _root_of_features(layer: int, vision: Tensor, text: Tensor, options: MetricOptions) -> _Root:
    try:
        found = trace_sqrt_from_features(
            vision, text, precision=options.sqrt_precision, bounds=options.bounds, backend=_root_backend(options)
        )
    except (ValueError, torch.linalg.LinAlgError) as error:
        raise _no_root(layer, error) from error
    return _as_roots(found)[0]


def _as_roots(found: Tensor | TraceSqrt) -> list[_Root]:
    columns = found if isinstance(found, TraceSqrt) else (found,)
    return [_Root(*entry) for entry in zip(*(column.reshape(-1).tolist() for column in columns), strict=True)]


def _root_backend(options: MetricOptions) -> str | None:
    """A backend of the token kernels alone ("native") leaves the root's to be chosen."""
    return options.backend if options.backend in TRACE_SQRT_PRODUCT.names() else None


def _no_root(layer: int, error: Exception) -> ValueError:
    """Of moments that are finite, but no covariances: a state made by hand."""
    return ValueError(f"layer {layer}: of its covariances no root can be taken ({error})")


def _terms(prepared: _Prepared, root: _Root) -> tuple[LayerTerms, list[str]]:
    square = prepared.pair.alpha * prepared.pair.alpha
    terms = LayerTerms(
        *(square * entry for entry in (prepared.mean, *prepared.traces, root.value)),
        *(None if entry is None else square * entry for entry in (root.lower, root.upper)),
    )
    if not math.isfinite(terms.distance):
        raise ValueError(f"layer {prepared.pair.layer}: the distance is not finite ({terms})")
    return terms, prepared.notes
