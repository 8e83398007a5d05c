"""StreamingMoments for any split, order, mask, merge tree, dtype and strides, and for very few rows."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mir_kernels.ops.moments import StreamingMoments, reference, streaming

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_split_order_mask_merge_tree_and_dtype_gives_the_same_moments(data):
    d = data.draw(st.integers(1, 5), "d")
    parts = data.draw(st.lists(st.integers(0, 40), min_size=1, max_size=8), "rows")
    seed = data.draw(st.integers(0, 2**31), "seed")
    precision = data.draw(st.sampled_from(["fast", "auto", "exact"]), "precision")
    generator = torch.Generator().manual_seed(seed)
    before, streaming.ROWS = streaming.ROWS, {"cpu": 16, "cuda": 16}
    try:
        kept, accumulators = [], []
        for rows in parts:
            dtype = data.draw(st.sampled_from(DTYPES))
            x = (torch.randn(rows, d, generator=generator) * 2 + 5).to(dtype)
            mask = data.draw(st.sampled_from([None, torch.bool, torch.uint8]))
            if mask is not None:
                mask = (torch.rand(rows, generator=generator) < 0.6).to(mask)
            kept.append(x.double() if mask is None else x.double()[mask != 0])
            if not accumulators or data.draw(st.booleans()):
                accumulators.append(StreamingMoments(d, precision=precision))
            data.draw(st.sampled_from(accumulators)).update(x, mask)
            if data.draw(st.booleans()):
                accumulators[-1].mean  # noqa: B018
        while len(accumulators) > 1:
            left = accumulators.pop(data.draw(st.integers(0, len(accumulators) - 1)))
            accumulators[data.draw(st.integers(0, len(accumulators) - 1))].merge(left)
        moments, x = accumulators[0], torch.cat(kept)
    finally:
        streaming.ROWS = before
    assert moments.count == x.shape[0]
    if x.shape[0] == 0:
        assert not moments.mean.any()
    if x.shape[0] > 1:
        limit = 1e-11 if precision == "exact" else 1e-5
        torch.testing.assert_close(moments.mean, reference.mean(x), rtol=0, atol=limit)
        torch.testing.assert_close(moments.covariance(), reference.covariance(x), rtol=0, atol=4 * limit)


@settings(max_examples=10, deadline=None)
@given(data=st.data())
def test_blocks_as_large_as_they_are_give_the_same_moments_whatever_split_mask_and_dtype(data):
    """Integer products, a second macro-tile of 96 columns and a second panel of 256, each with a remainder."""
    d = data.draw(st.sampled_from([97, 257, 300]), "d")
    parts = data.draw(st.lists(st.sampled_from([1, 63, 511, 1024, 1500]), min_size=1, max_size=4), "rows")
    dtype = data.draw(st.sampled_from(DTYPES), "dtype")
    ratio = data.draw(st.sampled_from([0, 5, 300]), "mean / deviation")
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31), "seed"))
    kept, moments = [], StreamingMoments(d)
    for rows in (1100, *parts):
        x = torch.randn(rows, d, generator=generator) * torch.linspace(0.1, 3, d)
        x[:, ::50] += ratio * torch.linspace(0.1, 3, d)[::50]
        x[::577, 1::60] *= 1000
        x = x.to(dtype)
        mask = torch.rand(rows, generator=generator) < 0.95 if data.draw(st.booleans(), "mask") else None
        kept.append(x if mask is None else x[mask])
        other = StreamingMoments(d) if data.draw(st.booleans(), "merge") else moments
        other.update(x, mask)
        if other is not moments:
            moments.merge(other)
    rows = torch.cat(kept).double()
    true = reference.covariance(rows)
    sigma = true.diagonal().sqrt()
    assert moments.count == len(rows)
    assert ((moments.covariance() - true).abs() <= 1e-5 * sigma[:, None] * sigma).all()
    assert ((moments.mean - reference.mean(rows)).abs() <= 1e-5 * sigma).all()


def test_bits_do_not_depend_on_how_rows_were_split(small_blocks):
    x = torch.randn(130, 40).bfloat16()
    mask = torch.rand(130) < 0.7
    results = []
    for split in ([130], [1] * 130, [16, 50, 64], [15, 17, 98]):
        moments = StreamingMoments(40)
        for part, keep in zip(x.split(split), mask.split(split), strict=True):
            moments.update(part, keep)
        results.append((moments.mean, moments.covariance()))
    for mean, covariance in results[1:]:
        assert torch.equal(mean, results[0][0])
        assert torch.equal(covariance, results[0][1])


def test_no_rows_and_one_row(run):
    moments = StreamingMoments(4, device=run.device, backend=run.backend)
    moments.update(torch.empty(0, 4, device=run.device))
    moments.update(torch.ones(2, 3, 4, device=run.device), torch.zeros(2, 3, dtype=torch.bool, device=run.device))
    assert moments.count == 0
    assert moments.mean.tolist() == [0, 0, 0, 0]
    with pytest.raises(ValueError, match="count: a covariance with ddof 1 requires more than 1 rows, got 0"):
        moments.covariance()
    row = torch.arange(4.0, device=run.device)
    moments.update(row)
    assert moments.count == 1
    assert moments.mean.tolist() == [0, 1, 2, 3]
    assert moments.covariance(ddof=0).abs().max() == 0
    with pytest.raises(ValueError, match="got 1"):
        moments.covariance()


@pytest.mark.parametrize("masked", [False, True])
def test_any_strides_are_read_and_inputs_are_left_alone(run, masked, assert_moments):
    base = torch.randn(12, 30, 14)
    for x in (base.transpose(0, 2), base[:, ::2, 1:8].transpose(1, 2), base[:, :1].expand(12, 20, 14), base.flip(0)):
        x = x.to(run.device)
        before, d = x.clone(), x.shape[-1]
        mask = torch.rand(x.shape[:-1], device=run.device) < 0.5 if masked else None
        kept = None if mask is None else mask.clone()
        moments = StreamingMoments(d, device=run.device, backend=run.backend)
        moments.update(x, mask)
        assert_moments(moments, x.reshape(-1, d) if mask is None else x[mask])
        assert torch.equal(x, before)
        assert mask is None or torch.equal(mask, kept)


def test_what_a_mask_leaves_out_may_be_anything(run, assert_moments):
    x = torch.randn(50, 9, device=run.device)
    mask = torch.arange(50, device=run.device) % 3 == 0
    poisoned = torch.where(mask[:, None], x, float("nan"))
    moments = StreamingMoments(9, device=run.device, backend=run.backend)
    moments.update(poisoned, mask)
    assert_moments(moments, x[mask])
