"""MoCa's compiled CPU kernels against float64: values, rounding, untouched memory, and reproducible bits."""

import pytest
import torch

from tolerances import assert_close, relative_error

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
SHAPES = [(1, 1), (3, 7), (37, 31), (129, 576), (300, 577), (17, 4100)]
SENTINEL = -123.0

pytestmark = pytest.mark.usefixtures("native_module")


def native():
    from mir_kernels.ops.moca import native

    return native


def inputs(rows, cols, dtype, *, seed=0, offset=3, gap=5):
    """Random rows in a larger buffer, misaligned by `offset` elements and `gap` elements apart; and the buffer."""
    torch.manual_seed(seed)
    buffer = torch.full((rows * (cols + gap) + offset + gap,), SENTINEL, dtype=dtype)
    view = torch.as_strided(buffer, (rows, cols), (cols + gap, 1), offset)
    view.copy_(torch.randn(rows, cols))
    return view, buffer


def parameters(cols, seed=1):
    torch.manual_seed(seed)
    return torch.randn(cols) + 1, torch.randn(cols)


def random_mask(rows):
    torch.manual_seed(2)
    mask = torch.rand(rows) < 0.5
    mask[0] = True
    return mask


def moca_in_float64(x, scale, shift, mask):
    return torch.where(mask.bool()[:, None], scale.double() * x.double() + shift.double(), x.double())


def written_outside(view, buffer):
    """Whether anything outside `view` in its buffer has changed."""
    inside = torch.zeros(buffer.shape, dtype=torch.bool)
    inside.as_strided(view.shape, view.stride(), view.storage_offset()).fill_(True)
    return bool((buffer[~inside] != SENTINEL).any())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "cols"), SHAPES)
@pytest.mark.parametrize("inplace", [False, True])
def test_forward_rounds_once_and_leaves_other_rows_bit_for_bit(rows, cols, dtype, inplace):
    x, x_buffer = inputs(rows, cols, dtype)
    before = x.clone()
    scale, shift = parameters(cols)
    mask = random_mask(rows)
    out, out_buffer = (x, x_buffer) if inplace else inputs(rows, cols, dtype, offset=1, gap=2)
    if not inplace:
        out.fill_(float("nan"))
    native().forward(x, scale, shift, mask, out)

    expected = moca_in_float64(before, scale, shift, mask)
    torch.testing.assert_close(out[~mask], before[~mask], rtol=0, atol=0)
    # Half a unit in the last place of the element type, after a float32 rounding; and float64 rounding in `expected`.
    half_ulp = {torch.float64: 0, torch.float32: 0, torch.float16: 2**-11, torch.bfloat16: 2**-8}[dtype]
    arithmetic = 2**-53 if dtype == torch.float64 else 2**-24
    subnormal = 2**-25 if dtype == torch.float16 else 0
    allowed = expected.abs() * (half_ulp + arithmetic) + subnormal + 2**-52 * (scale * before).double().abs()
    assert ((out.double() - expected).abs() <= allowed).all()
    assert not written_outside(out, out_buffer)
    if not inplace:
        assert torch.equal(x, before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "cols"), SHAPES)
def test_backward_matches_float64(rows, cols, dtype):
    x, _ = inputs(rows, cols, dtype, seed=3)
    grad, _ = inputs(rows, cols, dtype, seed=4, offset=2)
    scale, _ = parameters(cols)
    mask = random_mask(rows)
    dx, dx_buffer = inputs(rows, cols, dtype, offset=1)
    dx.fill_(float("nan"))
    x[~mask] = float("nan")  # backward reads x only inside the mask
    grad_before = grad.clone()
    dscale, dshift = native().backward(grad, x, scale, mask, dx)

    assert torch.equal(grad, grad_before)
    assert torch.equal(dx[~mask], grad[~mask])
    assert_close(dx[mask], grad[mask].double() * scale.double())
    sums = torch.float64 if dtype == torch.float64 else torch.float32
    assert dscale.dtype == dshift.dtype == sums
    assert_close(dscale, (grad.double() * x.double())[mask].sum(0))
    assert_close(dshift, grad[mask].double().sum(0))
    assert not written_outside(dx, dx_buffer)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_backward_in_place_of_the_gradient_gives_the_same_bits(dtype):
    x, _ = inputs(65, 100, dtype, seed=3)
    grad, grad_buffer = inputs(65, 100, dtype, seed=4)
    scale, _ = parameters(100)
    mask = random_mask(65)
    dx = torch.full_like(x, float("nan"))
    sums = native().backward(grad, x, scale, mask, dx)
    in_place = native().backward(grad, x, scale, mask, grad)
    assert torch.equal(grad, dx)
    assert all(torch.equal(a, b) for a, b in zip(sums, in_place, strict=True))
    assert not written_outside(grad, grad_buffer)


@pytest.mark.parametrize("rows", [1000, 20000])
def test_column_sums_err_at_most_twice_as_much_as_torchs_float32_sum(rows):
    torch.manual_seed(0)
    x, grad = torch.randn(rows, 96) + 1, torch.randn(rows, 96) + 0.5
    mask = torch.ones(rows, dtype=torch.bool)
    dscale, dshift = native().backward(grad, x, torch.ones(96), mask, torch.empty_like(x))
    products = grad.double() * x.double()
    assert relative_error(dscale, products.sum(0)) <= 2 * relative_error((grad * x).sum(0), products.sum(0)) + 2**-24
    assert (
        relative_error(dshift, grad.double().sum(0)) <= 2 * relative_error(grad.sum(0), grad.double().sum(0)) + 2**-24
    )


@pytest.fixture
def thread_counts():
    before = torch.get_num_threads()
    yield (1, 2, 3, 7)
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_thread_count_gives_the_same_bits(dtype, thread_counts):
    rows, cols = 1500, 515
    x, _ = inputs(rows, cols, dtype, seed=5)
    grad, _ = inputs(rows, cols, dtype, seed=6)
    scale, shift = parameters(cols)
    mask = random_mask(rows)
    results = []
    for threads in thread_counts:
        torch.set_num_threads(threads)
        out, dx, h = (torch.full_like(x, float("nan")) for _ in range(3))
        rstd = torch.empty(rows)
        native().forward(x, scale, shift, mask, out)
        sums = native().backward(grad, x, scale, mask, dx)
        native().add_rms_forward(x, grad, scale, shift, mask, scale, 1e-6, out, h, rstd)
        fused = native().add_rms_backward(grad, None, h, x, grad, scale, mask, scale, rstd, out)
        results.append((out, dx, h, rstd, *sums, *fused))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_large_outputs_past_the_caches_hold_the_same_bits(dtype):
    # Rows of whole cache lines are streamed from 16 MiB on; with a stride that is one element larger they never are.
    rows, cols = 2**24 // (1024 * dtype.itemsize) + 3, 1024
    x, _ = inputs(rows, cols, dtype, offset=0, gap=0)
    grad = x.flip(0).contiguous()
    scale, shift = parameters(cols)
    mask = random_mask(rows)
    streamed = torch.full((rows, cols), float("nan"), dtype=dtype)
    plain = torch.full((rows, cols + 1), float("nan"), dtype=dtype)[:, :cols]
    native().forward(x, scale, shift, mask, streamed)
    native().forward(x, scale, shift, mask, plain)
    assert torch.equal(streamed, plain)
    assert_close(streamed, moca_in_float64(x, scale, shift, mask))
    native().backward(grad, x, scale, mask, streamed)
    native().backward(grad, x, scale, mask, plain)
    assert torch.equal(streamed, plain)
    assert_close(streamed, torch.where(mask[:, None], grad.double() * scale.double(), grad.double()))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [0, 5])
def test_no_rows_or_none_in_the_mask_give_zero_sums(dtype, rows):
    x = torch.randn(rows, 9).to(dtype)
    mask = torch.zeros(rows, dtype=torch.bool)
    out = torch.full_like(x, float("nan"))
    native().forward(x, torch.ones(9), torch.ones(9), mask, out)
    assert torch.equal(out, x)
    dscale, dshift = native().backward(x, x, torch.ones(9), mask, out)
    assert torch.equal(out, x)
    assert dscale.tolist() == dshift.tolist() == [0.0] * 9


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_16_bit_value_survives_and_rounds_as_torch_rounds(dtype):
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    x = bits.view(dtype).view(256, 256)
    mask = torch.ones(256, dtype=torch.bool)
    out = torch.zeros_like(x)
    native().forward(x, torch.ones(256), torch.zeros(256), mask, out)
    assert torch.equal(out.isnan(), x.isnan())
    assert torch.equal(out.nan_to_num(7.0), x.nan_to_num(7.0))
    scale = torch.linspace(0.3, 1.7, 256)
    native().forward(x, scale, torch.zeros(256), mask, out)
    expected = (x.float() * scale).to(dtype)
    assert torch.equal(out.isnan(), expected.isnan())
    assert torch.equal(out.nan_to_num(7.0, 8.0, 9.0), expected.nan_to_num(7.0, 8.0, 9.0))


def test_a_nan_whose_payload_is_all_ones_stays_nan():
    nan = torch.tensor([0x7FFFFFFF], dtype=torch.int32).view(torch.float32)
    for dtype in (torch.bfloat16, torch.float16):
        out = torch.zeros(1, 1, dtype=dtype)
        native().forward(torch.ones(1, 1, dtype=dtype), torch.ones(1), nan, torch.ones(1, dtype=torch.bool), out)
        assert out.isnan().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "cols"), SHAPES)
def test_fused_forward_has_the_bits_of_the_separate_operations(rows, cols, dtype):
    x, _ = inputs(rows, cols, dtype, seed=7)
    residual, _ = inputs(rows, cols, dtype, seed=8)
    scale, shift = parameters(cols)
    weight, _ = parameters(cols, seed=9)
    mask = random_mask(rows)
    out, h = torch.full_like(x, float("nan")), torch.full_like(x, float("nan"))
    rstd = torch.full((rows,), float("nan"), dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    native().add_rms_forward(x, residual, scale, shift, mask, weight, 1e-6, out, h, rstd)

    separate = torch.empty(rows, cols, dtype=dtype)
    native().forward(x + residual, scale, shift, mask, separate)
    assert torch.equal(h, separate)
    expected_rstd = torch.rsqrt(h.double().square().mean(1) + 1e-6)
    assert_close(rstd, expected_rstd)
    # Llama's order: normalise in float32, round to the element type, multiply by the weight.
    normalised = (h.to(rstd.dtype) * rstd[:, None]).to(dtype)
    assert torch.equal(out, (weight.to(rstd.dtype) * normalised.to(rstd.dtype)).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("has_grad_h", [False, True])
@pytest.mark.parametrize(("rows", "cols"), SHAPES)
def test_fused_backward_matches_autograd_in_float64(rows, cols, dtype, has_grad_h):
    x, _ = inputs(rows, cols, dtype, seed=7)
    residual, _ = inputs(rows, cols, dtype, seed=8)
    grad_out, _ = inputs(rows, cols, dtype, seed=10)
    grad_h = inputs(rows, cols, dtype, seed=11)[0] if has_grad_h else None
    scale, shift = parameters(cols)
    weight, _ = parameters(cols, seed=9)
    mask = random_mask(rows)
    out, h, dx = (torch.full_like(x, float("nan")) for _ in range(3))
    rstd = torch.empty(rows, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    native().add_rms_forward(x, residual, scale, shift, mask, weight, 0.5, out, h, rstd)
    sums = native().add_rms_backward(grad_out, grad_h, h, x, residual, scale, mask, weight, rstd, dx)

    leaves = [t.double().requires_grad_() for t in (x, scale, shift, weight)]
    h64 = torch.where(mask[:, None], (leaves[0] + residual.double()) * leaves[1] + leaves[2], leaves[0] + residual)
    out64 = h64 * torch.rsqrt(h64.square().mean(1, keepdim=True) + 0.5) * leaves[3]
    loss = (out64 * grad_out.double()).sum() + (0 if grad_h is None else (h64 * grad_h.double()).sum())
    loss.backward()
    for got, leaf in zip((dx, *sums), leaves, strict=True):
        assert_close(got, leaf.grad, dtype=dtype, factor=3)


def test_rows_that_are_not_contiguous_are_refused():
    x = torch.randn(4, 6).t()
    with pytest.raises(ValueError, match="contiguous"):
        native().forward(x, torch.ones(4), torch.ones(4), torch.ones(6, dtype=torch.bool), torch.empty(6, 4))


def test_masks_of_other_types_are_refused():
    with pytest.raises(TypeError, match="mask"):
        native().forward(torch.ones(2, 2), torch.ones(2), torch.ones(2), torch.ones(2), torch.empty(2, 2))
