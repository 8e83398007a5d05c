"""A private copy of a mask with the positions of its vision rows."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mir_kernels import _checks

if TYPE_CHECKING:
    from mir_kernels._arrays import Array


class VisionMask:
    """The vision tokens of one forward pass, shared by all layers; pass it to `moca` as the mask.

    mask: (...), as in `moca`. It is copied, so later writes have no effect, including those that torch does not see
    (through NumPy, DLPack or a collective). The positions of the vision rows are computed on first use, which waits for
    the device. For a plain mask, `moca` computes them on every call.
    """

    def __init__(self, mask: Array) -> None:
        self.mask = own_mask(_checks.mask("mask", mask, None, floats=True))

    @cached_property
    def places(self) -> Tensor:
        """The indices of the vision rows in the flattened mask, ascending, int64."""
        return self._flat.nonzero().view(-1)

    @cached_property
    def row_of(self) -> Tensor:
        """The index of each row of the flattened mask among the vision rows, int64; undefined for text rows."""
        return self._flat.cumsum(0) - 1

    @property
    def _flat(self) -> Tensor:
        return self.mask.view(-1)


@torch.no_grad()
def own_mask(mask: Tensor) -> Tensor:
    """A contiguous bool copy that marks the current vision rows."""
    return mask.ne(0).contiguous()
