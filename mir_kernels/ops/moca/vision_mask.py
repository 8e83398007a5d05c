"""A mask that nobody else can change, with where its vision rows lie."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mir_kernels import _checks

if TYPE_CHECKING:
    from mir_kernels._arrays import Array


class VisionMask:
    """The vision tokens of one forward pass, which all of its layers share: `moca` takes it in place of the mask.

    mask: (...), as in `moca`. It is copied, so that whoever writes to it later,
    through NumPy, DLPack or a collective, which torch does not see, changes nothing here. Where its vision rows lie is
    found when it is first asked for, which waits for the device; a mask given to `moca` itself is asked every time.
    """

    def __init__(self, mask: Array) -> None:
        self.mask = own_mask(_checks.mask("mask", mask, None, floats=True))

    @cached_property
    def places(self) -> Tensor:
        """The rows of the flattened mask that are vision rows, in order, int64."""
        return self._flat.nonzero().view(-1)

    @cached_property
    def row_of(self) -> Tensor:
        """For each row of the flattened mask, which of the vision rows it is, int64; without meaning for others."""
        return self._flat.cumsum(0) - 1

    @property
    def _flat(self) -> Tensor:
        return self.mask.view(-1)


@torch.no_grad()
def own_mask(mask: Tensor) -> Tensor:
    """A contiguous copy, bool: what marks vision rows when it is made."""
    return mask.ne(0).contiguous()
