"""Token norms and the block update of the second moment with the compiled CPU kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from mir_kernels._native import DTYPE_CODES, C
from mir_kernels.ops.moments.packed import PANEL


def token_norms(x: Tensor) -> Tensor:
    """l2 norms of the rows of x `(rows, d)`, f32/bf16/f16/f64, as float32 `(rows,)`; squared and added in float64.

    Rows are contiguous; any row stride.
    """
    if x.stride(1) != 1 and x.shape[1] > 1 and x.shape[0]:
        raise ValueError(f"x: expected a matrix with contiguous rows, got strides {x.stride()}")
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

    If the CPU has AVX2, bf16 blocks of at least 1024 rows are multiplied in 16-bit integers (csrc/moments/integers.h),
    with a shift that is coarser than the centre.
    """
    if mask is not None or precision == "exact":
        raise ValueError("the native product does not support a mask or precision 'exact'")
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
