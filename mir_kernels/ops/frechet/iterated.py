"""The "eager" and "triton" backends: <U, N> with U the polar factor of N by the Newton-Schulz steps of `sqrtm`."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from mir_kernels.ops.frechet import certificate
from mir_kernels.ops.frechet.cross_factor import cross_factor
from mir_kernels.ops.frechet.report import TOLERANCE, TraceReport
from mir_kernels.ops.sqrtm.launch import polished_polar

# Precisions tried in turn. float16 is as fast as bfloat16 and reaches certificates that bfloat16 cannot (README.md).
RUNGS = {
    "bfloat16": ("float16", "float32", "float64"),
    "float32": ("float32", "float64"),
    "float64": ("float64",),
}


def trace(a: Tensor, b: Tensor, precision: str, backend: str, indefinite: float) -> TraceReport:
    """Tr((AB)^(1/2)) of symmetric float64 a, b (batch, d, d).

    Tries one precision after another until the dual bound is within the requested error.
    """
    pair = cross_factor(a, b, indefinite)
    value, gap, path = _certified(pair.n, precision, backend)
    path = [first + rest for first, rest in zip(pair.how, path, strict=True)]
    return TraceReport(pair.trace(value), gap + pair.relative_rounding(value), tuple(path))


def nuclear_norm(n: Tensor, precision: str, backend: str) -> tuple[Tensor, Tensor]:
    """|N|_* of float64 (batch, m, k), m >= k, and the relative gap of its dual bounds."""
    value, gap, _ = _certified(n, precision, backend)
    return value, gap


def witness(precision: str, backend: str) -> Callable[[Tensor], certificate.Witness]:
    """A function that returns the witness of a batch of N: a polar factor as accurate as `precision` requires."""

    def polar_witness(n: Tensor) -> certificate.Witness:
        for rung in RUNGS[precision if precision == "float64" else "float32"]:
            found = certificate.polar_witness(n, *polished_polar(n, rung, backend), TOLERANCE[precision])
            if bool((_gap(n, found) <= TOLERANCE[precision]).all()):
                break
        return found

    return polar_witness


def _certified(n: Tensor, precision: str, backend: str) -> tuple[Tensor, Tensor, list[str]]:
    """|N|_* of float64 (batch, m, n), m >= n; the relative gap of its dual bounds; the precisions that ran."""
    value, gap = n.new_zeros(n.shape[0]), n.new_full((n.shape[0],), float("inf"))
    path = [""] * n.shape[0]
    for rung in RUNGS[precision]:
        open_ = torch.nonzero(gap > TOLERANCE[precision])[:, 0]
        if open_.numel() == 0:
            break
        part = n[open_]
        u, norm = polished_polar(part, rung, backend)
        found = (u * part).sum((-2, -1))
        witness = certificate.polar_witness(part, u, norm, TOLERANCE[precision])
        reached = _gap(part, witness)
        better = reached < gap[open_]
        value[open_] = torch.where(better, found, value[open_])
        gap[open_] = torch.where(better, reached, gap[open_])
        for i in open_.tolist():
            path[i] += f"+polar[{rung}]"
    return value, gap, path


def _gap(n: Tensor, witness: certificate.Witness) -> Tensor:
    """(upper - lower) / upper for the nuclear norm of N; 1 where the witness failed."""
    lower, upper = certificate.nuclear_lower(n, witness), certificate.nuclear_upper(n, witness)
    gap = torch.where(upper > 0, (upper - lower) / upper, 0.0)
    return torch.where((witness.r == 0).all(-1).all(-1) & (upper > 0), 1.0, gap)
