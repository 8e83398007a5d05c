"""The squared form C^T A C in blocks, its measured rounding, and the sum of roots from a band."""

import math

import pytest
import torch
from covariances import SPECTRA, covariance, truth

from mir_kernels import _checks
from mir_kernels.frechet import trace_sqrt_product, trace_sqrt_report
from mir_kernels.sqrtm import band, factor, squared

NATIVE = pytest.mark.skipif(band.MISSING is not None, reason=f"{band.MISSING}")
D = 97


@pytest.fixture
def small_blocks(monkeypatch):
    """The paths of large matrices for small ones: several blocks and panels, the last ones shorter."""
    monkeypatch.setattr(squared, "BLOCK", 16)
    monkeypatch.setattr(squared, "_BLOCKED", 1)
    monkeypatch.setattr(squared, "_BANDED", 1)
    monkeypatch.setattr(band, "WIDTH", 6)


def matrix(values: torch.Tensor, seed: int = 0) -> torch.Tensor:
    """A random rotation of a diagonal matrix."""
    d = values.shape[0]
    q, _ = torch.linalg.qr(torch.randn(d, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64))
    m = q * values @ q.T
    return (m + m.T) / 2


def eigenvalues(band_matrix: torch.Tensor) -> torch.Tensor:
    d, width = band_matrix.shape[0], band_matrix.shape[1] - 1
    t = torch.zeros(d, d, dtype=torch.float64)
    for r in range(width + 1):
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


@pytest.mark.parametrize("d", [1, 2, 3, 63, 64, 65, 66, 128, 129, 193, 300])
@pytest.mark.parametrize("kind", ["random", "clustered", "repeated", "identity", "diagonal", "banded", "tridiagonal"])
def test_the_band_has_the_eigenvalues_of_the_matrix(kind, d):
    m = plain(kind, d)
    expected = torch.linalg.eigvalsh(m)
    # Nothing above the blocks on the diagonal may count.
    blocks = torch.arange(d) // 128
    m[blocks[:, None] < blocks] = float("nan")
    assert (eigenvalues(band.reduce_(m, 128)) - expected).abs().amax() <= 1e-14 * math.sqrt(d) * expected[-1]


@pytest.mark.parametrize("rank", [0, 1, 40])
def test_a_singular_matrix_keeps_its_eigenvalues_in_the_band(rank):
    values = torch.zeros(150, dtype=torch.float64)
    values[:rank] = 1 + torch.rand(rank, dtype=torch.float64)
    found = eigenvalues(band.reduce_(matrix(values), 64))
    assert (found - values.sort().values).abs().amax() <= 1e-13


@NATIVE
@pytest.mark.parametrize("d", [1, 2, 65, 129, 200])
@pytest.mark.parametrize("scale", [1e-150, 1.0, 1e150])
@pytest.mark.parametrize("power", [0.0, 1.0, 3.0])
def test_sums_over_eigenvalues_without_eigenvalues(power, scale, d):
    values = torch.arange(1, d + 1, dtype=torch.float64) ** -power
    found = band.root_sums_(matrix(values) * scale, 64)
    assert found.total.item() == pytest.approx(values.sqrt().sum().item() * math.sqrt(scale), rel=1e-10)
    assert found.inverse.item() == pytest.approx((1 / values).sum().item() / scale, rel=1e-6)
    assert found.norm.item() == pytest.approx(values.norm().item() * scale, rel=1e-12)


@NATIVE
@pytest.mark.parametrize("lowest", [0.0, -1e-3])
def test_sums_of_a_matrix_that_is_not_definite_are_not_numbers(lowest):
    values = torch.ones(100, dtype=torch.float64)
    values[:3] = lowest
    found = band.root_sums_(torch.diag(values), 64)
    assert found.total.isnan()
    assert found.inverse == torch.inf


@pytest.mark.parametrize("ratio", [1.0, 1.001, 2.0, 1e3, 1e6, 1e9, 1e13])
@pytest.mark.parametrize("low", [1e-200, 1.0, 1e100])
def test_nodes_give_roots_to_the_error_they_state(low, ratio):
    x = low * torch.logspace(0, math.log10(ratio), 5000, dtype=torch.float64)
    shifts, weights = band.nodes(low, low * ratio)
    assert len(shifts) % 8 == 0
    roots = (weights * (x[:, None] / (x[:, None] + shifts))).sum(-1)
    assert ((roots / x.sqrt() - 1).abs() <= band.QUADRATURE).all()


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


@pytest.mark.parametrize("kind", ["i^-1", "i^-3", "one direction 1e6", "flat", "all positive"])
def test_measured_rounding_is_that_of_exact_products(kind, small_blocks):
    """Against products whose every term and sum is exact, in Python's fractions of integers."""
    d = 24
    a = covariance(kind, d, 0) if kind != "all positive" else torch.ones(d, d).double() + 0.1 * torch.eye(d)
    b = covariance("i^-1", d, 100)
    form = squared.squared(a[None], b[None])
    h, scale, _ = factor.equilibrate(b)
    assert factor.cholesky_(h, squared.BLOCK)
    c = h.tril() * scale[:, None] * torch.exp2(-factor.half_exponent(a.diagonal().amax()))
    exact = exact_squared(a, c)
    error = (form.m[0].tril() - exact.tril()).norm() * math.sqrt(2)
    assert error <= 3 * form.rounding[0]
    assert form.rounding[0] <= 1e-14 * a.norm() * c.norm() ** 2


def exact_squared(a: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    from fractions import Fraction

    def exact(x: torch.Tensor) -> list[list[Fraction]]:
        return [[Fraction(v) for v in row] for row in x.tolist()]

    def product(x, y):
        columns = list(zip(*y, strict=True))
        return [[sum(p * q for p, q in zip(row, column, strict=True)) for column in columns] for row in x]

    m = product(exact(c.T), product(exact(a), exact(c)))
    return torch.tensor([[float(v) for v in row] for row in m], dtype=torch.float64)


@pytest.mark.parametrize("kind", SPECTRA)
@pytest.mark.parametrize("other", ["i^-1", "rank d/4", "one direction 1e6", None])
def test_the_paths_of_large_matrices_keep_the_promise(kind, other, small_blocks):
    a, b = covariance(kind, D, 0), covariance(other or kind, D, 100)
    report = trace_sqrt_report(a, b, precision="float64")
    expected = truth(a, b)
    assert (report.value - expected).abs() <= 1e-8 * expected
    assert (report.value - expected).abs() <= (report.error + 1e-10) * expected
    order = torch.randperm(D, generator=torch.Generator().manual_seed(3))
    permuted = trace_sqrt_product(a[order][:, order], b[order][:, order])
    assert (report.value - permuted).abs() <= 1e-9 * expected


@pytest.mark.parametrize("scale_a", [1e-300, 1e-12, 1e12, 1e300])
@pytest.mark.parametrize("scale_b", [1e-300, 1e12])
def test_scales_do_not_matter_to_the_paths_of_large_matrices(scale_a, scale_b, small_blocks):
    a, b = covariance("i^-1", D, 0), covariance("i^-1", D, 100)
    report = trace_sqrt_report(scale_a * a, scale_b * b)
    assert report.path == trace_sqrt_report(a, b).path
    assert (report.value / (truth(a, b) * math.sqrt(scale_a) * math.sqrt(scale_b)) - 1).abs() <= 1e-10


@NATIVE
def test_reports_name_the_band(small_blocks):
    assert trace_sqrt_report(covariance("i^-1", D, 0), covariance("i^-1", D, 1)).path == ("cholesky+band",)


def test_without_the_native_module_eigenvalues_are_taken_and_reported(small_blocks, monkeypatch):
    monkeypatch.setattr(band, "MISSING", "no compiler")
    a, b = covariance("i^-1", D, 0), covariance("i^-1", D, 100)
    report = trace_sqrt_report(a, b)
    assert report.path == ("cholesky+eigvalsh",)
    assert (report.value / truth(a, b) - 1).abs() <= 1e-10


def test_a_batch_takes_the_path_of_large_matrices_one_by_one(small_blocks):
    a = torch.stack([covariance(kind, D, 0) for kind in ("i^-1", "rank d/4", "i^-2")])
    b = torch.stack([covariance("i^-1", D, s) for s in range(3)])
    together = trace_sqrt_report(a, b)
    for i in range(3):
        alone = trace_sqrt_report(a[i], b[i])
        assert together.path[i : i + 1] == alone.path
        assert together.value[i] == alone.value


@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize("which", ["a", "b"])
def test_an_indefinite_matrix_is_refused_though_only_the_other_is_factored(which, large, request):
    """Its variances are positive, and the other matrix hardly has weight where it is negative."""
    if large:
        request.getfixturevalue("small_blocks")
    values = torch.logspace(0, -6, D, dtype=torch.float64)
    q, _ = torch.linalg.qr(torch.randn(D, D, generator=torch.Generator().manual_seed(5), dtype=torch.float64))
    good = q * values @ q.T
    values[-1] = -1e-3
    bad = q * values @ q.T
    good, bad = (good + good.T) / 2, (bad + bad.T) / 2
    assert bad.diagonal().amin() > 0
    pair = (bad, good) if which == "a" else (good, bad)
    with pytest.raises(ValueError, match=f"{which}: takes positive semi-definite matrices, got one with an eigenvalue"):
        trace_sqrt_product(*pair)


@pytest.mark.parametrize("d", [1, 5, 128, 129, 300])
def test_a_mirrored_matrix_is_told_from_one_with_a_single_entry_off(d):
    a = covariance("i^-1", d, 0)
    assert _checks.mirrored(a)
    assert _checks.mirrored(torch.stack((a, a)))
    if d > 1:
        for i, j in ((0, d - 1), (d - 1, 0), (d - 1, d - 2), (d // 2, d // 2 - 1)):
            off = torch.stack((a, a))
            off[1, i, j] += 1e-9
            assert not _checks.mirrored(off)
