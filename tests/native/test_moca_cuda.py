"""MoCa's CUDA kernels against float64 on a GPU: values, untouched memory around and between rows, reproducible bits."""

import pytest
import torch

from tolerances import assert_close

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("native_module")]

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
SHAPES = [(1, 1), (37, 7), (129, 576), (300, 577), (2051, 4096), (65, 8200)]
SENTINEL = -123.0


@pytest.fixture(autouse=True)
def cuda_here(native_module):
    if not torch.cuda.is_available():
        pytest.skip("torch sees no CUDA device")
    if not native_module.CUDA_ARCHS:
        pytest.skip("built without nvcc")


def native():
    from mir_kernels.ops.moca import native

    return native


def rows_in_buffer(rows, cols, dtype, *, seed, offset, gap):
    """Random rows on the GPU, with `gap` sentinels between them and `offset` sentinels before; and the whole buffer."""
    generator = torch.Generator().manual_seed(seed)
    buffer = torch.full((rows * (cols + gap) + offset + gap,), SENTINEL, dtype=dtype, device="cuda")
    view = torch.as_strided(buffer, (rows, cols), (cols + gap, 1), offset)
    view.copy_(torch.randn(rows, cols, generator=generator))
    return view, buffer


def sentinels(view, buffer):
    inside = torch.zeros(buffer.shape, dtype=torch.bool, device=buffer.device)
    inside.as_strided(view.shape, view.stride(), view.storage_offset()).fill_(True)
    return buffer[~inside]


def parameters(rows, cols):
    generator = torch.Generator().manual_seed(1)
    scale, shift = torch.randn(cols, generator=generator) + 1, torch.randn(cols, generator=generator)
    return scale.cuda(), shift.cuda(), (torch.rand(rows, generator=generator) < 0.5).cuda()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "cols"), SHAPES)
@pytest.mark.parametrize(("offset", "gap"), [(0, 0), (16, 32), (1, 3)])
@pytest.mark.parametrize("inplace", [False, True])
def test_forward_matches_float64_and_writes_nothing_else(rows, cols, dtype, offset, gap, inplace):
    x, x_buffer = rows_in_buffer(rows, cols, dtype, seed=0, offset=offset, gap=gap)
    out, out_buffer = (x, x_buffer) if inplace else rows_in_buffer(rows, cols, dtype, seed=2, offset=offset, gap=gap)
    before = x.clone()
    scale, shift, mask = parameters(rows, cols)
    native().forward(x, scale, shift, mask, out)
    assert torch.equal(out[~mask], before[~mask])
    assert_close(out[mask], scale.double() * before[mask].double() + shift.double())
    assert (sentinels(out, out_buffer) == SENTINEL).all()
    assert inplace or torch.equal(x, before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "cols"), SHAPES)
@pytest.mark.parametrize(("offset", "gap"), [(0, 0), (16, 32), (1, 3)])
@pytest.mark.parametrize("inplace", [False, True])
def test_backward_matches_float64_with_the_same_bits_on_every_run(rows, cols, dtype, offset, gap, inplace):
    x, _ = rows_in_buffer(rows, cols, dtype, seed=0, offset=offset, gap=gap)
    scale, _, mask = parameters(rows, cols)
    x[~mask] = float("nan")  # read only inside the mask
    runs = []
    for _ in range(3):
        grad, grad_buffer = rows_in_buffer(rows, cols, dtype, seed=3, offset=offset, gap=gap)
        expected = grad.double()
        dx, dx_buffer = grad, grad_buffer
        if not inplace:
            dx, dx_buffer = rows_in_buffer(rows, cols, dtype, seed=4, offset=offset, gap=gap)
        sums = native().backward(grad, x, scale, mask, dx)
        assert torch.equal(dx[~mask].double(), expected[~mask])
        assert_close(dx[mask], expected[mask] * scale.double())
        assert (sentinels(dx, dx_buffer) == SENTINEL).all()
        runs.append((dx.clone(), *sums))
    assert_close(runs[0][1], (expected[mask] * x[mask].double()).sum(0))
    assert_close(runs[0][2], expected[mask].sum(0))
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))


@pytest.mark.parametrize(("rows", "cols"), [(0, 24), (5, 24), (5, 0)])
def test_no_rows_no_columns_or_none_in_the_mask_give_zero_sums(rows, cols):
    x = torch.randn(rows, cols, device="cuda", dtype=torch.bfloat16)
    mask = torch.zeros(rows, dtype=torch.bool, device="cuda")
    ones, out = torch.ones(cols, device="cuda"), torch.full_like(x, float("nan"))
    native().forward(x, ones, ones, mask, out)
    assert torch.equal(out, x)
    dscale, dshift = native().backward(x, x, ones, mask, out)
    assert dscale.tolist() == dshift.tolist() == [0.0] * cols


def test_offsets_beyond_2_to_the_31_elements_are_right():
    cols = 4096
    rows = 2**31 // cols + 7
    if torch.cuda.get_device_properties(0).total_memory < 3 * rows * cols * 2:
        pytest.skip("needs 13 GB of GPU memory")
    x = torch.ones(rows, cols, device="cuda", dtype=torch.bfloat16)
    mask = torch.zeros(rows, dtype=torch.bool, device="cuda")
    mask[-3:] = True
    scale, shift = torch.full((cols,), 2.0, device="cuda"), torch.ones(cols, device="cuda")
    native().forward(x, scale, shift, mask, x)
    assert (x[-3:] == 3).all()
    assert (x[:-3] == 1).all()
    dscale, dshift = native().backward(x, x, scale, mask, x)
    assert dscale.tolist() == [27.0] * cols
    assert dshift.tolist() == [9.0] * cols
    assert (x[-3:] == 6).all()


def test_kernels_run_on_the_current_stream():
    x = torch.ones(4096, 4096, device="cuda")
    mask = torch.ones(4096, dtype=torch.bool, device="cuda")
    ones = torch.ones(4096, device="cuda")
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        native().forward(x, ones, ones, mask, x)
        still_running = not stream.query()
    stream.synchronize()
    assert still_running
    assert (x == 2).all()
