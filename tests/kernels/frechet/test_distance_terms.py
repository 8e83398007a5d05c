"""The distance is at least its mean term, whatever the traces, and its bounds hold for the matrices as given."""

from __future__ import annotations

import math
import random

import mpmath
import pytest
import torch
from torch import Tensor

from kernels import rationals
from mir_kernels.ops.frechet import distance, frechet_distance


def vector(*entries: float) -> Tensor:
    return torch.tensor(entries, dtype=torch.float64)


MASSIVE = torch.diag(vector(1e12, 1, 1))


@pytest.mark.parametrize("bounds", [False, True])
@pytest.mark.parametrize("apart", [1e-3, 1e-9, 1.0])
@pytest.mark.parametrize("backend", ["linalg", "eager"])
def test_equal_covariances_are_as_far_apart_as_their_means(apart, backend, bounds):
    means, covariances = vector(0, apart, 0).expand(2, 3), torch.stack((MASSIVE, torch.eye(3, dtype=torch.float64)))
    zeros = torch.zeros(2, 3)
    found = frechet_distance(means, covariances, zeros, covariances, backend=backend, bounds=bounds)
    values = found.value if bounds else found
    assert values.tolist() == [apart**2, apart**2]
    if bounds:
        assert (found.upper - found.lower <= 1e-14 * values).all()


@pytest.mark.parametrize("bounds", [False, True])
def test_next_to_a_massive_coordinate_means_and_deviations_are_not_lost(bounds):
    other = torch.diag(vector(1e16, 9, 4))
    found = frechet_distance(vector(0, 0, 1), torch.diag(vector(1e16, 1, 1)), torch.zeros(3), other, bounds=bounds)
    value = found.value if bounds else found
    assert value >= 1
    if bounds:
        assert 6 * (1 - 1e-12) <= found.lower <= 6 <= found.upper


@pytest.mark.parametrize("apart", [1e-200, 1e-160, 1e160, 1e200, 1.7e308])
def test_bounds_hold_where_the_squares_of_means_leave_the_range(apart):
    x, y = vector(apart, 0, 0), vector(-apart, 0, 0)
    value, lower, upper = frechet_distance(x, MASSIVE, y, MASSIVE, bounds=True)
    truth = 4 * mpmath.mpf(apart) ** 2
    assert mpmath.mpf(lower.item()) <= truth
    assert upper == math.inf or truth <= mpmath.mpf(upper.item())
    assert upper > 0
    assert lower <= value <= upper
    assert value == pytest.approx(float(truth), rel=1e-14, abs=1e-322)
    assert frechet_distance(x, MASSIVE, y, MASSIVE) == value


def drawn(seed: int) -> tuple[Tensor, ...]:
    """Means and covariances of every scale; some covariances are equal, singular or diagonal."""
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    d, dtype = rng.choice([1, 2, 3]), rng.choice([torch.float64, torch.float64, torch.float32])

    def covariance() -> Tensor:
        factor = torch.randn(d, rng.choice([d, d + 2, max(d - 1, 1)]), generator=generator, dtype=torch.float64)
        factor *= 10.0 ** (rng.choice([0, 12]) * (torch.rand(d, 1, generator=generator, dtype=torch.float64) - 0.5))
        factor *= rng.choice([1.0, 1.0, 1e-150 if dtype == torch.float64 else 1.0, 1e8])
        if rng.random() < 0.2:
            factor = torch.diag(factor[:, 0])
        product = factor @ factor.mT
        return ((product + product.mT) / 2).to(dtype)

    a = covariance()
    b = a.clone() if rng.random() < 0.25 else covariance()
    x = torch.randn(d, generator=generator, dtype=torch.float64) * 10.0 ** rng.choice([0, 0, 3, -200, 150])
    y = rng.choice([x, -x, x * (1 + 1e-12), torch.randn(d, generator=generator, dtype=torch.float64)])
    return x, a, y, b


@pytest.mark.filterwarnings("ignore:trace_sqrt_product. reached a relative error")
@pytest.mark.parametrize("backend", ["linalg", "eager"])
def test_bounds_hold_for_the_gaussians_as_given(backend):
    checked = 0
    for seed in range(100):
        x, a, y, b = drawn(seed)
        value, lower, upper = frechet_distance(x, a, y, b, bounds=True, backend=backend)
        plain = frechet_distance(x, a, y, b, backend=backend)
        matrices = rationals.exact(a), rationals.exact(b)
        with mpmath.workdps(rationals.DIGITS):
            means = rationals.of_means(*(rationals.exact(mean[None])[0] for mean in (x, y)))
            least = mpmath.mpf(value.item()), mpmath.mpf(plain.item())
            assert min(least) >= means * (1 - mpmath.mpf(1e-14)) - mpmath.mpf(1e-300), seed
            assert lower <= value <= upper, seed
            if all(map(rationals.semidefinite, matrices)):
                truth = means + rationals.of_covariances(*matrices)
                assert mpmath.mpf(lower.item()) <= truth <= mpmath.mpf(upper.item()), seed
                checked += 1
    assert checked > 60


def test_the_upper_end_has_room_for_the_positive_part_of_what_rounding_left_indefinite():
    """Tr A+ exceeds Tr A: eigenvalues 2 + 1e-10 and -1e-10."""
    a = torch.tensor([[1.0, 1 + 1e-10], [1 + 1e-10, 1.0]], dtype=torch.float64)
    (room,) = distance.negative_part(a[None])
    assert 1e-10 <= room <= 1e-7
    assert distance.negative_part(torch.stack((MASSIVE, 1e-300 * MASSIVE))).tolist() == [0.0, 0.0]
    zero = torch.zeros(2, dtype=torch.float64)
    found = frechet_distance(zero, a, zero, torch.zeros(2, 2), bounds=True)
    assert found.lower <= 2
    assert found.upper >= 2 + 1e-10


def test_an_empty_batch_has_no_distances():
    means, covariances = torch.zeros(0, 2), torch.zeros(0, 2, 2)
    assert frechet_distance(means, covariances, means, covariances).shape == (0,)
    found = frechet_distance(means, covariances, means, covariances, bounds=True)
    assert [end.shape for end in found] == [(0,)] * 3
