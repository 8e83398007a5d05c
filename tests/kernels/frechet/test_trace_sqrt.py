"""Tr((AB)^(1/2)) for difficult pairs, scales, shapes and dtypes: as accurate as promised and as reported."""

import math

import mpmath
import pytest
import torch

from kernels.covariances import SPECTRA, covariance, mpmath_truth, truth
from kernels.frechet.pairs import PATHS, D, exact_trace, pair
from mir_kernels.ops.frechet import certificate, iterated, launch, trace_sqrt_product, trace_sqrt_report
from mir_kernels.ops.frechet.cross_factor import cross_factor
from mir_kernels.ops.frechet.report import TOLERANCE
from mir_kernels.ops.sqrtm.launch import polished_polar

pytestmark = pytest.mark.usefixtures("warnings_are_failures")

# A root amplifies the rounding of zero eigenvalues, and the reported error includes this.
SINGULAR = {"rank d/4": 2e-7}


@pytest.mark.parametrize("kind", SPECTRA)
@pytest.mark.parametrize(("backend", "precision", "promise"), PATHS)
def test_trace_is_as_accurate_as_promised_on_hard_pairs(kind, backend, precision, promise):
    a, b = pair(kind)
    report = trace_sqrt_report(a, b, precision=precision, backend=backend)
    expected = truth(a, b)
    assert torch.isfinite(report.value)
    assert (report.value - expected).abs() <= promise * expected
    assert report.error <= max(promise, SINGULAR.get(kind, 0.0))


@pytest.mark.parametrize("kind", [*SPECTRA, "a direction at 1e-13"])
@pytest.mark.parametrize(("backend", "precision"), [("linalg", "float64"), ("eager", "float64"), ("eager", "float32")])
def test_the_reported_error_is_no_smaller_than_the_error(kind, backend, precision):
    """Against 45 digits, which resolve what float64 rounds away."""
    if kind in SPECTRA:
        a, b = pair(kind, 10)
        exact = exact_trace(kind)
    else:
        a = torch.eye(12, dtype=torch.float64)
        b = 1e-13 * a + 1
        exact = mpmath_truth(a, b)
    report = trace_sqrt_report(a, b, precision=precision, backend=backend)
    assert abs(mpmath.mpf(report.value.item()) - exact) <= (report.error.item() + 1e-15) * exact


def test_an_error_beyond_the_precision_is_said():
    eye = torch.eye(24, dtype=torch.float64)
    with pytest.warns(
        RuntimeWarning, match=r"reached a relative error of 1\.\de-06, precision='float64' requires 1e-08"
    ):
        trace_sqrt_product(eye, 1e-13 * eye + 1, precision="float64")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", ["linalg", "eager"])
def test_covariances_of_few_samples_in_a_low_precision_are_taken(dtype, backend):
    """Rounding to their dtype makes them indefinite, and the reported error is the root of that rounding."""
    x, y = torch.randn(2, 10, 30, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    a, b = torch.cov(x.T), torch.cov(y.T)
    report = trace_sqrt_report(a.to(dtype), b.to(dtype), backend=backend)
    exact = trace_sqrt_product(a, b)
    assert (report.value - exact).abs() <= report.error * exact
    assert report.error <= 4 * torch.finfo(dtype).eps ** 0.5


@pytest.mark.parametrize("kind", SPECTRA)
@pytest.mark.parametrize(("backend", "precision", "promise"), PATHS)
def test_trace_of_a_matrix_with_itself_is_its_trace(kind, backend, precision, promise):
    a = covariance(kind, D, 1)
    value = trace_sqrt_report(a, a, precision=precision, backend=backend).value
    assert (value - a.trace()).abs() <= promise * a.trace()


@pytest.mark.parametrize("scale_a", [1e-300, 1e-12, 1.0, 1e12, 1e300])
@pytest.mark.parametrize("scale_b", [1e-12, 1e12])
@pytest.mark.parametrize("backend", ["linalg", "eager"])
def test_scaling_a_matrix_scales_the_trace_by_its_root(scale_a, scale_b, backend):
    a, b = pair("i^-1", 40)
    value = trace_sqrt_product(scale_a * a, scale_b * b, backend=backend)
    expected = truth(a, b) * math.sqrt(scale_a) * math.sqrt(scale_b)
    assert (value / expected - 1).abs() <= (1e-6 if backend == "eager" else 1e-10)


@pytest.mark.parametrize("kind", SPECTRA)
def test_permuted_coordinates_give_the_same_trace(kind):
    a, b = pair(kind)
    order = torch.randperm(D, generator=torch.Generator().manual_seed(3))
    value = trace_sqrt_product(a, b)
    permuted = trace_sqrt_product(a[order][:, order], b[order][:, order])
    assert (value - permuted).abs() <= 1e-9 * value


@pytest.mark.parametrize("kind", [k for k in SPECTRA if k not in ("rank d/4", "zero columns", "zero", "block")])
@pytest.mark.parametrize("other", ["i^-1", "flat", "rank d/4", "diagonal", "condition 1e12"])
def test_pairs_of_different_kinds(kind, other):
    a, b = covariance(kind, D, 0), covariance(other, D, 7)
    assert (trace_sqrt_product(a, b) - truth(a, b)).abs() <= 1e-8 * truth(a, b)


@pytest.mark.parametrize("shape", [(0,), (3,), (2, 1), (2, 0), ()])
@pytest.mark.parametrize("backend", ["linalg", "eager", "reference"])
@pytest.mark.parametrize("d", [1, 2, 5])
def test_batches_of_every_shape_give_what_each_matrix_gives(shape, backend, d):
    generator = torch.Generator().manual_seed(d)
    x, y = (torch.randn(*shape, d, d, generator=generator, dtype=torch.float64) for _ in range(2))
    a, b = x @ x.mT, y @ y.mT
    found = trace_sqrt_product(a, b, backend=backend, bounds=True)
    assert found.value.shape == found.lower.shape == found.upper.shape == shape
    assert found.value.dtype == torch.float64
    for i in range(a[..., 0, 0].numel()):
        one = truth(a.reshape(-1, d, d)[i], b.reshape(-1, d, d)[i])
        assert (found.value.reshape(-1)[i] - one).abs() <= 1e-6 * one
    plain = trace_sqrt_product(a, b, backend=backend)
    assert torch.allclose(plain, found.value, rtol=1e-6)


def test_a_batch_is_cut_to_bound_its_memory(monkeypatch):
    a = torch.stack([covariance("i^-1", 12, s) for s in range(7)])
    b = a.roll(1, 0)
    whole = trace_sqrt_product(a, b, bounds=True)
    monkeypatch.setattr(launch, "CHUNK", 2 * 144)
    for one, other in zip(whole, trace_sqrt_product(a, b, bounds=True), strict=True):
        assert torch.allclose(one, other, rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_every_floating_dtype_is_taken(dtype):
    a, b = (torch.diag(torch.tensor([4.0, 1.0, 0.25])).to(dtype) for _ in range(2))
    assert trace_sqrt_product(a, b).item() == pytest.approx(5.25, rel=1e-12)


def test_inputs_stay_unchanged_and_may_be_strided():
    big = torch.full((60, 60), float("nan"), dtype=torch.float64)
    a, b = pair("i^-1", 30)
    big[::2, ::2] = a
    view = big[::2, ::2]
    before = (view.clone(), b.clone())
    value = trace_sqrt_product(view, b.T, bounds=True).value
    assert torch.equal(view, before[0])
    assert torch.equal(b, before[1])
    assert torch.equal(value, trace_sqrt_product(a, b, bounds=True).value)


def test_report_says_which_path_ran():
    assert trace_sqrt_report(*pair("i^-1")).path == ("cholesky+eigvalsh",)
    assert trace_sqrt_report(*pair("one direction 1e6")).path == ("cholesky+svdvals",)
    assert trace_sqrt_report(*pair("rank d/4")).path == ("eigh+svdvals",)
    for kind, path in (("i^-2", "polar[float16]"), ("one coordinate 1e6", "polar[float16]+polar[float32]")):
        iterated = trace_sqrt_report(*pair(kind, 256), precision="bfloat16", backend="eager")
        assert iterated.path == (f"cholesky+{path}",)


@pytest.mark.parametrize("kind", ["i^-1", "i^-2", "condition 1e12", "rank d/4", "block"])
def test_float16_certifies_what_bfloat16_cannot(kind):
    """Equally fast on a tensor core, and eight times as accurate for values between 0 and 2."""
    n = cross_factor(*(x[None] for x in pair(kind, 256)), 1.0).n
    gaps = {}
    for precision in ("float16", "bfloat16"):
        u, norm = polished_polar(n, precision, "eager")
        gaps[precision] = iterated._gap(n, certificate.polar_witness(n, u, norm, TOLERANCE["bfloat16"])).item()
    assert gaps["float16"] <= 0.5 * TOLERANCE["bfloat16"]
    assert gaps["float16"] <= 0.2 * gaps["bfloat16"]


def test_a_precision_that_is_missed_is_said(monkeypatch):
    monkeypatch.setitem(TOLERANCE, "float64", 1e-30)
    with pytest.warns(RuntimeWarning, match=r"reached a relative error of .*, precision='float64' requires 1e-30"):
        trace_sqrt_product(*pair("i^-1"), precision="float64", backend="eager")


@pytest.mark.parametrize("bounds", [False, True])
def test_compiles_without_a_graph_break(bounds):
    a, b = pair("i^-1", 12)
    compiled = torch.compile(lambda x, y: trace_sqrt_product(x, y, bounds=bounds), fullgraph=True, backend="aot_eager")
    found, expected = compiled(a, b), trace_sqrt_product(a, b, bounds=bounds)
    for one, other in zip(found if bounds else [found], expected if bounds else [expected], strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("bounds", [False, True])
def test_operator_passes_opcheck(bounds):
    a = torch.stack([covariance("i^-1", 6, s) for s in range(2)])
    result = torch.library.opcheck(
        torch.ops.mir_kernels.trace_sqrt_product.default, (a, a.roll(1, 0), "float32", bounds, "linalg")
    )
    assert set(result.values()) == {"SUCCESS"}
