"""Bounds of features hold for the features as given: checked against rationals, for any mean, scale and rank."""

from __future__ import annotations

from fractions import Fraction

import mpmath
import pytest
import torch
from torch import Tensor

from kernels import rationals
from kernels.frechet.feature_pairs import RATIOS, features
from mir_kernels.ops.frechet import centring, distance, trace_sqrt_from_features
from mir_kernels.ops.frechet.features import _apart


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("ratio", RATIOS)
def test_bounds_of_the_root_hold_for_the_features_themselves(ratio, dtype):
    for seed in range(20):
        x, y = features(seed, ratio, dtype)
        value, lower, upper = trace_sqrt_from_features(x, y, bounds=True, backend="eager" if seed % 5 == 0 else None)
        with mpmath.workdps(rationals.DIGITS):
            truth = rationals.root(rationals.moments(x)[1], rationals.moments(y)[1])
            assert mpmath.mpf(lower.item()) <= truth <= mpmath.mpf(upper.item()), seed
        assert lower <= value <= upper


@pytest.mark.parametrize("scale", [1e-200, 1e-100, 1e100, 1e250])
def test_bounds_of_the_root_hold_at_the_ends_of_the_range(scale):
    for seed in range(8):
        x, y = features(seed, 10.0)
        x, y = x * scale, y / scale
        _, lower, upper = trace_sqrt_from_features(x, y, bounds=True)
        with mpmath.workdps(rationals.DIGITS):
            truth = rationals.root(rationals.moments(x)[1], rationals.moments(y)[1])
            assert mpmath.mpf(lower.item()) <= truth <= mpmath.mpf(upper.item()), seed
            assert not truth or upper - lower <= 1e-4 * float(truth)


@pytest.mark.parametrize("ratio", RATIOS)
def test_means_and_deviations_are_within_their_bounds(ratio):
    for seed in range(20):
        x, _ = features(seed, ratio)
        mean, covariance = rationals.moments(x)
        known = centring.centre(x)
        unit, n = Fraction(2) ** int(known.exponent), len(x)
        z = rationals.exact(torch.cat(list(known.deviations(x, n))))
        for j, m in enumerate(mean):
            pair = Fraction(known.coarse[j].item()) + Fraction(known.fine[j].item())
            assert abs(m / unit - pair) <= Fraction(known.mean_error[j].item())
            apart = sum(((Fraction(a.item()) - m) / unit - b[j]) ** 2 for a, b in zip(x[:, j], z, strict=True))
            assert apart <= Fraction(known.error[j].item()) ** 2
        marginals = distance.marginals_of(known)
        for j, (low, high) in enumerate(zip(marginals.lower.tolist(), marginals.upper.tolist(), strict=True)):
            assert Fraction(low) ** 2 <= covariance[j][j] / unit**2 <= Fraction(high) ** 2


@pytest.mark.parametrize("ratio", [0.0, 1e6])
def test_what_is_left_of_a_mean_is_rounding_of_the_deviations(ratio):
    """The rounding is relative to the deviations, not to the mean, which is a million times larger."""
    x = torch.randn(3000, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + ratio
    known = centring.centre(x)
    assert (known.error <= 1e-13 * known.norm).all()
    assert (known.mean_error <= 1e-13 * known.norm / 3000**0.5).all()


@pytest.mark.parametrize("ratio", [0.0, 1e6])
@pytest.mark.parametrize("n", [7, 300, 2500])
def test_covariances_are_within_their_bounds_of_what_they_are_of(n, ratio):
    scales = torch.tensor([1, 1e-7, 1e9], dtype=torch.float64)
    x = torch.randn(n, 3, generator=torch.Generator().manual_seed(n), dtype=torch.float64) * scales
    known = centring.centre(x + ratio)
    found = centring.covariance(x + ratio, known)
    z = rationals.exact(torch.cat(list(known.deviations(x + ratio, n))))
    columns, scale = list(zip(*z, strict=True)), [Fraction(s) for s in found.scale.tolist()]
    # In the Frobenius norm, which is larger than the spectral norm that `shift` bounds.
    squares = Fraction(0)
    for i, a in enumerate(columns):
        for j, b in enumerate(columns):
            apart = sum(p * q for p, q in zip(a, b, strict=True)) / (n - 1) - Fraction(found.matrix[i, j].item())
            squares += (apart / scale[i] / scale[j]) ** 2
    assert squares <= Fraction(found.shift) ** 2
    assert found.shift <= 1e-14
    assert 0 < found.share < 1e-9


@pytest.mark.parametrize("noise", [1.0, 1e-3, 1e-5, 1e-7, 0.0])
def test_a_share_is_proved_only_where_the_covariance_is_definite_enough(noise):
    x = torch.randn(60, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x[:, 1] = x[:, 0] + noise * x[:, 1]
    found = centring.covariance(x, centring.centre(x))
    h = found.matrix / found.scale / found.scale[:, None]
    smallest = torch.linalg.eigvalsh(h)[0].item()
    assert found.share == 1.0 or found.share * smallest >= found.shift
    assert (found.share < 1e-6) == (noise > 1e-4)


@pytest.mark.parametrize("ratio", [0.0, 1e6])
def test_moments_without_proofs_are_exact_to_rounding_of_the_deviations(ratio):
    for rows in (40, 1500):
        x = torch.randn(rows, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64).sort(0).values + ratio
        mean, covariance = rationals.moments(x)
        *halves, matrix = centring.moments(x)
        for coarse, fine, variance in (centring.variances(x), (*halves, matrix.diagonal())):
            for j in range(3):
                assert abs(Fraction(coarse[j].item()) + Fraction(fine[j].item()) - mean[j]) <= Fraction(1e-14)
                assert abs(Fraction(variance[j].item()) / covariance[j][j] - 1) <= Fraction(1e-13)
        assert torch.equal(matrix, matrix.mT)
        assert float(covariance[0][1]) == pytest.approx(matrix[0, 1].item(), rel=1e-12)


def correlated(n: int, d: int, decay: float, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(d, d, generator=generator, dtype=torch.float64)).Q
    scales = torch.arange(1, d + 1, dtype=torch.float64) ** -decay
    return torch.randn(n, d, generator=generator, dtype=torch.float64) * scales @ basis


@pytest.mark.parametrize(
    ("n", "m", "d", "decay", "width"),
    [(2000, 1500, 256, 0.0, 1e-10), (400, 300, 64, 2.0, 1e-6), (400, 300, 64, 1.0, 1e-8), (60, 70, 300, 1.0, 1e-10)],
)
@pytest.mark.parametrize("ratio", [0.0, 1e6])
def test_bounds_are_close_in_ordinary_cases(n, m, d, decay, width, ratio):
    x, y = correlated(n, d, decay, 0) + ratio, correlated(m, d, decay, 1) + ratio
    value, lower, upper = trace_sqrt_from_features(x, y, bounds=True)
    assert upper - lower <= width * value


def centred(n: int, d: int, seed: int) -> Tensor:
    x = correlated(n, d, 1.0, seed)
    x[:, 0] *= 1e6
    return x - x.mean(0)


def moved(x: Tensor, by: Tensor, seed: int) -> Tensor:
    """Centred x with every column shortened and tilted, by `by` (d,) in total."""
    towards = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    askew, length = towards - towards.mean(0), torch.linalg.vector_norm(x, dim=0)
    return x + by * (askew / torch.linalg.vector_norm(askew, dim=0) / 5 - 0.8 * x / length)


@pytest.mark.parametrize("sides", [(1, 0), (0, 1), (1, 1)])
@pytest.mark.parametrize("share", [1e-2, 1e-4])
@pytest.mark.parametrize(("n", "m", "d"), [(30, 20, 5), (4, 6, 9)])
def test_errors_of_deviations_are_worth_what_they_move_the_root(n, m, d, share, sides):
    """In both forms of the bounds, with errors that exceed all rounding."""
    features = centred(n, d, 0), centred(m, d, 1)
    errors = [share * side * torch.linalg.vector_norm(x, dim=0) for x, side in zip(features, sides, strict=True)]
    others = [moved(x, error, 2) for x, error in zip(features, errors, strict=True)]
    degrees = ((n - 1) * (m - 1)) ** 0.5
    root, other = (torch.linalg.svdvals(x @ y.mT).sum() / degrees for x, y in (features, others))
    assert root - other > 0.1 * share * root
    matrices = [
        centring.exactly(x.mT @ x / (len(x) - 1))._replace(error=error / (len(x) - 1) ** 0.5)
        for x, error in zip(features, errors, strict=True)
    ]
    lower, upper = centring.widened(root * (1 - 1e-9), root * (1 + 1e-9), *matrices)
    assert lower <= other <= root <= upper <= root + 3 * (root - lower)
    known = [centring.centre(x) for x in features]
    scaled = [one._replace(error=error * 2.0**-one.exponent) for one, error in zip(known, errors, strict=True)]
    apart = _apart(*scaled) * 2.0 ** (known[0].exponent + known[1].exponent) / degrees
    assert root - other <= apart <= 20 * (root - other)


@pytest.mark.parametrize("definite", [False, True])
def test_errors_of_a_covariance_are_worth_what_they_move_the_root(definite):
    """Relative errors if the covariance is definite, their root near singularity."""
    generator = torch.Generator().manual_seed(0)
    factor = torch.randn(5, 5 if definite else 3, generator=generator, dtype=torch.float64)
    a, b = factor @ factor.mT, torch.diag(torch.rand(5, generator=generator, dtype=torch.float64) + 0.5)
    scale = a.diagonal().sqrt()
    known = centring.exactly(a)._replace(scale=scale, shift=1e-8, share=1e-3 if definite else 1.0)
    others = (a * 0.999, a * 1.001) if definite else (a, a + 1e-8 * torch.diag(scale**2))
    root, below, above = (torch.linalg.eigvals(one @ b).real.clamp(min=0).sqrt().sum() for one in (a, *others))
    assert above - root > 1e-5 * root
    for pair in ((known, centring.exactly(b)), (centring.exactly(b), known)):
        lower, upper = centring.widened(root, root, *pair)
        assert lower <= below <= above <= upper
        assert upper - root <= 30 * (above - root)
        assert root - lower <= 30 * (above - root)


def test_bounds_of_features_short_of_rank_are_as_close_as_the_root_of_rounding():
    """Where no bound relative to the covariance can be proved."""
    generator = torch.Generator().manual_seed(0)
    factor = torch.randn(10, 40, generator=generator, dtype=torch.float64)
    x, y = (torch.randn(n, 10, generator=generator, dtype=torch.float64) @ factor for n in (300, 200))
    with pytest.warns(RuntimeWarning, match="reached a relative error"):
        value, lower, upper = trace_sqrt_from_features(x, y, bounds=True, precision="float64")
    assert lower <= value <= upper
    assert upper - lower <= 1e-5 * value
