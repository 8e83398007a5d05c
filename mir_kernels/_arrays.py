"""What is taken where a tensor is: torch.Tensor as it is, and numpy arrays, as tensors that share their memory."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from typing import TypeAlias

    import numpy

    Array: TypeAlias = Tensor | numpy.ndarray[Any, Any]


def tensor_of(name: str, value: Any) -> Tensor:
    """`value` as a tensor; an array as one on the CPU, without a copy where torch can use its memory.

    Copied is what torch does not know: read-only memory, negative strides, another byte order. TypeError for anything
    else, an array with a mask or of a dtype that torch has not; the message names the argument.
    """
    if isinstance(value, Tensor):
        return value
    numpy = sys.modules.get("numpy")  # who has an array has loaded it
    if numpy is None or not isinstance(value, numpy.ndarray):
        raise TypeError(f"{name}: takes a torch.Tensor, got {type(value).__name__}")
    if isinstance(value, numpy.ma.MaskedArray):
        raise TypeError(f"{name}: takes a torch.Tensor or an array without a mask, got a MaskedArray")
    if value.dtype.name == "bfloat16":  # of ml_dtypes, as JAX has it
        return tensor_of(name, value.view(numpy.int16)).view(torch.bfloat16)
    if not value.dtype.isnative:
        value = value.astype(value.dtype.newbyteorder("="))
    if not value.flags.writeable or any(step < 0 or step % value.itemsize for step in value.strides):
        value = value.copy()
    try:
        return torch.from_numpy(value)
    except TypeError:
        raise TypeError(f"{name}: takes numbers of a dtype that torch has, got an array of {value.dtype}") from None
