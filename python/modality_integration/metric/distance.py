"""The Fréchet distance between the vision and text tokens of a layer, and its terms (Eq. 3 of the MIR paper).

`distances` handles several layers at once: roots of layers of equal size are computed in one batched call, which is
faster on a GPU.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mir_kernels import StreamingMoments
from mir_kernels.ops.frechet import TraceSqrt, trace_sqrt_from_features, trace_sqrt_product, trace_sqrt_report
from mir_kernels.ops.frechet.centring import exactly, moments, variances
from mir_kernels.ops.frechet.launch import CHUNK, Backend
from mir_kernels.ops.frechet.report import warn_if_missed
from modality_integration.metric import MODALITIES, proved_terms
from modality_integration.metric.options import MetricOptions
from modality_integration.metric.proved_terms import ProvedRoot, ProvedSide
from modality_integration.metric.result import LayerTerms


class Side(NamedTuple):
    """One modality: its mean as an unevaluated sum coarse + fine, and its variances, (d,) float64 each.

    matrix: the covariance (d, d) for the root, up to a power of two; None if the root is computed from the features.
    proved: certified bounds on all of these, if requested.
    """

    coarse: Tensor
    fine: Tensor
    variance: Tensor
    matrix: Tensor | None
    proved: ProvedSide | None = None


class TokenMoments:
    """The counted tokens of one modality as a mean and a covariance with ddof 1, in float64.

    rounded: the moments carry more than float64 rounding, so a rank-deficient covariance may be indefinite.
    """

    def __init__(self, moments: StreamingMoments, rounded: bool = False) -> None:
        self._moments, self._rounded = moments, rounded

    def side(self, bounds: bool, short: bool) -> Side:
        """bounds: include certified bounds. short: omit the covariance; only for features."""
        mean, matrix = self._moments.mean, self._moments.covariance(ddof=1)
        proved = proved_terms.of_moments(mean, matrix) if bounds else None
        return Side(mean, torch.zeros_like(mean), matrix.diagonal(), matrix, proved)

    def semidefinite(self, covariance: Tensor) -> tuple[Tensor, bool]:
        """The covariance, positive semi-definite up to float64 rounding, and whether it had to be changed."""
        if not self._rounded or torch.linalg.cholesky_ex(covariance).info == 0:
            return covariance, False
        return nearest_semidefinite(covariance), True


class FeatureMoments(TokenMoments):
    """Like `TokenMoments`, but keeps the features (n, d) themselves."""

    def __init__(self, features: Tensor) -> None:
        self.features, self._rounded = features, False

    @property
    def short(self) -> bool:
        """Whether there are too few tokens for a covariance of full rank."""
        return len(self.features) <= self.features.shape[-1]

    def side(self, bounds: bool, short: bool) -> Side:
        """See `TokenMoments`."""
        if bounds:
            proved = proved_terms.of_features(self.features, short)
            matrix = None if proved.covariance is None else proved.covariance.matrix
            return Side(*proved_terms.means_and_variances(proved), matrix, proved)
        if short:
            return Side(*variances(self.features), None)
        coarse, fine, matrix = moments(self.features)
        return Side(coarse, fine, matrix.diagonal(), matrix)


class GaussianPair(NamedTuple):
    """Both modalities of a layer, with the scale alpha of Eq. 2; `layer` (1..K) is for messages.

    roundings: roundings in the sum of norms behind alpha, see `roundings_of_norms`.
    """

    layer: int
    vision: TokenMoments
    text: TokenMoments
    alpha: float
    roundings: int = 0


class _Prepared(NamedTuple):
    """A pair with everything except its root; `root` is set if already known."""

    pair: GaussianPair
    sides: tuple[Side, Side]
    root: ProvedRoot | float | None
    notes: list[str]

    @property
    def matrices(self) -> list[Tensor]:
        """The covariances of vision and text; empty if the root is already known."""
        return [side.matrix for side in self.sides if side.matrix is not None]

    @property
    def proved(self) -> tuple[ProvedSide, ProvedSide] | None:
        """Certified bounds of both sides, if requested."""
        vision, text = (side.proved for side in self.sides)
        return None if vision is None or text is None else (vision, text)


def distances(pairs: Sequence[GaussianPair], options: MetricOptions) -> list[tuple[LayerTerms, list[str]]]:
    """For each pair, the terms of Eq. 3 scaled by its alpha, and notes on anything inexact in them."""
    prepared = [_prepare(pair, options) for pair in pairs]
    return [_terms(one, root, options) for one, root in zip(prepared, _roots(prepared, options), strict=True)]


def layers_together(hidden_size: int, device: torch.device) -> int:
    """How many layers' roots to compute per call: one on a CPU, where LAPACK does not batch; on a GPU as many as
    mir_kernels processes at a time."""
    return max(1, CHUNK // max(hidden_size, 1) ** 2) if device.type == "cuda" else 1


def nearest_semidefinite(covariance: Tensor) -> Tensor:
    """A copy of a covariance (d, d), float64, with negative eigenvalues of its correlation matrix set to zero."""
    scale = covariance.diagonal().sqrt()
    scale = torch.where(scale > 0, scale, 1.0)
    values, vectors = torch.linalg.eigh(covariance / scale / scale[:, None])
    root = vectors * values.clamp(min=0.0).sqrt() * scale[:, None]
    return root @ root.mT


def _prepare(pair: GaussianPair, options: MetricOptions) -> _Prepared:
    vision, text = pair.vision, pair.text
    short, root = False, None
    if isinstance(vision, FeatureMoments) and isinstance(text, FeatureMoments) and (vision.short or text.short):
        short, root = True, _root_of_features(pair.layer, vision.features, text.features, options)
    sides = (_side(pair, "vision", options.bounds, short), _side(pair, "text", options.bounds, short))
    return _Prepared(pair, sides, root, notes=[])


def _side(pair: GaussianPair, modality: str, bounds: bool, short: bool) -> Side:
    """One modality's `Side`; ValueError that names layer and modality if its moments are not finite."""
    try:
        return getattr(pair, modality).side(bounds, short)
    except ValueError as error:
        raise ValueError(f"layer {pair.layer}, {modality}: {error}") from error


def _roots(prepared: Sequence[_Prepared], options: MetricOptions) -> list[ProvedRoot | float]:
    """The root of each pair, with one call per matrix size and device."""
    roots = [one.root for one in prepared]
    alike: dict[tuple[int, torch.device], list[int]] = {}
    for i, one in enumerate(prepared):
        if one.matrices:
            matrix = one.matrices[0]
            alike.setdefault((matrix.shape[0], matrix.device), []).append(i)
    for places in alike.values():
        for i, root in zip(places, _roots_of_one_size([prepared[i] for i in places], options), strict=True):
            roots[i] = root
    return [root for root in roots if root is not None]


def _roots_of_one_size(prepared: Sequence[_Prepared], options: MetricOptions) -> list[ProvedRoot | float]:
    """Roots of pairs of one size. A covariance that rounding made indefinite is mended first, with a note.

    With bounds, every covariance is checked beforehand. Without them, the root's report tells whether its Cholesky
    factorisation succeeded, which is the same test; only failed pairs are then mended and redone.
    """
    if options.bounds:
        prepared = [_mended(one) for one in prepared]
    vision, text = zip(*(one.matrices for one in prepared), strict=True)
    together, backend = len(prepared) > 1, _root_backend(options)
    pair = (torch.stack(vision), torch.stack(text)) if together else (vision[0], text[0])
    try:
        if options.bounds:
            found = trace_sqrt_product(*pair, precision=options.sqrt_precision, bounds=True, backend=backend)
            ends = zip(*(column.reshape(-1) for column in found), strict=True)
            sides = [one.proved for one in prepared if one.proved is not None]
            return [proved_terms.proved_root(both, *three) for both, three in zip(sides, ends, strict=True)]
        report = trace_sqrt_report(*pair, precision=options.sqrt_precision, backend=backend)
    except (ValueError, torch.linalg.LinAlgError) as error:
        if together:  # redo one by one to find the layer at fault
            return [root for one in prepared for root in _roots_of_one_size([one], options)]
        mended = _mended(prepared[0])
        if mended is not prepared[0]:
            return _roots_of_one_size([mended], options)
        raise _no_root(prepared[0].pair.layer, error) from error
    roots: list[ProvedRoot | float] = report.value.reshape(-1).tolist()
    for i, (one, path) in enumerate(zip(prepared, report.path, strict=True)):
        if "cholesky" not in path and (mended := _mended(one)) is not one:
            (roots[i],) = _roots_of_one_size([mended], options)
    warn_if_missed("trace_sqrt_product", report.error, options.sqrt_precision)
    return roots


def _mended(prepared: _Prepared) -> _Prepared:
    """`prepared` with covariances made positive semi-definite up to float64 rounding; unchanged if they already are."""
    sides = []
    for modality, tokens, side in zip(MODALITIES, prepared.pair[1:3], prepared.sides, strict=True):
        if side.matrix is None:
            return prepared
        try:
            matrix, mended = tokens.semidefinite(side.matrix)
        except (ValueError, torch.linalg.LinAlgError) as error:
            raise _no_root(prepared.pair.layer, error) from error
        if mended:
            proved = side.proved and side.proved._replace(covariance=exactly(matrix))
            side = side._replace(matrix=matrix, proved=proved)
            prepared.notes.append(
                f"layer {prepared.pair.layer}, {modality}: the covariance is rank-deficient at the accumulated "
                'precision, so its smallest directions are rounding noise; precision="exact" resolves them'
            )
        sides.append(side)
    if all(side is before for side, before in zip(sides, prepared.sides, strict=True)):
        return prepared
    return prepared._replace(sides=(sides[0], sides[1]))


def _root_of_features(layer: int, vision: Tensor, text: Tensor, options: MetricOptions) -> ProvedRoot | float:
    try:
        found = trace_sqrt_from_features(
            vision, text, precision=options.sqrt_precision, bounds=options.bounds, backend=_root_backend(options)
        )
    except (ValueError, torch.linalg.LinAlgError) as error:
        raise _no_root(layer, error) from error
    if isinstance(found, TraceSqrt):
        return ProvedRoot(found.value.item(), found.lower.item(), found.upper.item(), 0.0)
    return found.item()


def _root_backend(options: MetricOptions) -> Backend | None:
    """The backend for the root; None (automatic) for "native", which only the token kernels have."""
    return None if options.backend == "native" else options.backend


def _no_root(layer: int, error: Exception) -> ValueError:
    """For finite moments that are not covariances, as in a hand-made state."""
    return ValueError(f"layer {layer}: no square root of its covariances exists ({error})")


def _terms(prepared: _Prepared, root: ProvedRoot | float, options: MetricOptions) -> tuple[LayerTerms, list[str]]:
    pair, (vision, text) = prepared.pair, prepared.sides
    means = (vision.coarse - text.coarse) + (vision.fine - text.fine)
    deviations = vision.variance.sqrt() - text.variance.sqrt()
    # Covariances as accumulated need not be semi-definite.
    definite = isinstance(pair.vision, FeatureMoments) and isinstance(pair.text, FeatureMoments)
    scalars = {
        "mean": torch.dot(means, means).item(),
        "trace_vision": vision.variance.sum().item(),
        "trace_text": text.variance.sum().item(),
        "trace_root": root.value if isinstance(root, ProvedRoot) else root,
        "deviations": torch.dot(deviations, deviations).item() if definite else 0.0,
    }
    terms = LayerTerms(**{name: pair.alpha * scalar * pair.alpha for name, scalar in scalars.items()})
    if isinstance(root, ProvedRoot) and prepared.proved is not None:
        scale = proved_terms.scale_of(pair.alpha, pair.roundings if options.normalize else None)
        proved_terms.prove(terms, prepared.proved, root, scale)
    if not math.isfinite(terms.distance):
        raise ValueError(f"layer {pair.layer}: the distance is not finite ({terms})")
    return terms, prepared.notes
