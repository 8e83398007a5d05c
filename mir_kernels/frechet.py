"""Trace of the square root of a product of covariances, and the Frechet distance of two Gaussians, with proved bounds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from mir_kernels import _checks
from mir_kernels._dispatch import Operation
from mir_kernels.sqrtm import certificate, factor

OPERATION = Operation("trace_sqrt_product", orders={"cuda": ("lapack",), "cpu": ("lapack",)}, reasons={"lapack": lambda d: None})
PRECISIONS = ("bfloat16", "float32", "float64")

# The squared form is kept where its own error bound is below this; the promise on the trace is 1e-8.
_SQUARED_TOLERANCE = 2e-9
# Float64 elements of one matrix stack that are worked on at a time.
_CHUNK = 1 << 24


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


@dataclass(frozen=True)
class TraceReport:
    """What `trace_sqrt_report` found and how.

    value: float64, batch shape.  error: the relative error bound or estimate each value was accepted with.
    path: per matrix of the flattened batch, which algorithm gave the value.
    """

    value: Tensor
    error: Tensor
    path: tuple[str, ...]


def trace_sqrt_product(
    a: Tensor, b: Tensor, *, precision: str = "float32", bounds: bool = False, backend: str | None = None
) -> Tensor | TraceSqrt:
    """Tr((AB)^(1/2)), the last term of Eq. 3 of the MIR paper, for covariances (..., d, d)."""
    value = trace_sqrt_report(a, b, precision=precision, backend=backend).value
    if not bounds:
        return value
    return _bounded(value, *_bounds(a, b))


@torch.no_grad()
def trace_sqrt_report(
    a: Tensor, b: Tensor, *, precision: str = "float32", backend: str | None = None
) -> TraceReport:
    """`trace_sqrt_product` and how it came about: the error each value was accepted with, and the path that ran."""
    _check_pair("a", a, "b", b)
    _checks.choice("precision", precision, PRECISIONS)
    OPERATION.choose(backend, a.device)
    batch, d = a.shape[:-2], a.shape[-1]
    x, y = a.reshape(-1, d, d), b.reshape(-1, d, d)
    step = max(1, _CHUNK // (d * d))
    parts = [
        _lapack(x[i : i + step], y[i : i + step]) for i in range(0, x.shape[0], step)
    ]
    values = torch.cat([p.value for p in parts]) if parts else a.new_zeros(0, dtype=torch.float64)
    errors = torch.cat([p.error for p in parts]) if parts else values
    return TraceReport(values.reshape(batch), errors.reshape(batch), tuple(s for p in parts for s in p.path))


@torch.no_grad()
def trace_sqrt_from_features(
    x: Tensor, y: Tensor, *, precision: str = "float32", bounds: bool = False
) -> Tensor | TraceSqrt:
    """Tr((SxSy)^(1/2)) of the ddof-1 covariances of the rows of x (n, d) and y (m, d), without forming a covariance
    that has more columns than rows: the singular values of Xc Yc^T / sqrt((n-1)(m-1)), exact to rounding.
    """
    _checks.tokens("x", x)
    _checks.tokens("y", y)
    for name, value in (("x", x), ("y", y)):
        if value.dim() != 2 or value.shape[0] < 2:
            raise ValueError(f"{name}: takes features (n, d) with n >= 2, got {tuple(value.shape)}")
        _checks.finite(name, value)
    if x.shape[1] != y.shape[1]:
        raise ValueError(f"y: takes {x.shape[1]} columns as x has, got {y.shape[1]}")
    cx, cy = _feature_factor(x), _feature_factor(y)
    n = cx.columns.mT @ cy.columns
    power = torch.exp2(cx.exponent + cy.exponent)
    value = torch.linalg.svdvals(n).sum() * power
    return value


@torch.no_grad()
def frechet_distance(
    mean_x: Tensor,
    cov_x: Tensor,
    mean_y: Tensor,
    cov_y: Tensor,
    *,
    precision: str = "float32",
    bounds: bool = False,
    backend: str | None = None,
) -> Tensor | FrechetDistance:
    """|mean_x - mean_y|^2 + Tr(cov_x + cov_y - 2 (cov_x cov_y)^(1/2)), Eq. 3 of the MIR paper. Never negative."""
    for name, mean, cov in (("mean_x", mean_x, cov_x), ("mean_y", mean_y, cov_y)):
        _checks.tokens(name, mean)
        _checks.finite(name, mean)
        if mean.shape != cov.shape[:-1]:
            raise ValueError(f"{name}: takes shape {tuple(cov.shape[:-1])} beside its covariance, got {tuple(mean.shape)}")
    _check_pair("cov_x", cov_x, "cov_y", cov_y)
    root = trace_sqrt_product(cov_x, cov_y, precision=precision, bounds=bounds, backend=backend)
    rest = (mean_x.double() - mean_y.double()).square().sum(-1) + _trace(cov_x) + _trace(cov_y)
    if not bounds:
        return (rest - 2 * root).clamp(min=0.0)
    slack = rest * certificate.gamma(4 * cov_x.shape[-1])
    return FrechetDistance(
        (rest - 2 * root.value).clamp(min=0.0),
        (rest - 2 * root.upper - slack).clamp(min=0.0),
        (rest - 2 * root.lower + slack).clamp(min=0.0),
    )


def _lapack(a: Tensor, b: Tensor) -> TraceReport:
    """Float64 factors, then the singular values of N = Ca^T Cb: as the square roots of the eigenvalues of N^T N where
    a bound on the error of squaring allows it, else directly."""
    x, y = factor.factor(factor.symmetrize(a)), factor.factor(factor.symmetrize(b))
    _check_definite("a", a, x)
    _check_definite("b", b, y)
    n = factor.cross_product(x, y)
    values = torch.linalg.eigvalsh(factor.gram(n))
    # Eigenvalues come with an error of a few units of the largest (LAPACK Users' Guide, section 4.7).
    delta = 4 * factor.UNIT * values[..., -1:]
    squared = values.clamp(min=0.0).sqrt().sum(-1)
    spread = (values + delta).clamp(min=0.0).sqrt() - (values - delta).clamp(min=0.0).sqrt()
    error = torch.where(squared > 0, spread.sum(-1) / (2 * squared), 0.0)
    direct = error > _SQUARED_TOLERANCE
    if bool(direct.any()):
        squared[direct] = torch.linalg.svdvals(n[direct]).sum(-1)
        error[direct] = n.shape[-1] * factor.UNIT
    path = tuple(
        ("eigh" if s else "cholesky") + ("+svdvals" if e else "+eigvalsh")
        for s, e in zip((x.singular | y.singular).tolist(), direct.tolist(), strict=True)
    )
    return TraceReport(squared * torch.exp2(x.exponent + y.exponent), error, path)


def _bounds(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    batch, d = a.shape[:-2], a.shape[-1]
    x, y = a.reshape(-1, d, d), b.reshape(-1, d, d)
    pairs = [certificate.trace_bounds(factor.symmetrize(s), factor.symmetrize(t)) for s, t in zip(x.split(1), y.split(1), strict=True)]
    if not x.shape[0]:
        return a.new_zeros(batch, dtype=torch.float64), a.new_zeros(batch, dtype=torch.float64)
    return torch.cat([p[0] for p in pairs]).reshape(batch), torch.cat([p[1] for p in pairs]).reshape(batch)


def _bounded(value: Tensor, lower: Tensor, upper: Tensor) -> TraceSqrt:
    # The value comes from another computation than the bounds; a truth inside them is never further from either end.
    return TraceSqrt(torch.minimum(torch.maximum(value, lower), upper), lower, upper)


def _feature_factor(x: Tensor) -> factor.Factor:
    """C with C C^T the covariance of the rows: the centred rows themselves, or the Cholesky factor when n > d."""
    n, d = x.shape
    x = x.double()
    size = x.abs().amax()
    exponent = torch.where(size > 0, torch.frexp(size).exponent.double(), 0.0)
    centred = x * torch.exp2(-exponent)
    centred = centred - centred.mean(0)
    centred = centred - centred.mean(0)
    if n > d:
        c = factor.factor((centred.mT @ centred / (n - 1))[None])
        return factor.Factor(c.columns[0], c.exponent[0] + exponent, c.singular[0], c.lowest[0])
    none = torch.zeros_like(exponent)
    return factor.Factor(centred.mT / (n - 1) ** 0.5, exponent, none.bool(), none)


def _check_pair(name_a: str, a: Tensor, name_b: str, b: Tensor) -> None:
    _checks.symmetric(name_a, a)
    _checks.symmetric(name_b, b)
    _checks.same_device(name_b, b, name_a, a)
    if a.shape != b.shape:
        raise ValueError(f"{name_b}: takes shape {tuple(a.shape)} as {name_a} has, got {tuple(b.shape)}")


def _check_definite(name: str, a: Tensor, c: factor.Factor) -> None:
    """Refuse a matrix whose equilibrated form has an eigenvalue that rounding cannot explain."""
    allowed = 8 * a.shape[-1] * max(torch.finfo(a.dtype).eps, 1e-12)
    if bool((c.lowest < -allowed).any()):
        raise ValueError(
            f"{name}: takes positive semi-definite matrices, got one with an eigenvalue of "
            f"{float(c.lowest.amin()):.3g} relative to its diagonal"
        )


def _trace(a: Tensor) -> Tensor:
    return a.diagonal(dim1=-2, dim2=-1).double().sum(-1)
