"""Errors for invalid matrices, features and arguments name the argument."""

import pytest
import torch

from mir_kernels.ops.frechet import frechet_distance, trace_sqrt_from_features, trace_sqrt_product

pytestmark = pytest.mark.usefixtures("warnings_are_failures")

INDEFINITE = torch.tensor([[1, 0.9, -0.9], [0.9, 1, 0.9], [-0.9, 0.9, 1]], dtype=torch.float64)


def good() -> torch.Tensor:
    return torch.eye(3, dtype=torch.float64)


@pytest.mark.parametrize(
    ("a", "b", "error", "message"),
    [
        ([[1.0]], good(), TypeError, "a: expected a torch.Tensor, got list"),
        (good().long(), good(), TypeError, "a: expected one of the dtypes"),
        (good(), good()[:2], ValueError, "b: expected square matrices"),
        (good(), torch.eye(4, dtype=torch.float64), ValueError, r"b: expected shape \(3, 3\) like a, got \(4, 4\)"),
        (good() * float("nan"), good(), ValueError, "a: expected finite values, got 9"),
        (good(), torch.diag(torch.tensor([1.0, 1.0, float("inf")])), ValueError, "b: expected finite values, got 1"),
        (good() + torch.eye(3).roll(1, 0), good(), ValueError, "a: expected symmetric matrices"),
        (good(), -good(), ValueError, "b: expected positive semi-definite matrices, got a diagonal entry -1"),
        (INDEFINITE, good(), ValueError, "a: expected positive semi-definite matrices, got one with an eigenvalue"),
        (good(), good() + 2 - 2 * good(), ValueError, "b: .* got one with an eigenvalue of -"),
        (
            good(),
            torch.tensor([[1.0, 1.0, 0], [1.0, 0, 0], [0, 0, 1.0]]),
            ValueError,
            "b: expected positive semi-definite",
        ),
    ],
)
@pytest.mark.parametrize("backend", ["linalg", "eager"])
def test_bad_matrices_are_refused_by_name(a, b, error, message, backend):
    with pytest.raises(error, match=message):
        trace_sqrt_product(a, b, backend=backend)


def test_bad_arguments_are_refused_by_name():
    a, mean = good(), torch.zeros(3)
    with pytest.raises(ValueError, match="precision: expected one of"):
        trace_sqrt_product(a, a, precision="half")
    with pytest.raises(ValueError, match="backend: trace_sqrt_product has no backend 'fast'"):
        trace_sqrt_product(a, a, backend="fast")
    with pytest.raises(ValueError, match=r"mean_y: expected shape \(3,\), got \(4,\)"):
        frechet_distance(mean, a, torch.zeros(4), a)
    with pytest.raises(ValueError, match="mean_x: expected finite values"):
        frechet_distance(mean / 0, a, mean, a)
    with pytest.raises(ValueError, match="cov_y: expected symmetric"):
        frechet_distance(mean, a, mean, a + torch.eye(3).roll(1, 0))
    with pytest.raises(ValueError, match=r"x: expected features \(n, d\) with n >= 2"):
        trace_sqrt_from_features(torch.zeros(1, 3), torch.zeros(4, 3))
    with pytest.raises(ValueError, match="y: expected 3 columns like x, got 4"):
        trace_sqrt_from_features(torch.zeros(5, 3), torch.zeros(5, 4))
