"""Gradients of MoCa in two forms: autograd.Function around the raw kernels for eager mode, and registered operators
for torch.compile, export and tensor subclasses. Both share the rules for what is saved and computed.

x (and residual) are saved for backward only if dscale is needed; in place, only a copy of the vision rows is saved.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mir_kernels._gate import is_memory
from mir_kernels._precision import accumulator
from mir_kernels._registration import Sharding, register
from mir_kernels.ops.moca import launch
from mir_kernels.ops.moca.vision_mask import VisionMask, own_mask


class Moca(torch.autograd.Function):
    """moca if a tensor requires grad. shared: the mask, if the caller passed a VisionMask."""

    @staticmethod
    def forward(ctx, x, scale, shift, mask, inplace: bool, backend: str | None, shared: VisionMask | None) -> Tensor:
        # No setup_context: with one, torch inspects this signature on every call, which costs more than a small kernel.
        ctx.backend = backend
        if not inplace:
            mask = own_mask(mask) if shared is None else mask
            ctx.save_for_backward(x if scale.requires_grad else None, None, scale, shift, mask)
            return launch.forward(x, scale, shift, mask, backend)
        ctx.mark_dirty(x)
        vision = VisionMask(mask) if shared is None else shared
        kept, x_rows = (launch.vision_rows(x, vision), vision.row_of) if scale.requires_grad else (None, None)
        ctx.kept = None if kept is None else kept.shape
        ctx.save_for_backward(kept, x_rows, scale, shift, vision.mask)
        launch.forward_(x, scale, shift, vision.mask, backend)
        return x

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        x, x_rows, scale, shift, mask = ctx.saved_tensors
        raw = _raw(grad, x, x_rows, scale, mask)
        if x is not None:
            x = _as_saved("x", x, grad.dtype, grad.shape if x_rows is None else ctx.kept)
        if x_rows is not None:
            x_rows = _as_saved("x_rows", x_rows, torch.int64, torch.Size([grad.numel() // grad.shape[-1]])).contiguous()
        if raw:
            calls = launch.forward, partial(launch.backward, x_rows=x_rows)
        else:
            calls = torch.ops.mir_kernels.moca, partial(_moca_backward_op, x_rows=x_rows)
        gradients = _moca_gradients(*calls, ctx.needs_input_grad, grad, x, scale, shift, mask, ctx.backend)
        return *gradients, None, None, None, None


class AddMocaRmsNorm(torch.autograd.Function):
    """add_moca_rms_norm if a tensor requires grad; also returns rstd, which is not differentiable."""

    @staticmethod
    def forward(ctx, x, residual, scale, shift, mask, weight, eps: float, backend: str | None, shared: bool):
        mask = mask if shared else own_mask(mask)
        out, h, rstd = launch.add_rms_forward(x, residual, scale, shift, mask, weight, eps, backend)
        ctx.backend = backend
        ctx.mark_non_differentiable(rstd)
        ctx.set_materialize_grads(False)
        pre = (x, residual) if scale.requires_grad else (None, None)
        ctx.save_for_backward(h, *pre, scale, shift, mask, weight, rstd)
        return out, h, rstd

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out: Tensor | None, grad_h: Tensor | None, _: None):
        saved = ctx.saved_tensors
        backward = launch.add_rms_backward if _raw(grad_out, grad_h, *saved) else _add_rms_backward_op
        return *_add_rms_gradients(backward, ctx, saved, grad_out, grad_h), None


# The inputs of backward are unchecked: gradients come from autograd, and saved tensors may have been replaced by hooks
# (torch.autograd.graph.saved_tensors_hooks).


def _raw(*tensors: Tensor | None) -> bool:
    """Whether all can be read at their addresses and are on the device of the first one."""
    place = next((t.get_device() for t in tensors if t is not None), -1)
    return all(t is None or (is_memory(t) and t.get_device() == place) for t in tensors)


def _as_saved(name: str, tensor: Tensor, dtype: torch.dtype, shape: torch.Size) -> Tensor:
    """A saved tensor with the dtype it was saved with; RuntimeError if its shape has changed."""
    if tensor.shape != shape:
        raise RuntimeError(
            f"{name}: was saved for backward with shape {tuple(shape)}, but a hook on saved tensors returned shape "
            f"{tuple(tensor.shape)}"
        )
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def _moca_gradients(
    forward: Callable, backward: Callable, needs, grad, x, scale, shift, mask, backend
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(dx, dscale, dshift). x may be None if dscale is not needed."""
    if not (needs[1] or needs[2]):
        return forward(grad, scale, torch.zeros_like(shift), mask, backend), None, None
    dx, dscale, dshift = backward(grad, grad if x is None else x, scale, mask, backend)
    return (
        dx if needs[0] else None,
        dscale.to(scale.dtype) if needs[1] else None,
        dshift.to(shift.dtype) if needs[2] else None,
    )


def _add_rms_gradients(backward: Callable, ctx, saved: tuple, grad_out: Tensor | None, grad_h: Tensor | None) -> tuple:
    """One entry per input of add_rms_forward; dresidual is dx."""
    h, x, residual, scale, shift, mask, weight, rstd = saved
    like = next((grad for grad in (grad_out, grad_h) if grad is not None), h)
    dtype, shape = like.dtype, like.shape
    h, rstd = _as_saved("h", h, dtype, shape), _as_saved("rstd", rstd, accumulator(like), shape[:-1])
    if x is None:
        x, residual = h, h
    else:
        x, residual = _as_saved("x", x, dtype, shape), _as_saved("residual", residual, dtype, shape)
    grad_out = torch.zeros_like(h) if grad_out is None else grad_out
    dx, dscale, dshift, dweight = backward(grad_out, grad_h, h, x, residual, scale, mask, weight, rstd, ctx.backend)
    grads = (dx, dx, dscale.to(scale.dtype), dshift.to(shift.dtype), None, dweight.to(weight.dtype), None, None)
    return tuple(g if wanted else None for g, wanted in zip(grads, ctx.needs_input_grad[: len(grads)], strict=True))


# The registered operators call the same row kernels. They return the column sums of a backward call as one tensor,
# because the kernels write them into one buffer and an operator's results may not share memory.


def _moca_backward(grad, x, scale, mask, backend):
    dx, *sums = launch.backward(grad, x, scale, mask, backend)
    return dx, torch.stack(sums)


def _add_rms_backward(grad_out, grad_h, h, x, residual, scale, mask, weight, rstd, backend):
    dx, *sums = launch.add_rms_backward(grad_out, grad_h, h, x, residual, scale, mask, weight, rstd, backend)
    return dx, torch.stack(sums)


def _moca_setup(ctx, inputs, output) -> None:
    x, scale, shift, mask, ctx.backend = inputs
    ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, scale, shift, mask)


def _moca_backward_op(grad, x, scale, mask, backend, x_rows=None):
    if x_rows is not None:
        x = x.index_select(0, x_rows.clamp(min=0)).view(grad.shape) if len(x) else grad
    dx, sums = torch.ops.mir_kernels.moca_backward(grad, x, scale, mask, backend)
    return dx, *sums.unbind(0)


def _add_rms_backward_op(*arguments):
    dx, sums = torch.ops.mir_kernels.add_moca_rms_norm_backward(*arguments)
    return dx, *sums.unbind(0)


def _moca_op_backward(ctx, grad):
    x, scale, shift, mask = ctx.saved_tensors
    calls = torch.ops.mir_kernels.moca, _moca_backward_op
    return *_moca_gradients(*calls, ctx.needs_input_grad, grad, x, scale, shift, mask, ctx.backend), None, None


def _add_rms_setup(ctx, inputs, output) -> None:
    x, residual, scale, shift, mask, weight, _, ctx.backend = inputs
    _, h, rstd = output
    pre = (x, residual) if ctx.needs_input_grad[2] else (None, None)
    ctx.save_for_backward(h, *pre, scale, shift, mask, weight, rstd)


def _add_rms_op_backward(ctx, grad_out, grad_h, _):
    return _add_rms_gradients(_add_rms_backward_op, ctx, ctx.saved_tensors, grad_out, grad_h)


register(
    "moca_backward(Tensor grad, Tensor x, Tensor scale, Tensor mask, str? backend) -> (Tensor, Tensor)",
    _moca_backward,
    lambda grad, x, scale, mask, backend: (
        grad.new_empty(grad.shape),
        grad.new_empty((2, grad.shape[-1]), dtype=accumulator(grad)),
    ),
    sharding=Sharding("xxwx-", "x+", 1),
)
register(
    "moca(Tensor x, Tensor scale, Tensor shift, Tensor mask, str? backend) -> Tensor",
    launch.forward,
    lambda x, scale, shift, mask, backend: x.new_empty(x.shape),
    sharding=Sharding("xwwx-", "x", 1),
    backward=_moca_op_backward,
    setup_context=_moca_setup,
)
register(
    "add_moca_rms_norm_backward(Tensor grad_out, Tensor? grad_h, Tensor h, Tensor x, Tensor residual, Tensor scale,"
    " Tensor mask, Tensor weight, Tensor rstd, str? backend) -> (Tensor, Tensor)",
    _add_rms_backward,
    lambda grad_out, grad_h, h, *others: (h.new_empty(h.shape), h.new_empty((3, h.shape[-1]), dtype=accumulator(h))),
    sharding=Sharding("xxxxxwxwx-", "x+", 1),
)
register(
    "add_moca_rms_norm(Tensor x, Tensor residual, Tensor scale, Tensor shift, Tensor mask, Tensor weight, float eps,"
    " str? backend) -> (Tensor, Tensor, Tensor)",
    launch.add_rms_forward,
    lambda x, *others: (
        *(x.new_empty(x.shape), x.new_empty(x.shape)),
        x.new_empty(x.shape[:-1], dtype=accumulator(x)),
    ),
    sharding=Sharding("xxwwxw--", "xxx", 1),
    backward=_add_rms_op_backward,
    setup_context=_add_rms_setup,
)
