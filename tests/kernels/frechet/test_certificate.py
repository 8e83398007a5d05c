"""The lemmas behind the proved bounds, each checked against exact rational arithmetic."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from torch import Tensor

from kernels.covariances import covariance
from mir_kernels.ops.frechet import certificate
from mir_kernels.ops.sqrtm import factor


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


@pytest.mark.parametrize("kind", ["i^-1", "i^-3", "rank d/4", "zero", "one direction 1e6"])
def test_both_spectral_witnesses_are_orthonormal(kind):
    """Cholesky of the Gram matrix if the columns are independent, otherwise Householder QR."""
    n = covariance(kind, 24, 3)
    u = certificate.spectral_witness(n).u
    assert torch.allclose(u.mT @ u, torch.eye(24, dtype=n.dtype), rtol=0, atol=1e-13)
