"""Gradients of the roots, and their registered operators.

One rule per operation serves both: `_*_backward` calls the raw gradient in eager mode and the registered one in a
trace."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mir_kernels._precision import accumulator, with_float32_products
from mir_kernels._registration import Sharding, eager_function, register
from mir_kernels.ops.sqrtm import eager, launch
from mir_kernels.ops.sqrtm.launch import symmetric_part

_Gradient = Callable[..., Tensor]


@with_float32_products
def _root_gradient(grad: Tensor, a: Tensor, x: Tensor, kind: str, precision: str) -> Tensor:
    """The gradient of A from that of X = A^(1/2) or A^(-1/2): X S + S X = G.

    With `precision` "float64" it is computed in float64 from A itself, because X was rounded to the dtype of A.
    """
    d = a.shape[-1]
    working = _working(a, precision)
    g = symmetric_part(grad.reshape(-1, d, d).to(working))
    flat = a.reshape(-1, d, d).to(working)
    if working != accumulator(a):
        values, vectors = torch.linalg.eigh(symmetric_part(flat))
        roots = values.clamp(min=0.0).sqrt()
        if kind == "inverse":
            x = vectors * (1 / roots)[..., None, :] @ vectors.mT
            g = -x @ g @ x
        return _lyapunov_in(roots, vectors, g).to(a.dtype).reshape(a.shape)
    x = symmetric_part(x.reshape(-1, d, d).to(working))
    if kind == "inverse":
        # X = R^-1 with R R = A: dX = -X dR X.
        g = -x @ g @ x
        x = symmetric_part(flat @ x)
    return _lyapunov(x, g).to(a.dtype).reshape(a.shape)


@with_float32_products
def _polar_gradient(grad: Tensor, m: Tensor, u: Tensor, precision: str) -> Tensor:
    """The gradient of M = U H from that of U.

    U^T dU is skew and solves H W + W H = U^T dM - dM^T U; the part of dM outside the range of U is divided by H.
    """
    wide = m.shape[-2] < m.shape[-1]
    working = _working(m, precision)
    shape = (-1, max(m.shape[-2:]), min(m.shape[-2:]))
    g, x, q = ((t.mT if wide else t).reshape(shape).to(working) for t in (grad, m, u))
    if working != accumulator(m) and x.shape[0]:
        q = launch.polar_iteration(x, precision, "eager")  # U was rounded to the dtype of M
    h = symmetric_part(q.mT @ x)
    inner = q.mT @ g
    k = _lyapunov(h, (inner - inner.mT) / 2)
    out = 2 * q @ k
    if x.shape[-2] > x.shape[-1]:
        values, vectors = torch.linalg.eigh(h)
        floor = x.shape[-1] * torch.finfo(working).eps * values[..., -1:]
        inverse = torch.where(values > floor, 1 / values, 0.0)
        out = out + (g - q @ inner) @ (vectors * inverse[..., None, :]) @ vectors.mT
    return (out.mT if wide else out).to(m.dtype).reshape(m.shape).contiguous()


@with_float32_products
def _newton_schulz_gradient(grad_y: Tensor, grad_z: Tensor, y: Tensor, z: Tensor) -> Tensor:
    """The gradient from the returned iterates, whatever precision they were iterated in. Z = Y^-1: dZ = -Z dY Z."""
    working = accumulator(y)
    of_y, of_z, root, inverse = (t.to(working) for t in (grad_y, grad_z, y, z))
    return _root_gradient(of_y - inverse.mT @ of_z @ inverse.mT, root, root, "sqrt", "float32").to(y.dtype)


def _working(x: Tensor, precision: str) -> torch.dtype:
    return torch.float64 if precision == "float64" else accumulator(x)


def _lyapunov(x: Tensor, g: Tensor) -> Tensor:
    """S with X S + S X = G for symmetric positive semi-definite X; zero where both eigenvalues are rounding errors."""
    if x.is_cuda and x.dtype == torch.float32:  # on a GPU products are faster than eigenvectors
        return eager.lyapunov(x, g)
    values, vectors = torch.linalg.eigh(x)
    return _lyapunov_in(values, vectors, g)


def _lyapunov_in(values: Tensor, vectors: Tensor, g: Tensor) -> Tensor:
    """`_lyapunov` from the eigenvalues and eigenvectors of X."""
    sums = values[..., :, None] + values[..., None, :]
    floor = 4 * g.shape[-1] * torch.finfo(g.dtype).eps * values[..., -1:, None]
    inner = torch.where(sums > floor, vectors.mT @ g @ vectors / sums, 0.0)
    return vectors @ inner @ vectors.mT


def _root_setup(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.kind, ctx.precision = inputs[1], inputs[3]
    ctx.save_for_backward(inputs[0], output)


def _root_backward(ctx: Any, grad: Tensor, *, gradient: _Gradient) -> tuple[Tensor | None, ...]:
    a, x = ctx.saved_tensors
    return gradient(grad, a, x, ctx.kind, ctx.precision), None, None, None, None, None, None


def _polar_setup(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.precision = inputs[1]
    ctx.save_for_backward(inputs[0], output)


def _polar_backward(ctx: Any, grad: Tensor, *, gradient: _Gradient) -> tuple[Tensor | None, ...]:
    return gradient(grad, *ctx.saved_tensors, ctx.precision), None, None, None


def _newton_schulz_setup(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.save_for_backward(*output[:2])


def _newton_schulz_backward(
    ctx: Any, grad_y: Tensor, grad_z: Tensor, _: Any, *, gradient: _Gradient
) -> tuple[Tensor | None, ...]:
    return gradient(grad_y, grad_z, *ctx.saved_tensors), None, None, None


Root = eager_function("Root", launch.root, _root_setup, partial(_root_backward, gradient=_root_gradient))
Polar = eager_function("Polar", launch.polar, _polar_setup, partial(_polar_backward, gradient=_polar_gradient))
NewtonSchulz = eager_function(
    "NewtonSchulz",
    launch.newton_schulz,
    _newton_schulz_setup,
    partial(_newton_schulz_backward, gradient=_newton_schulz_gradient),
)


def _like(a: Tensor) -> Tensor:
    return torch.empty_like(a, memory_format=torch.contiguous_format)


register(
    "root_backward(Tensor grad, Tensor a, Tensor x, str kind, str precision) -> Tensor",
    _root_gradient,
    lambda grad, a, x, kind, precision: _like(a),
    sharding=Sharding("xxx--", "x", 2),
)
register(
    "root(Tensor a, str kind, str method, str precision, SymInt? iterations, float? tol, str backend) -> Tensor",
    launch.root,
    lambda a, kind, method, precision, iterations, tol, backend: _like(a),
    sharding=Sharding("x------", "x", 2),
    backward=partial(_root_backward, gradient=torch.ops.mir_kernels.root_backward),
    setup_context=_root_setup,
)
register(
    "polar_backward(Tensor grad, Tensor m, Tensor u, str precision) -> Tensor",
    _polar_gradient,
    lambda grad, m, u, precision: _like(m),
    sharding=Sharding("xxx-", "x", 2),
)
register(
    "polar(Tensor m, str precision, SymInt? iterations, str backend) -> Tensor",
    launch.polar,
    lambda m, precision, iterations, backend: _like(m),
    sharding=Sharding("x---", "x", 2),
    backward=partial(_polar_backward, gradient=torch.ops.mir_kernels.polar_backward),
    setup_context=_polar_setup,
)
register(
    "newton_schulz_backward(Tensor grad_y, Tensor grad_z, Tensor y, Tensor z) -> Tensor",
    _newton_schulz_gradient,
    lambda grad_y, grad_z, y, z: _like(y),
    sharding=Sharding("xxxx", "x", 2),
)
register(
    "newton_schulz(Tensor a, SymInt iterations, str precision, str backend) -> (Tensor, Tensor, Tensor)",
    launch.newton_schulz,
    lambda a, iterations, precision, backend: (
        *(_like(a), _like(a)),
        a.new_empty(a.shape[:-2], dtype=launch.residual_dtype(precision)),
    ),
    sharding=Sharding("x---", "xxx", 2),
    backward=partial(_newton_schulz_backward, gradient=torch.ops.mir_kernels.newton_schulz_backward),
    setup_context=_newton_schulz_setup,
)
