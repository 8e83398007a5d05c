"""Bounds from log determinants: checked against 40 digits, and rejected where they cannot be proved."""

import itertools
import math

import mpmath
import pytest
import torch

from kernels.covariances import covariance, truth
from mir_kernels import trace_sqrt_product
from mir_kernels.ops.frechet import band_reduction, linalg, log_determinants, native, standard_form
from mir_kernels.ops.frechet.report import TOLERANCE

pytestmark = pytest.mark.skipif(native.MISSING is not None, reason=f"{native.MISSING}")
D = 48


@pytest.fixture(autouse=True)
def banded(monkeypatch):
    """Send small matrices through the path of large ones."""
    monkeypatch.setattr(standard_form, "BANDED", 1)


def exactly(a: torch.Tensor, b: torch.Tensor) -> mpmath.mpf:
    """Tr((AB)^(1/2)) to 40 digits."""
    with mpmath.workdps(40):
        x, y = (mpmath.matrix(m.tolist()) for m in (a, b))
        c = mpmath.cholesky(y)
        values = mpmath.eigsy(c.T * x * c, eigvals_only=True)
        return sum(mpmath.sqrt(v) for v in values)


@pytest.mark.parametrize("precision", ["bfloat16", "float32", "float64"])
@pytest.mark.parametrize("kind", ["flat", "i^-0.5", "i^-1", "i^-1.5"])
@pytest.mark.parametrize("scale", [1.0, 1e-200, 1e140])
def test_the_bounds_hold_the_truth_and_are_as_close_as_was_asked(kind, precision, scale):
    a, b = covariance(kind, D, 0) * scale, covariance("i^-1", D, 1)
    _, ((lower, upper),) = linalg.trace_with_bounds(a[None], b[None], precision, 1e-6)
    expected = exactly(a, b)
    assert float(lower) <= expected <= float(upper)
    assert float(upper) - float(lower) <= TOLERANCE[precision] * float(upper) * (1 + 1e-12)


@pytest.mark.parametrize("d", [1, 2, 11, 47, 97])
def test_they_hold_at_every_size(d):
    a, b = covariance("i^-1", d, 0), covariance("flat", d, 1)
    _, (ends,) = linalg.trace_with_bounds(a[None], b[None], "float64", 1e-6)
    assert ends is not None
    assert float(ends[0]) <= exactly(a, b) <= float(ends[1])


def test_they_hold_for_perturbations_as_large_as_were_announced():
    """The largest perturbation that `moved` allows, in the directions that change the roots most."""
    values = torch.diag(torch.logspace(0, -6, D, dtype=torch.float64))[None]
    m = native.standard_form(values, torch.eye(D, dtype=torch.float64)[None], banded=True)[0][0]
    values = m.diagonal()[:D].clone()
    sums = band_reduction.root_sums_(m.clone(), D)
    among_all, to_the_smallest = values.rsqrt() / (1 / values).sum().sqrt(), torch.zeros_like(values)
    to_the_smallest[values.argmin()] = 1
    small = [(share / (4 * sums.inverse), 3e-5) for share in (0.01, 0.1, 0.25)]
    for moved, width in small + [(share * sums.least, 1e-3) for share in (0.01, 0.1, 0.5, 0.8)]:
        ends = log_determinants.root_bounds(m, D, moved, sums, width, width)
        assert ends is not None
        for direction in (among_all, to_the_smallest, -among_all, -to_the_smallest):
            assert ends[0] <= (values + moved * direction).sqrt().sum().item() <= ends[1]
    assert log_determinants.root_bounds(m, D, sums.least, sums, 1e-3, 1e-3) is None


@pytest.mark.parametrize("power", [-890, -600, -200, 600])
def test_the_error_of_the_form_is_the_same_at_every_scale(power):
    a, b = covariance("i^-1", D, 0), covariance("i^-1", D, 1)
    expected = log_determinants.form_error(a, b, standard_form.reduce(a[None], b[None]).exponent.item())
    scaled = a * 2.0**power
    exponent = standard_form.reduce(scaled[None], b[None]).exponent.item()
    assert log_determinants.form_error(scaled, b, exponent) == expected > 0


def test_subnormal_covariances_are_left_to_the_certificate():
    a, b = 3 * 2.0**-1074 * torch.eye(D, dtype=torch.float64), torch.eye(D, dtype=torch.float64)
    assert log_determinants.form_error(a, b, 0.0) == math.inf


@pytest.mark.parametrize("power", [-600, 0, 600])
@pytest.mark.parametrize("condition", [1e4, 1e10])
def test_pairs_of_inverses_are_bounded_or_refused_at_every_scale(power, condition):
    """A B = I up to rounding of A and of its inverse, which grows with their condition number."""
    values = torch.logspace(0, -math.log10(condition), D, dtype=torch.float64)
    q, _ = torch.linalg.qr(torch.randn(D, D, generator=torch.Generator().manual_seed(1), dtype=torch.float64))
    a, b = q * values @ q.T, q / values @ q.T
    a, b = (a + a.T) / 2, (b + b.T) / 2
    _, (ends,) = linalg.trace_with_bounds((a * 2.0**power)[None], b[None], "float64", 1e-6)
    if ends is not None:
        assert float(ends[0]) <= exactly(a, b) * mpmath.mpf(2) ** (power // 2) <= float(ends[1])
    assert (ends is not None) or condition > 1e4


@pytest.mark.parametrize("rotated", [False, True])
def test_where_rounding_leaves_no_less_they_are_wider_and_float64_has_the_certificate(rotated):
    values = torch.logspace(0, -11, D, dtype=torch.float64)
    q, _ = torch.linalg.qr(torch.randn(D, D, generator=torch.Generator().manual_seed(1), dtype=torch.float64))
    a, b = torch.diag(values), torch.eye(D, dtype=torch.float64)
    a = q @ a @ q.T if rotated else a
    a = (a + a.T) / 2
    _, ((lower, upper),) = linalg.trace_with_bounds(a[None], b[None], "float32", 1e-6)
    assert float(lower) <= exactly(a, b) <= float(upper)
    assert TOLERANCE["float32"] < (upper - lower) / upper <= 10 * TOLERANCE["float32"]
    assert linalg.trace_with_bounds(a[None], b[None], "float64", 1e-6)[1] == [None]
    bounded = trace_sqrt_product(a, b, precision="float64", bounds=True)
    assert float(bounded.lower) <= exactly(a, b) <= float(bounded.upper)
    assert bounded.upper - bounded.lower <= (upper - lower) / 10


def test_wrong_estimates_give_wide_bounds_or_none_but_no_wrong_ones():
    a, b = covariance("i^-1", D, 0), covariance("i^-1", D, 1)
    form = standard_form.reduce(a[None], b[None])
    sums = band_reduction.root_sums_(form.m[0].clone(), D)
    expected = float(exactly(a, b)) / 2.0 ** form.exponent.item()
    moved = log_determinants.form_error(a, b, form.exponent.item())
    proved = 0
    for total in (0.1, 1.0, 10.0):
        for inverse in (1e-3, 0.1, 1.0, 10.0, 1e3):
            for least in (1e-3, 0.1, 1.0, 1.3, 10.0):
                wrong = sums._replace(
                    total=sums.total * total, inverse=sums.inverse * inverse, least=sums.least * least
                )
                ends = log_determinants.root_bounds(form.m[0], D, moved, wrong, 1e-3, 1e-3)
                proved += ends is not None
                assert ends is None or ends[0] <= expected <= ends[1]
    assert proved >= 20
    for field, value in itertools.product(
        ("total", "inverse", "least"), (0.0, -1e-300, -1.0, 1e200, math.inf, -math.inf)
    ):
        ends = log_determinants.root_bounds(form.m[0], D, moved, sums._replace(**{field: value}), 1e-3, 1e-3)
        assert ends is None or (field == "inverse" and value == 1e200 and ends[0] <= expected <= ends[1])
    for wrong in (-1e-3, math.nan, math.inf):
        assert log_determinants.root_bounds(form.m[0], D, wrong, sums, 1e-3, 1e-3) is None
    assert log_determinants.root_bounds(torch.zeros_like(form.m[0]), D, 0.0, sums, 1e-3, 1e-3) is None
    for field in sums._fields:
        assert log_determinants.root_bounds(
            form.m[0], D, moved, sums._replace(**{field: math.nan}), 1e-3, 1e-3
        ) is None or (field == "norm")


@pytest.mark.parametrize("kind", ["rank d/4", "one direction 1e6", "i^-3"])
def test_what_is_too_close_to_singular_is_left_to_the_certificate(kind):
    a, b = covariance(kind, D, 0), covariance("i^-1", D, 1)
    _, ends = linalg.trace_with_bounds(a[None], b[None], "float64", 1e-6)
    bounded = trace_sqrt_product(a, b, precision="float64", bounds=True)
    assert bounded.lower <= truth(a, b) <= bounded.upper
    assert bounded.lower <= bounded.value <= bounded.upper
    if kind == "rank d/4":
        assert ends == [None]


def test_a_batch_is_bounded_one_by_one_whichever_way_each_goes():
    a = torch.stack([covariance(kind, D, 0) for kind in ("i^-1", "rank d/4", "flat")])
    b = torch.stack([covariance("i^-1", D, s) for s in range(3)])
    together = trace_sqrt_product(a, b, bounds=True)
    for i in range(3):
        alone = trace_sqrt_product(a[i], b[i], bounds=True)
        assert (together.lower[i], together.upper[i]) == (alone.lower, alone.upper)
