"""Mean, centred second moment, covariance and norms in float64 as in the formulas: the reference for all tests."""

from __future__ import annotations

import torch
from torch import Tensor

from mir_kernels.ops.moments.packed import add_outer, panels


def mean(x: Tensor) -> Tensor:
    """mu = sum_t x_t / n of x (n, d), as (d,)."""
    return x.double().sum(0) / x.shape[0]


def second_moment(x: Tensor) -> Tensor:
    """M = sum_t (x_t - mu)(x_t - mu)^T of x (n, d), as (d, d). Two passes avoid cancellation for any mean."""
    centred = x.double() - mean(x)
    return centred.T @ centred


def covariance(x: Tensor, ddof: int = 1) -> Tensor:
    """M / (n - ddof) of x (n, d), as (d, d)."""
    return second_moment(x) / (x.shape[0] - ddof)


def token_norms(x: Tensor) -> Tensor:
    """||x_t|| over the last axis of x (..., d), as float32 (...)."""
    return x.double().square().sum(-1).sqrt().float()


def accumulate(
    second: Tensor, x: Tensor, mask: Tensor | None, centre: Tensor, vectors: Tensor, weights: Tensor, precision: str
) -> tuple[Tensor, Tensor]:
    """The block update of `eager.accumulate` in float64, computed as a full square."""
    d = x.shape[1]
    centred = x.double() - centre
    if mask is not None:
        centred = torch.where(mask[:, None], centred, 0.0)
    product = centred.T @ centred
    add_outer(second, d, vectors, weights)
    for start, stop, panel in panels(second, d):
        panel += product[start:stop, :stop]
    return centre, centred.sum(0)
