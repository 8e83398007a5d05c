"""The published code's function names and signatures, computed right; and its fast mode under a name of its own.

Coming from the published code:

- `matrix_sqrt` and `calculate_fid_pytorch` (its fast mode) iterated Y = (Y + Z^-1 A)/2, Z = (Z + Y^-1 A)/2 from Y = A,
  Z = I. That pair is a fixed point of the iteration, so the "root" of A was A itself. Here they give the square root.
- `calculate_fid` (its accurate mode) took the square root of a float32 product, which breaks down with fewer tokens
  than dimensions. Here the same definition is computed in float64, from the features when there are few.
- `fid_of_published_fast_mode` gives what the published fast mode gave, for comparison with numbers made by it.
- the two outlier functions write in place and return the tensor, as published.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mir_kernels import _checks, sqrtm, token_norms
from modality_integration.metric.features import feature_layer_result
from modality_integration.metric.options import MetricOptions
from modality_integration.metric.outliers import three_sigma

_UNPROCESSED = MetricOptions(outliers="none", normalize=False)


def matrix_sqrt(input: Tensor) -> Tensor:
    """The principal square root of a square matrix (d, d) with non-negative real eigenvalues; autograd.

    A symmetric matrix goes to `mir_kernels.sqrtm`, any other (as a product of two covariances is) through its
    eigenvectors in float64. The result has the input's dtype. ValueError where the eigenvectors do not give a root:
    eigenvalues on the negative axis, or too few tokens for the covariances to have full rank; `calculate_fid` takes
    features of any number.
    """
    _checks.square("input", input)
    if input.dim() != 2:
        raise ValueError(f"input: takes one matrix (d, d), got {tuple(input.shape)}")
    if torch.allclose(input, input.mT, rtol=0.0, atol=1e-7 * input.detach().abs().max().item()):
        return sqrtm(input.double(), precision="float64").to(input.dtype)
    matrix = input.double()
    values, vectors = torch.linalg.eig(matrix)
    root = torch.linalg.solve(vectors, vectors * values.sqrt(), left=False)
    size = matrix.detach().norm()
    error = ((root @ root).real - matrix).detach().norm() + root.detach().imag.norm() ** 2
    if not error <= 1e-5 * size:
        raise ValueError(
            f"input: no real square root was found (|Y^2 - A| / |A| is {(error / size).item():.1e}); covariances of "
            "fewer tokens than dimensions have a singular product: use calculate_fid, which starts from the features"
        )
    return root.real.to(input.dtype)


def calculate_fid(tensor_A: Tensor, tensor_B: Tensor) -> float:
    """The Fréchet distance of features (n, d) and (m, d): |mu_A - mu_B|^2 + Tr(C_A + C_B - 2 (C_A C_B)^(1/2)), ddof 1.

    The published accurate mode's definition, of the inputs as float32, in float64 arithmetic; never negative.
    """
    return calculate_fid_pytorch(tensor_A.type(torch.float32), tensor_B.type(torch.float32))


@torch.no_grad()
def calculate_fid_pytorch(tensor_A: Tensor, tensor_B: Tensor) -> float:
    """As `calculate_fid`, of the inputs in their own dtype."""
    return feature_layer_result(tensor_A, tensor_B, 1, _UNPROCESSED).terms.distance


@torch.no_grad()
def fid_of_published_fast_mode(tensor_A: Tensor, tensor_B: Tensor) -> float:
    """|mu_A - mu_B|^2 + Tr C_A + Tr C_B - 2 Tr(C_A C_B): what the published fast mode returns, in exact arithmetic.

    No square root is in it: the published iteration starts at a fixed point (see the module) and returns C_A C_B. It is
    not a distance (it may be negative, and is not 0 for equal inputs) and is here to reproduce old numbers only.
    """
    a, b = tensor_A.double(), tensor_B.double()
    mean_a, mean_b = a.mean(dim=0), b.mean(dim=0)
    a, b = a - mean_a, b - mean_b
    cov_a, cov_b = a.mT @ a / (len(a) - 1), b.mT @ b / (len(b) - 1)
    product = (cov_a * cov_b.mT).sum()
    return ((mean_a - mean_b).square().sum() + cov_a.trace() + cov_b.trace() - 2.0 * product).item()


def replace_outliers_with_median_l2(data: Tensor) -> Tensor:
    """Rows of data (n, d) with |norm - median| > 3 std (ddof 1) become the column medians, in place; returns data."""
    if len(data) < 2:
        return data  # no deviation: nothing stands out
    norms = token_norms(data.detach()).cpu()
    outlier = ~three_sigma(norms).keep(norms)
    return _replace(data, outlier)


def replace_outliers_with_iqr_l2(data: Tensor) -> Tensor:
    """Rows of data (n, d) with norms 1.5 interquartile ranges beyond the quartiles become the column medians, in place.

    Quartiles are interpolated linearly. Returns data.
    """
    if len(data) < 2:
        return data
    norms = token_norms(data.detach()).cpu().double().numpy()
    first, third = (float(q) for q in _quartiles(norms))
    margin = 1.5 * (third - first)
    return _replace(data, torch.from_numpy((norms < first - margin) | (norms > third + margin)))


def _quartiles(norms):
    import numpy as np  # torch.quantile stops at 16 million entries

    return np.quantile(norms, (0.25, 0.75))


def _replace(data: Tensor, outlier: Tensor) -> Tensor:
    if outlier.any():
        data[outlier.to(data.device)] = data.median(dim=0).values
    return data
