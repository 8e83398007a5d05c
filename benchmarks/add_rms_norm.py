"""Residual addition and RMSNorm in one Triton kernel: the rival of `add_moca_rms_norm` if Liger is not installed.

One program per row, as in kernels in common use: it reads x and the residual once and writes h and out once. These are
the bytes of `add_moca_rms_norm` without mask, scale and shift.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mir_kernels import _triton
from mir_kernels._triton import cast


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float = 1e-6) -> tuple[Tensor, Tensor]:
    """(out, h): h = x + residual rounded to its dtype, out = weight h / sqrt(mean(h^2) + eps). x, residual (n, d)."""
    rows, cols = x.shape
    h, out = torch.empty_like(x), torch.empty_like(x)
    block = triton.next_power_of_2(cols)
    with _triton.on(x.device):
        add_rms_norm_kernel[(rows,)](
            x, residual, weight, out, h, cols, eps, BLOCK=block, num_warps=16 if block >= 8192 else 8, **_triton.LAUNCH
        )
    return out, h


@triton.jit
def add_rms_norm_kernel(p_x, p_residual, p_weight, p_out, p_h, cols, eps, BLOCK: tl.constexpr):
    start = tl.program_id(0).to(tl.int64) * cols
    o = tl.arange(0, BLOCK)
    inside = o < cols
    b_x = tl.load(p_x + start + o, inside, 0.0).to(tl.float32)  # [BLOCK]
    b_residual = tl.load(p_residual + start + o, inside, 0.0).to(tl.float32)
    b_h = cast(b_x + b_residual, p_h.dtype.element_ty)
    tl.store(p_h + start + o, b_h, inside)
    b_wide = b_h.to(tl.float32)
    b_normed = b_wide * tl.rsqrt(tl.sum(b_wide * b_wide, 0) / cols + eps)
    b_weight = tl.load(p_weight + o, inside, 0.0).to(tl.float32)
    tl.store(p_out + start + o, cast(b_weight * b_normed, p_out.dtype.element_ty), inside)
