"""Tr((Sx Sy)^(1/2)) from features equals that from their covariances, at any scale, with massive tokens."""

import math

import pytest
import torch

from mir_kernels.ops.frechet import trace_sqrt_from_features
from mir_kernels.ops.frechet.report import TOLERANCE

pytestmark = pytest.mark.usefixtures("warnings_are_failures")


@pytest.mark.parametrize(
    ("n", "m", "d"), [(5, 9, 30), (9, 5, 30), (40, 9, 30), (9, 40, 30), (50, 70, 30), (30, 30, 30), (2, 2, 3)]
)
@pytest.mark.parametrize("bounds", [False, True])
@pytest.mark.parametrize("backend", ["linalg", "eager"])
def test_features_give_what_their_covariances_give(n, m, d, bounds, backend):
    generator = torch.Generator().manual_seed(n)
    x, y = (torch.randn(k, d, generator=generator, dtype=torch.float64) + 100 for k in (n, m))
    found = trace_sqrt_from_features(x, y, bounds=bounds, backend=backend)
    xc, yc = x - x.mean(0), y - y.mean(0)
    expected = torch.linalg.svdvals(xc @ yc.T).sum() / math.sqrt((n - 1) * (m - 1))
    value = found.value if bounds else found
    assert (value / expected - 1).abs() <= (1e-10 if backend == "linalg" else TOLERANCE["float32"])
    if bounds:
        assert found.lower <= expected * (1 + 1e-12)
        assert expected * (1 - 1e-12) <= found.upper
        assert found.upper - found.lower <= 1e-6 * expected


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_features_of_any_scale(scale):
    x, y = torch.randn(6, 20), torch.randn(8, 20)
    expected = trace_sqrt_from_features(x.double(), y.double())
    value = trace_sqrt_from_features(x * scale, y / scale)
    assert (value / expected - 1).abs() <= 1e-5


def test_features_with_massive_tokens_and_constant_columns():
    x, y = torch.randn(20, 64, dtype=torch.float64), torch.randn(30, 64, dtype=torch.float64)
    x[:, 5], y[:, 5] = 7.0, 7.0
    x[0] *= 1e3
    value = trace_sqrt_from_features(x, y, bounds=True)
    assert torch.isfinite(value.value)
    assert value.upper - value.lower <= 1e-8 * value.value
