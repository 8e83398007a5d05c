"""Proved bounds of Tr((AB)^(1/2)): they hold near singularity and at the ends of the range, and are tight."""

import math
import warnings

import mpmath
import pytest
import torch

from kernels.covariances import SPECTRA, covariance, mpmath_truth
from kernels.frechet.pairs import exact_trace, pair
from mir_kernels.ops.frechet import certificate, trace_sqrt_product

pytestmark = pytest.mark.usefixtures("warnings_are_failures")


@pytest.mark.parametrize("kind", SPECTRA)
@pytest.mark.parametrize(("backend", "precision"), [("linalg", "float32"), ("eager", "float32"), ("eager", "bfloat16")])
def test_bounds_hold_the_truth_in_many_digits(kind, backend, precision):
    a, b = pair(kind, 10)
    bounds = trace_sqrt_product(a, b, bounds=True, backend=backend, precision=precision)
    exact = exact_trace(kind)
    assert mpmath.mpf(bounds.lower.item()) <= exact <= mpmath.mpf(bounds.upper.item())
    assert bounds.lower <= bounds.value <= bounds.upper


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("smallest", [0.0, 1e-20, 1e-17, 1e-16, 1e-15, 1e-14, 1e-12, -1e-17])
def test_bounds_hold_the_truth_next_to_singular(seed, smallest):
    """Where Cholesky cannot tell definite from indefinite matrices, the bounds must not rely on it."""
    generator = torch.Generator().manual_seed(seed)
    d = 6
    q, _ = torch.linalg.qr(torch.randn(d, d, generator=generator, dtype=torch.float64))
    values = torch.tensor([1.0, 0.5, 1e-3, 1e-7, smallest, smallest], dtype=torch.float64)
    a = q * values @ q.T
    a = (a + a.T) / 2
    b = covariance("i^-1", d, seed)
    for x, y in ((a, b), (b, a), (a, a)):
        bounds = trace_sqrt_product(x, y, bounds=True)
        assert mpmath.mpf(bounds.lower.item()) <= mpmath_truth(x, y) <= mpmath.mpf(bounds.upper.item())


def test_bounds_of_a_matrix_that_rounding_left_indefinite_hold_whatever_its_scales():
    """The positive part is that of the matrix with equally scaled coordinates; see the README, "Bounds"."""
    for scale, dtype in ((2.0**18, torch.float64), (2.0**12, torch.float32)):
        a = torch.tensor(
            [[1, 1, 0.5 / scale], [1, 1, -0.5 / scale], [0.5 / scale, -0.5 / scale, 1]], dtype=torch.float64
        )
        rows = torch.tensor([scale, scale, 1.0], dtype=torch.float64)
        a = (rows[:, None] * a * rows).to(dtype)
        b = torch.diag(torch.tensor([0.0, 0.0, 1.0])).to(dtype)
        for backend in ("linalg", "eager"):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", RuntimeWarning)  # the value is uncertain, with a warning
                lower, upper = trace_sqrt_product(a, b, bounds=True, backend=backend)[1:]
            assert mpmath.mpf(lower.item()) <= mpmath_truth(a, b) <= mpmath.mpf(upper.item())


RANGE_ENDS = {
    "overflow": (torch.full((2,), 1.5e308, dtype=torch.float64), torch.full((2,), 1.5e308, dtype=torch.float64)),
    "almost": (torch.tensor([1e308, 0.0], dtype=torch.float64), torch.tensor([1e308, 1.0], dtype=torch.float64)),
    "subnormal": (
        torch.tensor([3e-320, 1e-321], dtype=torch.float64),
        torch.tensor([5e-320, 7e-322], dtype=torch.float64),
    ),
    "opposite": (
        torch.tensor([1e200, 1e-200], dtype=torch.float64),
        torch.tensor([1e-200, 1e200], dtype=torch.float64),
    ),
}


@pytest.mark.parametrize("ends", RANGE_ENDS.values(), ids=RANGE_ENDS)
@pytest.mark.parametrize("backend", ["linalg", "eager"])
def test_bounds_hold_at_the_ends_of_the_range(ends, backend):
    a, b = (torch.diag(end) for end in ends)
    value, lower, upper = trace_sqrt_product(a, b, bounds=True, backend=backend)
    exact = mpmath.fsum(
        mpmath.sqrt(mpmath.mpf(p) * mpmath.mpf(q))
        for p, q in zip(a.diagonal().tolist(), b.diagonal().tolist(), strict=True)
    )
    assert mpmath.mpf(lower.item()) <= exact
    assert upper == math.inf or exact <= mpmath.mpf(upper.item())
    assert lower <= value <= upper
    assert value == pytest.approx(float(exact), rel=1e-12, abs=1e-321)


@pytest.mark.parametrize(
    "kind", ["i^-0.5", "i^-1", "i^-2", "i^-3", "flat", "diagonal", "one coordinate 1e6", "identity"]
)
@pytest.mark.parametrize("backend", ["linalg", "eager"])
def test_bounds_are_close(kind, backend):
    value, lower, upper = trace_sqrt_product(*pair(kind), bounds=True, backend=backend)
    assert (upper - lower) <= 1e-6 * value


@pytest.mark.parametrize("d", [1, 2, 3, 5, 8, 12, 40])
def test_bounds_of_well_conditioned_pairs_are_a_few_roundings_apart(d):
    generator = torch.Generator().manual_seed(d)
    x, y = torch.randn(2, 4 * d, d, generator=generator, dtype=torch.float64)
    value, lower, upper = trace_sqrt_product(x.mT @ x, y.mT @ y, bounds=True)
    assert (upper - lower) <= 1e-14 * d**1.5 * value


@pytest.mark.parametrize("kind", ["i^-1", "i^-2", "rank d/4"])
def test_bounds_hold_where_products_are_cut_into_blocks(kind):
    a = covariance(kind, 600, 2)
    (lower,), (upper,) = certificate.trace_bounds(a[None], a[None], certificate.spectral_witness)
    exact = math.fsum(a.diagonal().tolist())  # (A A)^(1/2) = A
    assert lower <= exact <= upper
    assert upper - lower <= (1e-9 if kind != "rank d/4" else 1e-4) * exact


@pytest.mark.parametrize("kind", ["rank d/4", "condition 1e12", "one direction 1e6", "zero columns"])
def test_bounds_of_singular_pairs_are_as_close_as_the_root_of_rounding(kind):
    value, lower, upper = trace_sqrt_product(*pair(kind), bounds=True)
    assert (upper - lower) <= 2e-5 * value


@pytest.mark.parametrize("noise", [1e-8, 1e-7, 1e-6])
def test_bounds_are_close_where_two_coordinates_are_nearly_one(noise):
    """Cholesky factors of two neighbours of such a covariance may differ by a rotation of the trailing columns."""
    for seed in range(12):
        generator = torch.Generator().manual_seed(seed)
        x, y = (torch.randn(n, 6, generator=generator, dtype=torch.float64) for n in (15, 50))
        x[:, 1] = x[:, 0] + noise * x[:, 1]
        value, lower, upper = trace_sqrt_product(x.mT @ x, y.mT @ y, bounds=True)
        assert (upper - lower) <= 1e-6 * value
