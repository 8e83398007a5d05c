"""Edge cases of the published functions: non-finite values, few rows, all dtypes and strides, and covariances that
rounding made slightly indefinite.
"""

import math

import pytest
import torch

from modality_integration import official

REPLACERS = [official.replace_outliers_with_median_l2, official.replace_outliers_with_iqr_l2]
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


def rows(n=200, d=8, *, dtype=torch.float32, far=3):
    """Features, with `far` rows 20 times as large."""
    x = torch.randn(n, d, generator=torch.Generator().manual_seed(n + d), dtype=torch.float64)
    x[:far] *= 20
    return x.to(dtype)


def published_marks(data, replacer):
    """The rows that the published formulas mark; a comparison with NaN marks none."""
    norms = data.detach().double().norm(dim=1)
    if replacer is official.replace_outliers_with_median_l2:
        return (norms - norms.median()).abs() > 3 * norms.std()
    first, third = torch.quantile(norms, torch.tensor([0.25, 0.75], dtype=torch.float64))
    return (norms < first - 1.5 * (third - first)) | (norms > third + 1.5 * (third - first))


def published(data, replacer):
    """The result of the published functions, and the number of rows they replace."""
    expected, marks = data.detach().clone(), published_marks(data, replacer)
    expected[marks] = expected.median(dim=0).values
    return expected, int(marks.sum())


def assert_as_published(data, replacer):
    expected, count = published(data, replacer)
    assert replacer(data) is data
    assert torch.equal(data.detach().nan_to_num(7.0), expected.nan_to_num(7.0))
    return count


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("count", [1, 40, 200])
@pytest.mark.parametrize("n", [200, 201, 5])  # 201 and 5: quartiles without interpolation
@pytest.mark.parametrize("replacer", REPLACERS)
def test_rows_that_are_not_finite_mark_what_the_published_formula_marks(replacer, n, count, bad):
    data = rows(n, far=min(3, n // 4))
    data[-count:, 0] = bad
    marked = assert_as_published(data, replacer)
    if replacer is official.replace_outliers_with_median_l2 or math.isnan(bad):
        assert marked == 0
    elif count == 1:
        assert marked > 0  # including the infinite row
        assert data.isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("replacer", REPLACERS)
def test_every_floating_dtype_is_taken(replacer, dtype):
    assert assert_as_published(rows(dtype=dtype), replacer) >= 3


@pytest.mark.parametrize("replacer", REPLACERS)
def test_rows_that_only_float64_holds_are_told_apart(replacer):
    data = rows(dtype=torch.float64) * 1e100
    assert assert_as_published(data, replacer) >= 3


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x.repeat_interleave(2, 1)[:, ::2],
        lambda x: x.mT.contiguous().mT,
        lambda x: torch.cat([x, x])[: len(x)],
        lambda x: x.flip(0)[::2],
    ],
    ids=["every other column", "transposed", "first rows", "every other row"],
)
@pytest.mark.parametrize("replacer", REPLACERS)
def test_any_strides_are_written_in_place(replacer, view):
    data = view(rows())
    assert assert_as_published(data, replacer) > 0


@pytest.mark.parametrize("n", [0, 1])
@pytest.mark.parametrize("replacer", REPLACERS)
def test_fewer_than_two_rows_have_no_outliers(replacer, n):
    data = rows(n, far=0)
    before = data.clone()
    assert replacer(data) is data
    assert torch.equal(data, before)


@pytest.mark.parametrize("replacer", REPLACERS)
def test_inference_tensors_are_written_and_gradients_flow_past_the_rows_replaced(replacer):
    with torch.inference_mode():
        seen = rows()
    assert assert_as_published(seen, replacer) > 0
    leaf = rows().requires_grad_()
    data = leaf * 1
    assert replacer(data) is data
    data.sum().backward()
    kept = ~published_marks(leaf, replacer)
    assert (leaf.grad[kept] >= 1).all()
    assert leaf.grad.sum() == leaf.numel()  # a replaced entry passes its gradient to the column's median


REFUSED = [
    (lambda: rows().requires_grad_(), RuntimeError, "is a leaf that requires grad"),
    (lambda: rows()[:1].expand(9, 8), RuntimeError, "is expanded"),
    (lambda: rows().int(), TypeError, "expected one of the dtypes"),
    (lambda: rows().to(torch.complex64), TypeError, "expected one of the dtypes"),
    (lambda: rows()[0], ValueError, r"expected shape \(n, d\) with d >= 1, got \(8,\)"),
    (lambda: rows()[None], ValueError, r"expected shape \(n, d\) with d >= 1, got \(1, 200, 8\)"),
    (lambda: torch.tensor(1.0), ValueError, r"expected shape \(n, d\)"),
    (lambda: torch.ones(4, 0), ValueError, r"expected shape \(n, d\)"),
    (lambda: rows().tolist(), TypeError, "expected a torch.Tensor, got list"),
]


@pytest.mark.parametrize(("made", "error", "message"), REFUSED)
@pytest.mark.parametrize("replacer", REPLACERS)
def test_what_cannot_be_replaced_in_place_is_refused_by_name(replacer, made, error, message):
    with pytest.raises(error, match=f"data: {message}"):
        replacer(made())


def covariance(n, d, dtype, seed=0):
    """A covariance computed entirely in dtype: symmetric only up to its rounding."""
    x = torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    x = ((x - x.mean(0)) * torch.arange(1, d + 1) ** -0.5).to(dtype)
    return x.mT / (n - 1) @ x


def assert_is_root(root, matrix):
    assert root.dtype == matrix.dtype
    error = torch.linalg.norm(root.double() @ root.double() - matrix.double())
    assert error <= (1e-9 + 4 * torch.finfo(matrix.dtype).eps) * torch.linalg.norm(matrix.double())


@pytest.mark.parametrize(("n", "d"), [(300, 64), (65, 64), (40, 64), (5, 64), (2, 7)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_covariances_as_rounding_leaves_them_have_a_root(dtype, n, d):
    matrix = covariance(n, d, dtype)
    root = official.matrix_sqrt(matrix)
    assert_is_root(root, matrix)
    assert torch.equal(root, root.mT)


@pytest.mark.parametrize(("n", "d"), [(300, 40), (30, 40), (5, 64)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_products_of_covariances_as_rounding_leaves_them_have_a_root(dtype, n, d):
    matrix = covariance(n, d, dtype) @ covariance(n + 9, d, dtype, seed=1)
    assert_is_root(official.matrix_sqrt(matrix), matrix)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_one_rounding_off_symmetry_is_symmetric(dtype):
    matrix = torch.tensor([[1.0, 0.5], [0.5, 1.0]], dtype=dtype)
    expected = official.matrix_sqrt(matrix)
    matrix[0, 1] = torch.nextafter(matrix[0, 1], torch.ones((), dtype=dtype))
    assert torch.allclose(official.matrix_sqrt(matrix), expected, rtol=0, atol=2 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("size", [1e-300, 1e300])
@pytest.mark.parametrize("matrix", [[[2.0, 1.0], [1.0, 2.0]], [[1.0, 0.5], [0.0, 2.0]]], ids=["symmetric", "triangle"])
def test_sizes_at_the_ends_of_float64_do_not_matter(matrix, size):
    matrix = torch.tensor(matrix, dtype=torch.float64)
    root = official.matrix_sqrt(matrix * size) / size**0.5
    assert torch.allclose(root @ root, matrix, rtol=1e-12, atol=1e-12)


def test_strides_gradients_and_zeros_are_taken():
    matrix = covariance(300, 12, torch.float64)
    wide = torch.zeros(12, 24, dtype=torch.float64)
    wide[:, ::2] = matrix
    assert torch.equal(official.matrix_sqrt(wide[:, ::2]), official.matrix_sqrt(matrix))
    assert not official.matrix_sqrt(torch.zeros(3, 3)).any()
    product = (matrix @ covariance(300, 12, torch.float64, 1)).requires_grad_()
    official.matrix_sqrt(product).sum().backward()
    assert product.grad.isfinite().all()
    symmetric = matrix.float().requires_grad_()
    official.matrix_sqrt(symmetric).sum().backward()
    assert symmetric.grad.isfinite().all()


@pytest.mark.parametrize(
    ("made", "error", "message"),
    [
        (lambda: torch.full((2, 2), math.nan), ValueError, "expected finite values, got 4"),
        (lambda: torch.eye(2) / 0, ValueError, "expected finite values"),
        (lambda: torch.eye(2).long(), TypeError, "expected one of the dtypes"),
        (lambda: torch.ones(3), ValueError, "expected square matrices"),
        (lambda: torch.ones(0, 0), ValueError, "expected square matrices"),
        (lambda: torch.eye(2)[None], ValueError, "expected one matrix"),
        (lambda: [[1.0]], TypeError, "expected a torch.Tensor, got list"),
        (lambda: torch.tensor([[1.0, 2.0], [2.0, 1.0]]), ValueError, "expected positive semi-definite matrices"),
        (lambda: torch.diag(torch.tensor([1.0, -0.2])), ValueError, "expected positive semi-definite matrices"),
        (lambda: torch.diag(torch.tensor([1.0, -1e-3])), ValueError, "expected positive semi-definite matrices"),
        (lambda: torch.tensor([[1e300, 1.0], [0.0, -1e300]]).double(), ValueError, "expected finite values"),
        (lambda: torch.tensor([[1e300, 1.0], [9.0, -1e300]], dtype=torch.float64), ValueError, "semi-definite"),
        (lambda: torch.tensor([[1.0, 3.0], [0.0, -1e-3]]), ValueError, "no real square root"),
    ],
)
def test_what_has_no_root_is_refused_by_name(made, error, message):
    with pytest.raises(error, match=f"input: .*{message}"):
        official.matrix_sqrt(made())


DISTANCES = [official.calculate_fid, official.calculate_fid_pytorch, official.fid_of_published_fast_mode]


@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize(
    ("made", "error", "message"),
    [
        (lambda: rows()[:1], ValueError, r"expected features \(n, d\) with n >= 2"),
        (lambda: rows()[:0], ValueError, r"expected features \(n, d\) with n >= 2"),
        (lambda: rows()[0], ValueError, r"expected features \(n, d\) with n >= 2"),
        (lambda: rows()[None], ValueError, r"expected features \(n, d\) with n >= 2"),
        (lambda: rows().index_fill(0, torch.tensor([3]), math.nan), ValueError, "expected finite values, got 8"),
        (lambda: rows().index_fill(0, torch.tensor([3]), math.inf), ValueError, "expected finite values, got 8"),
        (lambda: rows().to(torch.complex64), TypeError, "expected real features, got complex64"),
        (lambda: rows().tolist(), TypeError, "expected a torch.Tensor, got list"),
    ],
)
def test_features_that_have_no_distance_are_refused_by_name(distance, swapped, made, error, message):
    arguments = (rows(), made()) if swapped else (made(), rows())
    with pytest.raises(error, match=f"tensor_{'B' if swapped else 'A'}: {message}"):
        distance(*arguments)


@pytest.mark.parametrize("distance", DISTANCES)
def test_features_of_two_sizes_are_refused(distance):
    with pytest.raises(ValueError, match="tensor_B: expected d = 8 as in tensor_A, got 7"):
        distance(rows(), rows(d=7))


@pytest.mark.parametrize("distance", DISTANCES)
def test_features_of_every_kind_are_taken(distance):
    a, b = rows(far=0), rows(90, far=0)
    expected = distance(a, b)
    wide = torch.zeros(90, 16)
    wide[:, ::2] = b
    assert distance(a.clone().requires_grad_(), wide[:, ::2]) == expected
    for dtype, tolerance in ((torch.float64, 1e-6), (torch.float16, 1e-2), (torch.bfloat16, 1e-1)):
        assert distance(a.to(dtype), b.to(dtype)) == pytest.approx(expected, rel=tolerance)
    whole = [(100 * x).int() for x in (a, b)]
    if distance is official.calculate_fid_pytorch:
        with pytest.raises(TypeError, match="tensor_A: expected one of the dtypes"):
            distance(*whole)
    else:
        assert distance(*whole) == distance(*(x.float() for x in whole))


def test_numbers_that_float32_does_not_hold_are_refused_by_the_accurate_mode_alone():
    large = rows(dtype=torch.float64) * 1e38
    with pytest.raises(ValueError, match="tensor_A: expected finite values"):
        official.calculate_fid(large * 1e3, large)
    assert math.isfinite(official.fid_of_published_fast_mode(large, large))
