"""Certified bounds of MIR against exact rational arithmetic; no distance is below its own mean term."""

from __future__ import annotations

import math
import random

import mpmath
import pytest
import torch
from torch import Tensor

from kernels import rationals
from kernels.frechet.feature_pairs import RATIOS, features
from mir_kernels import StreamingMoments
from modality_integration import LayerTerms, MIRResult, mir
from modality_integration.metric import proved_terms
from modality_integration.metric.distance import FeatureMoments, GaussianPair, TokenMoments, distances
from modality_integration.metric.options import MetricOptions
from modality_integration.metric.tokens import alpha_of, roundings_of_norms, sum_of_norms


def moved(seed: int, ratio: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A pair of features, some with means much closer together or farther apart than their standard deviations."""
    vision, text = features(seed, ratio, dtype)
    rng = random.Random(seed)
    return vision, (text.double() + rng.choice([0, 0, 1e-12, 1e-6, 1, 1e3])).to(dtype)


def hold(terms: LayerTerms, means: mpmath.mpf, covariances: mpmath.mpf, root: mpmath.mpf) -> None:
    """Every interval of `terms` contains the true value and the computed one."""
    assert mpmath.mpf(terms.mean_lower) <= means <= mpmath.mpf(terms.mean_upper)
    assert mpmath.mpf(terms.root_lower) <= root <= mpmath.mpf(terms.root_upper)
    traces = mpmath.mpf(terms.trace_vision) + mpmath.mpf(terms.trace_text)
    assert traces - 2 * mpmath.mpf(terms.root_upper) <= covariances <= traces - 2 * mpmath.mpf(terms.root_lower)
    assert mpmath.mpf(terms.deviations) <= covariances
    assert mpmath.mpf(terms.lower) <= means + covariances <= mpmath.mpf(terms.upper)
    assert terms.lower >= terms.mean_lower
    assert terms.lower <= terms.distance <= terms.upper
    assert terms.distance >= terms.mean


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("ratio", RATIOS)
def test_bounds_hold_for_features_as_they_are(ratio, dtype, normalize):
    for seed in range(12):
        vision, text = moved(seed, ratio, dtype)
        result = mir([vision], [text], outliers="none", normalize=normalize, bounds=True)
        plain = mir([vision], [text], outliers="none", normalize=normalize)
        with mpmath.workdps(rationals.DIGITS):
            square = rationals.mean_norm(text) ** -2 if normalize else mpmath.mpf(1)
            (mean_v, cov_v), (mean_t, cov_t) = rationals.moments(vision), rationals.moments(text)
            means = square * rationals.of_means(mean_v, mean_t)
            covariances = square * rationals.of_covariances(cov_v, cov_t)
            hold(result.terms[0], means, covariances, square * rationals.root(cov_v, cov_t))
            total = means + covariances
            truth = mpmath.log10(total) if total else -mpmath.inf
            assert mpmath.mpf(result.lower) <= truth <= mpmath.mpf(result.upper), seed
        assert result.lower <= result.value <= result.upper
        assert plain.terms[0].distance >= plain.terms[0].mean
        assert plain.terms[0].lower is None


@pytest.mark.parametrize(("count", "d"), [(2, 1), (50, 3), (4200, 1)])
@pytest.mark.parametrize("streamed", [False, True])
def test_alpha_is_within_the_roundings_of_its_sum_of_norms(count, d, streamed):
    scales = set()
    for seed in range(3):
        text = torch.randn(count, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        norms = sum((sum_of_norms(part) for part in text.split(7)), torch.zeros(())) if streamed else sum_of_norms(text)
        alpha = alpha_of(norms, count, 1)
        scale = proved_terms.scale_of(alpha, roundings_of_norms(count, d, streamed=streamed))
        with mpmath.workdps(rationals.DIGITS):
            truth = 1 / rationals.mean_norm(text)
            assert mpmath.mpf(scale.least) <= truth <= mpmath.mpf(scale.most)
            scales.add(truth == mpmath.mpf(alpha))
        assert scale.most - scale.least <= 1e-11 * alpha
    assert False in scales  # some alphas are rounded
    assert proved_terms.scale_of(1.0, None) == (1.0, 1.0)
    assert proved_terms.scale_of(1e150, 9) == (0.0, math.inf)


@pytest.mark.parametrize("ratio", [0.0, 1e5])
def test_bounds_of_accumulated_moments_hold_for_those(ratio):
    options, checked = MetricOptions("none", False, True, "exact", "float32"), 0
    for seed in range(60):
        pair = moved(seed, ratio, torch.float64)
        sides, truths = [], []
        for k, x in enumerate(pair):
            moments = StreamingMoments(x.shape[1], precision=("auto", "exact")[seed % 2])
            moments.update(x)
            if k and seed % 3 == 0:  # few tokens in the other modality, which are all held
                sides.append(FeatureMoments(x))
                truths.append(rationals.moments(x))
                continue
            sides.append(TokenMoments(moments, rounded=seed % 2 == 0))
            truths.append((rationals.exact(moments.mean[None])[0], rationals.exact(moments.covariance(1))))
        ((terms, _),) = distances([GaussianPair(1, *sides, 1.0)], options)
        assert terms.lower >= terms.mean_lower
        assert terms.lower <= terms.distance <= terms.upper
        (mean_v, cov_v), (mean_t, cov_t) = truths
        if rationals.semidefinite(cov_v) and rationals.semidefinite(cov_t):  # rounding may have made them indefinite
            checked += 1
            with mpmath.workdps(rationals.DIGITS):
                means, root = rationals.of_means(mean_v, mean_t), rationals.root(cov_v, cov_t)
                hold(terms, means, rationals.of_covariances(cov_v, cov_t), root)
    assert checked > 30


@pytest.mark.parametrize("rounded", [False, True])
def test_the_upper_end_has_room_for_what_an_indefinite_covariance_lacks(rounded):
    """Its eigenvalues are 2 + 1e-11 and -1e-11, so its positive semi-definite part has a larger trace."""
    above = 1 + 1e-11

    class Accumulated:
        mean = torch.zeros(2, dtype=torch.float64)

        def __init__(self, *rows):
            self.rows = torch.tensor(rows, dtype=torch.float64)

        def covariance(self, ddof):
            return self.rows

    sides = TokenMoments(Accumulated([1, above], [above, 1]), rounded), TokenMoments(Accumulated([0, 0], [0, 0]))
    options = MetricOptions("none", False, True, "exact", "float32")
    ((terms, notes),) = distances([GaussianPair(1, *sides, 1.0)], options)
    assert terms.lower <= 2
    assert 2 + 1e-11 <= terms.upper <= 2 + 1e-7
    assert bool(notes) == rounded


@pytest.mark.parametrize("bounds", [False, True])
@pytest.mark.parametrize("tokens", [500, 12])
def test_a_moved_mean_is_not_lost_next_to_a_massive_coordinate(tokens, bounds):
    text = torch.randn(tokens, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    text[:, 0] *= 1e7
    vision = text.clone()
    vision[:, 1] += 1
    (terms,) = mir([vision], [text], outliers="none", normalize=False, bounds=bounds).terms
    assert terms.distance == pytest.approx(1.0, rel=1e-9)
    if bounds:
        assert 1 - 1e-9 <= terms.lower <= 1.0
    vision[:, 2] *= 3  # standard deviations change as well
    (terms,) = mir([vision], [text], outliers="none", normalize=False, bounds=bounds).terms
    apart = (2 * text[:, 2].std()).square() + 1
    moved = (3 * text[:, 2]).mean() - text[:, 2].mean()
    assert terms.distance >= (apart + moved.square()) * (1 - 1e-9)


def test_mean_differences_keep_their_digits_whatever_the_mean():
    for tokens, d in ((900, 3), (6, 30)):
        noise = torch.randn(2, tokens, d, generator=torch.Generator().manual_seed(tokens), dtype=torch.float64)
        vision, text = noise.mul(2.0**20).round().div(2.0**20) + 2.0**25  # exact; the mean is 3e7 standard deviations
        near = mir([vision - 2.0**25], [text - 2.0**25], outliers="none", normalize=False).terms[0]
        far = mir([vision], [text], outliers="none", normalize=False).terms[0]
        assert far.mean == pytest.approx(near.mean, rel=1e-13)
        assert far.distance == pytest.approx(near.distance, rel=1e-12)


@pytest.mark.parametrize(("n", "m", "d"), [(600, 500, 128), (60, 70, 300)])
def test_bounds_are_close_whatever_the_mean(n, m, d):
    generator = torch.Generator().manual_seed(0)
    vision, text = (torch.randn(k, d, generator=generator, dtype=torch.float64) for k in (n, m))
    for ratio in (0.0, 1e6):
        result = mir([vision + ratio], [1.1 * text + ratio], normalize=False, bounds=True)
        assert result.upper - result.lower <= 1e-9


def test_a_sum_next_to_1_is_rounded_outward_before_its_logarithm():
    """Near 1, a unit in the last place of MIR is far smaller than one of the sum."""
    with mpmath.workdps(60):
        for last in range(1, 9):
            terms = [LayerTerms(share, 0.0, 0.0, 0.0, 0.0, 0.0, share, share) for share in (0.1, 0.2, 0.3, 0.4)]
            terms[0].mean_lower = terms[0].mean_upper = 0.1 + last * 2.0**-54
            made = MIRResult(terms, [1.0] * 4, *({"vision": [9] * 4, "text": [9] * 4},) * 2)
            total = mpmath.fsum(mpmath.mpf(term.mean_lower) for term in terms)
            assert mpmath.mpf(made.lower) <= mpmath.log10(total) <= mpmath.mpf(made.upper)
            assert made.upper - made.lower <= 1e-14


def test_bounds_made_by_hand_are_bounds_of_their_own_terms():
    assert LayerTerms(1.0, 8.0, 6.0, 7.0, 6.9, 7.1).lower == 1.0
    assert LayerTerms(1.0, 8.0, 6.0, 7.0, 6.9, 7.1, deviations=0.1).lower == pytest.approx(1.1)
    assert LayerTerms(1.0, 8.0, 6.0, 7.0, -math.inf, math.inf).lower == 1.0
    assert LayerTerms(1.0, 8.0, 6.0, 7.0, -math.inf, math.inf).upper == math.inf
    terms = LayerTerms(1.0, 8.0, 6.0, 7.0, 6.9, 7.1, 0.9, 1.2)
    assert (terms.lower, terms.distance) == (0.9, 1.0)
    assert 1.4 < terms.upper == pytest.approx(1.4)
