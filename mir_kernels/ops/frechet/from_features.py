"""The public functions of features: distances of their means and covariances; few rows need no covariance."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Literal, overload

import torch
from torch import Tensor

from mir_kernels import _checks
from mir_kernels._gate import outside_compilation, with_memory
from mir_kernels.ops.frechet import features
from mir_kernels.ops.frechet.functional import FrechetDistance, TraceSqrt
from mir_kernels.ops.frechet.launch import TRACE_SQRT_PRODUCT, Backend
from mir_kernels.ops.frechet.report import PRECISIONS, Precision

if TYPE_CHECKING:
    from mir_kernels._arrays import Array


@overload
def trace_sqrt_from_features(
    x: Array, y: Array, *, precision: Precision = ..., bounds: Literal[False] = ..., backend: Backend | None = ...
) -> Tensor: ...
@overload
def trace_sqrt_from_features(
    x: Array, y: Array, *, precision: Precision = ..., bounds: Literal[True], backend: Backend | None = ...
) -> TraceSqrt: ...
@overload
def trace_sqrt_from_features(
    x: Array, y: Array, *, precision: Precision = ..., bounds: bool, backend: Backend | None = ...
) -> Tensor | TraceSqrt: ...
@outside_compilation
@torch.no_grad()
def trace_sqrt_from_features(
    x: Array, y: Array, *, precision: Precision = "float32", bounds: bool = False, backend: Backend | None = None
) -> Tensor | TraceSqrt:
    """Tr((Sx Sy)^(1/2)) of the covariances (ddof 1) of the rows of x and y, the last term of Eq. 3 of the MIR paper.

    If x or y has no more rows than columns: the nuclear norm of Xc Yc^T / sqrt((n-1)(m-1)), Xc and Yc centred, by
    singular values ("linalg", exact to rounding) or a polar factor to `precision`. No covariance is formed, and the
    covariances may be rank-deficient. Otherwise `trace_sqrt_product` of the two covariances.
    x: (..., n, d), y: (..., m, d), n, m >= 2, any floating dtype, numpy arrays too; leading axes broadcast. The
    features need not be centred: `bounds` hold for any mean and include the rounding of means, deviations and
    covariances.
    precision, bounds, backend: as for `trace_sqrt_product`. Returns float64 of the batch's shape, a scalar for one
    pair, or `TraceSqrt` with `bounds`; no gradient. Raises ValueError for features that are not finite or whose shapes
    do not match, TypeError for other dtypes.
    """
    value, lower, upper = _over_pairs("trace_sqrt_from_features", features.trace_sqrt, x, y, precision, bounds, backend)
    return value if lower is None or upper is None else TraceSqrt(value, lower, upper)


@overload
def frechet_distance_from_features(
    x: Array, y: Array, *, precision: Precision = ..., bounds: Literal[False] = ..., backend: Backend | None = ...
) -> Tensor: ...
@overload
def frechet_distance_from_features(
    x: Array, y: Array, *, precision: Precision = ..., bounds: Literal[True], backend: Backend | None = ...
) -> FrechetDistance: ...
@overload
def frechet_distance_from_features(
    x: Array, y: Array, *, precision: Precision = ..., bounds: bool, backend: Backend | None = ...
) -> Tensor | FrechetDistance: ...
@outside_compilation
@torch.no_grad()
def frechet_distance_from_features(
    x: Array, y: Array, *, precision: Precision = "float32", bounds: bool = False, backend: Backend | None = None
) -> Tensor | FrechetDistance:
    """The squared Frechet distance of the rows of x and y as Gaussians, Eq. 3 of the MIR paper:
    |mean_x - mean_y|^2 + Tr(Sx + Sy - 2 (Sx Sy)^(1/2)) with means and covariances (ddof 1) of the rows.

    Preferable with fewer rows than columns, where covariances are rank-deficient and the root of their product is
    ill-conditioned. The last term is that of `trace_sqrt_from_features`, with the same arguments, dtypes, batches and
    errors; the error of the root is relative to the root. `bounds=True` returns
    `FrechetDistance(value, lower, upper)` with lower <= truth <= upper proved for the features as given.
    At least |mean_x - mean_y|^2, and 0 for equal features. float64, of the batch's shape, no gradient.
    """
    call = ("frechet_distance_from_features", features.distance)
    value, lower, upper = _over_pairs(*call, x, y, precision, bounds, backend)
    return value if lower is None or upper is None else FrechetDistance(value, lower, upper)


_Ends = tuple[Tensor, Tensor | None, Tensor | None]


def _over_pairs(
    name: str,
    one_pair: Callable[[Tensor, Tensor, str, bool, str], _Ends],
    x: Array,
    y: Array,
    precision: Precision,
    bounds: bool,
    backend: Backend | None,
) -> _Ends:
    """Check the features and call `one_pair` on each pair of the batch."""
    x, y = _features("x", x), _features("y", y)
    _checks.same_device("y", y, "x", x)
    if x.shape[-1] != y.shape[-1]:
        raise ValueError(f"y: expected {x.shape[-1]} columns like x, got {y.shape[-1]}")
    _checks.choice("precision", precision, PRECISIONS)
    x, y = with_memory(name, "x", x).detach(), with_memory(name, "y", y).detach()
    _checks.finite("x", x)
    _checks.finite("y", y)
    chosen = TRACE_SQRT_PRODUCT.choose(backend, x.device)
    if x.dim() == y.dim() == 2:
        return one_pair(x, y, precision, bounds, chosen)
    try:
        batch = torch.broadcast_shapes(x.shape[:-2], y.shape[:-2])
    except RuntimeError:
        raise ValueError(
            f"y: expected leading axes that broadcast with those of x, {tuple(x.shape[:-2])}, got {tuple(y.shape[:-2])}"
        ) from None
    flat = [one.expand(*batch, *one.shape[-2:]).flatten(0, -3) if batch else one[None] for one in (x, y)]
    found = [one_pair(a, b, precision, bounds, chosen) for a, b in zip(*flat, strict=True)]

    def together(column: int) -> Tensor:
        parts = [ends[column] for ends in found]
        kept = [part for part in parts if part is not None]
        return torch.stack(kept).view(batch) if kept else x.new_empty(batch, dtype=torch.float64)

    return (together(0), together(1), together(2)) if bounds else (together(0), None, None)


def _features(name: str, value: Array) -> Tensor:
    value = _checks.tokens(name, value)
    if value.dim() < 2 or value.shape[-2] < 2:
        raise ValueError(
            f"{name}: expected features (n, d) with n >= 2, or a batch (..., n, d) of them, got {tuple(value.shape)}"
        )
    return value
