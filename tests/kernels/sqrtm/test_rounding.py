"""Proofs about rounding: definiteness beyond an error, and the norm after the last step."""

import pytest
import torch

from kernels.covariances import covariance
from mir_kernels.ops.sqrtm import rounding
from tolerances import relative_error


@pytest.mark.parametrize("smallest", [-1e-3, -1e-12, 0.0, 1e-17])
def test_no_matrix_with_an_eigenvalue_below_the_error_passes(smallest):
    error = torch.tensor(1e-16, dtype=torch.float64)
    assert not rounding.at_least(torch.diag(torch.tensor([1.0, 0.5, smallest], dtype=torch.float64)), error)


def test_a_clearly_definite_matrix_passes_and_one_that_is_no_number_does_not():
    s = covariance("flat", 20, 1)
    assert rounding.at_least(s, torch.tensor(1e-6, dtype=s.dtype))
    assert not rounding.at_least(s, torch.tensor(torch.inf, dtype=s.dtype))
    assert not rounding.at_least(s * torch.nan, torch.tensor(0.0, dtype=s.dtype))


@pytest.mark.parametrize("largest", [0.0, 0.5, 1.0, 1.02, 1.6, 1.8, 3.0])
def test_the_last_step_proves_its_norm_without_finding_it(largest):
    """1 plus rounding for norms up to sqrt(3); above that, an explicit bound."""
    generator = torch.Generator().manual_seed(6)
    w, _ = torch.linalg.qr(torch.randn(2, 40, 30, generator=generator, dtype=torch.float64))
    v, _ = torch.linalg.qr(torch.randn(2, 30, 30, generator=generator, dtype=torch.float64))
    s = torch.linspace(0, 1, 30, dtype=torch.float64) * largest
    out, norm = rounding.contract(w * s @ v.mT)
    exact = torch.linalg.svdvals(out).amax(-1)
    assert (exact <= norm).all()
    assert relative_error(out, w * (s * (3 - s**2) / 2) @ v.mT) <= 1e-14
    assert (norm <= (1 + 1e-11 if largest < 3**0.5 else 2 * exact.amax() + 1e-9)).all()
