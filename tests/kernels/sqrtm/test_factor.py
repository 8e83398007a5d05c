"""Cholesky in blocks against LAPACK's, and where it breaks."""

import pytest
import torch

from kernels.covariances import covariance
from mir_kernels.ops.sqrtm import factor


@pytest.mark.parametrize("d", [1, 15, 16, 17, 97])
def test_cholesky_in_blocks_is_that_of_lapack(d):
    h = factor.equilibrate(covariance("i^-1", d, 0)).h
    expected = torch.linalg.cholesky(h)
    found = h.clone()
    assert factor.cholesky_(found, 16)
    assert (found.tril() - expected).abs().amax() <= 1e-13


@pytest.mark.parametrize("kind", ["rank d/4", "indefinite", "indefinite at the end"])
def test_cholesky_in_blocks_says_where_it_breaks(kind):
    h = covariance("i^-1", 97, 0) if kind != "rank d/4" else covariance(kind, 97, 0)
    if kind != "rank d/4":
        i = 3 if kind == "indefinite" else 95
        h[i, i + 1] = h[i + 1, i] = 2 * (h[i, i] * h[i + 1, i + 1]).sqrt()
    assert not factor.cholesky_(factor.equilibrate(h).h, 16)
