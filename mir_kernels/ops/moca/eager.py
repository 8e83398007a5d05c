"""MoCa in plain torch: runs wherever torch runs, traceable, no synchronisation. Formulas: see reference.py.

Arithmetic is in float32 (float64 for float64), and every result is rounded once to its dtype. The column sums use
torch's own reduction over the rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mir_kernels._precision import accumulator


def forward(x: Tensor, scale: Tensor, shift: Tensor, mask: Tensor, out: Tensor) -> None:
    """Write Eq. 5 into `out` (which may be x). x, out (n, d); scale, shift (d,); mask (n,), nonzero for vision rows."""
    dtype = accumulator(x)
    y = torch.empty_like(x)
    torch.addcmul(
        shift.to(dtype), x, scale.to(dtype), out=y
    )  # 2 + 2 bytes per element in bf16, because the casts are inside the loop
    torch.where(mask.ne(0)[:, None], y, x, out=out)  # selects in the storage dtype: text rows keep their bits, even NaN


def backward(
    grad: Tensor, x: Tensor, scale: Tensor, mask: Tensor, dx: Tensor, x_rows: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Write dx and return (dscale, dshift). grad, x, dx (n, d); rows of x outside the mask are not used.

    x_rows (n,): if x holds only vision rows, the index in x of each row i of grad.
    """
    if x_rows is not None:
        x = x.index_select(0, x_rows.clamp(min=0)) if len(x) else grad
    dtype = accumulator(grad)
    vision = mask.ne(0)[:, None]
    scaled = torch.empty_like(grad)
    torch.mul(grad, scale.to(dtype), out=scaled)
    torch.where(vision, scaled, grad, out=dx)
    g = torch.where(vision, grad, 0)  # not a product with the mask, because text rows may contain NaN
    return (g * torch.where(vision, x, 0).to(dtype)).sum(0), g.sum(0, dtype=dtype)


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
    """Write h = psi(x + residual), rstd (n,) and out = weight * (h * rstd), all in Llama's rounding order.

    As in the separate operations, x + residual is rounded to x.dtype before MoCa, and h * rstd before the weight.
    """
    dtype = accumulator(x)
    forward(x + residual, scale, shift, mask, h)
    wide = h.to(dtype)
    r = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    rstd.copy_(r[:, 0])
    torch.mul(weight, (wide * r).to(x.dtype), out=out)


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
    """Write dx (equal to dresidual) and return (dscale, dshift, dweight); roundings count as the identity."""
    dtype = accumulator(grad_out)
    vision = mask.ne(0)[:, None]
    g, r = grad_out.to(dtype), rstd[:, None]
    n = h * r
    dn = g * weight.to(dtype)
    dh = (dn - n * (dn * n).mean(-1, keepdim=True)) * r
    if grad_h is not None:
        dh = dh + grad_h
    dx.copy_(torch.where(vision, dh * scale.to(dtype), dh))
    dh = torch.where(vision, dh, 0)
    p = torch.where(vision, x + residual, 0)
    return (dh * p).sum(0), dh.sum(0), (g * n).sum(0)
