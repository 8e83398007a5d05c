"""MoCa as a module: one scale and one shift vector, which the paper adds at the end of every decoder layer."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from mir_kernels.ops.moca.functional import moca
from mir_kernels.ops.moca.vision_mask import VisionMask

if TYPE_CHECKING:
    from mir_kernels._arrays import Array


class MoCa(nn.Module):
    """Learnable scale and shift of vision tokens, Eq. 5 of the MIR paper.

    hidden_size: d. std: 0 initialises with ones and zeros, as in the paper; otherwise scale ~ N(1, std),
    shift ~ N(0, std), as in the published training code. Parameters `scale`, `shift`: (d,).
    """

    def __init__(
        self,
        hidden_size: int,
        *,
        std: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(hidden_size, int) or hidden_size < 1:
            raise ValueError(f"hidden_size: expected an integer >= 1, got {hidden_size!r}")
        if not std >= 0:
            raise ValueError(f"std: expected a standard deviation >= 0, got {std!r}")
        self.hidden_size, self.std = hidden_size, std
        self.scale = nn.Parameter(torch.empty(hidden_size, device=device, dtype=dtype))
        self.shift = nn.Parameter(torch.empty(hidden_size, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set scale to ones and shift to zeros, or draw them from normal distributions around these with `std`."""
        with torch.no_grad():
            self.scale.normal_(1.0, self.std) if self.std else self.scale.fill_(1.0)
            self.shift.normal_(0.0, self.std) if self.std else self.shift.zero_()

    def forward(self, x: Array, mask: Array | VisionMask, *, inplace: bool = False) -> Tensor:
        """`moca` with this module's scale and shift. x (..., d); mask (...), as in `moca`."""
        return moca(x, self.scale, self.shift, mask, inplace=inplace)

    def extra_repr(self) -> str:
        return f"{self.hidden_size}, std={self.std}"
