"""Square roots, inverse square roots and polar factors of batches of matrices, with gradients."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mir_kernels import _checks
from mir_kernels._dispatch import Operation
from mir_kernels._precision import with_float32_products
from mir_kernels.sqrtm import certificate, eager, factor, reference

_ORDERS = {"cuda": ("triton", "eager"), "cpu": ("eager", "triton")}
SQRTM = Operation("sqrtm", orders=_ORDERS)
INVERSE_SQRTM = Operation("inverse_sqrtm", orders=_ORDERS)
POLAR = Operation("polar", orders=_ORDERS)
NEWTON_SCHULZ = Operation("newton_schulz", orders={"cuda": ("eager",), "cpu": ("eager",)})
OPERATIONS = (SQRTM, INVERSE_SQRTM, POLAR, NEWTON_SCHULZ)

PRECISIONS = ("bfloat16", "float16", "float32", "float64")
METHODS = ("auto", "polar", "coupled", "eigh")
_DTYPES = (torch.float32, torch.bfloat16, torch.float64)
_Gradient = Callable[..., Tensor]


class NewtonSchulz(NamedTuple):
    """sqrt: A^(1/2).  inverse_sqrt: A^(-1/2).  residual: |I - ZY|_F / sqrt(d) of the scaled iterates, (...) ."""

    sqrt: Tensor
    inverse_sqrt: Tensor
    residual: Tensor


def sqrtm(
    a: Tensor,
    *,
    method: str = "auto",
    precision: str = "float32",
    iterations: int | None = None,
    tol: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """The principal square roots X of symmetric positive semi-definite `a` (..., d, d): X X = A, X = X^T >= 0.

    method: "eigh", eigenvectors in float64; "polar", A = L L^T in float64 and the polar factor U of L^T = U X in
    `precision` (Higham, Functions of Matrices, Alg. 6.21); "coupled", the coupled Newton-Schulz iteration, for
    well-conditioned matrices only; "auto", "eigh" on a CPU and for "float64", "polar" elsewhere and with the "triton"
    backend, which knows no other method and no "float64".
    precision: what the iterations of "polar" and "coupled" are run in; |X - A^(1/2)|_F / |A^(1/2)|_F of "polar" is at
    most about 2e-2 ("bfloat16"), 5e-3 ("float16"), 4e-6 ("float32") and 2e-7 ("float64"), whatever the condition.
    iterations: number of steps instead of the method's own.  tol: a RuntimeWarning says so if |XX - A|_F / |A|_F of a
    matrix is above it.
    dtypes float32, bfloat16, float64, kept.  Gradient: the Lyapunov equation X S + S X = G, null directions left out; a
    second derivative raises. Raises ValueError for matrices that are not finite, symmetric and positive semi-definite
    up to rounding, TypeError for other dtypes.
    """
    return _root("sqrt", SQRTM, a, method, precision, iterations, tol, backend)


def inverse_sqrtm(
    a: Tensor,
    *,
    method: str = "auto",
    precision: str = "float32",
    iterations: int | None = None,
    tol: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """The inverse square roots of symmetric positive definite `a` (..., d, d); arguments as in `sqrtm`.

    tol bounds |X A X - I|_F / sqrt(d). Raises ValueError for a matrix that is singular to rounding.
    """
    return _root("inverse", INVERSE_SQRTM, a, method, precision, iterations, tol, backend)


def polar(
    m: Tensor, *, precision: str = "float32", iterations: int | None = None, backend: str | None = None
) -> Tensor:
    """The orthogonal polar factor U of M = U H, H = (M^T M)^(1/2), for `m` (..., m, n), wide ones transposed.

    Degree-5 Newton-Schulz with the coefficients of The Polar Express (Amsel et al., 2025). U has orthonormal columns
    over the singular values above 3e-4 ("bfloat16"), 1e-4 ("float16"), 1e-7 ("float32") or 1e-12 ("float64") of the
    largest; smaller ones come out below 1, and a zero singular value as 0. "float16" takes the time of "bfloat16" on
    tensor cores and is eight times finer; nothing here leaves its range.
    The "triton" backend has no "float64". dtypes float32, bfloat16, float64, kept. Gradient included, a second one
    raises. Raises ValueError for values that are not finite.
    """
    _checks.floating("m", m, _DTYPES)
    if m.dim() < 2 or min(m.shape[-2:]) < 1:
        raise ValueError(f"m: takes matrices (..., m, n) with m, n >= 1, got {tuple(m.shape)}")
    _checks.finite("m", m)
    _check_run(precision, iterations)
    backend = _choose(POLAR, backend, m.device, precision)
    # Where nothing is compiled the registered operation is passed by: its first call loads the compiler.
    run = torch.ops.mir_kernels.polar if torch.compiler.is_compiling() else _Polar.apply
    return run(m, precision, iterations or -1, backend)


def newton_schulz(
    a: Tensor, *, iterations: int, precision: str = "float32", backend: str | None = None
) -> NewtonSchulz:
    """The coupled Newton-Schulz iteration for symmetric positive definite `a` (..., d, d).

    Y' = Y (3I - ZY)/2, Z' = (3I - ZY)/2 Z from Y = A/s, Z = I, with s the largest absolute row sum, at least |A|_2
    (Higham, Functions of Matrices, 6.35); returns sqrt(s) Y, Z / sqrt(s) and the residual. Past a condition of about
    1e4 in bfloat16 and 1e6 in float32 rounding grows without bound: then the iterate with the best residual is
    returned with a RuntimeWarning. `sqrtm` has no such limit.
    dtypes float32, bfloat16, float64, kept; gradients for both roots.
    """
    _checks.symmetric("a", a)
    _checks.floating("a", a, _DTYPES)
    _check_run(precision, iterations)
    backend = NEWTON_SCHULZ.choose(backend, a.device)
    run = torch.ops.mir_kernels.newton_schulz if torch.compiler.is_compiling() else _NewtonSchulz.apply
    return NewtonSchulz(*run(a, iterations, precision, backend))


def polar_iteration(m: Tensor, precision: str, backend: str, iterations: int | None = None) -> Tensor:
    """The raw iteration for (batch, m, n), m >= n, in the dtype of `precision`."""
    if backend == "triton" and precision != "float64":
        from mir_kernels.sqrtm import triton

        return triton.polar(m, precision, iterations=iterations)
    return eager.polar(m, precision, iterations=iterations)


def polished_polar(m: Tensor, precision: str, backend: str, iterations: int | None = None) -> tuple[Tensor, Tensor]:
    """The polar factor in float64, the iteration in `precision` and `certificate.contract`; and a bound of its norm.

    That last step squares the deviation from orthogonality that rounding left. What remains is a rotation, which
    changes <U, M> in second order only. Finite, whatever the iteration did.
    """
    return certificate.contract(polar_iteration(m, precision, backend, iterations).double().nan_to_num(0.0, 0.0, 0.0))


def _root(
    kind: str,
    operation: Operation,
    a: Tensor,
    method: str,
    precision: str,
    iterations: int | None,
    tol: float | None,
    backend: str | None,
) -> Tensor:
    _checks.symmetric("a", a)
    _checks.floating("a", a, _DTYPES)
    _checks.choice("method", method, METHODS)
    _check_run(precision, iterations)
    if method == "auto":
        on_tensor_cores = a.device.type != "cpu" and precision != "float64"
        method = "polar" if on_tensor_cores or backend == "triton" else "eigh"
    backend = _choose(operation, backend, a.device, precision if method == "polar" else method)
    run = torch.ops.mir_kernels.root if torch.compiler.is_compiling() else _Root.apply
    x = run(a, kind, method, precision, iterations or -1, backend)
    if tol is not None and not torch.compiler.is_compiling() and a.numel():
        reached = _residual(kind, a.detach(), x.detach())
        if not reached <= tol:
            warnings.warn(
                f"{operation.name}: reached a relative residual of {reached:.2g}, tol={tol:.2g}; "
                'a higher precision or method="eigh" gets closer',
                RuntimeWarning,
                stacklevel=3,
            )
    return x


def _choose(operation: Operation, backend: str | None, device: torch.device, form: str) -> str:
    """The backend; `form` is a precision, or a method that is no polar factor. Triton has neither float64 nor those."""
    if form in ("bfloat16", "float16", "float32"):
        return operation.choose(backend, device)
    if backend == "triton":
        raise RuntimeError(f"backend 'triton' of {operation.name} has no {form}: leave the backend out")
    return operation.choose(backend or "eager", device)


@with_float32_products
def _root_forward(a: Tensor, kind: str, method: str, precision: str, iterations: int, backend: str) -> Tensor:
    d = a.shape[-1]
    flat = a.reshape(-1, d, d)
    if flat.shape[0] == 0:
        return a.clone(memory_format=torch.contiguous_format)
    if backend == "reference":
        x = reference.sqrtm(flat) if kind == "sqrt" else reference.inverse_sqrtm(flat)
    elif method == "eigh":
        x = _by_eigenvectors(kind, flat)
    elif method == "polar":
        x = _by_polar(kind, flat, precision, None if iterations < 0 else iterations, backend)
    else:
        steps = _COUPLED[precision] if iterations < 0 else iterations
        x = eager.coupled(factor.symmetrize(flat), precision, steps)[0 if kind == "sqrt" else 1]
    return x.to(a.dtype).reshape(a.shape).contiguous()


_root_op = torch.library.custom_op("mir_kernels::root", _root_forward, mutates_args=())


@_root_op.register_fake
def _(a: Tensor, kind: str, method: str, precision: str, iterations: int, backend: str) -> Tensor:
    return torch.empty_like(a, memory_format=torch.contiguous_format)


def _root_setup(ctx, inputs, output) -> None:
    ctx.kind = inputs[1]
    ctx.save_for_backward(inputs[0], output)


def _root_backward(ctx: Any, *grads: Any, gradient: _Gradient) -> tuple[Tensor | None, ...]:
    a, x = ctx.saved_tensors
    return gradient(*grads, a, x, ctx.kind), None, None, None, None, None


_root_op.register_autograd(
    lambda ctx, *grads: _root_backward(ctx, *grads, gradient=torch.ops.mir_kernels.root_backward),
    setup_context=_root_setup,
)


class _Root(torch.autograd.Function):
    forward = staticmethod(_root_forward)
    setup_context = staticmethod(_root_setup)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        return _root_backward(ctx, *grad_outputs, gradient=_root_gradient)


@with_float32_products
def _root_gradient(grad: Tensor, a: Tensor, x: Tensor, kind: str) -> Tensor:
    d = a.shape[-1]
    working = _working(a)
    g, x = (_symmetric(t.reshape(-1, d, d).to(working)) for t in (grad, x))
    if kind == "inverse":
        # X = R^-1 with R R = A: dX = -X dR X.
        g = -x @ g @ x
        x = _symmetric(a.reshape(-1, d, d).to(working) @ x)
    return _lyapunov(x, g).to(a.dtype).reshape(a.shape)


_root_backward_op = torch.library.custom_op("mir_kernels::root_backward", _root_gradient, mutates_args=())


@_root_backward_op.register_fake
def _(grad: Tensor, a: Tensor, x: Tensor, kind: str) -> Tensor:
    return torch.empty_like(a, memory_format=torch.contiguous_format)


@with_float32_products
def _polar_forward(m: Tensor, precision: str, iterations: int, backend: str) -> Tensor:
    wide = m.shape[-2] < m.shape[-1]
    x = (m.mT if wide else m).reshape(-1, max(m.shape[-2:]), min(m.shape[-2:]))
    if x.shape[0] == 0:
        return m.clone(memory_format=torch.contiguous_format)
    u = (
        reference.polar(x)
        if backend == "reference"
        else polar_iteration(x, precision, backend, None if iterations < 0 else iterations)
    )
    u = u.mT if wide else u
    return u.to(m.dtype).reshape(m.shape).contiguous()


_polar_op = torch.library.custom_op("mir_kernels::polar", _polar_forward, mutates_args=())


@_polar_op.register_fake
def _(m: Tensor, precision: str, iterations: int, backend: str) -> Tensor:
    return torch.empty_like(m, memory_format=torch.contiguous_format)


def _polar_setup(ctx, inputs, output) -> None:
    ctx.save_for_backward(inputs[0], output)


def _polar_backward(ctx: Any, *grads: Any, gradient: _Gradient) -> tuple[Tensor | None, ...]:
    return gradient(*grads, *ctx.saved_tensors), None, None, None


_polar_op.register_autograd(
    lambda ctx, *grads: _polar_backward(ctx, *grads, gradient=torch.ops.mir_kernels.polar_backward),
    setup_context=_polar_setup,
)


class _Polar(torch.autograd.Function):
    forward = staticmethod(_polar_forward)
    setup_context = staticmethod(_polar_setup)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        return _polar_backward(ctx, *grad_outputs, gradient=_polar_gradient)


@with_float32_products
def _polar_gradient(grad: Tensor, m: Tensor, u: Tensor) -> Tensor:
    """U^T dU is skew and solves H W + W H = U^T dM - dM^T U; what of dM leaves the range of U is divided by H."""
    wide = m.shape[-2] < m.shape[-1]
    working = _working(m)
    shape = (-1, max(m.shape[-2:]), min(m.shape[-2:]))
    g, x, q = ((t.mT if wide else t).reshape(shape).to(working) for t in (grad, m, u))
    h = _symmetric(q.mT @ x)
    inner = q.mT @ g
    k = _lyapunov(h, (inner - inner.mT) / 2)
    out = 2 * q @ k
    if x.shape[-2] > x.shape[-1]:
        values, vectors = torch.linalg.eigh(h)
        floor = x.shape[-1] * torch.finfo(working).eps * values[..., -1:]
        inverse = torch.where(values > floor, 1 / values, 0.0)
        out = out + (g - q @ inner) @ (vectors * inverse[..., None, :]) @ vectors.mT
    return (out.mT if wide else out).to(m.dtype).reshape(m.shape).contiguous()


_polar_backward_op = torch.library.custom_op("mir_kernels::polar_backward", _polar_gradient, mutates_args=())


@_polar_backward_op.register_fake
def _(grad: Tensor, m: Tensor, u: Tensor) -> Tensor:
    return torch.empty_like(m, memory_format=torch.contiguous_format)


@with_float32_products
def _newton_schulz_forward(a: Tensor, iterations: int, precision: str, backend: str) -> tuple[Tensor, Tensor, Tensor]:
    d = a.shape[-1]
    flat = factor.symmetrize(a.reshape(-1, d, d))
    of_residual = torch.float64 if precision == "float64" else torch.float32
    if flat.shape[0] == 0:
        return a.clone(), a.clone(), a.new_zeros(a.shape[:-2], dtype=of_residual)
    y, z, residual = eager.coupled(flat, precision, iterations)
    diverged = residual > _DIVERGED[precision]
    if bool(diverged.any()):
        warnings.warn(
            f"newton_schulz: {int(diverged.sum())} of {flat.shape[0]} matrices have not converged after {iterations} "
            f"iterations in {precision}, with a residual of up to {residual.amax().item():.2g}; more iterations, a "
            "higher precision or sqrtm(), which cannot diverge, may help",
            RuntimeWarning,
            stacklevel=2,
        )
    root, inverse = (t.to(a.dtype).reshape(a.shape).contiguous() for t in (y, z))
    return root, inverse, residual.to(of_residual).reshape(a.shape[:-2])


_newton_schulz_op = torch.library.custom_op("mir_kernels::newton_schulz", _newton_schulz_forward, mutates_args=())


@_newton_schulz_op.register_fake
def _(a: Tensor, iterations: int, precision: str, backend: str) -> tuple[Tensor, Tensor, Tensor]:
    like = torch.empty_like(a, memory_format=torch.contiguous_format)
    residual = a.new_empty(a.shape[:-2], dtype=torch.float64 if precision == "float64" else torch.float32)
    return like, torch.empty_like(like), residual


def _newton_schulz_setup(ctx, inputs, output) -> None:
    ctx.save_for_backward(*output[:2])


def _newton_schulz_backward(ctx: Any, *grads: Any, gradient: _Gradient) -> tuple[Tensor | None, ...]:
    y, z = ctx.saved_tensors
    # Z = Y^-1: dZ = -Z dY Z.
    g = grads[0] - z.mT @ grads[1] @ z.mT
    return gradient(g, y, y, "sqrt"), None, None, None


_newton_schulz_op.register_autograd(
    lambda ctx, *grads: _newton_schulz_backward(ctx, *grads, gradient=torch.ops.mir_kernels.root_backward),
    setup_context=_newton_schulz_setup,
)


class _NewtonSchulz(torch.autograd.Function):
    forward = staticmethod(_newton_schulz_forward)
    setup_context = staticmethod(_newton_schulz_setup)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        return _newton_schulz_backward(ctx, *grad_outputs, gradient=_root_gradient)


_COUPLED = {"bfloat16": 12, "float16": 14, "float32": 24, "float64": 40}
# Residuals above this are not what rounding leaves of a converged iteration.
_DIVERGED = {"bfloat16": 5e-2, "float16": 1e-2, "float32": 1e-3, "float64": 1e-8}


def _by_eigenvectors(kind: str, a: Tensor) -> Tensor:
    exponent = factor.half_exponent(a.diagonal(dim1=-2, dim2=-1).amax(-1).double())[..., None, None]
    values, vectors = torch.linalg.eigh(factor.times_power(factor.symmetrize(a), -2 * exponent))
    power = torch.exp2(exponent)
    floor = a.shape[-1] * factor.UNIT * values[..., -1:].clamp(min=0.0)
    if kind == "inverse":
        _check_positive(values[..., 0] > floor[..., 0])
        return _symmetric(vectors * values.rsqrt()[..., None, :] @ vectors.mT) / power
    _check_semidefinite(values[..., 0], values[..., -1], a)
    return _symmetric(vectors * values.clamp(min=0.0).sqrt()[..., None, :] @ vectors.mT) * power


def _by_polar(kind: str, a: Tensor, precision: str, iterations: int | None, backend: str) -> Tensor:
    c = factor.factor(factor.symmetrize(a))
    _check_semidefinite(c.lowest, torch.ones_like(c.lowest), a)
    if kind == "inverse":
        _check_positive(~c.singular & (c.columns.diagonal(dim1=-2, dim2=-1) > 0).all(-1))
    power = torch.exp2(c.exponent)[..., None, None]
    u, _ = polished_polar(c.columns.mT, precision, backend, iterations)
    if kind == "sqrt":
        return _symmetric(u.mT @ c.columns.mT) * power
    # L^T = U R, so R^-1 = L^-T U.
    return _symmetric(torch.linalg.solve_triangular(c.columns.mT, u, upper=True)) / power


def _lyapunov(x: Tensor, g: Tensor) -> Tensor:
    """S with X S + S X = G for symmetric positive semi-definite X; nothing where both eigenvalues are rounding."""
    if x.is_cuda and x.dtype == torch.float32:  # a GPU multiplies faster than it finds eigenvectors
        return eager.lyapunov(x, g)
    values, vectors = torch.linalg.eigh(x)
    sums = values[..., :, None] + values[..., None, :]
    floor = 4 * x.shape[-1] * torch.finfo(x.dtype).eps * values[..., -1:, None]
    inner = torch.where(sums > floor, vectors.mT @ g @ vectors / sums, 0.0)
    return vectors @ inner @ vectors.mT


def _residual(kind: str, a: Tensor, x: Tensor) -> float:
    a, x = a.double(), x.double()
    if kind == "sqrt":
        size = eager.frobenius(a)
        return (eager.frobenius(x @ x - a) / torch.where(size > 0, size, 1.0)).amax().item()
    eye = torch.eye(a.shape[-1], dtype=a.dtype, device=a.device)
    return eager.frobenius(x @ a @ x - eye).amax().item() / a.shape[-1] ** 0.5


def _symmetric(x: Tensor) -> Tensor:
    return (x + x.mT) / 2


def _working(a: Tensor) -> torch.dtype:
    return torch.float64 if a.dtype == torch.float64 else torch.float32


def _check_positive(positive: Tensor) -> None:
    if not bool(positive.all()):
        raise ValueError(
            f"a: takes positive definite matrices, {int((~positive).sum())} of {positive.numel()} are singular to "
            "rounding: add a multiple of the identity, or use sqrtm"
        )


def _check_semidefinite(lowest: Tensor, largest: Tensor, a: Tensor) -> None:
    """Refuse an eigenvalue that rounding in a's dtype cannot explain."""
    allowed = 8 * a.shape[-1] * max(torch.finfo(a.dtype).eps, 1e-12)
    if bool((lowest < -allowed * largest).any()):
        worst = (lowest / torch.where(largest > 0, largest, 1.0)).amin().item()
        raise ValueError(
            f"a: takes positive semi-definite matrices, got one with an eigenvalue of {worst:.3g} of the largest"
        )


def _check_run(precision: str, iterations: int | None) -> None:
    _checks.choice("precision", precision, PRECISIONS)
    if iterations is not None and iterations < 1:
        raise ValueError(f"iterations: takes a positive number of steps or None, got {iterations}")
