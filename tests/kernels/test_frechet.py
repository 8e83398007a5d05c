"""Tr((AB)^(1/2)) and the Frechet distance: accuracy on hard pairs, proved bounds, and refusals."""

import functools
import importlib.util
import math
import warnings
from pathlib import Path

import mpmath
import pytest
import torch

from mir_kernels import frechet
from mir_kernels.frechet import (
    TOLERANCE,
    frechet_distance,
    trace_sqrt_from_features,
    trace_sqrt_product,
    trace_sqrt_report,
)
from mir_kernels.sqrtm import certificate

_spec = importlib.util.spec_from_file_location("covariances", Path(__file__).parent / "sqrtm" / "covariances.py")
covariances = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(covariances)
SPECTRA, covariance, mpmath_truth, truth = (
    covariances.SPECTRA,
    covariances.covariance,
    covariances.mpmath_truth,
    covariances.truth,
)

D = 96
# Eigenvalues that are rounding may be zero or not, and a root says which: the report owns up to that.
SINGULAR = {"rank d/4": 2e-7}
# (backend, precision): the relative error that is promised. float64 singular values do not depend on the precision.
PATHS = [("linalg", "float32", 1e-8), *(("eager", precision, TOLERANCE[precision]) for precision in TOLERANCE)]


def pair(kind: str, d: int = D, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    return covariance(kind, d, seed), covariance(kind, d, seed + 100)


@functools.cache
def exact_trace(kind: str) -> mpmath.mpf:
    return mpmath_truth(*pair(kind, 10))


@pytest.fixture(autouse=True)
def warnings_are_failures():
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        yield


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
    """Against 45 digits, which know what float64 rounds away."""
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
        RuntimeWarning, match=r"reached a relative error of 1\.\de-06, precision='float64' asks for 1e-08"
    ):
        trace_sqrt_product(eye, 1e-13 * eye + 1, precision="float64")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", ["linalg", "eager"])
def test_covariances_of_few_samples_in_a_low_precision_are_taken(dtype, backend):
    """Rounding to their dtype leaves them indefinite, and the roots of what it leaves are said to be the error."""
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
    """Where Cholesky stops being able to tell definite from indefinite: the bounds must not take its word."""
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
    """The positive part is taken of the matrix with its coordinates scaled alike: see the README, "Bounds"."""
    for scale, dtype in ((2.0**18, torch.float64), (2.0**12, torch.float32)):
        a = torch.tensor(
            [[1, 1, 0.5 / scale], [1, 1, -0.5 / scale], [0.5 / scale, -0.5 / scale, 1]], dtype=torch.float64
        )
        rows = torch.tensor([scale, scale, 1.0], dtype=torch.float64)
        a = (rows[:, None] * a * rows).to(dtype)
        b = torch.diag(torch.tensor([0.0, 0.0, 1.0])).to(dtype)
        for backend in ("linalg", "eager"):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", RuntimeWarning)  # the value is uncertain, and says so
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
    lower, upper = trace_sqrt_product(a, a, bounds=True)[1:]
    exact = math.fsum(a.diagonal().tolist())  # (A A)^(1/2) = A
    assert lower <= exact <= upper
    assert upper - lower <= (1e-9 if kind != "rank d/4" else 1e-4) * exact


@pytest.mark.parametrize("kind", ["rank d/4", "condition 1e12", "one direction 1e6", "zero columns"])
def test_bounds_of_singular_pairs_are_as_close_as_the_root_of_rounding(kind):
    value, lower, upper = trace_sqrt_product(*pair(kind), bounds=True)
    assert (upper - lower) <= 2e-5 * value


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
    monkeypatch.setattr(frechet, "_CHUNK", 2 * 144)
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
    """As fast on a tensor core, and eight times finer where all values lie between 0 and 2."""
    n = frechet._factors(*(x[None] for x in pair(kind, 256)), 1.0).n
    gaps = {}
    for precision in ("float16", "bfloat16"):
        u, norm = frechet.sqrtm.polished_polar(n, precision, "eager")
        gaps[precision] = frechet._gap(n, certificate.polar_witness(n, u, norm, TOLERANCE["bfloat16"])).item()
    assert gaps["float16"] <= 0.5 * TOLERANCE["bfloat16"]
    assert gaps["float16"] <= 0.2 * gaps["bfloat16"]


def test_a_precision_that_is_missed_is_said(monkeypatch):
    monkeypatch.setitem(TOLERANCE, "float64", 1e-30)
    with pytest.warns(RuntimeWarning, match=r"reached a relative error of .*, precision='float64' asks for 1e-30"):
        trace_sqrt_product(*pair("i^-1"), precision="float64", backend="eager")


@pytest.mark.parametrize(
    ("n", "m", "d"), [(5, 9, 30), (9, 5, 30), (40, 9, 30), (9, 40, 30), (50, 70, 30), (30, 30, 30), (2, 2, 3)]
)
@pytest.mark.parametrize("bounds", [False, True])
@pytest.mark.parametrize("backend", ["linalg", "eager"])
def test_features_give_what_their_covariances_give(n, m, d, bounds, backend):
    generator = torch.Generator().manual_seed(n)
    x, y = (torch.randn(k, d, generator=generator, dtype=torch.float64) + 100 for k in (n, m))
    found = trace_sqrt_from_features(x, y, bounds=bounds, backend=backend)
    xc, yc = x - x.mean(0), y - y.mean(0)
    expected = torch.linalg.svdvals(xc @ yc.T).sum() / math.sqrt((n - 1) * (m - 1))
    value = found.value if bounds else found
    assert (value / expected - 1).abs() <= (1e-10 if backend == "linalg" else TOLERANCE["float32"])
    if bounds:
        assert found.lower <= expected * (1 + 1e-12)
        assert expected * (1 - 1e-12) <= found.upper
        assert found.upper - found.lower <= 1e-6 * expected


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_features_of_any_scale(scale):
    x, y = torch.randn(6, 20), torch.randn(8, 20)
    expected = trace_sqrt_from_features(x.double(), y.double())
    value = trace_sqrt_from_features(x * scale, y / scale)
    assert (value / expected - 1).abs() <= 1e-5


def test_features_with_massive_tokens_and_constant_columns():
    x, y = torch.randn(20, 64, dtype=torch.float64), torch.randn(30, 64, dtype=torch.float64)
    x[:, 5], y[:, 5] = 7.0, 7.0
    x[0] *= 1e3
    value = trace_sqrt_from_features(x, y, bounds=True)
    assert torch.isfinite(value.value)
    assert value.upper - value.lower <= 1e-8 * value.value


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


INDEFINITE = torch.tensor([[1, 0.9, -0.9], [0.9, 1, 0.9], [-0.9, 0.9, 1]], dtype=torch.float64)


def good() -> torch.Tensor:
    return torch.eye(3, dtype=torch.float64)


@pytest.mark.parametrize(
    ("a", "b", "error", "message"),
    [
        ([[1.0]], good(), TypeError, "a: takes a torch.Tensor, got list"),
        (good().long(), good(), TypeError, "a: takes a dtype of"),
        (good(), good()[:2], ValueError, "b: takes square matrices"),
        (good(), torch.eye(4, dtype=torch.float64), ValueError, r"b: takes shape \(3, 3\) as a has, got \(4, 4\)"),
        (good() * float("nan"), good(), ValueError, "a: takes finite values, got 9"),
        (good(), torch.diag(torch.tensor([1.0, 1.0, float("inf")])), ValueError, "b: takes finite values, got 1"),
        (good() + torch.eye(3).roll(1, 0), good(), ValueError, "a: takes symmetric matrices"),
        (good(), -good(), ValueError, "b: takes positive semi-definite matrices, got a diagonal entry -1"),
        (INDEFINITE, good(), ValueError, "a: takes positive semi-definite matrices, got one with an eigenvalue"),
        (good(), good() + 2 - 2 * good(), ValueError, "b: .* got one with an eigenvalue of -"),
        (
            good(),
            torch.tensor([[1.0, 1.0, 0], [1.0, 0, 0], [0, 0, 1.0]]),
            ValueError,
            "b: takes positive semi-definite",
        ),
    ],
)
@pytest.mark.parametrize("backend", ["linalg", "eager"])
def test_bad_matrices_are_refused_by_name(a, b, error, message, backend):
    with pytest.raises(error, match=message):
        trace_sqrt_product(a, b, backend=backend)


def test_bad_arguments_are_refused_by_name():
    a, mean = good(), torch.zeros(3)
    with pytest.raises(ValueError, match="precision: takes one of"):
        trace_sqrt_product(a, a, precision="half")
    with pytest.raises(ValueError, match="backend: trace_sqrt_product has no backend 'fast'"):
        trace_sqrt_product(a, a, backend="fast")
    with pytest.raises(ValueError, match=r"mean_y: takes shape \(3,\), got \(4,\)"):
        frechet_distance(mean, a, torch.zeros(4), a)
    with pytest.raises(ValueError, match="mean_x: takes finite values"):
        frechet_distance(mean / 0, a, mean, a)
    with pytest.raises(ValueError, match="cov_y: takes symmetric"):
        frechet_distance(mean, a, mean, a + torch.eye(3).roll(1, 0))
    with pytest.raises(ValueError, match=r"x: takes features \(n, d\) with n >= 2"):
        trace_sqrt_from_features(torch.zeros(1, 3), torch.zeros(4, 3))
    with pytest.raises(ValueError, match="y: takes 3 columns as x has, got 4"):
        trace_sqrt_from_features(torch.zeros(5, 3), torch.zeros(5, 4))
