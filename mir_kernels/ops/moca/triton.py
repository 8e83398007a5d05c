"""MoCa in Triton: forward, backward with fixed-order column sums, and both fused with residual add and RMSNorm.

A program handles a tile of rows and columns. Lanes of text rows are masked off, so in place those rows are neither read
nor written. The number of programs depends only on the table and the shape. Each keeps its column sums in registers and
writes one row of partial sums, and a second small kernel adds those rows in order: the same bits on every run. Token
counts are runtime arguments without specialisation, so a new count or mask triggers no compilation.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from mir_kernels import _triton
from mir_kernels._precision import accumulator
from mir_kernels._triton import cast


class Blocks(NamedTuple):
    """Block sizes of one architecture.

    tile_bytes: of one operand in a program's tile; 8 KB with 128 threads means four 16-byte accesses in flight per
    thread.
    processors: multiprocessors (compute units). A backward kernel has at most as many programs as fit on them at once.
    whole_row: the widest row that fits in registers together with its three float32 column sums.
    sum_columns: columns per program of the small final kernel.
    lanes: threads per warp.
    """

    tile_bytes: int
    processors: int
    whole_row: int
    sum_columns: int
    lanes: int


TABLE = {
    "sm_80": Blocks(tile_bytes=8192, processors=108, whole_row=4096, sum_columns=64, lanes=32),
    "sm_90": Blocks(tile_bytes=8192, processors=132, whole_row=4096, sum_columns=64, lanes=32),
    "sm_100": Blocks(tile_bytes=8192, processors=148, whole_row=4096, sum_columns=64, lanes=32),
    "gfx942": Blocks(tile_bytes=16384, processors=304, whole_row=8192, sum_columns=64, lanes=64),
    "interpreter": Blocks(tile_bytes=32768, processors=1, whole_row=4096, sum_columns=2048, lanes=32),
}

# Warps that run at once on a multiprocessor of any of these architectures with up to 128 registers per thread: 65536
# registers in warps of 32, or 131072 in warps of 64. More warps would run as a second wave and add partial sums.
RESIDENT_WARPS = 16


def forward(x: Tensor, scale: Tensor, shift: Tensor, mask: Tensor, out: Tensor) -> None:
    """Write Eq. 5 into `out`; if `out` is x, only vision rows are touched. x, out (n, d), row-strided; mask (n,)."""
    rows, cols = x.shape
    block_m, block_n = tile(x, _triton.row(TABLE, x.device).tile_bytes)
    grid = (triton.cdiv(rows, block_m), triton.cdiv(cols, block_n))
    with _triton.on(x.device):
        forward_kernel[grid](
            x, scale.contiguous(), shift.contiguous(), mask, out, rows, cols, x.stride(0), out.stride(0),
            IN_PLACE=x.data_ptr() == out.data_ptr(), VECTOR=vector(x, out), WIDE=wide(x),
            BLOCK_M=block_m, BLOCK_N=block_n, num_warps=4, **_triton.LAUNCH,
        )  # fmt: skip


def backward(
    grad: Tensor, x: Tensor, scale: Tensor, mask: Tensor, dx: Tensor, x_rows: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Write dx and return (dscale, dshift), float32 (float64 for float64). Only vision rows of x are read.

    x_rows (n,), int64: if x holds only vision rows, the index in x of each row i of grad.
    """
    rows, cols = grad.shape
    blocks = _triton.row(TABLE, grad.device)
    block_m, block_n = tile(grad, blocks.tile_bytes // 2)
    grid = row_programs(rows, cols, block_m, block_n, blocks.processors, warps=4)
    partial = torch.empty((2, grid[0], cols), dtype=accumulator(grad), device=grad.device)
    with _triton.on(grad.device):
        backward_kernel[grid](
            grad, x, mask if x_rows is None else x_rows, scale.contiguous(), mask, dx, partial, rows, cols,
            grad.stride(0), x.stride(0), dx.stride(0),
            X_ROWS=x_rows is not None, VECTOR=vector(grad, x, dx), WIDE=wide(grad), BLOCK_M=block_m, BLOCK_N=block_n,
            num_warps=4, **_triton.LAUNCH,
        )  # fmt: skip
        dscale, dshift = column_sums(partial)
    return dscale, dshift


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
    """Write h = psi(x + residual), rstd (n,) and out = weight * (h * rstd), rounded in Llama's order (see eager.py)."""
    rows, cols = x.shape
    block_n = triton.next_power_of_2(cols)
    with _triton.on(x.device):
        add_rms_forward_kernel[(rows,)](
            x, residual, scale.contiguous(), shift.contiguous(), mask, weight.contiguous(), out, h, rstd, cols,
            x.stride(0), residual.stride(0), out.stride(0), h.stride(0),
            EPS=eps, VECTOR=vector(x, residual, out, h), WIDE=wide(x), BLOCK_N=block_n,
            num_warps=row_warps(block_n, 16, _triton.row(TABLE, x.device).lanes), **_triton.LAUNCH,
        )  # fmt: skip


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
    """Write dx (which is dresidual too) and return (dscale, dshift, dweight), float32 (float64 for float64).

    One pass over the data up to d = 4096 (8192 on AMD); beyond, a first pass over grad_out and h computes mean(dn n).
    """
    rows, cols = grad_out.shape
    blocks = _triton.row(TABLE, grad_out.device)
    upstream = grad_out if grad_h is None else grad_h
    scale, weight = scale.contiguous(), weight.contiguous()
    tensors = (grad_out, upstream, x, residual, h, dx)
    strides = [t.stride(0) for t in tensors]
    hints = {"HAS_GRAD_H": grad_h is not None, "VECTOR": vector(*tensors), "WIDE": wide(grad_out)}
    block_m, block_n = 1, triton.next_power_of_2(cols)
    whole = block_n * accumulator(grad_out).itemsize <= blocks.whole_row * 4
    if whole:
        warps, dots = row_warps(block_n, 8, blocks.lanes), rstd
    else:
        block_m, block_n = tile(grad_out, blocks.tile_bytes // 4)
        warps, dots = 4, torch.empty_like(rstd)
    grid = row_programs(rows, cols, block_m, block_n, blocks.processors, warps)
    partial = torch.empty((3, grid[0], cols), dtype=accumulator(grad_out), device=grad_out.device)
    with _triton.on(grad_out.device):
        if not whole:
            row_dot_kernel[(rows,)](
                grad_out, h, weight, rstd, dots, cols, grad_out.stride(0), h.stride(0),
                VECTOR=hints["VECTOR"], WIDE=hints["WIDE"], BLOCK_N=4096, num_warps=8, **_triton.LAUNCH,
            )  # fmt: skip
        add_rms_backward_kernel[grid](
            grad_out, upstream, x, residual, h, scale, mask, weight, rstd, dots, dx, partial, rows, cols, *strides,
            WHOLE=whole, BLOCK_M=block_m, BLOCK_N=block_n, num_warps=warps, **hints, **_triton.LAUNCH,
        )  # fmt: skip
        dscale, dshift, dweight = column_sums(partial)
    return dscale, dshift, dweight


@triton.jit(do_not_specialize=["rows"])
def forward_kernel(
    x_ptr, scale_ptr, shift_ptr, mask_ptr, out_ptr, rows, cols, x_stride, out_stride,
    IN_PLACE: tl.constexpr, VECTOR: tl.constexpr, WIDE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    col = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    m_col = col < cols // VECTOR * VECTOR
    vision = tl.load(mask_ptr + row, mask=row < rows, other=0) != 0
    m_vision = vision[:, None] & m_col[None, :]  # [BLOCK_M, BLOCK_N]
    m_used = m_vision if IN_PLACE else (row < rows)[:, None] & m_col[None, :]

    b_scale = tl.load(scale_ptr + col, mask=m_col, other=0).to(WIDE)
    b_shift = tl.load(shift_ptr + col, mask=m_col, other=0).to(WIDE)
    b_x = tl.load(x_ptr + row[:, None] * (x_stride // VECTOR * VECTOR) + col[None, :], mask=m_used, other=0)
    b_y = tl.fma(b_x.to(WIDE), b_scale[None, :], b_shift[None, :])
    # Selected in the storage dtype, so that NaN in a text row keeps its payload.
    b_out = tl.where(m_vision, cast(b_y, b_x.dtype), b_x)
    tl.store(out_ptr + row[:, None] * (out_stride // VECTOR * VECTOR) + col[None, :], b_out, mask=m_used)


@triton.jit(do_not_specialize=["rows"])
def backward_kernel(
    grad_ptr, x_ptr, x_rows_ptr, scale_ptr, mask_ptr, dx_ptr, partial_ptr, rows, cols,
    grad_stride, x_stride, dx_stride,
    X_ROWS: tl.constexpr, VECTOR: tl.constexpr, WIDE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    first, programs = tl.program_id(0), tl.num_programs(0)
    col = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    m_col = col < cols // VECTOR * VECTOR
    b_scale = tl.load(scale_ptr + col, mask=m_col, other=0).to(WIDE)
    b_dscale = tl.zeros((BLOCK_M, BLOCK_N), WIDE)
    b_dshift = tl.zeros((BLOCK_M, BLOCK_N), WIDE)
    for start in range(first * BLOCK_M, rows, programs * BLOCK_M):
        row = (start + tl.arange(0, BLOCK_M)).to(tl.int64)  # [BLOCK_M]
        vision = tl.load(mask_ptr + row, mask=row < rows, other=0) != 0
        m_vision = vision[:, None] & m_col[None, :]  # [BLOCK_M, BLOCK_N]
        m_used = (row < rows)[:, None] & m_col[None, :]
        b_grad = tl.load(
            grad_ptr + row[:, None] * (grad_stride // VECTOR * VECTOR) + col[None, :], mask=m_used, other=0
        )
        x_row = tl.load(x_rows_ptr + row, mask=vision, other=0) if X_ROWS else row
        b_x = tl.load(x_ptr + x_row[:, None] * (x_stride // VECTOR * VECTOR) + col[None, :], mask=m_vision, other=0)
        b_wide = b_grad.to(WIDE)
        b_dx = tl.where(m_vision, cast(b_wide * b_scale[None, :], b_grad.dtype), b_grad)
        tl.store(dx_ptr + row[:, None] * (dx_stride // VECTOR * VECTOR) + col[None, :], b_dx, mask=m_used)
        b_g = tl.where(m_vision, b_wide, 0.0)
        b_dscale = tl.fma(b_g, b_x.to(WIDE), b_dscale)
        b_dshift += b_g
    _store_partial(partial_ptr, 0, b_dscale, col, m_col, cols)
    _store_partial(partial_ptr, 1, b_dshift, col, m_col, cols)


@triton.jit
def add_rms_forward_kernel(
    x_ptr, residual_ptr, scale_ptr, shift_ptr, mask_ptr, weight_ptr, out_ptr, h_ptr, rstd_ptr, cols,
    x_stride, residual_stride, out_stride, h_stride,
    EPS: tl.constexpr, VECTOR: tl.constexpr, WIDE: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    col = tl.arange(0, BLOCK_N)  # [BLOCK_N], a whole row
    m_col = col < cols // VECTOR * VECTOR
    vision = tl.load(mask_ptr + row) != 0
    b_x = tl.load(x_ptr + row * (x_stride // VECTOR * VECTOR) + col, mask=m_col, other=0)
    b_residual = tl.load(residual_ptr + row * (residual_stride // VECTOR * VECTOR) + col, mask=m_col, other=0)
    b_h = cast(b_x.to(WIDE) + b_residual.to(WIDE), b_x.dtype)  # rounded here, as in a separate addition
    if vision:
        b_scale = tl.load(scale_ptr + col, mask=m_col, other=0).to(WIDE)
        b_shift = tl.load(shift_ptr + col, mask=m_col, other=0).to(WIDE)
        b_h = cast(tl.fma(b_h.to(WIDE), b_scale, b_shift), b_x.dtype)
    tl.store(h_ptr + row * (h_stride // VECTOR * VECTOR) + col, b_h, mask=m_col)
    b_wide = b_h.to(WIDE)
    rstd = tl.rsqrt(tl.sum(b_wide * b_wide, axis=0) / cols + EPS)
    tl.store(rstd_ptr + row, rstd)
    b_weight = tl.load(weight_ptr + col, mask=m_col, other=0).to(WIDE)
    b_n = cast(b_wide * rstd, b_x.dtype)  # Llama rounds the normalised row before the weight
    b_out = cast(b_n.to(WIDE) * b_weight, b_x.dtype)
    tl.store(out_ptr + row * (out_stride // VECTOR * VECTOR) + col, b_out, mask=m_col)


@triton.jit(do_not_specialize=["rows"])
def add_rms_backward_kernel(
    grad_out_ptr, grad_h_ptr, x_ptr, residual_ptr, h_ptr, scale_ptr, mask_ptr, weight_ptr, rstd_ptr, dot_ptr, dx_ptr,
    partial_ptr, rows, cols, grad_out_stride, grad_h_stride, x_stride, residual_stride, h_stride, dx_stride,
    HAS_GRAD_H: tl.constexpr, WHOLE: tl.constexpr, VECTOR: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    # WHOLE: a tile holds whole rows and mean(dn * n) is computed here; otherwise row_dot_kernel has computed it.
    first, programs = tl.program_id(0), tl.num_programs(0)
    col = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    m_col = col < cols // VECTOR * VECTOR
    b_scale = tl.load(scale_ptr + col, mask=m_col, other=0).to(WIDE)
    b_weight = tl.load(weight_ptr + col, mask=m_col, other=0).to(WIDE)
    b_dscale = tl.zeros((BLOCK_M, BLOCK_N), WIDE)
    b_dshift = tl.zeros((BLOCK_M, BLOCK_N), WIDE)
    b_dweight = tl.zeros((BLOCK_M, BLOCK_N), WIDE)
    for start in range(first * BLOCK_M, rows, programs * BLOCK_M):
        row = (start + tl.arange(0, BLOCK_M)).to(tl.int64)  # [BLOCK_M]
        m_row = row < rows
        m_used = m_row[:, None] & m_col[None, :]  # [BLOCK_M, BLOCK_N]
        vision = tl.load(mask_ptr + row, mask=m_row, other=0) != 0
        m_vision = vision[:, None] & m_col[None, :]
        rstd = tl.load(rstd_ptr + row, mask=m_row, other=0)[:, None]
        b_grad = tl.load(
            grad_out_ptr + row[:, None] * (grad_out_stride // VECTOR * VECTOR) + col[None, :], mask=m_used, other=0
        )
        b_h = tl.load(h_ptr + row[:, None] * (h_stride // VECTOR * VECTOR) + col[None, :], mask=m_used, other=0)
        b_g = b_grad.to(WIDE)
        b_n = b_h.to(WIDE) * rstd
        b_dn = b_g * b_weight[None, :]
        if WHOLE:
            dot = tl.sum(b_dn * b_n, axis=1)[:, None] / cols
        else:
            dot = tl.load(dot_ptr + row, mask=m_row, other=0)[:, None]
        b_dh = (b_dn - b_n * dot) * rstd
        if HAS_GRAD_H:
            b_grad_h = tl.load(
                grad_h_ptr + row[:, None] * (grad_h_stride // VECTOR * VECTOR) + col[None, :], mask=m_used, other=0
            )
            b_dh += b_grad_h.to(WIDE)
        b_x = tl.load(x_ptr + row[:, None] * (x_stride // VECTOR * VECTOR) + col[None, :], mask=m_vision, other=0)
        b_residual = tl.load(
            residual_ptr + row[:, None] * (residual_stride // VECTOR * VECTOR) + col[None, :], mask=m_vision, other=0
        )
        b_p = cast(b_x.to(WIDE) + b_residual.to(WIDE), b_x.dtype).to(WIDE)  # rounded as in the forward
        b_dx = cast(tl.where(m_vision, b_dh * b_scale[None, :], b_dh), b_grad.dtype)
        tl.store(dx_ptr + row[:, None] * (dx_stride // VECTOR * VECTOR) + col[None, :], b_dx, mask=m_used)
        b_dh = tl.where(m_vision, b_dh, 0.0)
        b_dscale = tl.fma(b_dh, b_p, b_dscale)
        b_dshift += b_dh
        b_dweight = tl.fma(b_g, b_n, b_dweight)
    _store_partial(partial_ptr, 0, b_dscale, col, m_col, cols)
    _store_partial(partial_ptr, 1, b_dshift, col, m_col, cols)
    _store_partial(partial_ptr, 2, b_dweight, col, m_col, cols)


@triton.jit
def row_dot_kernel(
    grad_out_ptr, h_ptr, weight_ptr, rstd_ptr, dot_ptr, cols, grad_out_stride, h_stride,
    VECTOR: tl.constexpr, WIDE: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    # mean(dn * n) of one row, n = h * rstd and dn = grad_out * weight.
    row = tl.program_id(0).to(tl.int64)
    b_dot = tl.zeros((BLOCK_N,), WIDE)
    for start in range(0, cols, BLOCK_N):
        col = start + tl.arange(0, BLOCK_N)
        m_col = col < cols // VECTOR * VECTOR
        b_g = tl.load(grad_out_ptr + row * (grad_out_stride // VECTOR * VECTOR) + col, mask=m_col, other=0).to(WIDE)
        b_h = tl.load(h_ptr + row * (h_stride // VECTOR * VECTOR) + col, mask=m_col, other=0).to(WIDE)
        b_weight = tl.load(weight_ptr + col, mask=m_col, other=0).to(WIDE)
        b_dot = tl.fma(b_g * b_weight, b_h, b_dot)
    tl.store(dot_ptr + row, tl.sum(b_dot, axis=0) * tl.load(rstd_ptr + row) / cols)


@triton.jit(do_not_specialize=["parts"])
def column_sum_kernel(partial_ptr, out_ptr, parts, cols, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr):
    # out[col] = sum over parts of partial[parts, cols], in an order fixed by BLOCK_P.
    col = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    which = tl.program_id(1).to(tl.int64)
    b_sum = tl.zeros((BLOCK_P, BLOCK_N), partial_ptr.dtype.element_ty)
    for start in range(0, parts, BLOCK_P):
        part = start + tl.arange(0, BLOCK_P)  # [BLOCK_P]
        m_part = (part < parts)[:, None] & (col < cols)[None, :]
        b_sum += tl.load(partial_ptr + (which * parts + part[:, None]) * cols + col[None, :], mask=m_part, other=0)
    tl.store(out_ptr + which * cols + col, tl.sum(b_sum, axis=0), mask=col < cols)


@triton.jit
def _store_partial(partial_ptr, which: tl.constexpr, b_sum, col, m_col, cols):
    part = (tl.num_programs(0) * which + tl.program_id(0)).to(tl.int64)
    tl.store(partial_ptr + part * cols + col, tl.sum(b_sum, axis=0), mask=m_col)


def column_sums(partial: Tensor) -> tuple[Tensor, ...]:
    """Sum (k, parts, cols) over the parts; returns k tensors (cols,)."""
    k, parts, cols = partial.shape
    out = torch.empty((k, cols), dtype=partial.dtype, device=partial.device)
    block_n = _triton.row(TABLE, partial.device).sum_columns
    column_sum_kernel[(triton.cdiv(cols, block_n), k)](
        partial, out, parts, cols, BLOCK_P=64, BLOCK_N=block_n, num_warps=4, **_triton.LAUNCH
    )
    return out.unbind(0)


def tile(x: Tensor, tile_bytes: int) -> tuple[int, int]:
    """Rows and columns of a tile: up to 1024 columns, fewer if padding the last tile would waste over an eighth."""
    cols = x.shape[1]
    block_n = min(triton.next_power_of_2(cols), 1024)
    while block_n > 64 and triton.cdiv(cols, block_n) * block_n > cols + cols // 8:
        block_n //= 2
    return max(1, tile_bytes // (block_n * x.element_size())), block_n


def row_programs(rows: int, cols: int, block_m: int, block_n: int, processors: int, warps: int) -> tuple[int, int]:
    """Grid of a backward kernel: as many programs as run at once, fewer if there are few rows; each loops over rows."""
    columns = triton.cdiv(cols, block_n)
    programs = processors * max(1, RESIDENT_WARPS // warps)
    return min(triton.cdiv(rows, block_m), max(1, programs // columns)), columns


def row_warps(block_n: int, elements: int, lanes: int) -> int:
    """Warps of a program that holds whole rows with `elements` per thread, at most 16."""
    return min(16, max(1, block_n // (elements * lanes)))


def vector(*tensors: Tensor) -> int:
    """Elements per 16-byte access, or fewer if the row strides and the row length require it."""
    strides = (t.stride(0) for t in tensors)
    return math.gcd(16 // tensors[0].element_size(), tensors[0].shape[1], *strides)


def wide(x: Tensor) -> tl.dtype:
    """The dtype of the arithmetic: float32, or float64 for float64."""
    return tl.float64 if x.dtype == torch.float64 else tl.float32
