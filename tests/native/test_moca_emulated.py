"""MoCa's CUDA kernels on the emulated device against float64: values, reproducible bits, and all memory accesses.

The device lets a kernel read and write only the memory that the operation needs. Forbidden are rows outside the mask in
place, rows of x outside the mask in backward, and gaps between rows; races are errors. See emulated_cuda.
"""

import pytest
import torch

from mir_kernels.ops.moca import native, reference
from native.emulated import CODES
from tolerances import assert_close

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
# Rows of 129 to 516 vectors or 1032 single elements need several strips of columns; 2051 rows have chunks of 32.
SHAPES = [(1, 1), (3, 7), (33, 40), (70, 129), (17, 1032), (2051, 3), (1, 1032)]
# Elements before the first row and between rows: all addresses aligned, still aligned with gaps, and unaligned with a
# different alignment in each row.
PLACES = [(0, 0), (16, 32), (1, 3)]
SENTINEL = -123.0


@pytest.fixture
def device(emulated_device, monkeypatch):
    """The emulated device, used by native.forward and native.backward."""
    monkeypatch.setattr(native, "C", emulated_device)
    monkeypatch.setattr(native, "DTYPE_CODES", CODES)
    monkeypatch.setattr(emulated_device, "device", 0)
    monkeypatch.setattr(emulated_device, "stream", 0)
    yield emulated_device
    emulated_device.set_backwards(False)


def rows_in_buffer(rows, cols, dtype, place, *, seed):
    """Random rows with sentinels before, between and after them; and the whole buffer."""
    offset, gap = place
    buffer = torch.full((rows * (cols + gap) + offset + gap + 16,), SENTINEL, dtype=dtype)
    view = buffer.as_strided((rows, cols), (cols + gap, 1), offset)
    view.copy_(torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed)))
    return view, buffer


def sentinels(view, buffer):
    outside = torch.ones(buffer.shape, dtype=torch.bool)
    outside.as_strided(view.shape, view.stride(), view.storage_offset()).fill_(False)
    return buffer[outside]


def parameters(rows, cols, masked="some"):
    generator = torch.Generator().manual_seed(1)
    scale, shift = torch.randn(cols, generator=generator) + 1, torch.randn(cols, generator=generator)
    part = {"none": 0.0, "some": 0.5, "all": 1.0}[masked]
    mask = torch.rand(rows, generator=generator) < part
    if masked == "some" and rows:
        mask[-1] = True
    return scale, shift, mask


def forward_in_float64(x, scale, shift, mask):
    out = torch.empty(x.shape, dtype=torch.float64)
    reference.forward(x.double(), scale, shift, mask, out)
    return out


def backward_in_float64(grad, x, scale, mask):
    dx = torch.empty(grad.shape, dtype=torch.float64)
    return dx, *reference.backward(grad.double(), x, scale, mask, dx)


def assert_forward(rows, cols, dtype, place, inplace, masked="some"):
    x, x_buffer = rows_in_buffer(rows, cols, dtype, place, seed=0)
    scale, shift, mask = parameters(rows, cols, masked)
    if inplace:
        x[~mask] = float("nan")  # neither read nor written
    before = x.clone()
    out, buffer = (x, x_buffer) if inplace else rows_in_buffer(rows, cols, dtype, place, seed=2)
    native.forward(x, scale, shift, mask, out)
    torch.testing.assert_close(out[~mask], before[~mask], rtol=0, atol=0, equal_nan=True)
    assert_close(out[mask], forward_in_float64(before, scale, shift, mask)[mask])
    assert (sentinels(out, buffer) == SENTINEL).all()
    if not inplace:
        assert torch.equal(x, before)


def assert_backward(device, rows, cols, dtype, place, inplace, masked="some", gathered=False):
    """Three runs, the second with blocks and threads in reverse order, are correct and have the same bits."""
    x, _ = rows_in_buffer(rows, cols, dtype, place, seed=0)
    scale, _, mask = parameters(rows, cols, masked)
    x[~mask] = float("nan")  # read only inside the mask
    exact = None
    runs = []
    for backwards in (False, True, False):
        grad, buffer = rows_in_buffer(rows, cols, dtype, place, seed=3)
        before = grad.clone()
        exact = exact or backward_in_float64(grad, x, scale, mask)
        dx = grad
        if not inplace:
            dx, buffer = rows_in_buffer(rows, cols, dtype, place, seed=4)
        given, x_rows = x, None
        if gathered:
            given, _ = rows_in_buffer(int(mask.sum()), cols, dtype, place, seed=5)
            given.copy_(x[mask])
            x_rows = mask.cumsum(0) - 1  # -1 before the first row of the mask
        device.set_backwards(backwards)
        sums = native.backward(grad, given, scale, mask, dx, x_rows)
        assert torch.equal(dx[~mask], before[~mask])
        assert (sentinels(dx, buffer) == SENTINEL).all()
        assert inplace or torch.equal(grad, before)
        runs.append((dx.clone(), *sums))
    for found, wanted in zip(runs[0], exact, strict=True):
        assert_close(found, wanted)
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "cols"), SHAPES)
@pytest.mark.parametrize("place", PLACES, ids=str)
@pytest.mark.parametrize("inplace", [False, True])
def test_forward_is_right_and_touches_nothing_else(device, rows, cols, dtype, place, inplace):
    assert_forward(rows, cols, dtype, place, inplace)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "cols"), SHAPES)
@pytest.mark.parametrize("place", PLACES, ids=str)
@pytest.mark.parametrize("inplace", [False, True])
def test_backward_is_right_with_the_same_bits_in_any_order_of_blocks(device, rows, cols, dtype, place, inplace):
    assert_backward(device, rows, cols, dtype, place, inplace)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "cols"), [(1, 1), (70, 129), (37, 40), (17, 1032)])
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("masked", ["some", "none"])
def test_gathered_rows_of_x_are_found_where_they_lie(device, rows, cols, dtype, inplace, masked):
    assert_backward(device, rows, cols, dtype, (16, 32) if cols % 8 == 0 else (1, 3), inplace, masked, gathered=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("masked", ["none", "all"])
@pytest.mark.parametrize("inplace", [False, True])
def test_masks_of_no_row_and_of_every_row(device, dtype, masked, inplace):
    for place in PLACES[:1], PLACES[2:]:
        assert_forward(37, 24, dtype, *place, inplace, masked)
        assert_backward(device, 37, 24, dtype, *place, inplace, masked)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "cols"), [(0, 24), (5, 0), (0, 0)])
def test_no_rows_or_no_columns(device, dtype, rows, cols):
    x, ones = torch.randn(rows, cols).to(dtype), torch.ones(cols)
    mask, out = torch.ones(rows, dtype=torch.bool), torch.empty(rows, cols, dtype=dtype)
    native.forward(x, ones, ones, mask, out)
    assert device.launched == ""
    dscale, dshift = native.backward(x, x, ones, mask, out)
    assert dscale.tolist() == dshift.tolist() == [0.0] * cols


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_vectors_of_16_bytes_are_moved_only_where_every_address_and_stride_allows(device, dtype):
    rows, cols, vector = 5, 1032, 16 // dtype.itemsize
    vectors, single = (strips(cols // vector), strips(cols))
    scale, shift, mask = parameters(rows, cols)
    for forward, count in ((True, 2), (False, 3)):  # matrices that are read or written
        for odd in range(-1, count):  # the matrix with the unaligned address or stride; -1 for none
            for places in ({odd: (1, 0)}, {odd: (0, 1)}, {odd: (vector, vector)}):
                given = [rows_in_buffer(rows, cols, dtype, places.get(i, (0, 0)), seed=i)[0] for i in range(count)]
                if forward:
                    native.forward(given[0], scale, shift, mask, given[1])
                else:
                    native.backward(given[0], given[1], scale, mask, given[2])
                aligned = odd == -1 or places[odd] == (vector, vector)
                assert f"grid (1, {vectors if aligned else single}, 1)" in device.launched


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("odd", ["scale", "shift"])
@pytest.mark.parametrize("distance", [8, 16], ids="{} bytes".format)
def test_scale_and_shift_need_not_be_aligned(device, dtype, odd, distance):
    rows, cols = 5, 1032
    vectors, single = strips(cols // (16 // dtype.itemsize)), strips(cols)
    x, _ = rows_in_buffer(rows, cols, dtype, (0, 0), seed=0)
    scale, shift, mask = parameters(rows, cols)
    scale, shift = (aside(v, dtype, distance * (odd == name)) for v, name in ((scale, "scale"), (shift, "shift")))
    out = torch.empty_like(x)
    native.forward(x, scale, shift, mask, out)
    assert f"grid (1, {single}, 1)" in device.launched
    assert_close(out, forward_in_float64(x, scale, shift, mask))
    sums = native.backward(x, x, scale, mask, out)
    assert f"grid (1, {single if odd == 'scale' else vectors}, 1)" in device.launched
    for found, wanted in zip((out, *sums), backward_in_float64(x, x, scale, mask), strict=True):
        assert_close(found, wanted)


def aside(vector, dtype, distance):
    """The vector in the accumulator dtype of `dtype`, `distance` bytes from an aligned address."""
    total = torch.float64 if dtype == torch.float64 else torch.float32
    return torch.zeros(len(vector) + 8, dtype=total)[distance // total.itemsize :][: len(vector)].copy_(vector)


def strips(vectors):
    return -(-vectors // 128)


def test_a_wider_row_than_a_grid_has_strips_is_refused_by_name(device):
    most = 65535 * 128
    for cols, code in ((most + 1, 2), (8 * (most + 1), 2), (2 * (most + 1), 3)):
        limit = most * (1 if cols == most + 1 else 16 // (2 if code == 2 else 8))
        device.start()
        outcome = device.raw_forward(64, cols, 64, 64, 64, 128, cols, 1, cols, code, 0, 0).decode()
        assert outcome == f"cols: expected at most {limit} for these strides and addresses, got {cols}"
        outcome = device.raw_backward(64, cols, 64, cols, 0, 64, 64, 64, cols, 64, 64, 64, 1, cols, code, 0, 0).decode()
        assert outcome == f"cols: expected at most {limit} for these strides and addresses, got {cols}"
    rows = 32 * 2**31
    outcome = device.raw_forward(64, 1, 64, 64, 64, 128, 1, rows, 1, 0, 0, 0).decode()
    assert outcome == f"rows: expected at most {rows - 32} for these strides and addresses, got {rows}"


def test_kernels_run_on_the_device_and_stream_of_the_call_and_leave_the_current_device(device):
    x, (scale, shift, mask) = torch.ones(4, 8), parameters(4, 8)
    device.device, device.stream = 1, 77
    native.forward(x, scale, shift, mask, x)
    assert device.launched.startswith("device 1, stream 77, grid (1, 1, 1)")
    assert device.current_device() == 0
    native.backward(x, x.clone(), scale, mask, x)
    assert [line.partition(", grid")[0] for line in device.launched.splitlines()] == ["device 1, stream 77"] * 2
    device.device = 2
    with pytest.raises(RuntimeError, match="cudaSetDevice: invalid device ordinal"):
        native.forward(x, scale, shift, mask, x)
    assert device.current_device() == 0
