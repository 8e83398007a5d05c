"""The standard form C^T A C, its measured rounding, and the paths of large matrices through it."""

import math

import pytest
import torch

from kernels.covariances import SPECTRA, covariance, truth
from mir_kernels.ops.frechet import native, standard_form, trace_sqrt_product, trace_sqrt_report

NATIVE = pytest.mark.skipif(native.MISSING is not None, reason=f"{native.MISSING}")
D = 97


@pytest.fixture
def banded(monkeypatch):
    """Send small matrices through the path of large ones, if the native module is available."""
    monkeypatch.setattr(standard_form, "BANDED", 1)


@pytest.fixture(params=[pytest.param("native", marks=NATIVE), "torch"])
def either(request, monkeypatch):
    """The compiled kernel, and its fallback if it is not built."""
    if request.param == "torch":
        monkeypatch.setattr(native, "MISSING", "no compiler")


def exactly_factored(d: int) -> tuple[torch.Tensor, torch.Tensor]:
    """B and its Cholesky factor, of integers so small that no step of the factorization rounds."""
    generator = torch.Generator().manual_seed(0)
    c = torch.randint(-3, 4, (d, d), generator=generator).double().tril(-1)
    c.diagonal().copy_(2.0 ** torch.randint(0, 3, (d,), generator=generator))
    return c @ c.T, c


@pytest.mark.parametrize("d", [1, 3, 24, 49])
@pytest.mark.parametrize("kind", ["i^-1", "i^-3", "one direction 1e6", "flat", "all positive"])
def test_measured_rounding_is_that_of_exact_products(kind, d, either):
    """Against products with exact terms and sums, in Python's fractions."""
    a = covariance(kind, d, 0) if kind != "all positive" else torch.ones(d, d).double() + 0.1 * torch.eye(d)
    b, c = exactly_factored(d)
    form = standard_form.reduce(a[None], b[None])
    exact = exact_standard_form(a, c)
    unit = 4.0 ** form.exponent.item()
    error, estimate = (form.m[0, :d, :d] * unit - exact).norm(), form.rounding[0] * unit
    assert error <= 4 * estimate + 1e-16 * exact.norm()
    assert estimate <= 1e-14 * a.norm() * c.norm() ** 2
    assert not form.m[0, d:].any()
    assert not form.m[0, :, d:].any()


@NATIVE
@pytest.mark.parametrize("d", [1, 5, 12, 24, 95, 96, 97, 200, 300])
@pytest.mark.parametrize("threads", [1, 3])
def test_the_compiled_form_is_that_of_torch(d, threads, monkeypatch):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        a = torch.stack([covariance("i^-1", d, s) for s in range(5)])
        b = torch.stack([covariance("flat", d, 10 + s) for s in range(5)])
        found = standard_form.reduce(a, b)
    finally:
        torch.set_num_threads(before)
    monkeypatch.setattr(native, "MISSING", "no compiler")
    expected = standard_form.reduce(a, b)
    assert found.exponent.tolist() == expected.exponent.tolist()
    size = torch.linalg.vector_norm(expected.m, dim=(-2, -1))
    assert (torch.linalg.vector_norm(found.m[:, :d, :d] - expected.m, dim=(-2, -1)) <= 1e-13 * size).all()
    assert torch.equal(found.m, found.m.mT)


def exact_standard_form(a: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
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
def test_the_paths_of_large_matrices_keep_the_promise(kind, other, banded):
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
def test_scales_do_not_matter_to_the_paths_of_large_matrices(scale_a, scale_b, banded):
    a, b = covariance("i^-1", D, 0), covariance("i^-1", D, 100)
    report = trace_sqrt_report(scale_a * a, scale_b * b)
    assert report.path == trace_sqrt_report(a, b).path
    assert (report.value / (truth(a, b) * math.sqrt(scale_a) * math.sqrt(scale_b)) - 1).abs() <= 1e-10


@NATIVE
def test_reports_name_the_band(banded):
    assert trace_sqrt_report(covariance("i^-1", D, 0), covariance("i^-1", D, 1)).path == ("cholesky+band",)


def test_without_the_native_module_eigenvalues_are_taken_and_reported(banded, monkeypatch):
    monkeypatch.setattr(native, "MISSING", "no compiler")
    a, b = covariance("i^-1", D, 0), covariance("i^-1", D, 100)
    report = trace_sqrt_report(a, b)
    assert report.path == ("cholesky+eigvalsh",)
    assert (report.value / truth(a, b) - 1).abs() <= 1e-10


def test_a_batch_takes_the_path_of_large_matrices_one_by_one(banded):
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
    """Its variances are positive, and the other matrix has little weight in its negative direction."""
    if large:
        request.getfixturevalue("banded")
    values = torch.logspace(0, -6, D, dtype=torch.float64)
    q, _ = torch.linalg.qr(torch.randn(D, D, generator=torch.Generator().manual_seed(5), dtype=torch.float64))
    good = q * values @ q.T
    values[-1] = -1e-3
    bad = q * values @ q.T
    good, bad = (good + good.T) / 2, (bad + bad.T) / 2
    assert bad.diagonal().amin() > 0
    pair = (bad, good) if which == "a" else (good, bad)
    with pytest.raises(
        ValueError, match=f"{which}: expected positive semi-definite matrices, got one with an eigenvalue"
    ):
        trace_sqrt_product(*pair)


@NATIVE
@pytest.mark.parametrize("d", [1, 12, 95, 97, 200, 300])
def test_pivots_and_norms_are_those_of_the_factors_of_the_shifted_matrix(d):
    m = covariance("i^-1", d, 0)
    padded = torch.zeros(-(-d // 48) * 48, -(-d // 48) * 48, dtype=torch.float64)
    padded[:d, :d] = m
    shifts = torch.tensor([0.0, 1e-3, 10.0], dtype=torch.float64)
    pivots, size, spectral = native.shifted_factors(padded, d, shifts)
    for i, s in enumerate(shifts.tolist()):
        lower = torch.linalg.cholesky(m + s * torch.eye(d, dtype=torch.float64))
        assert torch.allclose(pivots[i], lower.diagonal(), rtol=1e-9)
        assert size[i].item() == pytest.approx(lower.norm().item(), rel=1e-9)
        assert spectral[i] * (1 + 1e-9) >= torch.linalg.matrix_norm(lower.abs(), 2)
    assert not native.shifted_factors(padded, d, shifts - 20)[1].isfinite().any()
