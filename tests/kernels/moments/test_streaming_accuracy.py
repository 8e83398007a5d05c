"""The error of StreamingMoments against float64 stays within its bound for all means, dtypes and hard streams."""

import pytest
import torch

from mir_kernels.ops.moments import StreamingMoments

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def large_mean(n, d, ratio, dtype, seed=0):
    """Rows with mean / deviation `ratio` in the first column, up to ratio / 15 in forty others, and 0 in the rest."""
    x = torch.randn(n, d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    x[:, 0] = 2 * x[:, 0] + 2 * ratio
    x[:, 1:41] -= torch.linspace(0, ratio / 15, 40, dtype=torch.float64)
    return x.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("ratio", [0, 150, 1e4])
def test_error_is_within_the_promise_whatever_the_mean(run, dtype, ratio, assert_moments):
    if dtype == torch.float16 and ratio > 1000:
        ratio = 1000  # the largest float16 is 65504
    x = large_mean(2500, 300, ratio, dtype).to(run.device)
    moments = StreamingMoments(300, device=run.device, backend=run.backend)
    moments.update(x)
    assert_moments(moments, x, 1e-5 if dtype != torch.float64 else 1e-9)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_exact_is_exact(run, dtype, assert_moments):
    x = large_mean(1500, 130, 150, dtype).to(run.device)
    moments = StreamingMoments(130, device=run.device, backend=run.backend, precision="exact")
    moments.update(x[:700])
    moments.update(x[700:])
    assert_moments(moments, x, 1e-10)


@pytest.mark.parametrize(
    "stream",
    [
        lambda x: x.sort(0).values,  # every column drifts through its whole range
        lambda x: torch.cat([x[:5] * 0, x[5:] + 1e4]),  # the first rows are unrelated to the rest
        lambda x: torch.cat([x[:1000], x[1000:] * 1000 - 5e4]),
        lambda x: x * torch.where(torch.arange(len(x)) % 577 == 0, 1000.0, 1.0)[:, None],  # massive activations
        lambda x: (x > 1).to(x.dtype) + 300,  # two values
        lambda x: x * torch.logspace(-12, 12, x.shape[1]),  # very different deviations
    ],
    ids=["sorted", "late", "jump", "massive", "binary", "scales"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_error_is_within_the_promise_on_hard_streams(run, stream, dtype, assert_moments):
    x = stream(torch.randn(3000, 60, generator=torch.Generator().manual_seed(1))).to(dtype).to(run.device)
    moments = StreamingMoments(60, device=run.device, backend=run.backend)
    for part in x.split(577):
        moments.update(part)
        moments.mean  # noqa: B018  # reading folds in gathered rows, so blocks are small and uneven
    assert_moments(moments, x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("part", [0.9, 1.3])
def test_products_that_are_lost_beside_a_large_one_stay_within_the_promise(run, dtype, part, assert_moments):
    x = torch.full((4096, 8), (part * 2**-24) ** 0.5)
    x[1::2] *= -1
    x[0] = 1  # each later product is below the last place of this one, but their sum is not
    moments = StreamingMoments(8, device=run.device, backend=run.backend)
    moments.update(x.to(dtype).to(run.device))
    assert_moments(moments, x.to(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_constant_column_has_no_covariance_at_all(run, dtype):
    x = torch.randn(2100, 6).to(dtype)
    x[:, 2], x[:, 4] = 0.1, -3000.0
    moments = StreamingMoments(6, device=run.device, backend=run.backend)
    moments.update(x.to(run.device))
    covariance = moments.covariance()
    for column in (2, 4):
        assert moments.mean[column].item() == pytest.approx(x[0, column].item(), rel=1e-15)
        assert covariance[column].abs().max() <= 1e-12 * x[0, column].abs()
        assert covariance[column, column] >= 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("deviation", [2e-15, 4e16])
def test_the_ends_of_the_range_keep_the_promise(run, dtype, deviation, assert_moments):
    x = (deviation * (torch.randn(4096, 40, dtype=torch.float64) + 3.9)).to(dtype).to(run.device)
    moments = StreamingMoments(40, device=run.device, backend=run.backend)
    moments.update(x)
    assert_moments(moments, x)
