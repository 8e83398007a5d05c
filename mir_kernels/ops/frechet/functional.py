"""The public functions: checks, then the registered operator under torch.compile and the raw function elsewhere."""

from __future__ import annotations

from typing import Literal, NamedTuple, overload

import torch
from torch import Tensor

from mir_kernels import _checks
from mir_kernels._gate import by_operator, outside_compilation, with_memory
from mir_kernels.ops.frechet import autograd, features, launch
from mir_kernels.ops.frechet.launch import TRACE_SQRT_PRODUCT
from mir_kernels.ops.frechet.report import PRECISIONS, Precision, TraceReport


class TraceSqrt(NamedTuple):
    """Tr((AB)^(1/2)) with lower <= truth <= upper; float64 tensors of the batch's shape."""

    value: Tensor
    lower: Tensor
    upper: Tensor


class FrechetDistance(NamedTuple):
    """The squared Frechet distance with lower <= truth <= upper; float64 tensors of the batch's shape."""

    value: Tensor
    lower: Tensor
    upper: Tensor


@overload
def trace_sqrt_product(
    a: Tensor, b: Tensor, *, precision: Precision = ..., bounds: Literal[False] = ..., backend: str | None = ...
) -> Tensor: ...
@overload
def trace_sqrt_product(
    a: Tensor, b: Tensor, *, precision: Precision = ..., bounds: Literal[True], backend: str | None = ...
) -> TraceSqrt: ...
@overload
def trace_sqrt_product(
    a: Tensor, b: Tensor, *, precision: Precision = ..., bounds: bool, backend: str | None = ...
) -> Tensor | TraceSqrt: ...
def trace_sqrt_product(
    a: Tensor, b: Tensor, *, precision: Precision = "float32", bounds: bool = False, backend: str | None = None
) -> Tensor | TraceSqrt:
    """Tr((AB)^(1/2)), the last term of Eq. 3 of the MIR paper, as the nuclear norm of Ca^T Cb with Ca Ca^T = A.

    a, b: covariances (..., d, d) of one shape, any floating dtype; each is symmetrised and worked on in float64.
    precision: the relative error of the trace is at most 2e-3 ("bfloat16", by products of 16 bits), 1e-6 ("float32") or
    1e-8 ("float64"), whatever the backend; a RuntimeWarning says what was reached where that could not be met.
    bounds: return `TraceSqrt(value, lower, upper)` with lower <= truth <= upper proved in float64; of a matrix that
    rounding left indefinite, the positive part is meant, taken with the diagonal scaled alike. On a CPU, from d = 384
    on, they are no closer than `precision` asks, with "float32" up to 1e-5 apart where rounding leaves no less.
    backend: "linalg" (float64 singular values), "eager" or "triton" (polar factor by Newton-Schulz).
    Returns float64 of the batch's shape, without gradient. Raises ValueError for matrices that are not finite,
    symmetric and positive semi-definite up to rounding, TypeError for other dtypes. Compiled code refuses the same,
    when it runs.
    """
    _check_pair("a", a, "b", b)
    _checks.choice("precision", precision, PRECISIONS)
    backend = TRACE_SQRT_PRODUCT.choose(backend, a.device)
    registered = by_operator("trace_sqrt_product", a, b)
    run = torch.ops.mir_kernels.trace_sqrt_product if registered else autograd.checked_trace_sqrt_product
    value, lower, upper = run(a.detach(), b.detach(), precision, bounds, backend)
    return TraceSqrt(value, lower, upper) if bounds else value


@outside_compilation
@torch.no_grad()
def trace_sqrt_report(
    a: Tensor, b: Tensor, *, precision: Precision = "float32", backend: str | None = None
) -> TraceReport:
    """`trace_sqrt_product` and how it came about: the error each value was accepted with, and the path that ran."""
    _check_pair("a", a, "b", b)
    _checks.choice("precision", precision, PRECISIONS)
    a, b = with_memory("trace_sqrt_report", "a", a), with_memory("trace_sqrt_report", "b", b)
    _checks.symmetric("a", a)
    _checks.symmetric("b", b)
    return launch.report(a, b, precision, TRACE_SQRT_PRODUCT.choose(backend, a.device))


@outside_compilation
@torch.no_grad()
def trace_sqrt_from_features(
    x: Tensor, y: Tensor, *, precision: Precision = "float32", bounds: bool = False, backend: str | None = None
) -> Tensor | TraceSqrt:
    """Tr((Sx Sy)^(1/2)) of the covariances (ddof 1) of the rows of x (n, d) and y (m, d), n, m >= 2, in float64.

    The nuclear norm of Xc Yc^T / sqrt((n-1)(m-1)), without a covariance, where one of them has no more rows than
    columns: by singular values ("linalg", exact to rounding) or a polar factor to `precision`. Otherwise
    `trace_sqrt_product` of the two covariances. The features need not be centred: `bounds` hold for them as they are,
    whatever their mean, with what rounds in means, deviations and covariances. A scalar, or `TraceSqrt` with `bounds`.
    """
    _checks.tokens("x", x)
    _checks.tokens("y", y)
    for name, value in (("x", x), ("y", y)):
        if value.dim() != 2 or value.shape[0] < 2:
            raise ValueError(f"{name}: takes features (n, d) with n >= 2, got {tuple(value.shape)}")
    _checks.same_device("y", y, "x", x)
    if x.shape[1] != y.shape[1]:
        raise ValueError(f"y: takes {x.shape[1]} columns as x has, got {y.shape[1]}")
    _checks.choice("precision", precision, PRECISIONS)
    x, y = with_memory("trace_sqrt_from_features", "x", x), with_memory("trace_sqrt_from_features", "y", y)
    _checks.finite("x", x)
    _checks.finite("y", y)
    backend = TRACE_SQRT_PRODUCT.choose(backend, x.device)
    value, lower, upper = features.trace_sqrt(x, y, precision, bounds, backend)
    return value if lower is None or upper is None else TraceSqrt(value, lower, upper)


@overload
def frechet_distance(
    mean_x: Tensor,
    cov_x: Tensor,
    mean_y: Tensor,
    cov_y: Tensor,
    *,
    precision: Precision = ...,
    bounds: Literal[False] = ...,
    backend: str | None = ...,
) -> Tensor: ...
@overload
def frechet_distance(
    mean_x: Tensor,
    cov_x: Tensor,
    mean_y: Tensor,
    cov_y: Tensor,
    *,
    precision: Precision = ...,
    bounds: Literal[True],
    backend: str | None = ...,
) -> FrechetDistance: ...
@overload
def frechet_distance(
    mean_x: Tensor,
    cov_x: Tensor,
    mean_y: Tensor,
    cov_y: Tensor,
    *,
    precision: Precision = ...,
    bounds: bool,
    backend: str | None = ...,
) -> Tensor | FrechetDistance: ...
def frechet_distance(
    mean_x: Tensor,
    cov_x: Tensor,
    mean_y: Tensor,
    cov_y: Tensor,
    *,
    precision: Precision = "float32",
    bounds: bool = False,
    backend: str | None = None,
) -> Tensor | FrechetDistance:
    """|mean_x - mean_y|^2 + Tr(cov_x + cov_y - 2 (cov_x cov_y)^(1/2)), the distance of Eq. 3 of the MIR paper.

    mean_x, mean_y: (..., d).  cov_x, cov_y: (..., d, d).  precision, bounds, backend and errors as for
    `trace_sqrt_product`; the error of the root is relative to the root, so where the distance is far smaller than the
    traces it holds fewer digits: `bounds=True` returns `FrechetDistance(value, lower, upper)` and says how many.
    Never less than |mean_x - mean_y|^2, and just that for equal covariances. float64, of the batch's shape, without
    gradient.
    """
    _check_pair("cov_x", cov_x, "cov_y", cov_y)
    for name, mean in (("mean_x", mean_x), ("mean_y", mean_y)):
        _checks.tokens(name, mean)
        if mean.shape != cov_x.shape[:-1]:
            raise ValueError(f"{name}: takes shape {tuple(cov_x.shape[:-1])}, got {tuple(mean.shape)}")
        _checks.same_device(name, mean, "cov_x", cov_x)
    _checks.choice("precision", precision, PRECISIONS)
    backend = TRACE_SQRT_PRODUCT.choose(backend, cov_x.device)
    mean_x, cov_x, mean_y, cov_y = (tensor.detach() for tensor in (mean_x, cov_x, mean_y, cov_y))
    registered = by_operator("frechet_distance", mean_x, cov_x, mean_y, cov_y)
    run = torch.ops.mir_kernels.frechet_distance if registered else autograd.checked_frechet_distance
    value, lower, upper = run(mean_x, cov_x, mean_y, cov_y, precision, bounds, backend)
    return FrechetDistance(value, lower, upper) if bounds else value


def _check_pair(name_a: str, a: Tensor, name_b: str, b: Tensor) -> None:
    _checks.square(name_a, a)
    _checks.square(name_b, b)
    _checks.same_device(name_b, b, name_a, a)
    if a.shape != b.shape:
        raise ValueError(f"{name_b}: takes shape {tuple(a.shape)} as {name_a} has, got {tuple(b.shape)}")
