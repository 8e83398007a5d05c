"""The "linalg" backend: float64 decompositions; for large matrices, rounding up to `precision` is accepted."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from mir_kernels.ops.frechet import certificate, log_determinants, standard_form
from mir_kernels.ops.frechet.band_reduction import RootSums
from mir_kernels.ops.frechet.cross_factor import cross_factor
from mir_kernels.ops.frechet.report import TOLERANCE, TraceReport
from mir_kernels.ops.frechet.standard_form import StandardForm
from mir_kernels.ops.sqrtm import factor

_WIDEST = 1e-5  # relative width accepted for "float32": the tighter certificate takes four times as long


def trace(a: Tensor, b: Tensor, precision: str, backend: str, indefinite: float) -> TraceReport:
    """Tr((AB)^(1/2)) of symmetric float64 a, b (batch, d, d).

    The roots of the eigenvalues of C^T A C with C C^T = B if rounding allows, else the singular values of N.
    """
    return _trace(a, b, standard_form.reduce(a, b), precision, indefinite)[0]


def trace_with_bounds(
    a: Tensor, b: Tensor, precision: str, indefinite: float
) -> tuple[TraceReport, list[tuple[Tensor, Tensor] | None]]:
    """`trace` with proved bounds of each pair; None where they do not come from a large standard form.

    They are as tight as `precision` requires; "float32" accepts _WIDEST if rounding allows no less.
    """
    form = standard_form.reduce(a, b)
    if not form.banded:
        return _trace(a, b, form, precision, indefinite)[0], [None] * len(form.rounding)
    a, b = torch.broadcast_tensors(a, b)
    tolerance = TOLERANCE[precision]
    widest = _WIDEST if precision == "float32" else tolerance
    kept = form.m.clone()
    found, sums = _trace(a, b, form, precision, indefinite)
    ends: list[tuple[Tensor, Tensor] | None] = []
    for i, estimate in enumerate(sums):
        exponent = form.exponent[i]
        moved = log_determinants.form_error(a[i], b[i], exponent.item())
        pair = log_determinants.root_bounds(kept[i], form.d, moved, estimate, tolerance, widest)
        if pair is None:
            ends.append(None)
            continue
        lower, upper = a.new_tensor(pair)
        ends.append((certificate.outward(lower, exponent, -1), certificate.outward(upper, exponent, 1)))
    return found, ends


def _trace(
    a: Tensor, b: Tensor, form: StandardForm, precision: str, indefinite: float
) -> tuple[TraceReport, list[RootSums]]:
    sums, errors, solver = standard_form.roots_(form)
    total = a.new_tensor([_times_power(one.total, e) for one, e in zip(sums, form.exponent.tolist(), strict=True)])
    error = a.new_tensor(errors)
    path = [f"cholesky+{solver}"] * len(errors)
    # For large matrices the singular values take seven times as long: use them only if the promised error needs them.
    allowed = min(TOLERANCE[precision], TOLERANCE["float32"]) if form.banded else TOLERANCE["float64"]
    direct = [i for i, reached in enumerate(errors) if not reached <= allowed]
    if direct:
        x, y = (one if one.shape[0] == 1 else one[direct] for one in (a, b))
        pair = cross_factor(x, y, indefinite)
        values = torch.linalg.svdvals(pair.n).sum(-1)
        total[direct] = pair.trace(values)
        error[direct] = pair.n.shape[-1] * factor.UNIT + pair.relative_rounding(values)
        for i, how in zip(direct, pair.how, strict=True):
            path[i] = how + "+svdvals"
    return TraceReport(total, error, tuple(path)), sums


def _times_power(x: float, exponent: float) -> float:
    """x 2^exponent; infinite beyond float64's range."""
    try:
        return math.ldexp(x, int(exponent))
    except OverflowError:
        return math.inf


def nuclear_norm(n: Tensor, precision: str, backend: str) -> tuple[Tensor, Tensor]:
    """|N|_* of float64 n (batch, m, k), and its relative error beyond rounding, which is zero."""
    values = torch.linalg.svdvals(n).sum(-1)
    return values, torch.zeros_like(values)


def witness(precision: str, backend: str) -> Callable[[Tensor], certificate.Witness]:
    """A function that returns the witness of a batch of N."""
    return certificate.spectral_witness
