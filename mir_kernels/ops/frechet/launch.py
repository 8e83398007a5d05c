"""From checked covariances or features to a solver, in parts that bound the memory, with bounds around the value."""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType

import torch
from torch import Tensor

from mir_kernels._dispatch import Operation
from mir_kernels._symmetry import symmetrize
from mir_kernels.ops.frechet import certificate, iterated, linalg, reference
from mir_kernels.ops.frechet.report import TraceReport, warn_if_missed

# "linalg": float64 singular values through torch.linalg; "eager" and "triton": the polar factor by Newton-Schulz.
TRACE_SQRT_PRODUCT = Operation(
    "trace_sqrt_product",
    orders={"cuda": ("triton", "eager", "linalg"), "cpu": ("linalg", "eager", "triton")},
    reasons={"linalg": lambda device: None},
)
OPERATIONS = (TRACE_SQRT_PRODUCT,)

# Float64 elements of one matrix stack that are worked on at a time.
CHUNK = 1 << 24


def trace_sqrt_product(
    a: Tensor, b: Tensor, precision: str, bounds: bool, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    """The value and, with `bounds`, its lower and upper end; those are empty without."""
    if not bounds:
        found = report(a, b, precision, backend)
        warn_if_missed("trace_sqrt_product", found.error, precision)
        return found.value, found.value.new_empty(0), found.value.new_empty(0)
    found, lower, upper = _with_bounds(a, b, precision, backend)
    warn_if_missed("trace_sqrt_product", found.error, precision)
    # The value comes from another computation than the bounds: inside them it is never further from the truth.
    return torch.minimum(torch.maximum(found.value, lower), upper), lower, upper


def report(a: Tensor, b: Tensor, precision: str, backend: str) -> TraceReport:
    """The value, the error it was accepted with, and the path that ran, for each of the batch."""
    indefinite = _indefinite(a, b)
    return _joined(a, [solver(backend).trace(x, y, precision, backend, indefinite) for x, y in _chunks(a, b)])


def _with_bounds(a: Tensor, b: Tensor, precision: str, backend: str) -> tuple[TraceReport, Tensor, Tensor]:
    indefinite, module = _indefinite(a, b), solver(backend)
    reports, lowers, uppers = [], [], []
    for x, y in _chunks(a, b):
        if module is linalg:
            found, ends = linalg.trace_with_bounds(x, y, precision, indefinite)
        else:
            found, ends = module.trace(x, y, precision, backend, indefinite), [None] * x.shape[0]
        lower, upper = torch.empty_like(found.value), torch.empty_like(found.value)
        for i, pair in enumerate(ends):
            if pair is not None:
                lower[i], upper[i] = pair
        if open_ := [i for i, pair in enumerate(ends) if pair is None]:
            lower[open_], upper[open_] = certificate.trace_bounds(
                x[open_], y[open_], module.witness(precision, backend)
            )
        reports.append(found)
        lowers.append(lower)
        uppers.append(upper)
    found = _joined(a, reports)
    if not reports:
        return found, found.value.clone(), found.value.clone()
    return found, torch.cat(lowers).reshape(a.shape[:-2]), torch.cat(uppers).reshape(a.shape[:-2])


def _indefinite(a: Tensor, b: Tensor) -> float:
    """How negative an eigenvalue of a covariance may be, relative to its equilibrated diagonal: rounding."""
    return 8 * a.shape[-1] * max(torch.finfo(a.dtype).eps, torch.finfo(b.dtype).eps, 1e-12)


def _joined(a: Tensor, parts: list[TraceReport]) -> TraceReport:
    values = torch.cat([part.value for part in parts]) if parts else a.new_zeros(0, dtype=torch.float64)
    errors = torch.cat([part.error for part in parts]) if parts else values
    batch = a.shape[:-2]
    return TraceReport(values.reshape(batch), errors.reshape(batch), tuple(p for part in parts for p in part.path))


def solver(backend: str) -> ModuleType:
    """The module that has `trace`, `nuclear_norm` and `witness` of a backend."""
    return {"linalg": linalg, "reference": reference, "eager": iterated, "triton": iterated}[backend]


def _chunks(a: Tensor, b: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """The flattened batch, symmetric and in float64, in parts that bound the memory of the intermediates."""
    d = a.shape[-1]
    step = max(1, CHUNK // (d * d))
    x, y = a.reshape(-1, d, d), b.reshape(-1, d, d)
    for i in range(0, x.shape[0], step):
        yield symmetrize(x[i : i + step]), symmetrize(y[i : i + step])
