"""The sum of roots of eigenvalues from a band: the reduction, the traces of inverses, the nodes of the quadrature."""

import math

import pytest
import torch

from mir_kernels.ops.frechet import band_reduction, native

NATIVE = pytest.mark.skipif(native.MISSING is not None, reason=f"{native.MISSING}")


def padded(m: torch.Tensor) -> torch.Tensor:
    """m laid out for the reduction: zero-padded to whole panels, with a larger row stride."""
    d, width = m.shape[0], native.C.BAND_WIDTH
    rows = -(-d // width) * width
    out = torch.zeros(rows, rows + 8, dtype=torch.float64)
    out[:d, :d] = m
    return out[:, :rows]


def matrix(values: torch.Tensor, seed: int = 0) -> torch.Tensor:
    """A random rotation of a diagonal matrix."""
    d = values.shape[0]
    q, _ = torch.linalg.qr(torch.randn(d, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64))
    m = q * values @ q.T
    return (m + m.T) / 2


def eigenvalues(band_matrix: torch.Tensor) -> torch.Tensor:
    d, width = band_matrix.shape[0], band_matrix.shape[1] - 1
    t = torch.zeros(d, d, dtype=torch.float64)
    for r in range(min(width, d - 1) + 1):
        t.diagonal(-r).copy_(band_matrix[: d - r, r])
    return torch.linalg.eigvalsh(t)


def plain(kind: str, d: int) -> torch.Tensor:
    return {
        "random": lambda: matrix(torch.rand(d, dtype=torch.float64) + 0.1),
        "clustered": lambda: matrix(1 + 1e-10 * torch.arange(d, dtype=torch.float64)),
        "repeated": lambda: matrix((1.0 + torch.arange(d) % 3).double()),
        "identity": lambda: torch.eye(d, dtype=torch.float64),
        "diagonal": lambda: torch.diag(torch.arange(1, d + 1).double()),
        "banded": lambda: torch.eye(d, dtype=torch.float64) * 4 + torch.ones(d, d).triu(-2).tril(2),
        "tridiagonal": lambda: torch.eye(d, dtype=torch.float64) * 3 + torch.ones(d, d).triu(-1).tril(1),
    }[kind]()


@NATIVE
@pytest.mark.parametrize("d", [1, 2, 3, 47, 48, 49, 63, 64, 65, 66, 128, 129, 193, 300])
@pytest.mark.parametrize("kind", ["random", "clustered", "repeated", "identity", "diagonal", "banded", "tridiagonal"])
def test_the_band_has_the_eigenvalues_of_the_matrix(kind, d):
    m = plain(kind, d)
    expected = torch.linalg.eigvalsh(m)
    # Entries above the blocks on the diagonal must not be read.
    blocks = torch.arange(d) // native.C.BAND_WIDTH
    m[blocks[:, None] < blocks] = float("nan")
    assert (eigenvalues(native.band(padded(m), d)) - expected).abs().amax() <= 1e-14 * math.sqrt(d) * expected[-1]


@NATIVE
@pytest.mark.parametrize("rank", [0, 1, 40])
def test_a_singular_matrix_keeps_its_eigenvalues_in_the_band(rank):
    values = torch.zeros(150, dtype=torch.float64)
    values[:rank] = 1 + torch.rand(rank, dtype=torch.float64)
    found = eigenvalues(native.band(padded(matrix(values)), 150))
    assert (found - values.sort().values).abs().amax() <= 1e-13


@NATIVE
@pytest.mark.parametrize("d", [1, 2, 65, 129, 200])
@pytest.mark.parametrize("scale", [1e-150, 1.0, 1e150])
@pytest.mark.parametrize("power", [0.0, 1.0, 3.0])
def test_sums_over_eigenvalues_without_eigenvalues(power, scale, d):
    values = torch.arange(1, d + 1, dtype=torch.float64) ** -power
    found = band_reduction.root_sums_(padded(matrix(values) * scale), d)
    assert found.total == pytest.approx(values.sqrt().sum().item() * math.sqrt(scale), rel=1e-10)
    assert found.inverse == pytest.approx((1 / values).sum().item() / scale, rel=1e-6)
    assert found.norm == pytest.approx(values.norm().item() * scale, rel=1e-12)
    lowest = values.min().item() * scale
    assert lowest / d**0.125 * (1 - 1e-6) <= found.least <= lowest * (1 + 1e-6)


@NATIVE
@pytest.mark.parametrize("lowest", [0.0, -1e-3])
def test_sums_of_a_matrix_that_is_not_definite_are_not_numbers(lowest):
    values = torch.ones(100, dtype=torch.float64)
    values[:3] = lowest
    found = band_reduction.root_sums_(padded(torch.diag(values)), 100)
    assert math.isnan(found.total)
    assert found.inverse == math.inf
    assert found.least == 0


@pytest.mark.parametrize("error", [1e-2, 3e-4, 1.7e-7, 1.7e-9, 1e-11])
@pytest.mark.parametrize("lanes", [2, 8])
@pytest.mark.parametrize("ratio", [1.0, 1.001, 2.0, 1e3, 1e6, 1e9, 1e13])
@pytest.mark.parametrize("low", [1e-200, 1.0, 1e100])
def test_nodes_give_roots_to_the_error_they_state(low, ratio, lanes, error):
    x = low * torch.logspace(0, math.log10(ratio), 5000, dtype=torch.float64)
    shifts, weights = band_reduction.nodes(low, low * ratio, error, lanes)
    assert len(shifts) % lanes == 0
    roots = (weights * (x[:, None] / (x[:, None] + shifts))).sum(-1)
    assert ((roots / x.sqrt() - 1).abs() <= error).all()
