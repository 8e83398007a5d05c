"""The Triton kernels of the moments on a GPU, or in Triton's interpreter (in a process of test_interpreted.py)."""

import os

import pytest
import torch

pytest.importorskip("triton")

from mir_kernels.ops.moments import StreamingMoments, packed, reference, streaming, token_norms
from mir_kernels.ops.moments import triton as kernels
from tolerances import assert_close

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
pytestmark = [] if INTERPRETED else [pytest.mark.gpu]

FLOATS = [torch.float32, torch.bfloat16, torch.float16]
SIZES = [(1, 1), (33, 37), (70, 131)] if INTERPRETED else [(1, 1), (33, 37), (70, 131), (3001, 520), (5000, 1111)]


def product(x, mask=None, precision="auto", centre=None, second=None, vectors=None, weights=None):
    """The sum that the launcher adds to a triangle of zeros, as a square matrix; the shift; and the column sums."""
    d = x.shape[1]
    second = torch.zeros(packed.entries(d), dtype=torch.float64, device=DEVICE) if second is None else second
    centre = torch.zeros(d, dtype=torch.float64, device=DEVICE) if centre is None else centre
    vectors = torch.zeros(2, d, dtype=torch.float64, device=DEVICE) if vectors is None else vectors
    weights = torch.zeros(2, dtype=torch.float64, device=DEVICE) if weights is None else weights
    shift, sums = kernels.accumulate(second, x, mask, centre, vectors, weights, precision)
    return packed.unpack(second, d), shift, sums


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(("rows", "d"), SIZES)
def test_small_integers_multiply_exactly_under_any_mask(rows, d, dtype):
    x = torch.randint(-4, 5, (rows, d + 5), device=DEVICE).to(dtype)[:, 2 : d + 2]
    before = x.clone()
    for mask in (None, torch.rand(rows, device=DEVICE) < 0.5):
        # Rows outside the mask are NaN and never enter a product.
        poisoned = x if mask is None else torch.where(mask[:, None], x, float("nan"))
        kept = (x if mask is None else x[mask]).double()
        full, shift, sums = product(poisoned, mask, precision="fast" if dtype != torch.float32 else "auto")
        assert not shift.any()
        assert torch.equal(full, kept.T @ kept)
        assert torch.equal(sums, kept.sum(0))
    assert torch.equal(x, before)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_shifted_tiles_and_plain_tiles_meet_in_one_triangle(dtype):
    """One column of 131 is shifted: its group of 128 columns uses the second launch, the corner tile the first."""
    x = torch.randint(-3, 4, (41, 131), device=DEVICE).to(dtype)
    x[:, 7] += 64  # exact in every dtype, and so is the difference from the shift
    centre = x.double().mean(0).round()
    full, shift, sums = product(x, centre=centre)
    assert shift[7] == centre[7]
    assert (shift[1] == 0) == (dtype != torch.float32) or centre[1] == 0
    away = x.double() - shift
    assert torch.equal(full, away.T @ away)
    assert torch.equal(sums, away.sum(0))


def test_what_the_last_block_left_is_added_in_the_same_pass():
    d = 37
    x = torch.randint(-3, 4, (20, d), device=DEVICE).bfloat16()
    vectors = torch.randint(-9, 9, (2, d), device=DEVICE).double()
    weights = torch.tensor([3.0, -2.0], dtype=torch.float64, device=DEVICE)
    second = torch.full((packed.entries(d),), 0.5, dtype=torch.float64, device=DEVICE)
    full, _, _ = product(x, second=second, vectors=vectors, weights=weights)
    assert torch.equal(full, 0.5 + x.double().T @ x.double() + vectors.T @ (weights[:, None] * vectors))


def test_sums_of_several_chunks_of_rows_are_whole(monkeypatch):
    monkeypatch.setattr(kernels, "CHUNK", 32)
    x = torch.randint(-4, 5, (101, 40), device=DEVICE).bfloat16()
    full, _, sums = product(x)
    assert torch.equal(full, x.double().T @ x.double())
    assert torch.equal(sums, x.double().sum(0))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("ratio", [0, 150])
def test_error_is_within_the_promise_whatever_the_mean(dtype, ratio, monkeypatch, assert_moments):
    rows, d = (90, 40) if INTERPRETED else (9001, 777)
    monkeypatch.setattr(streaming, "ROWS", {"cpu": 48, "cuda": 4096})
    x = torch.randn(rows, d, dtype=torch.float64, device=DEVICE)
    x[:, 0] += ratio
    x[:, 1:20] -= torch.linspace(0, ratio / 15, 19, device=DEVICE)
    x[5, 3] = 900.0  # an outlier that is not exact after the shift of its column
    x = x.to(dtype)
    mask = torch.rand(rows, device=DEVICE) < 0.8
    moments = StreamingMoments(d, device=DEVICE, backend="triton")
    for part, keep in zip(x.split(37), mask.split(37), strict=True):
        moments.update(part, keep)
    assert_moments(moments, x[mask])


def test_float32_columns_of_any_size_keep_their_digits():
    """Each column has a separate power of two: deviations of 1e-25 and 1e15, zeros, a value a thousand times larger."""
    x = torch.randn(300, 6, generator=torch.Generator().manual_seed(0))
    x[17, 2] = 1000.0
    x = (x * torch.tensor([1e-25, 1.0, 1.0, 1e15, 1.0, 0.0])).to(DEVICE)
    mask = torch.arange(300, device=DEVICE) % 5 != 0
    kept = x[mask].double()
    centre = kept.mean(0)
    full, shift, sums = product(x, mask, centre=centre)
    away = kept - shift
    sigma = away.square().sum(0).sqrt().clamp(min=1e-100)
    assert ((full - away.T @ away).abs() / (sigma[:, None] * sigma)).max() <= 1e-6
    assert not full[5].any()
    assert ((sums - away.sum(0)).abs() / sigma).max() <= 1e-6


def test_fast_float32_products_hold_eleven_bits():
    x = torch.randn(200, 40, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    full, shift, _ = product(x, precision="fast")
    exact = x.double().T @ x.double()
    sigma = exact.diagonal().sqrt()
    assert not shift.any()
    assert 1e-6 < ((full - exact).abs() / (sigma[:, None] * sigma)).max() <= 2.0**-11


@pytest.mark.parametrize("precision", ["auto", "fast"])
def test_what_is_not_finite_shows(precision):
    x = torch.ones(20, 5, device=DEVICE)
    x[3, 1], x[4, 2] = float("nan"), float("inf")
    full, _, _ = product(x, precision=precision)
    assert not full[1].isfinite().any()
    assert not full[2, 2].isfinite()
    assert full[3:, 3:].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_columns_just_below_the_threshold_of_shifting_keep_the_promise(dtype, monkeypatch, assert_moments):
    """The largest unshifted sums in the tensor cores, which truncate: every column has a mean."""
    rows, d = (700, 33) if INTERPRETED else (streaming.DIRECT, 512)
    monkeypatch.setattr(streaming, "ROWS", {"cpu": 350, "cuda": streaming.ROWS["cuda"]})
    x = (torch.randn(rows, d, device=DEVICE) + 0.97 * kernels.SHIFT_ABOVE).to(dtype)
    moments = StreamingMoments(d, device=DEVICE, backend="triton")
    moments.update(x)
    assert_moments(moments, x)


def test_a_block_larger_than_what_is_gathered_goes_in_directly(monkeypatch, assert_moments):
    monkeypatch.setattr(streaming, "ROWS", {"cpu": 16, "cuda": 16})
    monkeypatch.setattr(streaming, "DIRECT", 32)
    folded, fold = [], StreamingMoments._fold
    monkeypatch.setattr(StreamingMoments, "_fold", lambda m, x, mask: (folded.append(len(x)), fold(m, x, mask)))
    x = torch.randn(70, 9, device=DEVICE).bfloat16() + 3
    moments = StreamingMoments(9, device=DEVICE, backend="triton")
    moments.update(x[:10])
    moments.update(x[10:60])
    assert folded == [32, 16]  # the last two wait with the ten before them
    moments.update(x[60:])
    assert_moments(moments, x)


@pytest.mark.parametrize("order", ["masked first", "masked last", "in turn"])
def test_updates_with_and_without_a_mask_follow_each_other(order, monkeypatch, assert_moments):
    monkeypatch.setattr(streaming, "ROWS", {"cpu": 16, "cuda": 16})
    x = torch.randn(91, 9, device=DEVICE).bfloat16() + 3
    mask = torch.rand(91, device=DEVICE) < 0.6
    moments, kept = StreamingMoments(9, device=DEVICE, backend="triton"), []
    for number, (part, keep) in enumerate(zip(x.split(7), mask.split(7), strict=True)):
        masked = {"masked first": number < 6, "masked last": number > 6, "in turn": number % 2 == 0}[order]
        moments.update(part, keep if masked else None)
        kept.append(part[keep] if masked else part)
        if number == 8:
            state = {key: value.clone() for key, value in moments.state_dict().items()}
            moments = StreamingMoments(9, device=DEVICE, backend="triton")
            moments.load_state_dict(state)
        if number == 10:
            other = StreamingMoments(9, device=DEVICE, backend="triton")
            other.merge(moments)
            moments = other
    assert_moments(moments, torch.cat(kept))


def test_float64_is_multiplied_in_float64(assert_moments):
    x = torch.randn(40, 9, device=DEVICE, dtype=torch.float64) + 1e5
    moments = StreamingMoments(9, device=DEVICE, backend="triton")
    moments.update(x)
    assert_moments(moments, x, 1e-9)
    with pytest.raises(TypeError, match="x: expected float32, bfloat16 or float16 for the Triton product, got float64"):
        product(x)


@pytest.mark.parametrize("dtype", [*FLOATS, torch.float64], ids=str)
@pytest.mark.parametrize("d", [1, 37, 5000])
def test_norms_are_right_to_float32_and_nothing_overflows_on_the_way(d, dtype):
    x = torch.rand(7, d, device=DEVICE, dtype=torch.float64) - 0.5
    for scale in (1.0, float(torch.finfo(dtype).max) / d if dtype != torch.float64 else 1e30 / d, 1e-30):
        scaled = (x * scale).to(dtype)
        assert_close(token_norms(scaled, backend="triton"), reference.token_norms(scaled))
    if dtype != torch.float16:
        x = torch.full((5, d), 1.0, device=DEVICE)
        x = (x * torch.tensor([2.0**58, 2.0**60, 2.0**-58, 2.0**-62, 2.0**-126], device=DEVICE)[:, None]).to(dtype)
        x[3, 0] *= 4  # one element has a different range from the rest
        assert_close(token_norms(x, backend="triton"), reference.token_norms(x))
    x = torch.tensor([[float("nan"), 1.0], [float("inf"), 1.0], [0.0, 0.0], [3.0, 4.0]], device=DEVICE).to(dtype)
    norms = token_norms(x, backend="triton")
    assert norms[0].isnan()
    assert norms[1:].tolist() == [float("inf"), 0.0, 5.0]
