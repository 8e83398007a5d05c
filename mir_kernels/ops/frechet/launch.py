"""Run a solver on checked covariances, in parts that bound memory, and clamp the value to its bounds."""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType
from typing import Literal

import torch
from torch import Tensor

from mir_kernels._dispatch import Operation
from mir_kernels._symmetry import symmetrize
from mir_kernels.ops.frechet import certificate, iterated, linalg, reference
from mir_kernels.ops.frechet.report import TraceReport, warn_if_missed

Backend = Literal["triton", "eager", "linalg", "reference"]
# "linalg": float64 singular values through torch.linalg; "eager" and "triton": the polar factor by Newton-Schulz.
TRACE_SQRT_PRODUCT = Operation(
    "trace_sqrt_product",
    orders={"cuda": ("triton", "eager", "linalg"), "cpu": ("linalg", "eager", "triton")},
    reasons={"linalg": lambda device: None},
)
OPERATIONS = (TRACE_SQRT_PRODUCT,)

# Float64 elements of one matrix stack that are processed at a time.
CHUNK = 1 << 24


def trace_sqrt_product(
    a: Tensor, b: Tensor, precision: str, bounds: bool, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    """The value with its lower and upper end, which are empty without `bounds`. Leading axes broadcast."""
    if not bounds:
        found = report(a, b, precision, backend)
        warn_if_missed("trace_sqrt_product", found.error, precision)
        return found.value, found.value.new_empty(0), found.value.new_empty(0)
    found, lower, upper = _with_bounds(a, b, precision, backend)
    warn_if_missed("trace_sqrt_product", found.error, precision)
    # Value and bounds come from different computations: clamping never moves the value away from the truth.
    return torch.minimum(torch.maximum(found.value, lower), upper), lower, upper


def report(a: Tensor, b: Tensor, precision: str, backend: str) -> TraceReport:
    """The value, the error it was accepted with, and the path that ran, for each pair of the batch."""
    indefinite = _indefinite(a, b)
    return _joined(a, b, [solver(backend).trace(x, y, precision, backend, indefinite) for x, y in _chunks(a, b)])


def _with_bounds(a: Tensor, b: Tensor, precision: str, backend: str) -> tuple[TraceReport, Tensor, Tensor]:
    indefinite, module = _indefinite(a, b), solver(backend)
    reports, lowers, uppers = [], [], []
    for x, y in _chunks(a, b):
        if module is linalg:
            found, ends = linalg.trace_with_bounds(x, y, precision, indefinite)
        else:
            found = module.trace(x, y, precision, backend, indefinite)
            ends = [None] * len(found.value)
        lower, upper = torch.empty_like(found.value), torch.empty_like(found.value)
        for i, pair in enumerate(ends):
            if pair is not None:
                lower[i], upper[i] = pair
        if open_ := [i for i, pair in enumerate(ends) if pair is None]:
            part = (some(x, open_), some(y, open_))
            lower[open_], upper[open_] = certificate.trace_bounds(*part, module.witness(precision, backend))
        reports.append(found)
        lowers.append(lower)
        uppers.append(upper)
    found = _joined(a, b, reports)
    if not reports:
        return found, found.value.clone(), found.value.clone()
    return found, torch.cat(lowers).reshape(found.value.shape), torch.cat(uppers).reshape(found.value.shape)


def _indefinite(a: Tensor, b: Tensor) -> float:
    """How negative rounding may make an eigenvalue of a covariance, relative to its equilibrated diagonal."""
    return 8 * a.shape[-1] * max(torch.finfo(a.dtype).eps, torch.finfo(b.dtype).eps, 1e-12)


def _joined(a: Tensor, b: Tensor, parts: list[TraceReport]) -> TraceReport:
    values = torch.cat([part.value for part in parts]) if parts else a.new_zeros(0, dtype=torch.float64)
    errors = torch.cat([part.error for part in parts]) if parts else values
    batch = batch_of(a, b)
    return TraceReport(values.reshape(batch), errors.reshape(batch), tuple(p for part in parts for p in part.path))


def batch_of(a: Tensor, b: Tensor) -> torch.Size:
    """The broadcast leading axes of matrices (..., d, d)."""
    if a.shape == b.shape:  # saves microseconds
        return a.shape[:-2]
    return torch.broadcast_shapes(a.shape[:-2], b.shape[:-2])


def solver(backend: str) -> ModuleType:
    """The module with `trace`, `nuclear_norm` and `witness` of a backend."""
    return {"linalg": linalg, "reference": reference, "eager": iterated, "triton": iterated}[backend]


def some(x: Tensor, places: list[int]) -> Tensor:
    """The matrices at `places` of a part (count, d, d); a matrix shared by the whole batch, (1, d, d), unchanged."""
    return x if x.shape[0] == 1 else x[places]


def _chunks(a: Tensor, b: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """The flattened batch, symmetric and in float64, in parts that bound the memory of intermediate results.

    A matrix shared by the whole batch is yielded as (1, d, d) with every part, and factored once per part.
    """
    d, batch = a.shape[-1], batch_of(a, b)
    step = max(1, CHUNK // (d * d))
    sides = [_Side(matrix, batch) for matrix in (a, b)]
    for i in range(0, batch.numel(), step):
        x, y = (side.part(i, i + step) for side in sides)
        yield x, y


class _Side:
    """Matrices (..., d, d), addressed by their place in the flattened broadcast batch."""

    def __init__(self, matrices: Tensor, batch: torch.Size) -> None:
        self._flat = matrices.reshape(-1, *matrices.shape[-2:])
        count = self._flat.shape[0]
        self._alone = symmetrize(self._flat) if count == 1 else None
        self._places: Tensor | None = None
        if count not in (1, batch.numel()):
            places = torch.arange(count, device=matrices.device, dtype=torch.int64)
            self._places = places.view(matrices.shape[:-2]).expand(batch).reshape(-1)

    def part(self, start: int, stop: int) -> Tensor:
        if self._alone is not None:
            return self._alone
        part = self._flat[start:stop] if self._places is None else self._flat[self._places[start:stop]]
        return symmetrize(part)
