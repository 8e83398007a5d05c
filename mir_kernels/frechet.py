"""Trace of the square root of a product of covariances and Frechet distance of two Gaussians, with proved bounds."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from mir_kernels import _checks, sqrtm
from mir_kernels._dispatch import Operation
from mir_kernels._precision import with_float32_products
from mir_kernels.sqrtm import certificate, factor, reference, squared

# "linalg": float64 singular values through torch.linalg; "eager" and "triton": the polar factor by Newton-Schulz.
OPERATION = Operation(
    "trace_sqrt_product",
    orders={"cuda": ("triton", "eager", "linalg"), "cpu": ("linalg", "eager", "triton")},
    reasons={"linalg": lambda device: None},
)
OPERATIONS = (OPERATION,)
PRECISIONS = ("bfloat16", "float32", "float64")
TOLERANCE = {"bfloat16": 2e-3, "float32": 1e-6, "float64": 1e-8}  # promised relative error of the trace
# Iterations tried in turn. The first is as fast as one in bfloat16 and certifies what that cannot (sqrtm/README.md).
RUNGS = {
    "bfloat16": ("float16", "float32", "float64"),
    "float32": ("float32", "float64"),
    "float64": ("float64",),
}

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
    """Tr((AB)^(1/2)), the last term of Eq. 3 of the MIR paper, as the nuclear norm of Ca^T Cb with Ca Ca^T = A.

    a, b: covariances (..., d, d) of one shape, any floating dtype; each is symmetrised and worked on in float64.
    precision: the relative error of the trace is at most 2e-3 ("bfloat16", by products of 16 bits), 1e-6 ("float32") or
    1e-8 ("float64"), whatever the backend; a RuntimeWarning says what was reached where that could not be met.
    bounds: return `TraceSqrt(value, lower, upper)` with lower <= truth <= upper proved in float64; of a matrix that
    rounding left indefinite, the positive part is meant, taken with the diagonal scaled alike.
    backend: "linalg" (float64 singular values), "eager" or "triton" (polar factor by Newton-Schulz).
    Returns float64 of the batch's shape, without gradient. Raises ValueError for matrices that are not finite,
    symmetric and positive semi-definite up to rounding, TypeError for other dtypes.
    """
    _check_pair("a", a, "b", b)
    _checks.choice("precision", precision, PRECISIONS)
    backend = OPERATION.choose(backend, a.device)
    value, lower, upper = _call(a, b, precision, bounds, backend)
    return TraceSqrt(value, lower, upper) if bounds else value


def _call(a: Tensor, b: Tensor, precision: str, bounds: bool, backend: str) -> tuple[Tensor, Tensor, Tensor]:
    """The registered operation where torch.compile traces, else its body: calling a custom_op loads the compiler."""
    with torch.no_grad():
        if torch.compiler.is_compiling():
            return torch.ops.mir_kernels.trace_sqrt_product(a, b, precision, bounds, backend)
        return _trace_sqrt_product(a, b, precision, bounds, backend)


@with_float32_products
def _trace_sqrt_product(
    a: Tensor, b: Tensor, precision: str, bounds: bool, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    report = _report(a, b, precision, backend)
    _say_if_missed("trace_sqrt_product", report.error, precision)
    if not bounds:
        return report.value, report.value.new_empty(0), report.value.new_empty(0)
    lower, upper = _bounds(a, b, precision, backend)
    # The value comes from another computation than the bounds: inside them it is never further from the truth.
    return torch.minimum(torch.maximum(report.value, lower), upper), lower, upper


_trace_sqrt_product_op = torch.library.custom_op(
    "mir_kernels::trace_sqrt_product", _trace_sqrt_product, mutates_args=()
)


@_trace_sqrt_product_op.register_fake
def _(a: Tensor, b: Tensor, precision: str, bounds: bool, backend: str) -> tuple[Tensor, Tensor, Tensor]:
    value = a.new_empty(a.shape[:-2], dtype=torch.float64)
    lower, upper = (a.new_empty(a.shape[:-2] if bounds else (0,), dtype=torch.float64) for _ in range(2))
    return value, lower, upper


@torch.no_grad()
@with_float32_products
def trace_sqrt_report(a: Tensor, b: Tensor, *, precision: str = "float32", backend: str | None = None) -> TraceReport:
    """`trace_sqrt_product` and how it came about: the error each value was accepted with, and the path that ran."""
    _check_pair("a", a, "b", b)
    _checks.choice("precision", precision, PRECISIONS)
    backend = OPERATION.choose(backend, a.device)
    return _report(a, b, precision, backend)


def _report(a: Tensor, b: Tensor, precision: str, backend: str) -> TraceReport:
    solve = _linalg if backend == "linalg" else _reference if backend == "reference" else _iterated
    indefinite = 8 * a.shape[-1] * max(torch.finfo(a.dtype).eps, torch.finfo(b.dtype).eps, 1e-12)
    parts = [solve(x, y, precision, backend, indefinite) for x, y in _chunks(a, b)]
    values = torch.cat([part.value for part in parts]) if parts else a.new_zeros(0, dtype=torch.float64)
    errors = torch.cat([part.error for part in parts]) if parts else values
    batch = a.shape[:-2]
    return TraceReport(values.reshape(batch), errors.reshape(batch), tuple(p for part in parts for p in part.path))


@torch.no_grad()
@with_float32_products
def trace_sqrt_from_features(
    x: Tensor, y: Tensor, *, precision: str = "float32", bounds: bool = False, backend: str | None = None
) -> Tensor | TraceSqrt:
    """Tr((Sx Sy)^(1/2)) of the covariances (ddof 1) of the rows of x (n, d) and y (m, d), n, m >= 2, in float64.

    The nuclear norm of Xc Yc^T / sqrt((n-1)(m-1)), without a covariance, where one of them has no more rows than
    columns: by singular values ("linalg", exact to rounding) or a polar factor to `precision`. Otherwise
    `trace_sqrt_product` of the two covariances, and then bounds are those of the covariances as rounded to float64.
    The features need not be centred. A scalar, or `TraceSqrt` with `bounds`.
    """
    _checks.tokens("x", x)
    _checks.tokens("y", y)
    for name, value in (("x", x), ("y", y)):
        if value.dim() != 2 or value.shape[0] < 2:
            raise ValueError(f"{name}: takes features (n, d) with n >= 2, got {tuple(value.shape)}")
        _checks.finite(name, value)
    _checks.same_device("y", y, "x", x)
    if x.shape[1] != y.shape[1]:
        raise ValueError(f"y: takes {x.shape[1]} columns as x has, got {y.shape[1]}")
    _checks.choice("precision", precision, PRECISIONS)
    backend = OPERATION.choose(backend, x.device)
    if min(x.shape[0], y.shape[0]) > x.shape[1]:
        (cx, ex), (cy, ey) = _covariance(x), _covariance(y)
        root = trace_sqrt_product(cx, cy, precision=precision, bounds=bounds, backend=backend)
        power = torch.exp2(ex + ey)
        return TraceSqrt(*(t * power for t in root)) if isinstance(root, TraceSqrt) else root * power
    (cx, ex), (cy, ey) = _centred(x), _centred(y)
    power = torch.exp2(ex + ey) / ((x.shape[0] - 1) * (y.shape[0] - 1)) ** 0.5
    if not bounds:
        cx, cy = (c if c.shape[0] <= c.shape[1] else torch.linalg.qr(c, mode="r").R for c in (cx, cy))
    n = cx @ cy.mT if cx.shape[0] >= cy.shape[0] else cy @ cx.mT
    if backend in ("linalg", "reference"):
        value = torch.linalg.svdvals(n).sum()
    else:
        value, gap, _ = _nuclear_norm(n[None], precision, backend)
        _say_if_missed("trace_sqrt_from_features", gap, precision)
        value = value[0]
    if not bounds:
        return value * power
    witness = _witness(precision, backend)(n[None])
    # Centring: the subtraction, and the rounding of the mean of what was centred once already.
    rows = max(x.shape[0], y.shape[0])
    slack = certificate.product_error(cx.mT, cy.mT) + 3 * certificate.gamma(rows + 4) * (
        certificate.frobenius(cx) * certificate.frobenius(cy)
    )
    lower = (certificate.nuclear_lower(n, witness)[0] - slack).clamp(min=0.0) * power * (1 - 8 * factor.UNIT)
    upper = (certificate.nuclear_upper(n, witness)[0] + slack) * power * (1 + 8 * factor.UNIT)
    return TraceSqrt((value * power).clamp(lower, upper), lower, upper)


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
    """|mean_x - mean_y|^2 + Tr(cov_x + cov_y - 2 (cov_x cov_y)^(1/2)), the distance of Eq. 3 of the MIR paper.

    mean_x, mean_y: (..., d).  cov_x, cov_y: (..., d, d).  precision, bounds, backend and errors as for
    `trace_sqrt_product`; the error of the root is relative to the root, so where the distance is far smaller than the
    traces it holds fewer digits: `bounds=True` returns `FrechetDistance(value, lower, upper)` and says how many.
    Never negative, and zero for equal Gaussians. float64, of the batch's shape, without gradient.
    """
    for name, mean, cov in (("mean_x", mean_x, cov_x), ("mean_y", mean_y, cov_y)):
        _checks.tokens(name, mean)
        _checks.finite(name, mean)
        if mean.shape != cov.shape[:-1]:
            raise ValueError(f"{name}: takes shape {tuple(cov.shape[:-1])}, got {tuple(mean.shape)}")
        _checks.same_device(name, mean, "cov_x", cov_x)
    _check_pair("cov_x", cov_x, "cov_y", cov_y)
    _checks.choice("precision", precision, PRECISIONS)
    backend = OPERATION.choose(backend, cov_x.device)
    traces = _trace(cov_x), _trace(cov_y)
    rest = (mean_x.double() - mean_y.double()).square().sum(-1) + traces[0] + traces[1]
    # (AA)^(1/2) = A: equal covariances are at no distance in any precision.
    same = (cov_x == cov_y).all(-1).all(-1)
    if not bounds and not torch.compiler.is_compiling() and bool(same.all()):
        return (rest - 2 * traces[0]).clamp(min=0.0)
    value, lower, upper = _call(cov_x, cov_y, precision, bounds, backend)
    value = (rest - 2 * torch.where(same, traces[0], value)).clamp(min=0.0)
    if not bounds:
        return value
    slack = rest * certificate.gamma(4 * cov_x.shape[-1])
    # Where the means' distance leaves float64's range, so does the upper end.
    lower, upper = (rest - 2 * upper - slack).clamp(min=0.0), rest - 2 * lower + slack
    lower = lower.nan_to_num(0.0).clamp(max=torch.finfo(rest.dtype).max)
    return FrechetDistance(value.clamp(lower, upper), lower, upper.clamp(min=0.0))


def _linalg(a: Tensor, b: Tensor, precision: str, backend: str, indefinite: float) -> TraceReport:
    """The roots of the eigenvalues of C^T A C with C C^T = B where rounding allows it, else the singular values of N.
    As accurate in every precision."""
    form = squared.squared(a, b)
    total, error, solver = squared.roots_(form)
    total = factor.times_power(total, form.exponent)
    path = [f"cholesky+{solver}"] * a.shape[0]
    direct = torch.nonzero(~(error <= TOLERANCE["float64"]))[:, 0]
    if direct.numel():
        pair = _factors(a[direct], b[direct], indefinite)
        values = torch.linalg.svdvals(pair.n).sum(-1)
        total[direct] = factor.times_power(values, pair.exponent)
        error[direct] = pair.n.shape[-1] * factor.UNIT + _relative(pair.rounding, values)
        for i, how in zip(direct.tolist(), pair.how, strict=True):
            path[i] = how + "+svdvals"
    return TraceReport(total, error, tuple(path))


def _iterated(a: Tensor, b: Tensor, precision: str, backend: str, indefinite: float) -> TraceReport:
    """<U, N> with U the polar factor of N by Newton-Schulz, one precision after another until the dual bound says that
    the error asked for is met."""
    n, exponent, rounding, how = _factors(a, b, indefinite)
    value, gap, path = _nuclear_norm(n, precision, backend)
    path = [first + rest for first, rest in zip(how, path, strict=True)]
    return TraceReport(factor.times_power(value, exponent), gap + _relative(rounding, value), tuple(path))


def _nuclear_norm(n: Tensor, precision: str, backend: str) -> tuple[Tensor, Tensor, list[str]]:
    """|N|_* of float64 (batch, m, n), m >= n; the relative gap of its dual bounds; the precisions that ran."""
    value, gap = n.new_zeros(n.shape[0]), n.new_full((n.shape[0],), float("inf"))
    path = [""] * n.shape[0]
    for rung in RUNGS[precision]:
        open_ = torch.nonzero(gap > TOLERANCE[precision])[:, 0]
        if open_.numel() == 0:
            break
        part = n[open_]
        u, norm = sqrtm.polished_polar(part, rung, backend)
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
    """(upper - lower) / upper of the nuclear norm of N, 1 where the witness failed."""
    lower, upper = certificate.nuclear_lower(n, witness), certificate.nuclear_upper(n, witness)
    gap = torch.where(upper > 0, (upper - lower) / upper, 0.0)
    return torch.where((witness.r == 0).all(-1).all(-1) & (upper > 0), 1.0, gap)


def _say_if_missed(name: str, error: Tensor, precision: str) -> None:
    missed = error.amax().item() if error.numel() else 0.0
    if missed > TOLERANCE[precision]:
        warnings.warn(
            f"{name}: reached a relative error of {missed:.2g}, precision={precision!r} asks for "
            f"{TOLERANCE[precision]:.0e}",
            RuntimeWarning,
            stacklevel=5,
        )


def _relative(error: Tensor, value: Tensor) -> Tensor:
    return torch.where(error > 0, error / value, 0.0)


def _reference(a: Tensor, b: Tensor, precision: str, backend: str, indefinite: float) -> TraceReport:
    value = reference.trace_sqrt_product(a, b)
    return TraceReport(value, torch.full_like(value, 1e-8), ("reference",) * value.shape[0])


class _Factors(NamedTuple):
    """Tr((AB)^(1/2)) = 2^exponent |N|_*, to within `rounding` of |N|_*.  how: "cholesky" or "eigh" gave N."""

    n: Tensor
    exponent: Tensor
    rounding: Tensor
    how: tuple[str, ...]


def _factors(a: Tensor, b: Tensor, indefinite: float) -> _Factors:
    x, y = factor.factor(a), factor.factor(b)
    for name, c in (("a", x), ("b", y)):
        if bool((c.lowest < -indefinite).any()):
            raise ValueError(
                f"{name}: takes positive semi-definite matrices, got one with an eigenvalue of "
                f"{float(c.lowest.amin()):.3g} relative to its diagonal"
            )
    singular = (x.singular | y.singular).tolist()
    n = factor.cross_product(x.columns, y.columns, triangular=not any(singular))
    how = tuple("eigh" if s else "cholesky" for s in singular)
    return _Factors(n, x.exponent + y.exponent, factor.trace_error(x, y), how)


def _bounds(a: Tensor, b: Tensor, precision: str, backend: str) -> tuple[Tensor, Tensor]:
    witness = _witness(precision, backend)
    ends = [certificate.trace_bounds(x, y, witness) for x, y in _chunks(a, b)]
    if not ends:
        empty = a.new_zeros(a.shape[:-2], dtype=torch.float64)
        return empty, empty.clone()
    lower, upper = (torch.cat(end).reshape(a.shape[:-2]) for end in zip(*ends, strict=True))
    return lower, upper


def _witness(precision: str, backend: str) -> Callable[[Tensor], certificate.Witness]:
    """How the bounds of a batch of N are witnessed: eigenvectors, or a polar factor as fine as `precision` wants."""

    def polar_witness(n: Tensor) -> certificate.Witness:
        for rung in RUNGS[precision if precision == "float64" else "float32"]:
            found = certificate.polar_witness(n, *sqrtm.polished_polar(n, rung, backend), TOLERANCE[precision])
            if bool((_gap(n, found) <= TOLERANCE[precision]).all()):
                break
        return found

    return certificate.spectral_witness if backend in ("linalg", "reference") else polar_witness


def _chunks(a: Tensor, b: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """The flattened batch, symmetric and in float64, in parts that bound the memory of the intermediates."""
    d = a.shape[-1]
    step = max(1, _CHUNK // (d * d))
    x, y = a.reshape(-1, d, d), b.reshape(-1, d, d)
    for i in range(0, x.shape[0], step):
        yield factor.symmetrize(x[i : i + step]), factor.symmetrize(y[i : i + step])


def _centred(x: Tensor) -> tuple[Tensor, Tensor]:
    """Features minus their mean in float64, divided by 2^exponent so that squares neither over- nor underflow."""
    x = x.double()
    size = x.abs().amax()
    exponent = torch.where(size > 0, torch.frexp(size).exponent.double(), 0.0)
    centred = x * torch.exp2(-exponent)
    centred = centred - centred.mean(0)
    # Once more: the first mean was rounded to the size of the mean, the second to that of the deviations.
    return centred - centred.mean(0), exponent


def _covariance(x: Tensor) -> tuple[Tensor, Tensor]:
    centred, exponent = _centred(x)
    return factor.gram(centred) / (x.shape[0] - 1), exponent


def _check_pair(name_a: str, a: Tensor, name_b: str, b: Tensor) -> None:
    _checks.symmetric(name_a, a)
    _checks.symmetric(name_b, b)
    _checks.same_device(name_b, b, name_a, a)
    if a.shape != b.shape:
        raise ValueError(f"{name_b}: takes shape {tuple(a.shape)} as {name_a} has, got {tuple(b.shape)}")


def _trace(a: Tensor) -> Tensor:
    return a.diagonal(dim1=-2, dim2=-1).double().sum(-1)
