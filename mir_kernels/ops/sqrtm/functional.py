"""The public functions: argument checks, then the registered operator under torch.compile, else the raw function."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from mir_kernels import _checks
from mir_kernels._dispatch import Operation
from mir_kernels._gate import by_operator
from mir_kernels.ops.sqrtm import autograd
from mir_kernels.ops.sqrtm.launch import INVERSE_SQRTM, NEWTON_SCHULZ, POLAR, SQRTM, Backend, IterationBackend

if TYPE_CHECKING:
    from mir_kernels._arrays import Array

Precision = Literal["bfloat16", "float16", "float32", "float64"]
Method = Literal["auto", "polar", "coupled", "eigh"]
PRECISIONS, METHODS = get_args(Precision), get_args(Method)


class NewtonSchulz(NamedTuple):
    """sqrt: A^(1/2).  inverse_sqrt: A^(-1/2).  residual: |I - ZY|_F / sqrt(d) of the scaled iterates, (...) ."""

    sqrt: Tensor
    inverse_sqrt: Tensor
    residual: Tensor


def sqrtm(
    a: Array,
    *,
    method: Method = "auto",
    precision: Precision = "float32",
    iterations: int | None = None,
    tol: float | None = None,
    backend: Backend | None = None,
) -> Tensor:
    """The principal square roots X of symmetric positive semi-definite `a` (..., d, d): X X = A, X = X^T >= 0.

    method: "eigh": eigenvectors in float64. "polar": A = L L^T in float64 and the polar factor U of L^T = U X in
    `precision` (Higham, Functions of Matrices, Alg. 6.21). "coupled": the coupled Newton-Schulz iteration, for
    well-conditioned matrices only. "auto": "eigh" on a CPU and for "float64", else "polar". The "triton" backend
    supports "polar" only, and no "float64".
    precision: of the iterations of "polar" and "coupled"; |X - A^(1/2)|_F / |A^(1/2)|_F of "polar" is at most about
    2e-2 ("bfloat16"), 5e-3 ("float16"), 4e-6 ("float32") and 2e-7 ("float64"), whatever the condition number.
    iterations: number of steps, by default chosen by the method.  tol: warns (RuntimeWarning) if |XX - A|_F / |A|_F of
    any matrix exceeds it.
    Accepts any floating dtype, which the result keeps, and numpy arrays.  Gradient: the Lyapunov equation
    X S + S X = G without null directions; a second derivative raises. Raises ValueError for matrices that are not
    finite, symmetric and positive semi-definite up to rounding, TypeError for other dtypes. Compiled code raises the
    same errors when it runs.
    """
    return _root("sqrt", SQRTM, a, method, precision, iterations, tol, backend)


def inverse_sqrtm(
    a: Array,
    *,
    method: Method = "auto",
    precision: Precision = "float32",
    iterations: int | None = None,
    tol: float | None = None,
    backend: Backend | None = None,
) -> Tensor:
    """The inverse square roots of symmetric positive definite `a` (..., d, d); arguments as in `sqrtm`.

    tol applies to |X A X - I|_F / sqrt(d). Raises ValueError for a matrix that is singular to rounding.
    """
    return _root("inverse", INVERSE_SQRTM, a, method, precision, iterations, tol, backend)


def polar(
    m: Array, *, precision: Precision = "float32", iterations: int | None = None, backend: Backend | None = None
) -> Tensor:
    """The orthogonal polar factor U of M = U H, H = (M^T M)^(1/2), for `m` (..., m, n); wide ones are transposed.

    Degree-5 Newton-Schulz with the coefficients of The Polar Express (Amsel et al., 2025). U has singular value 1 for
    every singular value of M above 3e-3 ("bfloat16"), 1e-3 ("float16"), 5e-7 ("float32") or 1e-12 ("float64") of the
    largest. In "float64" smaller ones come out below 1, and zero as 0, to 1e-4. In the other precisions a smaller one,
    or zero, comes out anywhere between 0 and 1, because rounding errors are as large; zero rows and columns stay zero.
    All arithmetic is in `precision`, whatever the dtype of m. "float16" is as fast as "bfloat16" on tensor cores and
    eight times as accurate; no intermediate value leaves its range.
    The "triton" backend does not support "float64". Accepts any floating dtype, which the result keeps. First
    derivatives only. Raises ValueError for values that are not finite.
    """
    m = _checks.floating("m", m)
    if m.dim() < 2 or min(m.shape[-2:]) < 1:
        raise ValueError(f"m: expected matrices (..., m, n) with m, n >= 1, got {tuple(m.shape)}")
    _check_run(precision, iterations)
    chosen = _choose(POLAR, backend, m.device, precision)
    run = torch.ops.mir_kernels.polar if by_operator("polar", m) else autograd.Polar.apply
    return run(m, precision, iterations, chosen)


def newton_schulz(
    a: Array, *, iterations: int, precision: Precision = "float32", backend: IterationBackend | None = None
) -> NewtonSchulz:
    """The coupled Newton-Schulz iteration for symmetric positive definite `a` (..., d, d).

    Y' = Y (3I - ZY)/2, Z' = (3I - ZY)/2 Z from Y = A/s, Z = I, with s the largest absolute row sum, at least |A|_2
    (Higham, Functions of Matrices, 6.35); returns sqrt(s) Y, Z / sqrt(s) and the residual. Beyond a condition number of
    about 1e4 in bfloat16 and 1e6 in float32, rounding errors grow without bound: the iterate with the best residual is
    returned with a RuntimeWarning. `sqrtm` has no such limit.
    Accepts any floating dtype, which the results keep. Gradients for both roots. backend "reference" is the same
    iteration in float64.
    """
    a = _checks.square("a", a)
    _check_run(precision, iterations)
    chosen = NEWTON_SCHULZ.choose(backend, a.device)
    run = torch.ops.mir_kernels.newton_schulz if by_operator("newton_schulz", a) else autograd.NewtonSchulz.apply
    return NewtonSchulz(*run(a, iterations, precision, chosen))


def _root(
    kind: str,
    operation: Operation,
    a: Array,
    method: Method,
    precision: Precision,
    iterations: int | None,
    tol: float | None,
    backend: Backend | None,
) -> Tensor:
    a = _checks.square("a", a)
    _checks.choice("method", method, METHODS)
    _check_run(precision, iterations)
    if method == "auto":
        on_tensor_cores = a.device.type != "cpu" and precision != "float64"
        method = "polar" if on_tensor_cores or backend == "triton" else "eigh"
    chosen = _choose(operation, backend, a.device, precision if method == "polar" else method)
    run = torch.ops.mir_kernels.root if by_operator(operation.name, a) else autograd.Root.apply
    return run(a, kind, method, precision, iterations, tol, chosen)


def _choose(operation: Operation, backend: str | None, device: torch.device, form: str) -> str:
    """The backend for `form`: a precision of "polar", or another method. Triton supports neither float64 nor those."""
    if form in ("bfloat16", "float16", "float32"):
        return operation.choose(backend, device)
    if backend == "triton":
        raise RuntimeError(f"backend 'triton' of {operation.name} does not support {form}; omit the backend")
    return operation.choose(backend or "eager", device)


def _check_run(precision: str, iterations: int | None) -> None:
    _checks.choice("precision", precision, PRECISIONS)
    if iterations is not None and iterations < 1:
        raise ValueError(f"iterations: expected a positive number of steps or None, got {iterations}")
