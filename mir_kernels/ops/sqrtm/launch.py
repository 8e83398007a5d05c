"""Run the iterations of a backend on checked tensors: roots by each method, polar factors, the coupled iteration."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from mir_kernels import _checks
from mir_kernels._dispatch import Operation
from mir_kernels._symmetry import symmetrize
from mir_kernels._warnings import warn
from mir_kernels.ops.sqrtm import eager, factor, float64, reference, rounding

Backend = Literal["triton", "eager", "reference"]
IterationBackend = Literal["eager", "reference"]
_ORDERS = {"cuda": ("triton", "eager"), "cpu": ("eager", "triton")}
SQRTM = Operation("sqrtm", orders=_ORDERS)
INVERSE_SQRTM = Operation("inverse_sqrtm", orders=_ORDERS)
POLAR = Operation("polar", orders=_ORDERS)
NEWTON_SCHULZ = Operation("newton_schulz", orders={"cuda": ("eager",), "cpu": ("eager",)})
OPERATIONS = (SQRTM, INVERSE_SQRTM, POLAR, NEWTON_SCHULZ)

_COUPLED = {"bfloat16": 12, "float16": 14, "float32": 24, "float64": 40}
# Residuals above these mean that the iteration has not converged; rounding alone stays below.
_DIVERGED = {"bfloat16": 5e-2, "float16": 1e-2, "float32": 1e-3, "float64": 1e-8}


def root(
    a: Tensor, kind: str, method: str, precision: str, iterations: int | None, tol: float | None, backend: str
) -> Tensor:
    """A^(1/2) (kind "sqrt") or A^(-1/2) ("inverse") of square a (..., d, d): a new contiguous tensor of a's dtype.

    Raises ValueError if a is not finite, symmetric and positive (semi-)definite; warns if `tol` is not reached.
    """
    _checks.symmetric("a", a)
    d = a.shape[-1]
    flat = a.reshape(-1, d, d)
    if flat.shape[0] == 0:
        return a.clone(memory_format=torch.contiguous_format)
    if backend == "reference":
        x = reference.sqrtm(flat) if kind == "sqrt" else reference.inverse_sqrtm(flat)
    elif method == "eigh":
        x = _by_eigenvectors(kind, flat)
    elif method == "polar":
        x = _by_polar(kind, flat, precision, iterations, backend)
    else:
        steps = _COUPLED[precision] if iterations is None else iterations
        x = eager.coupled(symmetrize(flat), precision, steps)[0 if kind == "sqrt" else 1]
    x = x.to(a.dtype)
    if tol is not None:
        _warn_if_above(tol, kind, flat, x)
    return x.reshape(a.shape).contiguous()


def polar(m: Tensor, precision: str, iterations: int | None, backend: str) -> Tensor:
    """The orthogonal polar factor of m (..., m, n), a new contiguous tensor. Raises ValueError if m is not finite."""
    _checks.finite("m", m)
    wide = m.shape[-2] < m.shape[-1]
    x = (m.mT if wide else m).reshape(-1, max(m.shape[-2:]), min(m.shape[-2:]))
    if x.shape[0] == 0:
        return m.clone(memory_format=torch.contiguous_format)
    u = reference.polar(x) if backend == "reference" else polar_iteration(x, precision, backend, iterations)
    u = u.mT if wide else u
    return u.to(m.dtype).reshape(m.shape).contiguous()


def newton_schulz(a: Tensor, iterations: int, precision: str, backend: str) -> tuple[Tensor, Tensor, Tensor]:
    """A^(1/2), A^(-1/2) and the residual (...) of the coupled iteration; warns if it has not converged."""
    _checks.symmetric("a", a)
    d = a.shape[-1]
    flat = symmetrize(a.reshape(-1, d, d))
    if flat.shape[0] == 0:
        return a.clone(), a.clone(), a.new_zeros(a.shape[:-2], dtype=residual_dtype(precision))
    y, z, residual = eager.coupled(flat, "float64" if backend == "reference" else precision, iterations)
    diverged = residual > _DIVERGED[precision]
    if bool(diverged.any()):
        warn(
            f"newton_schulz: {int(diverged.sum())} of {flat.shape[0]} matrices have not converged after {iterations} "
            f"iterations in {precision}: residual up to {residual.amax().item():.2g}; try more iterations, a "
            "higher precision, or sqrtm(), which cannot diverge"
        )
    root, inverse = (t.to(a.dtype).reshape(a.shape).contiguous() for t in (y, z))
    return root, inverse, residual.to(residual_dtype(precision)).reshape(a.shape[:-2])


def residual_dtype(precision: str) -> torch.dtype:
    """The dtype of the residuals of `newton_schulz`."""
    return torch.float64 if precision == "float64" else torch.float32


def polar_iteration(m: Tensor, precision: str, backend: str, iterations: int | None = None) -> Tensor:
    """The raw iteration for (batch, m, n), m >= n, in the dtype of `precision`."""
    if backend == "triton" and precision != "float64":
        from mir_kernels.ops.sqrtm import triton

        return triton.polar(m, precision, iterations=iterations)
    return eager.polar(m, precision, iterations=iterations)


def polished_polar(m: Tensor, precision: str, backend: str, iterations: int | None = None) -> tuple[Tensor, Tensor]:
    """The float64 polar factor U, by the iteration in `precision` and `rounding.contract`, and a bound of its norm.

    `contract` squares the deviation from orthogonality. The remaining error is a rotation, which changes <U, M> only in
    second order. U is finite even if the iteration is not.
    """
    return rounding.contract(polar_iteration(m, precision, backend, iterations).double().nan_to_num(0.0, 0.0, 0.0))


def _by_eigenvectors(kind: str, a: Tensor) -> Tensor:
    exponent = factor.half_exponent(a.diagonal(dim1=-2, dim2=-1).amax(-1).double())[..., None, None]
    values, vectors = torch.linalg.eigh(float64.times_power(symmetrize(a), -2 * exponent))
    power = torch.exp2(exponent)
    floor = a.shape[-1] * factor.UNIT * values[..., -1:].clamp(min=0.0)
    if kind == "inverse":
        _check_positive(values[..., 0] > floor[..., 0])
        return symmetric_part(vectors * values.rsqrt()[..., None, :] @ vectors.mT) / power
    _check_semidefinite(values[..., 0], values[..., -1], a)
    return symmetric_part(vectors * values.clamp(min=0.0).sqrt()[..., None, :] @ vectors.mT) * power


def _by_polar(kind: str, a: Tensor, precision: str, iterations: int | None, backend: str) -> Tensor:
    c = factor.factor(symmetrize(a))
    _check_semidefinite(c.lowest, torch.ones_like(c.lowest), a)
    if kind == "inverse":
        _check_positive(~c.singular & (c.columns.diagonal(dim1=-2, dim2=-1) > 0).all(-1))
    power = torch.exp2(c.exponent)[..., None, None]
    u, _ = polished_polar(c.columns.mT, precision, backend, iterations)
    if kind == "sqrt":
        return symmetric_part(u.mT @ c.columns.mT) * power
    # L^T = U R, so R^-1 = L^-T U.
    return symmetric_part(torch.linalg.solve_triangular(c.columns.mT, u, upper=True)) / power


def symmetric_part(x: Tensor) -> Tensor:
    """(X + X^T) / 2."""
    return (x + x.mT) / 2


def _warn_if_above(tol: float, kind: str, a: Tensor, x: Tensor) -> None:
    """Warn if |XX - A|_F / |A|_F, or |X A X - I|_F / sqrt(d) of an inverse root, exceeds `tol`."""
    a, x = a.double(), x.double()
    if kind == "sqrt":
        size = eager.frobenius(a)
        reached = (eager.frobenius(x @ x - a) / torch.where(size > 0, size, 1.0)).amax().item()
    else:
        eye = torch.eye(a.shape[-1], dtype=a.dtype, device=a.device)
        reached = eager.frobenius(x @ a @ x - eye).amax().item() / a.shape[-1] ** 0.5
    if not reached <= tol:
        name = (SQRTM if kind == "sqrt" else INVERSE_SQRTM).name
        warn(
            f"{name}: reached a relative residual of {reached:.2g}, above tol={tol:.2g}; "
            'use a higher precision or method="eigh"'
        )


def _check_positive(positive: Tensor) -> None:
    if not bool(positive.all()):
        raise ValueError(
            f"a: expected positive definite matrices, got {int((~positive).sum())} of {positive.numel()} that are "
            "singular to rounding; add a multiple of the identity, or use sqrtm"
        )


def _check_semidefinite(lowest: Tensor, largest: Tensor, a: Tensor) -> None:
    """Raise for a negative eigenvalue that rounding in a's dtype cannot explain."""
    allowed = 8 * a.shape[-1] * max(torch.finfo(a.dtype).eps, 1e-12)
    if bool((lowest < -allowed * largest).any()):
        worst = (lowest / torch.where(largest > 0, largest, 1.0)).amin().item()
        raise ValueError(
            f"a: expected positive semi-definite matrices, got one with an eigenvalue of {worst:.3g} times the largest"
        )
