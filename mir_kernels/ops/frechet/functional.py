"""The public functions of moments: argument checks, then the operator under torch.compile, else the raw function."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple, overload

import torch
from torch import Tensor

from mir_kernels import _checks
from mir_kernels._gate import by_operator, outside_compilation, with_memory
from mir_kernels.ops.frechet import autograd, launch
from mir_kernels.ops.frechet.launch import TRACE_SQRT_PRODUCT, Backend
from mir_kernels.ops.frechet.report import PRECISIONS, Precision, TraceReport

if TYPE_CHECKING:
    from mir_kernels._arrays import Array


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
    a: Array, b: Array, *, precision: Precision = ..., bounds: Literal[False] = ..., backend: Backend | None = ...
) -> Tensor: ...
@overload
def trace_sqrt_product(
    a: Array, b: Array, *, precision: Precision = ..., bounds: Literal[True], backend: Backend | None = ...
) -> TraceSqrt: ...
@overload
def trace_sqrt_product(
    a: Array, b: Array, *, precision: Precision = ..., bounds: bool, backend: Backend | None = ...
) -> Tensor | TraceSqrt: ...
def trace_sqrt_product(
    a: Array, b: Array, *, precision: Precision = "float32", bounds: bool = False, backend: Backend | None = None
) -> Tensor | TraceSqrt:
    """Tr((AB)^(1/2)), the last term of Eq. 3 of the MIR paper, as the nuclear norm of Ca^T Cb with Ca Ca^T = A.

    a, b: covariances (..., d, d), any floating dtype, numpy arrays too; they are symmetrised and processed in float64.
    Leading axes broadcast as in torch: one reference (d, d) against a batch is checked and factored once.
    precision: the relative error of the trace is at most 2e-3 ("bfloat16", by 16-bit products), 1e-6 ("float32") or
    1e-8 ("float64"), for every backend; a RuntimeWarning states the error reached if that is not possible.
    bounds: return `TraceSqrt(value, lower, upper)` with lower <= truth <= upper proved in float64. If rounding made a
    matrix indefinite, they refer to its positive part after scaling the diagonal to 1. On a CPU, from d = 384 on, they
    are only as tight as `precision` requires; with "float32" up to 1e-5 apart if rounding allows no less.
    backend: "linalg" (float64 singular values), "eager" or "triton" (polar factor by Newton-Schulz).
    Returns float64 of the batch's shape, without gradient. Raises ValueError for matrices that are not finite,
    symmetric and positive semi-definite up to rounding, TypeError for other dtypes. Compiled code raises the same
    errors when it runs.
    """
    a, b = _checked_pair("a", a, "b", b)
    _checks.choice("precision", precision, PRECISIONS)
    chosen = TRACE_SQRT_PRODUCT.choose(backend, a.device)
    run: Callable[..., tuple[Tensor, Tensor, Tensor]]
    if by_operator("trace_sqrt_product", a, b):
        run, shape = torch.ops.mir_kernels.trace_sqrt_product, torch.broadcast_shapes(a.shape, b.shape)
        a, b = _expanded(a, shape), _expanded(b, shape)
    else:
        run = autograd.checked_trace_sqrt_product
    value, lower, upper = run(a.detach(), b.detach(), precision, bounds, chosen)
    return TraceSqrt(value, lower, upper) if bounds else value


@outside_compilation
@torch.no_grad()
def trace_sqrt_report(
    a: Array, b: Array, *, precision: Precision = "float32", backend: Backend | None = None
) -> TraceReport:
    """`trace_sqrt_product` with the error each value was accepted with and the path that computed it."""
    a, b = _checked_pair("a", a, "b", b)
    _checks.choice("precision", precision, PRECISIONS)
    a, b = with_memory("trace_sqrt_report", "a", a), with_memory("trace_sqrt_report", "b", b)
    _checks.symmetric("a", a)
    _checks.symmetric("b", b)
    return launch.report(a, b, precision, TRACE_SQRT_PRODUCT.choose(backend, a.device))


@overload
def frechet_distance(
    mean_x: Array,
    cov_x: Array,
    mean_y: Array,
    cov_y: Array,
    *,
    precision: Precision = ...,
    bounds: Literal[False] = ...,
    backend: Backend | None = ...,
) -> Tensor: ...
@overload
def frechet_distance(
    mean_x: Array,
    cov_x: Array,
    mean_y: Array,
    cov_y: Array,
    *,
    precision: Precision = ...,
    bounds: Literal[True],
    backend: Backend | None = ...,
) -> FrechetDistance: ...
@overload
def frechet_distance(
    mean_x: Array,
    cov_x: Array,
    mean_y: Array,
    cov_y: Array,
    *,
    precision: Precision = ...,
    bounds: bool,
    backend: Backend | None = ...,
) -> Tensor | FrechetDistance: ...
def frechet_distance(
    mean_x: Array,
    cov_x: Array,
    mean_y: Array,
    cov_y: Array,
    *,
    precision: Precision = "float32",
    bounds: bool = False,
    backend: Backend | None = None,
) -> Tensor | FrechetDistance:
    """|mean_x - mean_y|^2 + Tr(cov_x + cov_y - 2 (cov_x cov_y)^(1/2)), the distance of Eq. 3 of the MIR paper.

    mean_x, mean_y: (..., d).  cov_x, cov_y: (..., d, d). Leading axes broadcast: one reference (d,), (d, d) against a
    batch yields the batch's distances. precision, bounds, backend, arrays and errors as for `trace_sqrt_product`. The
    error of the root is relative to the root, so a distance far smaller than the traces has fewer correct digits;
    `bounds=True` returns `FrechetDistance(value, lower, upper)`, which shows how many.
    At least |mean_x - mean_y|^2, and equal to it for equal covariances. float64, of the batch's shape, without
    gradient.
    """
    cov_x, cov_y = _checked_pair("cov_x", cov_x, "cov_y", cov_y)
    mean_x, mean_y = (_checked_mean(*one, cov_x) for one in (("mean_x", mean_x), ("mean_y", mean_y)))
    _checks.choice("precision", precision, PRECISIONS)
    chosen = TRACE_SQRT_PRODUCT.choose(backend, cov_x.device)
    run: Callable[..., tuple[Tensor, Tensor, Tensor]]
    shape = _shape_of_all(mean_x, cov_x, mean_y, cov_y)
    mean_x, cov_x, mean_y, cov_y = (tensor.detach() for tensor in (mean_x, cov_x, mean_y, cov_y))
    if by_operator("frechet_distance", mean_x, cov_x, mean_y, cov_y):
        run = torch.ops.mir_kernels.frechet_distance
        mean_x, mean_y = _expanded(mean_x, shape), _expanded(mean_y, shape)
        cov_x, cov_y = (_expanded(cov, (*shape, cov.shape[-1])) for cov in (cov_x, cov_y))
    else:
        run = autograd.checked_frechet_distance
    value, lower, upper = run(mean_x, cov_x, mean_y, cov_y, precision, bounds, chosen)
    return FrechetDistance(value, lower, upper) if bounds else value


def _checked_pair(name_a: str, a: Array, name_b: str, b: Array) -> tuple[Tensor, Tensor]:
    a, b = _checks.square(name_a, a), _checks.square(name_b, b)
    _checks.same_device(name_b, b, name_a, a)
    if a.shape != b.shape and (a.shape[-1] != b.shape[-1] or not _broadcast(a.shape[:-2], b.shape[:-2])):
        raise ValueError(
            f"{name_b}: expected shape {tuple(a.shape)} like {name_a}, got {tuple(b.shape)}; leading axes may broadcast"
        )
    return a, b


def _checked_mean(name: str, mean: Array, covariance: Tensor) -> Tensor:
    mean = _checks.tokens(name, mean)
    if mean.shape[-1] != covariance.shape[-1]:
        raise ValueError(f"{name}: expected shape {tuple(covariance.shape[:-1])}, got {tuple(mean.shape)}")
    _checks.same_device(name, mean, "cov_x", covariance)
    return mean


def _shape_of_all(mean_x: Tensor, cov_x: Tensor, mean_y: Tensor, cov_y: Tensor) -> torch.Size:
    """The broadcast shape (..., d) of the batch. Raises ValueError for a mean whose leading axes do not broadcast."""
    shape = torch.broadcast_shapes(cov_x.shape[:-1], cov_y.shape[:-1])
    for name, mean in (("mean_x", mean_x), ("mean_y", mean_y)):
        if not _broadcast(mean.shape, shape):
            raise ValueError(
                f"{name}: expected shape {tuple(shape)}, got {tuple(mean.shape)}; leading axes may broadcast"
            )
        shape = torch.broadcast_shapes(mean.shape, shape)
    return shape


def _expanded(tensor: Tensor, shape: Sequence[int]) -> Tensor:
    """Expanded for an operator, which requires equal leading axes."""
    return tensor if tuple(tensor.shape) == tuple(shape) else tensor.expand(*shape)


def _broadcast(one: torch.Size, other: torch.Size) -> bool:
    return all(a == b or 1 in (a, b) for a, b in zip(reversed(one), reversed(other), strict=False))
