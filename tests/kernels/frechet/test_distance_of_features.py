"""The Frechet distance of features equals that of their moments, with bounds that hold for the features as given."""

from fractions import Fraction

import mpmath
import numpy as np
import pytest
import scipy.linalg
import torch

from kernels import rationals
from kernels.frechet.feature_pairs import RATIOS, features
from mir_kernels import frechet_distance, frechet_distance_from_features
from mir_kernels.ops.frechet.report import TOLERANCE

SIZES = [(5, 9, 30), (40, 9, 30), (30, 31, 30), (50, 70, 30), (2, 2, 3)]


def pair(n, m, d, mean=3.0):
    generator = torch.Generator().manual_seed(n + m)
    x, y = (torch.randn(k, d, generator=generator, dtype=torch.float64) for k in (n, m))
    return x + mean, 1.5 * y


def truth(x, y):
    """The distance of the features in rational arithmetic."""
    (mean_x, cov_x), (mean_y, cov_y) = rationals.moments(x), rationals.moments(y)
    apart = sum((a - b) ** 2 for a, b in zip(mean_x, mean_y, strict=True))
    traces = sum(c[j][j] for c in (cov_x, cov_y) for j in range(x.shape[1]))
    exact = Fraction(apart + traces)
    whole = mpmath.mpf(exact.numerator) / exact.denominator
    distance = whole - 2 * rationals.root(cov_x, cov_y)
    return distance if abs(distance) > whole * mpmath.mpf(10) ** -60 else mpmath.mpf(0)  # the root is rounded


@pytest.mark.parametrize(("n", "m", "d"), SIZES)
@pytest.mark.parametrize("backend", ["linalg", "eager", "reference"])
@pytest.mark.parametrize("bounds", [False, True])
def test_it_is_the_distance_of_means_and_covariances(n, m, d, backend, bounds):
    x, y = pair(n, m, d)
    found = frechet_distance_from_features(x, y, backend=backend, bounds=bounds)
    xc, yc = x - x.mean(0), y - y.mean(0)
    root = torch.linalg.svdvals(xc @ yc.T).sum() / ((n - 1) * (m - 1)) ** 0.5
    traces = xc.square().sum() / (n - 1) + yc.square().sum() / (m - 1)
    expected = (x.mean(0) - y.mean(0)).square().sum() + traces - 2 * root
    value = found.value if bounds else found
    assert (value - expected).abs() <= 2 * root * (TOLERANCE["float32"] if backend == "eager" else 1e-11)
    if bounds:
        assert found.lower <= found.value <= found.upper
        assert found.upper - found.lower <= 1e-5 * expected


@pytest.mark.parametrize(("n", "m", "d"), [(50, 70, 30), (9, 12, 4)])
def test_it_is_what_scipy_finds_of_full_rank(n, m, d):
    x, y = (one.numpy() for one in pair(n, m, d))
    a, b = np.cov(x.T), np.cov(y.T)
    expected = ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(a + b - 2 * scipy.linalg.sqrtm(a @ b).real)
    assert frechet_distance_from_features(x, y).item() == pytest.approx(expected, rel=1e-9)
    moments = (torch.from_numpy(one) for one in (x.mean(0), a, y.mean(0), b))
    assert frechet_distance(*moments).item() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("ratio", RATIOS)
def test_bounds_hold_for_the_features_themselves(ratio, dtype):
    for seed in range(15):
        x, y = features(seed, ratio, dtype)
        value, lower, upper = frechet_distance_from_features(
            x, y, bounds=True, backend="eager" if seed % 5 == 0 else None
        )
        with mpmath.workdps(rationals.DIGITS):
            assert mpmath.mpf(lower.item()) <= truth(x, y) <= mpmath.mpf(upper.item()), seed
        assert 0 <= lower <= value <= upper


@pytest.mark.parametrize("scale", [1e-200, 1e-100, 1e100, 1e160])
def test_bounds_hold_at_the_ends_of_the_range(scale):
    for seed in range(8):
        x, y = (one * scale for one in features(seed, 1.0))
        value, lower, upper = frechet_distance_from_features(x, y, bounds=True)
        with mpmath.workdps(rationals.DIGITS):
            assert mpmath.mpf(lower.item()) <= truth(x, y), seed
            assert upper == torch.inf or truth(x, y) <= mpmath.mpf(upper.item()), seed
        assert lower <= value <= upper


@pytest.mark.parametrize("bounds", [False, True])
@pytest.mark.parametrize(("n", "d"), [(5, 30), (40, 30)])
def test_equal_features_are_no_distance_apart_and_shifted_ones_the_shift(n, d, bounds):
    x, _ = pair(n, 2, d)
    same = frechet_distance_from_features(x, x.clone(), bounds=bounds)
    assert all(part == 0 for part in (same if bounds else [same]))
    moved = frechet_distance_from_features(x, x + 2.0**-10, bounds=bounds)
    value = moved.value if bounds else moved
    assert d * 2.0**-20 * (1 - 1e-9) <= value <= d * 2.0**-20 * (1 + 1e-6)


def test_it_has_no_gradient_and_leaves_its_arguments():
    x, y = pair(5, 9, 30)
    kept = x.clone()
    value = frechet_distance_from_features(x.requires_grad_(), y)
    assert not value.requires_grad
    assert torch.equal(x.detach(), kept)


@pytest.mark.parametrize(
    ("x", "y", "error", "message"),
    [
        (
            torch.zeros(1, 3),
            torch.zeros(4, 3),
            ValueError,
            r"x: expected features \(n, d\) with n >= 2, .* got \(1, 3\)",
        ),
        (torch.zeros(4, 3), torch.zeros(3), ValueError, r"y: expected features \(n, d\) with n >= 2, .* got \(3,\)"),
        (torch.zeros(5, 3), torch.zeros(5, 4), ValueError, "y: expected 3 columns like x, got 4"),
        (torch.zeros(5, 3), torch.full((5, 3), torch.nan), ValueError, "y: expected finite values, got 15"),
        (torch.zeros(5, 3).int(), torch.zeros(5, 3), TypeError, "x: expected one of the dtypes .* got int32"),
        ([[0.0]], torch.zeros(5, 3), TypeError, r"x: expected a torch\.Tensor, got list"),
    ],
)
def test_bad_features_are_refused_by_name(x, y, error, message):
    with pytest.raises(error, match=message):
        frechet_distance_from_features(x, y)


def test_bad_options_are_refused_by_name():
    x, y = pair(5, 9, 3)
    with pytest.raises(ValueError, match="precision: expected one of"):
        frechet_distance_from_features(x, y, precision="half")
    with pytest.raises(ValueError, match="backend: trace_sqrt_product has no backend 'cuda'"):
        frechet_distance_from_features(x, y, backend="cuda")
