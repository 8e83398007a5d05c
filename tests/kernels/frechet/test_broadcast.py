"""One reference against a batch: leading axes broadcast, and the reference is checked and factored once."""

import numpy as np
import pytest
import torch

from mir_kernels import frechet_distance, frechet_distance_from_features, trace_sqrt_from_features, trace_sqrt_product
from mir_kernels.ops.frechet import cross_factor, launch, standard_form, trace_sqrt_report
from mir_kernels.ops.sqrtm import factor

pytestmark = pytest.mark.usefixtures("warnings_are_failures")

D = 6
BATCHES = [
    ((), (4,)),
    ((4,), ()),
    ((1,), (4,)),
    ((3, 1), (4,)),
    ((4,), (3, 1)),
    ((1, 1), (2, 3)),
    ((), (0,)),
    ((3, 1), (0,)),
]


def gaussian(batch, seed, d=D):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*batch, 3 * d, d, generator=generator, dtype=torch.float64)
    x = x - x.mean(-2, keepdim=True)
    return torch.randn(*batch, d, generator=generator, dtype=torch.float64), x.mT @ x / (3 * d - 1)


def columns(found):
    return [found] if isinstance(found, torch.Tensor) else list(found)


def alike(found, expected, shape):
    for a, b in zip(columns(found), columns(expected), strict=True):
        assert a.shape == shape
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.fixture(params=["linalg", "eager", "reference", "split"])
def backend(request, monkeypatch):
    """ "split": process the batch in parts of two matrices, as for larger ones."""
    if request.param == "split":
        monkeypatch.setattr(launch, "CHUNK", 2 * D * D)
        return "eager"
    return request.param


@pytest.mark.parametrize("bounds", [False, True])
@pytest.mark.parametrize(("one", "other"), BATCHES)
def test_leading_axes_broadcast(one, other, backend, bounds):
    (mean_x, cov_x), (mean_y, cov_y) = gaussian(one, 1), gaussian(other, 2)
    batch = torch.broadcast_shapes(one, other)
    whole = [m.expand(*batch, D).contiguous() for m in (mean_x, mean_y)]
    wide = [c.expand(*batch, D, D).contiguous() for c in (cov_x, cov_y)]
    options = {"bounds": bounds, "backend": backend}
    alike(trace_sqrt_product(cov_x, cov_y, **options), trace_sqrt_product(*wide, **options), batch)
    expected = frechet_distance(whole[0], wide[0], whole[1], wide[1], **options)
    alike(frechet_distance(mean_x, cov_x, mean_y, cov_y, **options), expected, batch)


@pytest.mark.parametrize("bounds", [False, True])
def test_means_may_be_many_where_covariances_are_one(backend, bounds):
    (_, cov_x), (mean_y, cov_y) = gaussian((), 1), gaussian((), 2)
    means = gaussian((5, 1), 3)[0]
    found = frechet_distance(means, cov_x, mean_y, cov_y, bounds=bounds, backend=backend)
    alone = [frechet_distance(m[0], cov_x, mean_y, cov_y, bounds=bounds, backend=backend) for m in means]
    expected = [torch.stack(c)[:, None] for c in zip(*map(columns, alone), strict=True)]
    alike(found, expected[0] if not bounds else expected, (5, 1))


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("swapped", [False, True])
def test_with_the_native_kernels_and_without(native, swapped, monkeypatch):
    if not native:
        monkeypatch.setattr(standard_form.native, "MISSING", "for a test")
    pair = [gaussian((), 1)[1], gaussian((4,), 2)[1]]
    pair = pair[::-1] if swapped else pair
    report = trace_sqrt_report(*pair, backend="linalg")
    assert len(report.path) == 4
    expected = [torch.linalg.eigvals(pair[0] @ pair[1])[i].real.sqrt().sum() for i in range(4)]
    torch.testing.assert_close(report.value, torch.stack(expected), rtol=1e-9, atol=0)


@pytest.mark.parametrize("swapped", [False, True])
def test_the_reference_is_factored_once(swapped, monkeypatch):
    factored = []

    def counted(a):
        factored.append(len(a))
        return factor.factor(a)

    monkeypatch.setattr(cross_factor, "factor", type("Counting", (), {"factor": staticmethod(counted)}))
    monkeypatch.setattr(cross_factor.factor, "blocks", factor.blocks, raising=False)
    pair = [gaussian((), 1)[1], gaussian((4,), 2)[1]]
    trace_sqrt_product(*(pair[::-1] if swapped else pair), backend="eager")
    assert sorted(factored) == [1, 4]


def test_a_bad_reference_or_one_bad_matrix_is_named():
    reference, batch = gaussian((), 1)[1], gaussian((4,), 2)[1]
    batch[2, 0, 0] = -1
    mean = torch.zeros(D)
    with pytest.raises(ValueError, match="b: expected positive semi-definite"):
        trace_sqrt_product(reference, batch)
    with pytest.raises(ValueError, match="cov_x: expected positive semi-definite"):
        frechet_distance(mean, batch, mean, reference)
    with pytest.raises(ValueError, match=r"b: expected shape \(3, 6, 6\) like a, got \(4, 6, 6\)"):
        trace_sqrt_product(reference.expand(3, D, D), batch)
    with pytest.raises(ValueError, match=r"mean_y: expected shape \(4, 6\), got \(3, 6\)"):
        frechet_distance(mean, reference, mean.expand(3, D), reference.expand(4, D, D))


@pytest.mark.parametrize("function", [trace_sqrt_product, lambda a, b: frechet_distance(a[..., 0], a, b[..., 0], b)])
def test_compiled_code_broadcasts(function):
    pair = gaussian((), 1)[1], gaussian((4,), 2)[1]
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    alike(compiled(*pair), function(*pair), (4,))


@pytest.mark.parametrize("bounds", [False, True])
@pytest.mark.parametrize("function", [trace_sqrt_from_features, frechet_distance_from_features])
@pytest.mark.parametrize(("n", "m"), [(4, 9), (20, 30)], ids=["short", "tall"])
def test_features_in_batches(n, m, function, bounds):
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(*shape, D, generator=generator) for shape in ((3, 1, n), (4, m)))
    found = function(x, y, bounds=bounds)
    for i in np.ndindex(3, 4):
        alone = function(x[i[0], 0], y[i[1]], bounds=bounds)
        assert all(torch.equal(a[i], b) for a, b in zip(columns(found), columns(alone), strict=True))
    assert all(c.shape == (3, 0) for c in columns(function(x, y[:0], bounds=bounds)))
    with pytest.raises(
        ValueError, match=r"y: expected leading axes that broadcast with those of x, \(3, 1\), got \(2, 4\)"
    ):
        function(x, y.expand(2, 4, m, D))
