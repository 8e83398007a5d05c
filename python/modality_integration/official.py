"""The published code's function names and signatures, computed right; and its fast mode under a name of its own.

Coming from the published code:

- `matrix_sqrt` and `calculate_fid_pytorch` (its fast mode) iterated Y = (Y + Z^-1 A)/2, Z = (Z + Y^-1 A)/2 from Y = A,
  Z = I. That pair is a fixed point of the iteration, so the "root" of A was A itself. Here they give the square root.
- `calculate_fid` (its accurate mode) took the square root of a float32 product, which breaks down with fewer tokens
  than dimensions. Here the same definition is computed in float64, from the features when there are few.
- `fid_of_published_fast_mode` gives what the published fast mode gave, for comparison with numbers made by it.
- the two outlier functions write in place and return the tensor, as published. What is not finite marks as many rows
  as in the published formulas: a norm that is NaN, or a standard deviation that is, marks none.

numpy arrays are taken as well, but for what is written in place. What does not fit is refused with a ValueError,
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

    A matrix that is symmetric up to the rounding of its dtype goes to `mir_kernels.sqrtm`, any other (as a product of
    two covariances is) through its eigenvectors; both in float64. The result has the input's dtype. Eigenvalues that
    are negative by no more than that rounding count as 0, as those of covariances of fewer tokens than dimensions are.
    ValueError where an entry is not finite, or no root is found: eigenvalues on the negative axis, or eigenvectors that
    do not give one.
    """
    input = _checks.square("input", input)
    if input.dim() != 2:
        raise ValueError(f"input: takes one matrix (d, d), got {tuple(input.shape)}")
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
    if not error <= max(rounding, 1e-5):  # NaN is none
        raise ValueError(
            f"input: no real square root was found (|Y^2 - A| / |A| is {error:.1e}); covariances of fewer tokens than "
            "dimensions have a singular product: use calculate_fid, which starts from the features"
        )
    return (root * largest.sqrt()).to(input.dtype)


def calculate_fid(tensor_A: Array, tensor_B: Array) -> float:
    """The Fréchet distance of features (n, d) and (m, d): |mu_A - mu_B|^2 + Tr(C_A + C_B - 2 (C_A C_B)^(1/2)), ddof 1.

    The published accurate mode's definition, of the inputs as float32, in float64 arithmetic; never negative.
    """
    tensor_A, tensor_B = _features(tensor_A, tensor_B)
    return calculate_fid_pytorch(tensor_A.type(torch.float32), tensor_B.type(torch.float32))


@torch.no_grad()
def calculate_fid_pytorch(tensor_A: Array, tensor_B: Array) -> float:
    """As `calculate_fid`, of the inputs in their own dtype."""
    tensor_A, tensor_B = _features(tensor_A, tensor_B)
    for name, tensor in (("tensor_A", tensor_A), ("tensor_B", tensor_B)):
        _checks.floating(name, tensor)
    return feature_layer_result(tensor_A, tensor_B, 1, _UNPROCESSED).terms.distance


@torch.no_grad()
def fid_of_published_fast_mode(tensor_A: Array, tensor_B: Array) -> float:
    """|mu_A - mu_B|^2 + Tr C_A + Tr C_B - 2 Tr(C_A C_B): what the published fast mode returns, in exact arithmetic.

    No square root is in it: the published iteration starts at a fixed point (see the module) and returns C_A C_B. It is
    not a distance (it may be negative, and is not 0 for equal inputs) and is here to reproduce old numbers only.
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

    No row where a norm is NaN or infinite, or with fewer than two rows: there is no standard deviation then.
    """
    norms = _norms_to_go_by(data)
    if len(norms) < 2:
        return data
    return _replace(data, three_sigma(norms).beyond(norms))


def replace_outliers_with_iqr_l2(data: Tensor) -> Tensor:
    """Rows of data (n, d) with norms 1.5 interquartile ranges beyond the quartiles become the column medians, in place.

    Quartiles are interpolated linearly. A row with an infinite norm lies beyond them, unless they are infinite too;
    where a norm is NaN there are none, and no row is replaced. Returns data.
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
    """The norms of the rows of data, on the CPU, if data can be written in place."""
    if not isinstance(data, Tensor):
        raise TypeError(f"data: takes a torch.Tensor, got {type(data).__name__}; it is written in place")
    _checks.floating("data", data)
    if data.dim() != 2 or data.shape[1] < 1:
        raise ValueError(f"data: takes shape (n, d) with d >= 1, got {tuple(data.shape)}")
    if data.requires_grad and data.is_leaf and torch.is_grad_enabled():
        raise RuntimeError("data: is a leaf that requires grad, and is written in place; pass data.detach()")
    if any(size > 1 and stride == 0 for size, stride in zip(data.shape, data.stride(), strict=True)):
        raise RuntimeError("data: is expanded, and is written in place: rows or columns share memory; clone it before")
    rows = data.detach()
    # What only float64 holds is infinite as a float32 norm.
    return (torch.linalg.vector_norm(rows, dim=1) if rows.dtype == torch.float64 else token_norms(rows)).cpu()


def _quantile(ordered: Tensor, quarters: int) -> float:
    """Of sorted numbers. torch.quantile stops at 16 million, and numpy's is NaN beside an infinite one."""
    below, between = divmod(quarters * (len(ordered) - 1), 4)
    low = ordered[below].item()
    return low if between == 0 else low + between / 4 * (ordered[below + 1].item() - low)


def _replace(data: Tensor, outlier: Tensor) -> Tensor:
    if outlier.any():
        with torch.inference_mode() if data.is_inference() else contextlib.nullcontext():
            data[outlier.to(data.device)] = data.median(dim=0).values
    return data


def _features(tensor_A: Array, tensor_B: Array) -> tuple[Tensor, Tensor]:
    """Finite real features (n, d) and (m, d), two rows or more of each, on one device."""
    tensor_A, tensor_B = _checks.tensor("tensor_A", tensor_A), _checks.tensor("tensor_B", tensor_B)
    for name, tensor in (("tensor_A", tensor_A), ("tensor_B", tensor_B)):
        if tensor.is_complex():
            raise TypeError(f"{name}: takes real features, got {str(tensor.dtype).removeprefix('torch.')}")
        if tensor.dim() != 2 or len(tensor) < 2 or tensor.shape[1] < 1:
            raise ValueError(f"{name}: takes features (n, d) with n >= 2 and d >= 1, got {tuple(tensor.shape)}")
        if tensor.is_floating_point():
            _checks.finite(name, tensor)
    if tensor_A.shape[1] != tensor_B.shape[1]:
        raise ValueError(f"tensor_B: takes d = {tensor_A.shape[1]} as tensor_A has it, got {tensor_B.shape[1]}")
    _checks.same_device("tensor_B", tensor_B, "tensor_A", tensor_A)
    return tensor_A, tensor_B
