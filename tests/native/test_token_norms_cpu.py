"""Token norms of the compiled CPU kernel against float64."""

import pytest
import torch

from tolerances import assert_close

pytestmark = pytest.mark.usefixtures("native_module")


def token_norms(x):
    from mir_kernels.ops.moments import native

    return native.token_norms(x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize(("rows", "cols"), [(0, 4), (1, 1), (5, 7), (33, 576), (9, 4097)])
def test_norms_of_strided_rows_are_right_to_float32(rows, cols, dtype):
    torch.manual_seed(0)
    x = torch.randn(rows, cols + 3).to(dtype)[:, 2 : cols + 2]
    out = token_norms(x)
    assert out.dtype == torch.float32
    assert_close(out, x.double().norm(dim=1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_largest_and_the_smallest_values_neither_overflow_nor_vanish(dtype):
    info = torch.finfo(dtype)
    largest = torch.tensor([[info.max, 0, 0], [info.max / 4, info.max / 4, info.max / 4]], dtype=dtype)
    assert_close(token_norms(largest), largest.double().norm(dim=1))
    smallest = torch.full((1, 16), info.tiny, dtype=dtype)
    assert_close(token_norms(smallest), smallest.double().norm(dim=1))


def test_float64_norms_beyond_float32_are_infinite():
    assert token_norms(torch.tensor([[1e30, 1.0], [1e39, 0.0]], dtype=torch.float64)).tolist() == [
        pytest.approx(1e30, rel=1e-6),
        float("inf"),
    ]


def test_nan_and_infinity_come_through():
    out = token_norms(torch.tensor([[float("nan"), 1.0], [float("inf"), 1.0], [3.0, 4.0]]))
    assert out[0].isnan()
    assert out[1:].tolist() == [float("inf"), 5.0]
