"""The functions that eager code calls, which also check values, and the registered operators. None has a gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mir_kernels import _checks
from mir_kernels._registration import Sharding, register
from mir_kernels.ops.frechet import distance, launch, small
from mir_kernels.ops.frechet.cross_factor import NotSemidefinite

Ends = tuple[Tensor, Tensor, Tensor]  # value, lower and upper end; the ends are meaningless without `bounds`


def checked_trace_sqrt_product(a: Tensor, b: Tensor, precision: str, bounds: bool, backend: str) -> Ends:
    """Tr((AB)^(1/2)) of square matrices with broadcastable leading axes. ValueError if one is not a covariance."""
    if not bounds and backend == "linalg":
        found = small.trace(a, b)
        if found is not None:
            return found, found, found
    with torch.no_grad():
        _checks.symmetric("a", a)
        _checks.symmetric("b", b)
        return launch.trace_sqrt_product(a, b, precision, bounds, backend)


@torch.no_grad()
def checked_frechet_distance(
    mean_x: Tensor, cov_x: Tensor, mean_y: Tensor, cov_y: Tensor, precision: str, bounds: bool, backend: str
) -> Ends:
    """The squared Frechet distance. ValueError for a non-finite input or a matrix that is not a covariance."""
    for name, mean in (("mean_x", mean_x), ("mean_y", mean_y)):
        _checks.finite(name, mean)
    for name, covariance in (("cov_x", cov_x), ("cov_y", cov_y)):
        _checks.symmetric(name, covariance)
    try:
        found = distance.frechet(mean_x, cov_x, mean_y, cov_y, precision, bounds, backend)
    except NotSemidefinite as error:
        raise error.named({"a": "cov_x", "b": "cov_y"}[error.name]) from None
    return found


def _with_ends(function: Callable[..., Ends], bounds_at: int) -> Callable[..., Ends]:
    """Make the results fit an operator: same shape, separate memory, infinite ends without `bounds`."""

    def run(*arguments: Any) -> Ends:
        value, lower, upper = function(*arguments)
        if arguments[bounds_at]:
            return value, lower, upper
        return value, torch.full_like(value, -torch.inf), torch.full_like(value, torch.inf)

    return run


def _like(a: Tensor, b: Tensor, precision: str, bounds: bool, backend: str) -> Ends:
    value, lower, upper = (a.new_empty(a.shape[:-2], dtype=torch.float64) for _ in range(3))
    return value, lower, upper


register(
    "trace_sqrt_product(Tensor a, Tensor b, str precision, bool bounds, str backend) -> (Tensor, Tensor, Tensor)",
    _with_ends(checked_trace_sqrt_product, 3),
    _like,
    sharding=Sharding("xx---", "xxx", 2),
)
register(
    "frechet_distance(Tensor mean_x, Tensor cov_x, Tensor mean_y, Tensor cov_y, str precision, bool bounds,"
    " str backend) -> (Tensor, Tensor, Tensor)",
    _with_ends(checked_frechet_distance, 5),
    lambda mean_x, cov_x, mean_y, cov_y, *others: _like(cov_x, cov_y, *others),
    sharding=Sharding("xxxx---", "xxx", 1),
)
