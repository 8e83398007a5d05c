"""The Frechet distance: zero for equal Gaussians, a closed form for diagonal ones, bounds around the exact value."""

import mpmath
import pytest
import torch

from kernels.covariances import SPECTRA, covariance, mpmath_truth
from kernels.frechet.pairs import D, pair
from mir_kernels.ops.frechet import frechet_distance
from mir_kernels.ops.frechet.report import TOLERANCE

pytestmark = pytest.mark.usefixtures("warnings_are_failures")


@pytest.mark.parametrize("kind", SPECTRA)
@pytest.mark.parametrize("precision", list(TOLERANCE))
@pytest.mark.parametrize("backend", ["linalg", "eager"])
def test_distance_of_equal_gaussians_is_zero(kind, precision, backend):
    a = covariance(kind, D, 2)
    mean = torch.linspace(-1, 1, D, dtype=torch.float64)
    distance = frechet_distance(mean, a, mean, a, precision=precision, backend=backend)
    assert 0 <= distance <= 1e-9 * 2 * a.trace()


@pytest.mark.parametrize("kind", SPECTRA)
def test_distance_bounds_hold_the_exact_distance(kind):
    a, b = pair(kind, 8)
    x, y = torch.linspace(0, 1, 8, dtype=torch.float64), torch.linspace(1, 0, 8, dtype=torch.float64) ** 2
    found = frechet_distance(x, a, y, b, bounds=True)
    with mpmath.workdps(50):
        means = mpmath.fsum((mpmath.mpf(p) - mpmath.mpf(q)) ** 2 for p, q in zip(x.tolist(), y.tolist(), strict=True))
        traces = mpmath.fsum(mpmath.mpf(v) for v in [*a.diagonal().tolist(), *b.diagonal().tolist()])
        exact = means + traces - 2 * mpmath_truth(a, b)
    assert mpmath.mpf(found.lower.item()) <= exact <= mpmath.mpf(found.upper.item())
    assert 0 <= found.lower <= found.value <= found.upper


def test_distance_of_diagonal_gaussians_has_its_closed_form():
    s, t = torch.tensor([4.0, 9.0, 0.0]), torch.tensor([1.0, 16.0, 1.0])
    distance = frechet_distance(torch.zeros(3), torch.diag(s), torch.ones(3), torch.diag(t))
    assert distance.item() == pytest.approx(3 + 1 + 1 + 1, rel=1e-12)
