"""Token norms and the block update of the second moment by the compiled CPU kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from mir_kernels._native import DTYPE_CODES, C
from mir_kernels.ops.moments.packed import PANEL


def token_norms(x: Tensor) -> Tensor:
    """l2 norms of the rows of x `(rows, d)`, f32/bf16/f16/f64, as float32 `(rows,)`; squared and added in float64.

    Elements of a row lie side by side, rows any distance apart.
    """
    if x.stride(1) != 1 and x.shape[1] > 1 and x.shape[0]:
        raise ValueError(f"x: takes a matrix whose rows are contiguous, got strides {x.stride()}")
    out = torch.empty(x.shape[0], dtype=torch.float32, device="cpu")
    C.token_norms(
        *(x.data_ptr(), x.stride(0), out.data_ptr(), x.shape[0], x.shape[1], DTYPE_CODES[x.dtype]),
        torch.get_num_threads(),
    )
    return out


def accumulate(
    second: Tensor, x: Tensor, mask: Tensor | None, centre: Tensor, vectors: Tensor, weights: Tensor, precision: str
) -> tuple[Tensor, Tensor]:
    """The block update of `eager.accumulate`, f32/bf16/f16 without a mask, with products in float32.

    From 1024 rows on bf16 is multiplied in 16-bit integers where the CPU has AVX2 (csrc/moments/integers.h), with a
    shift that is coarser than the centre.
    """
    if mask is not None or precision == "exact":
        raise ValueError("the native product takes every row, and precision 'fast' or 'auto'")
    rows, d = x.shape
    if x.stride(1) != 1 and d > 1:
        x = x.contiguous()
    shift = centre.float()
    sums = torch.empty(d, dtype=torch.float64, device="cpu")
    packed = torch.empty(C.second_moment_workspace(rows, d), dtype=torch.float32, device="cpu")
    C.second_moment(
        *(x.data_ptr(), x.stride(0), shift.data_ptr(), vectors.data_ptr(), weights.data_ptr()),
        *(second.data_ptr(), PANEL, sums.data_ptr(), packed.data_ptr(), rows, d, DTYPE_CODES[x.dtype]),
        torch.get_num_threads(),
    )
    return shift.double(), sums
