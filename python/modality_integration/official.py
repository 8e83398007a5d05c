"""Drop-in replacements for the functions of the published code, computed correctly, plus its fast mode for reference.

When migrating from the published code:

- `matrix_sqrt` and `calculate_fid_pytorch` (its fast mode) iterated Y = (Y + Z^-1 A)/2, Z = (Z + Y^-1 A)/2 from Y = A,
  Z = I. That pair is a fixed point of the iteration, so the "root" of A was A itself. Here they use the true square
  root.
- `calculate_fid` (its accurate mode) took the square root of a float32 product, which breaks down with fewer tokens
  than dimensions. Here the same definition is computed in float64, directly from the features when there are few.
- `fid_of_published_fast_mode` reproduces the values of the published fast mode, to compare with old results.
- The two outlier functions write in place and return the tensor, as published. Non-finite values mark the same number
  of rows as the published formulas: a NaN norm, or a NaN standard deviation, marks none.

numpy arrays are accepted too, except where the argument is written in place. Invalid input raises a ValueError,
TypeError or RuntimeError that names the argument.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mir_kernels import _checks, sqrtm, token_norms
from modality_integration.metric.features import feature_layer_result
from modality_integration.metric.options import MetricOptions
from modality_integration.metric.outliers import three_sigma

if TYPE_CHECKING:
    from mir_kernels._arrays import Array

_UNPROCESSED = MetricOptions(outliers="none", normalize=False)


def matrix_sqrt(input: Array) -> Tensor:
    """The principal square root of a square matrix (d, d) with non-negative real eigenvalues; autograd.

    A matrix that is symmetric up to the rounding of its dtype goes to `mir_kernels.sqrtm`. Any other, such as a product
    of two covariances, is decomposed into eigenvectors. Both run in float64, and the result has the input's dtype.
    Eigenvalues that are negative by no more than that rounding count as 0, as for covariances of fewer tokens than
    dimensions. ValueError if an entry is not finite, or if no root is found: eigenvalues on the negative axis, or
    eigenvectors that do not yield a root.
    """
    input = _checks.square("input", input)
    if input.dim() != 2:
        raise ValueError(f"input: expected one matrix (d, d), got {tuple(input.shape)}")
    _checks.finite("input", input)
    rounding = _checks.asymmetry_allowed(input.dtype)
    matrix = input.double()
    largest = matrix.detach().abs().max()
    scaled = matrix / torch.where(largest > 0, largest, 1.0)
    if bool((scaled.detach() - scaled.detach().mT).abs().max() <= rounding):
        try:
            return sqrtm(input, precision="float64")
        except ValueError as refusal:
            raise ValueError(f"input: {str(refusal).removeprefix('a: ')}") from refusal
    values, vectors = torch.linalg.eig(scaled)
    root = torch.linalg.solve_ex(vectors, vectors * values.sqrt(), left=False)[0].real
    error = ((root @ root - scaled).norm() / scaled.norm()).item()
    if not error <= max(rounding, 1e-5):  # `not <=` also rejects NaN
        raise ValueError(
            f"input: no real square root was found (|Y^2 - A| / |A| is {error:.1e}); covariances of fewer tokens than "
            "dimensions have a singular product: use calculate_fid, which starts from the features"
        )
    return (root * largest.sqrt()).to(input.dtype)


def calculate_fid(tensor_A: Array, tensor_B: Array) -> float:
    """The Fréchet distance of features (n, d) and (m, d): |mu_A - mu_B|^2 + Tr(C_A + C_B - 2 (C_A C_B)^(1/2)), ddof 1.

    Definition of the published accurate mode: inputs rounded to float32, then float64 arithmetic. Never negative.
    """
    tensor_A, tensor_B = _features(tensor_A, tensor_B)
    return calculate_fid_pytorch(tensor_A.type(torch.float32), tensor_B.type(torch.float32))


@torch.no_grad()
def calculate_fid_pytorch(tensor_A: Array, tensor_B: Array) -> float:
    """Like `calculate_fid`, without rounding the inputs to float32."""
    tensor_A, tensor_B = _features(tensor_A, tensor_B)
    for name, tensor in (("tensor_A", tensor_A), ("tensor_B", tensor_B)):
        _checks.floating(name, tensor)
    return feature_layer_result(tensor_A, tensor_B, 1, _UNPROCESSED).terms.distance


@torch.no_grad()
def fid_of_published_fast_mode(tensor_A: Array, tensor_B: Array) -> float:
    """|mu_A - mu_B|^2 + Tr C_A + Tr C_B - 2 Tr(C_A C_B): the value of the published fast mode in exact arithmetic.

    It contains no square root: the published iteration starts at a fixed point (see the module docstring) and returns
    C_A C_B. It is not a distance: it may be negative and is not 0 for equal inputs. Use it only to reproduce old
    numbers.
    """
    tensor_A, tensor_B = _features(tensor_A, tensor_B)
    a, b = tensor_A.double(), tensor_B.double()
    mean_a, mean_b = a.mean(dim=0), b.mean(dim=0)
    a, b = a - mean_a, b - mean_b
    cov_a, cov_b = a.mT @ a / (len(a) - 1), b.mT @ b / (len(b) - 1)
    product = (cov_a * cov_b.mT).sum()
    return ((mean_a - mean_b).square().sum() + cov_a.trace() + cov_b.trace() - 2.0 * product).item()


def replace_outliers_with_median_l2(data: Tensor) -> Tensor:
    """Rows of data (n, d) with |norm - median| > 3 std (ddof 1) become the column medians, in place; returns data.

    No row is replaced if any norm is NaN or infinite, or if there are fewer than two rows: the standard deviation is
    then undefined.
    """
    norms = _norms_to_go_by(data)
    if len(norms) < 2:
        return data
    return _replace(data, three_sigma(norms).beyond(norms))


def replace_outliers_with_iqr_l2(data: Tensor) -> Tensor:
    """Rows of data (n, d) with norms 1.5 interquartile ranges beyond the quartiles become the column medians, in place.

    Quartiles are interpolated linearly. A row with an infinite norm lies beyond them unless they are infinite too. If
    any norm is NaN, the quartiles are undefined and no row is replaced. Returns data.
    """
    norms = _norms_to_go_by(data).double()
    if len(norms) < 2:
        return data
    ordered = norms.sort().values  # NaN last
    if bool(ordered[-1].isnan()):
        return data
    first, third = (_quantile(ordered, quarters) for quarters in (1, 3))
    margin = 1.5 * (third - first)
    return _replace(data, (norms < first - margin) | (norms > third + margin))


def _norms_to_go_by(data: Tensor) -> Tensor:
    """The row norms of `data`, on the CPU, after checking that `data` can be written in place."""
    if not isinstance(data, Tensor):
        raise TypeError(f"data: expected a torch.Tensor, got {type(data).__name__}; data is written in place")
    _checks.floating("data", data)
    if data.dim() != 2 or data.shape[1] < 1:
        raise ValueError(f"data: expected shape (n, d) with d >= 1, got {tuple(data.shape)}")
    if data.requires_grad and data.is_leaf and torch.is_grad_enabled():
        raise RuntimeError("data: is a leaf that requires grad, but it is written in place; pass data.detach()")
    if any(size > 1 and stride == 0 for size, stride in zip(data.shape, data.stride(), strict=True)):
        raise RuntimeError(
            "data: is expanded, so rows or columns share memory, but it is written in place; pass data.clone()"
        )
    rows = data.detach()
    # Norms beyond the float32 range would become infinite in `token_norms`.
    return (torch.linalg.vector_norm(rows, dim=1) if rows.dtype == torch.float64 else token_norms(rows)).cpu()


def _quantile(ordered: Tensor, quarters: int) -> float:
    """Quartile of sorted numbers.

    torch.quantile is limited to 16 million entries, and numpy's returns NaN next to an infinite one.
    """
    below, between = divmod(quarters * (len(ordered) - 1), 4)
    low = ordered[below].item()
    return low if between == 0 else low + between / 4 * (ordered[below + 1].item() - low)


def _replace(data: Tensor, outlier: Tensor) -> Tensor:
    if outlier.any():
        with torch.inference_mode() if data.is_inference() else contextlib.nullcontext():
            data[outlier.to(data.device)] = data.median(dim=0).values
    return data


def _features(tensor_A: Array, tensor_B: Array) -> tuple[Tensor, Tensor]:
    """Check for finite real features (n, d) and (m, d), at least two rows each, on one device."""
    tensor_A, tensor_B = _checks.tensor("tensor_A", tensor_A), _checks.tensor("tensor_B", tensor_B)
    for name, tensor in (("tensor_A", tensor_A), ("tensor_B", tensor_B)):
        if tensor.is_complex():
            raise TypeError(f"{name}: expected real features, got {str(tensor.dtype).removeprefix('torch.')}")
        if tensor.dim() != 2 or len(tensor) < 2 or tensor.shape[1] < 1:
            raise ValueError(f"{name}: expected features (n, d) with n >= 2 and d >= 1, got {tuple(tensor.shape)}")
        if tensor.is_floating_point():
            _checks.finite(name, tensor)
    if tensor_A.shape[1] != tensor_B.shape[1]:
        raise ValueError(f"tensor_B: expected d = {tensor_A.shape[1]} as in tensor_A, got {tensor_B.shape[1]}")
    _checks.same_device("tensor_B", tensor_B, "tensor_A", tensor_A)
    return tensor_A, tensor_B
