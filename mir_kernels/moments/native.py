"""Token norms by the compiled CPU kernel."""

from __future__ import annotations

import torch
from torch import Tensor

from mir_kernels._native import C

_CODES = {getattr(torch, name): code for name, code in C.DTYPES.items()} if C is not None else {}


def token_norms(x: Tensor) -> Tensor:
    """l2 norms of the rows of x `(rows, d)`, f32/bf16/f16/f64, as float32 `(rows,)`; squared and added in float64.

    Elements of a row lie side by side, rows any distance apart.
    """
    if x.stride(1) != 1 and x.shape[1] > 1:
        raise ValueError(f"x: takes a matrix whose rows are contiguous, got strides {x.stride()}")
    out = torch.empty(x.shape[0], dtype=torch.float32)
    C.token_norms(
        *(x.data_ptr(), x.stride(0), out.data_ptr(), x.shape[0], x.shape[1], _CODES[x.dtype]), torch.get_num_threads()
    )
    return out
