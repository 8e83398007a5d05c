"""Accepts NumPy arrays wherever tensors are expected, as tensors that share their memory."""

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
    """`value` as a tensor. An array becomes a CPU tensor, without a copy if torch can use its memory.

    An array is copied if its memory is read-only, a stride is negative or not a multiple of the item size, or the byte
    order is foreign. Masked arrays, dtypes that torch lacks and other types raise a TypeError that names the argument.
    """
    if isinstance(value, Tensor):
        return value
    numpy = sys.modules.get("numpy")  # loaded already if value is an array
    if numpy is None or not isinstance(value, numpy.ndarray):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(value).__name__}")
    if isinstance(value, numpy.ma.MaskedArray):
        raise TypeError(f"{name}: expected a torch.Tensor or an array without a mask, got a MaskedArray")
    if value.dtype.name == "bfloat16":  # from ml_dtypes, as in JAX
        return tensor_of(name, value.view(numpy.int16)).view(torch.bfloat16)
    if not value.dtype.isnative:
        value = value.astype(value.dtype.newbyteorder("="))
    if not value.flags.writeable or any(step < 0 or step % value.itemsize for step in value.strides):
        value = value.copy()
    try:
        return torch.from_numpy(value)
    except TypeError:
        raise TypeError(f"{name}: expected a dtype that torch supports, got an array of {value.dtype}") from None
