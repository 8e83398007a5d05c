"""Converts integer masks of 0 and 1, as tokenizers produce them, to bool after checking that they hold nothing else."""

from __future__ import annotations

import torch
from torch import Tensor

from mir_kernels._gate import by_operator
from mir_kernels._registration import Sharding, register

WHOLE = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint16, torch.uint32, torch.uint64)


def of_whole_numbers(name: str, mask: Tensor) -> Tensor:
    """A mask with a dtype of `WHOLE` as bool. ValueError, naming the mask and an entry, if one is neither 0 nor 1.

    Reads the values, so it waits for the device. Compiled code makes the same check when it runs.
    """
    run = torch.ops.mir_kernels.mask_of_whole_numbers if by_operator("mask_of_whole_numbers", mask) else _checked
    return run(mask, name)


@torch.no_grad()
def _checked(mask: Tensor, name: str) -> Tensor:
    if mask.numel():
        lowest, highest = (int(end) for end in torch.aminmax(mask.to(torch.int64)))
        if lowest < 0 or highest > 1:
            got = lowest if lowest < 0 else highest
            dtype = str(mask.dtype).removeprefix("torch.")
            raise ValueError(f"{name}: expected True and False, or 0 and 1, got {got} in a mask of {dtype}")
    return mask.to(torch.bool).contiguous()


register(
    "mask_of_whole_numbers(Tensor mask, str name) -> Tensor",
    _checked,
    lambda mask, name: mask.new_empty(mask.shape, dtype=torch.bool),
    sharding=Sharding("x-", "x", 0),
)
