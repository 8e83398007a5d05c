"""MoCa and its fusion with residual add and RMSNorm with the compiled kernels: C++ for CPU tensors, CUDA C++ for CUDA.

Matrices are `(rows, d)` with contiguous rows and any row stride. scale, shift and weight are `(d,)` of any float dtype,
mask is `(rows,)` bool or uint8, nonzero where MoCa applies. Arithmetic and column sums are float32 (float64 for float64
matrices). Column sums have the same bits on every run and for every thread count.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mir_kernels._native import DTYPE_CODES, C
from mir_kernels._precision import accumulator


def forward(x: Tensor, scale: Tensor, shift: Tensor, mask: Tensor, out: Tensor) -> None:
    """out = scale * x + shift on masked rows, x elsewhere. If `out` is the memory of x, other rows stay untouched."""
    scale, shift, mask = _vector(scale, x), _vector(shift, x), _bytes(mask)
    arguments = (*_rows(x), scale.data_ptr(), shift.data_ptr(), mask.data_ptr(), *_rows(out), *_shape(x))
    if x.is_cuda:
        C.moca_forward_cuda(*arguments, *_stream(x))
    else:
        C.moca_forward(*arguments, torch.get_num_threads())


def backward(
    grad: Tensor, x: Tensor, scale: Tensor, mask: Tensor, dx: Tensor, x_rows: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """dx = scale * grad on masked rows, grad elsewhere; returns (dscale, dshift). x is read on masked rows only.

    If `dx` is the memory of grad, other rows stay untouched. x_rows `(rows,)`, int64, contiguous: if x holds only
    masked rows, the index in x of each row i of grad.
    """
    scale, mask = _vector(scale, grad), _bytes(mask)
    sums = _column_sums(grad, 2)
    partial = _partial(grad, 2)
    arguments = (
        *(*_rows(grad), *_rows(x), 0 if x_rows is None else x_rows.data_ptr(), scale.data_ptr(), mask.data_ptr()),
        *(*_rows(dx), partial.data_ptr(), sums[0].data_ptr(), sums[1].data_ptr(), *_shape(grad)),
    )
    if grad.is_cuda:
        C.moca_backward_cuda(*arguments, *_stream(grad))
    else:
        C.moca_backward(*arguments, torch.get_num_threads())
    return sums[0], sums[1]


def add_rms_forward(
    x: Tensor,
    residual: Tensor,
    scale: Tensor,
    shift: Tensor,
    mask: Tensor,
    weight: Tensor,
    eps: float,
    out: Tensor,
    h: Tensor,
    rstd: Tensor,
) -> None:
    """h = moca(x + residual), rstd = 1/sqrt(mean(h^2) + eps), out = weight * (h * rstd). CPU.

    Rounded to x.dtype after the addition, after MoCa, after h * rstd and after the weight, which reproduces the bits of
    the separate operations in the order of Llama's RMSNorm. rstd: `(rows,)` float32 (float64 for float64). h may be the
    memory of x or residual.
    """
    _on_cpu(x)
    scale, shift, weight, mask = _vector(scale, x), _vector(shift, x), _vector(weight, x), _bytes(mask)
    C.add_rms_forward(
        *(*_rows(x), *_rows(residual), scale.data_ptr(), shift.data_ptr(), mask.data_ptr(), weight.data_ptr(), eps),
        *(*_rows(out), *_rows(h), rstd.data_ptr(), *_shape(x), torch.get_num_threads()),
    )


def add_rms_backward(
    grad_out: Tensor,
    grad_h: Tensor | None,
    h: Tensor,
    x: Tensor,
    residual: Tensor,
    scale: Tensor,
    mask: Tensor,
    weight: Tensor,
    rstd: Tensor,
    dx: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """dx (for both x and residual) from the gradients of out and h; returns (dscale, dshift, dweight). CPU.

    With y = h rstd and dy = grad_out weight: dh = rstd (dy - y mean(dy y)) + grad_h, then MoCa's backward. x and
    residual are read on masked rows only. dx may be grad_out or grad_h.
    """
    _on_cpu(h)
    scale, weight, mask = _vector(scale, h), _vector(weight, h), _bytes(mask)
    sums = _column_sums(h, 3)
    partial = _partial(h, 3)
    C.add_rms_backward(
        *(*_rows(grad_out), *((0, 0) if grad_h is None else _rows(grad_h)), *_rows(h), *_rows(x), *_rows(residual)),
        *(scale.data_ptr(), mask.data_ptr(), weight.data_ptr(), rstd.data_ptr(), *_rows(dx), partial.data_ptr()),
        *(*(s.data_ptr() for s in sums), *_shape(h), torch.get_num_threads()),
    )
    return sums[0], sums[1], sums[2]


def _on_cpu(matrix: Tensor) -> None:
    if matrix.device.type != "cpu":
        raise ValueError(f"add_moca_rms_norm: expected CPU tensors for the compiled kernels, got {matrix.device}")


def _rows(matrix: Tensor) -> tuple[int, int]:
    """Address and row stride in elements."""
    row, element = matrix.stride()
    if element != 1 and matrix.shape[1] > 1:
        raise ValueError(f"rows: expected matrices with contiguous rows, got strides {matrix.stride()}")
    return matrix.data_ptr(), row


def _shape(matrix: Tensor) -> tuple[int, int, int]:
    return *matrix.shape, DTYPE_CODES[matrix.dtype]


def _vector(vector: Tensor, matrix: Tensor) -> Tensor:
    dtype = accumulator(matrix)
    if vector.dtype == dtype and vector.is_contiguous():  # the usual case needs no call into torch's dispatcher
        return vector
    return vector.to(dtype).contiguous()


def _bytes(mask: Tensor) -> Tensor:
    if mask.dtype not in (torch.bool, torch.uint8):
        raise TypeError(f"mask: expected bool or uint8, got {str(mask.dtype).removeprefix('torch.')}")
    return mask.contiguous()


def _column_sums(matrix: Tensor, sums: int) -> tuple[Tensor, ...]:
    return matrix.new_empty((sums, matrix.shape[1]), dtype=accumulator(matrix)).unbind(0)


def _partial(matrix: Tensor, sums: int) -> Tensor:
    """Scratch: one row per sum and chunk of rows."""
    chunks = C.moca_partial_rows(matrix.shape[0])
    return matrix.new_empty((chunks, sums, matrix.shape[1]), dtype=accumulator(matrix))


def _stream(matrix: Tensor) -> tuple[int, int]:
    index = matrix.get_device()
    return index, torch._C._cuda_getCurrentRawStream(index)  # current_stream() would create an object first
