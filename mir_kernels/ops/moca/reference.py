"""MoCa in float64, as written in Eq. 5 of the MIR paper: the reference for all tests, never selected by default.

Eq. 5, for vision tokens f only:   psi(f) = u * f + v        (u: scale, v: shift, both (d,))

With y = psi(x) on the vision rows V and y = x elsewhere, and g the gradient of a loss with respect to y:

    dx_i = scale * g_i  (i in V),  g_i  (i not in V)
    dscale = sum_{i in V} g_i * x_i          dshift = sum_{i in V} g_i

Fused with the preceding residual add and the following RMSNorm (Zhang and Sennrich, Root Mean Square Layer
Normalization, 2019), row by row, with r = (mean(h^2) + eps)^(-1/2) and n = r h:

    p = x + residual      h = psi(p)      out = weight * n

and, for gradients g of out and e of h, with dn = weight * g:

    dh = e + r (dn - n mean(dn * n))       dweight = sum_i g_i * n_i
    dx = dresidual = scale * dh  (in V),  dh  (elsewhere)
    dscale = sum_{i in V} dh_i * p_i       dshift = sum_{i in V} dh_i
"""

from __future__ import annotations

import torch
from torch import Tensor


def forward(x: Tensor, scale: Tensor, shift: Tensor, mask: Tensor, out: Tensor) -> None:
    """Write Eq. 5 into `out`. x, out (n, d); scale, shift (d,); mask (n,), nonzero for vision rows."""
    vision = mask.ne(0)[:, None]
    out.copy_(torch.where(vision, (scale.double() * x.double() + shift.double()).to(x.dtype), x))


def backward(
    grad: Tensor, x: Tensor, scale: Tensor, mask: Tensor, dx: Tensor, x_rows: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Write dx and return (dscale, dshift), float64. grad, x, dx (n, d); rows of x outside the mask are not used.

    x_rows (n,): if x holds only vision rows, the index in x of each row i of grad.
    """
    if x_rows is not None:
        x = x.index_select(0, x_rows.clamp(min=0)) if len(x) else grad
    vision = mask.ne(0)[:, None]
    g = grad.double()
    dx.copy_(torch.where(vision, (scale.double() * g).to(grad.dtype), grad))
    zero = torch.zeros_like(g)
    return torch.where(vision, g * x.double(), zero).sum(0), torch.where(vision, g, zero).sum(0)


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
    """Write out = weight * h * rstd, h = psi(x + residual) and rstd (n,), each rounded once from float64."""
    vision = mask.ne(0)[:, None]
    p = x.double() + residual.double()
    exact = torch.where(vision, scale.double() * p + shift.double(), p)
    r = (exact.square().mean(-1) + eps).rsqrt()
    out.copy_(weight.double() * (exact * r[:, None]))
    h.copy_(exact)
    rstd.copy_(r)


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
    """Write dx (equal to dresidual) and return (dscale, dshift, dweight), float64."""
    vision = mask.ne(0)[:, None]
    g, r = grad_out.double(), rstd.double()[:, None]
    n = h.double() * r
    dn = weight.double() * g
    dh = r * (dn - n * (dn * n).mean(-1, keepdim=True))
    if grad_h is not None:
        dh = dh + grad_h.double()
    dx.copy_(torch.where(vision, scale.double() * dh, dh))
    zero = torch.zeros_like(dh)
    p = x.double() + residual.double()
    return (
        torch.where(vision, dh * p, zero).sum(0),
        torch.where(vision, dh, zero).sum(0),
        (g * n).sum(0),
    )
