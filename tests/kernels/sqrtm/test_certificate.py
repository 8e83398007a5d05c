"""The lemmas under the proved bounds, each held to exact rational arithmetic."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from covariances import covariance
from torch import Tensor

from mir_kernels.sqrtm import certificate, factor
from tolerances import relative_error


def exact_residual(h: Tensor, c: Tensor) -> list[list[Fraction]]:
    rows = [[Fraction(x) for x in row] for row in c.tolist()]
    return [
        [Fraction(h[i, j].item()) - sum(x * y for x, y in zip(rows[i], rows[j], strict=True)) for j in range(len(rows))]
        for i in range(len(rows))
    ]


@pytest.mark.parametrize("kind", ["i^-1", "i^-3", "flat", "zero columns"])
@pytest.mark.parametrize("triangular", [False, True])
def test_residuals_are_within_their_bound_of_the_exact_one(kind, triangular):
    h, _, _ = factor.equilibrate(covariance(kind, 9, 4))
    c = torch.linalg.cholesky(h + 1e-15 * torch.eye(9, dtype=h.dtype))
    residual, rounded = certificate._residual(h, c, triangular=triangular)
    exact = exact_residual(h, c)
    squares = sum((Fraction(residual[i, j].item()) - exact[i][j]) ** 2 for i in range(9) for j in range(9))
    assert squares <= Fraction(rounded.item()) ** 2
    assert rounded <= 1e-20


def test_a_factor_with_rows_beyond_the_lemma_proves_nothing():
    h = torch.eye(3, dtype=torch.float64) * 0.5
    _, rounded = certificate._residual(h, 1.5 * torch.eye(3, dtype=torch.float64), triangular=True)
    assert rounded == torch.inf


@pytest.mark.parametrize("smallest", [-1e-3, -1e-12, 0.0, 1e-17])
def test_no_matrix_with_an_eigenvalue_below_the_error_passes(smallest):
    error = torch.tensor(1e-16, dtype=torch.float64)
    assert not certificate.at_least(torch.diag(torch.tensor([1.0, 0.5, smallest], dtype=torch.float64)), error)


def test_a_clearly_definite_matrix_passes_and_one_that_is_no_number_does_not():
    s = covariance("flat", 20, 1)
    assert certificate.at_least(s, torch.tensor(1e-6, dtype=s.dtype))
    assert not certificate.at_least(s, torch.tensor(torch.inf, dtype=s.dtype))
    assert not certificate.at_least(s * torch.nan, torch.tensor(0.0, dtype=s.dtype))


@pytest.mark.parametrize("kind", ["i^-1", "i^-3", "rank d/4", "zero", "one direction 1e6"])
def test_both_spectral_witnesses_are_orthonormal(kind):
    """Cholesky of the Gram matrix where the columns are independent, Householder's QR where they are not."""
    n = covariance(kind, 24, 3)
    u = certificate.spectral_witness(n).u
    assert torch.allclose(u.mT @ u, torch.eye(24, dtype=n.dtype), rtol=0, atol=1e-13)


@pytest.mark.parametrize("largest", [0.0, 0.5, 1.0, 1.02, 1.6, 1.8, 3.0])
def test_the_last_step_proves_its_norm_without_finding_it(largest):
    """At most 1 and rounding up to sqrt(3); beyond, what it really is."""
    generator = torch.Generator().manual_seed(6)
    w, _ = torch.linalg.qr(torch.randn(2, 40, 30, generator=generator, dtype=torch.float64))
    v, _ = torch.linalg.qr(torch.randn(2, 30, 30, generator=generator, dtype=torch.float64))
    s = torch.linspace(0, 1, 30, dtype=torch.float64) * largest
    out, norm = certificate.contract(w * s @ v.mT)
    exact = torch.linalg.svdvals(out).amax(-1)
    assert (exact <= norm).all()
    assert relative_error(out, w * (s * (3 - s**2) / 2) @ v.mT) <= 1e-14
    assert (norm <= (1 + 1e-11 if largest < 3**0.5 else 2 * exact.amax() + 1e-9)).all()
