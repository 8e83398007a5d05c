"""Replacements of the published functions: correct values, their signatures, and in-place semantics."""

import inspect

import numpy as np
import pytest
import scipy.linalg
import torch

from integration import mir_oracle
from integration.metric.test_metric import features, pair
from modality_integration import official


def covariances(n, d):
    vision, text = pair(n, n + 30, d)
    return [torch.from_numpy(np.cov(x.double(), rowvar=False)) for x in (vision, text)]


@pytest.mark.parametrize("name", ["calculate_fid", "calculate_fid_pytorch"])
@pytest.mark.parametrize(
    ("n", "m", "d", "how"), [(300, 250, 48, "sqrtm"), (40, 60, 100, "eigh"), (30, 300, 64, "eigh")]
)
def test_distances_are_the_frechet_distance_in_float64(name, n, m, d, how):
    a, b = pair(n, m, d)
    fid = getattr(official, name)(a, b)
    assert isinstance(fid, float)
    assert fid == pytest.approx(mir_oracle.distance(a, b, rule="none", normalize=False, how=how), rel=1e-6)


def test_accurate_mode_rounds_its_inputs_to_float32_as_published():
    a, b = pair(300, 250, 32)
    a, b = a.double() + 1e-9, b.double()
    assert official.calculate_fid(a, b) == official.calculate_fid_pytorch(a.float(), b.float())


def test_root_of_a_product_of_covariances_is_its_square_root():
    a, b = covariances(400, 40)
    product = a @ b
    root = official.matrix_sqrt(product)
    assert torch.linalg.norm(root @ root - product) <= 1e-9 * torch.linalg.norm(product)
    expected = scipy.linalg.sqrtm(product.numpy())
    assert np.linalg.norm(root.numpy() - expected) <= 1e-7 * np.linalg.norm(expected)
    # The published iteration returns the product itself.
    assert torch.linalg.norm(root - product) > 0.1 * torch.linalg.norm(product)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_root_of_a_symmetric_matrix_is_symmetric_and_keeps_its_dtype(dtype):
    a = covariances(400, 40)[0].to(dtype)
    root = official.matrix_sqrt(a)
    assert root.dtype == dtype
    assert torch.linalg.norm(root @ root - a) <= 1e-5 * torch.linalg.norm(a)
    assert torch.allclose(root, root.mT, rtol=0, atol=1e-6)


def test_root_has_the_gradient_of_the_square_root():
    a, b = covariances(200, 6)
    assert torch.autograd.gradcheck(official.matrix_sqrt, (a @ b).requires_grad_())


@pytest.mark.parametrize(
    ("matrix", "message"),
    [
        (torch.tensor([[1.0, 2.0], [0.0, -1.0]]), "no real square root"),
        (torch.tensor([[0.0, 1.0], [0.0, 0.0]]), "no real square root"),
        (torch.diag(torch.tensor([4.0, -1.0])), "positive semi-definite"),
        (torch.ones(2, 3), "square matrices"),
        (torch.ones(2, 3, 3), "expected one matrix"),
    ],
)
def test_what_has_no_real_root_is_refused(matrix, message):
    with pytest.raises(ValueError, match=message):
        official.matrix_sqrt(matrix)


def test_fast_mode_under_its_own_name_is_what_the_published_iteration_gives():
    a, b = (features(n, 32, n, decay=0.1, tails=False).double() for n in (300, 250))
    mean_a, mean_b = a.mean(0), b.mean(0)
    cov_a, cov_b = torch.from_numpy(np.cov(a, rowvar=False)), torch.from_numpy(np.cov(b, rowvar=False))
    product = cov_a @ cov_b
    y, z = product, torch.eye(32, dtype=torch.float64)
    for _ in range(5):  # Y = (Y + Z^-1 A)/2, Z = (Z + Y^-1 A)/2 from (A, I)
        y = 0.5 * (y + torch.linalg.inv(z) @ product)
        z = 0.5 * (z + torch.linalg.inv(y) @ product)
    expected = (mean_a - mean_b).square().sum() + cov_a.trace() + cov_b.trace() - 2 * y.trace()
    assert official.fid_of_published_fast_mode(a, b) == pytest.approx(expected.item(), rel=1e-9)
    assert official.fid_of_published_fast_mode(a, a) > 0.1 * cov_a.trace().item()  # it is not a distance


def test_median_replacement_is_in_place_and_returns_the_tensor():
    data = features(500, 16, 3)
    expected = mir_oracle.process(data.double().numpy(), "median")
    out = official.replace_outliers_with_median_l2(data)
    assert out is data
    assert np.array_equal(data.numpy(), expected.astype(np.float32))
    assert not np.array_equal(features(500, 16, 3).numpy(), data.numpy())


def test_interquartile_replacement_is_in_place_and_returns_the_tensor():
    data = features(500, 16, 4)
    before = data.double().numpy().copy()
    norms = mir_oracle.norms(before)
    first, third = np.quantile(norms, [0.25, 0.75])
    out = (norms < first - 1.5 * (third - first)) | (norms > third + 1.5 * (third - first))
    before[out] = np.sort(before, axis=0)[(len(before) - 1) // 2]
    assert out.sum() > 5
    assert official.replace_outliers_with_iqr_l2(data) is data
    assert np.array_equal(data.numpy(), before.astype(np.float32))


@pytest.mark.parametrize("name", ["replace_outliers_with_median_l2", "replace_outliers_with_iqr_l2"])
def test_data_without_outliers_is_left_alone(name):
    for data in (torch.ones(50, 4), torch.ones(1, 4), torch.ones(0, 4)):
        before = data.clone()
        assert torch.equal(getattr(official, name)(data), before)


def test_signatures_are_the_published_ones():
    expected = {
        "matrix_sqrt": ["input"],
        "calculate_fid": ["tensor_A", "tensor_B"],
        "calculate_fid_pytorch": ["tensor_A", "tensor_B"],
        "replace_outliers_with_median_l2": ["data"],
        "replace_outliers_with_iqr_l2": ["data"],
    }
    for name, parameters in expected.items():
        assert list(inspect.signature(getattr(official, name)).parameters) == parameters
