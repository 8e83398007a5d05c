"""Tokens or squares that are not finite: update does not check, reading names the columns, everything else works."""

import copy
import math

import pytest
import torch

from mir_kernels.ops.moments import StreamingMoments

BACKENDS = ["native", "eager", "reference"]
BAD = [math.nan, math.inf, -math.inf]
COUNTED = "the rows contain NaN or infinity"


def rows(n: int = 1500, d: int = 6, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed)).to(dtype)


def reads(moments: StreamingMoments) -> dict:
    return {"mean": lambda: moments.mean, "covariance": moments.covariance}


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
@pytest.mark.parametrize("precision", ["auto", "exact", "fast"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("n", [3, 1500])
def test_reading_names_the_columns(backend, precision, dtype, n):
    for bad in BAD:
        x = rows(n, dtype=dtype)
        x[2, 1], x[n // 2, 4] = bad, bad
        moments = StreamingMoments(6, backend=backend, precision=precision)
        moments.update(x)
        for name, read in reads(moments).items():
            for _ in range(2):
                with pytest.raises(ValueError, match=rf"^{name}: is not finite in 2 of 6 columns \(1, 4\): {COUNTED}"):
                    read()
        assert moments.count == n


def test_many_columns_are_counted_and_the_first_named():
    moments = StreamingMoments(20)
    moments.update(rows(5, 20).fill_(math.nan))
    with pytest.raises(ValueError, match=r"in 20 of 20 columns \(0, 1, 2, 3, 4, 5, 6, 7, ...\)"):
        _ = moments.mean


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
def test_both_infinities_in_one_column_are_found_too(backend):
    x = rows()
    x[0, 3], x[1, 3] = math.inf, -math.inf
    moments = StreamingMoments(6, backend=backend)
    moments.update(x)
    with pytest.raises(ValueError, match=r"1 of 6 columns \(3\)"):
        _ = moments.mean


@pytest.mark.parametrize(
    ("backend", "cuda_way"),
    [("native", False), ("eager", False), ("eager", True), ("reference", True)],  # there only the device counts
    indirect=["backend"],
)
def test_rows_that_the_mask_leaves_out_are_not_counted(backend, cuda_way, monkeypatch):
    monkeypatch.setattr(StreamingMoments, "_waits_for_nothing", lambda self: cuda_way)
    x = rows()
    mask = torch.ones(len(x), dtype=torch.bool)
    mask[::7] = False
    poisoned = torch.where(mask[:, None], x, math.nan)
    moments, plain = StreamingMoments(6, backend=backend), StreamingMoments(6, backend=backend)
    moments.update(poisoned, mask)
    plain.update(x[mask])
    torch.testing.assert_close(moments.mean, plain.mean, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(moments.covariance(), plain.covariance(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bad", BAD)
def test_everything_else_goes_on(bad):
    x = rows()
    x[700, 2] = bad
    moments, other = StreamingMoments(6), StreamingMoments(6)
    moments.update(x[:900])
    state = moments.state_dict()
    moments.update(x[900:])
    other.load_state_dict(state)
    other.update(x[900:])
    other.merge(moments)
    twin = copy.deepcopy(other).to("cpu")
    assert (moments.count, other.count, twin.count) == (1500, 3000, 3000)
    for one in (moments, other, twin):
        for name, read in reads(one).items():
            with pytest.raises(ValueError, match=rf"{name}: .* 1 of 6 columns \(2\)"):
                read()
    moments.reset()
    moments.update(rows())
    assert torch.isfinite(moments.covariance()).all()
    healthy = StreamingMoments(6)
    healthy.update(rows())
    other.load_state_dict(healthy.state_dict())
    assert torch.equal(other.covariance(), healthy.covariance())


@pytest.mark.parametrize("backend", ["native", "eager"], indirect=True)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_squares_beyond_float32_are_told_from_tokens_that_are_not_finite(backend, dtype):
    x = rows(dtype=dtype)
    x[:, 5] *= 1e25
    moments, exact = StreamingMoments(6, backend=backend), StreamingMoments(6, backend=backend, precision="exact")
    moments.update(x)
    exact.update(x)
    assert torch.isfinite(moments.mean).all()
    with pytest.raises(
        ValueError,
        match=r'^covariance: is not finite in 1 of 6 columns \(5\): the mean is finite, .* float32, .*"exact"',
    ):
        moments.covariance()
    torch.testing.assert_close(exact.covariance(), torch.cov(x.double().T), rtol=1e-9, atol=1e-9)
    exact.merge(moments)
    with pytest.raises(ValueError, match=r"covariance: .* of float32 in moments merged from another precision"):
        exact.covariance()


@pytest.mark.parametrize("precision", ["auto", "exact"])
def test_squares_beyond_float64_too(precision):
    x = rows(dtype=torch.float64) * 1e200
    moments = StreamingMoments(6, precision=precision)
    moments.update(x)
    assert torch.isfinite(moments.mean).all()
    with pytest.raises(ValueError, match=r"covariance: is not finite in 6 of 6 columns .* squares exceed the range"):
        moments.covariance()


def test_sums_beyond_float64_are_not_called_tokens_alone():
    moments = StreamingMoments(6)
    moments.update(torch.full((1500, 6), 1e308, dtype=torch.float64) * torch.tensor([1, -1]).repeat(3))
    moments.update(-torch.full((1500, 6), 1.7e308, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"columns .* or their sum exceeds the range of floating point"):
        moments.covariance()


def test_few_rows_are_said_first_and_no_rows_have_a_mean():
    moments = StreamingMoments(6)
    assert torch.equal(moments.mean, torch.zeros(6, dtype=torch.float64))
    moments.update(torch.full((1, 6), math.nan))
    with pytest.raises(ValueError, match="count: a covariance with ddof 1 requires more than 1 rows, got 1"):
        moments.covariance()
    with pytest.raises(ValueError, match="mean: is not finite in 6 of 6"):
        _ = moments.mean
