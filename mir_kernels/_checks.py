"""Input checks that every operation shares. Each message names the argument, what came and what it takes.

Those of a tensor give it back, made of the caller's array where it was one (`_arrays`): go on with that.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from mir_kernels import _masks
from mir_kernels._arrays import tensor_of
from mir_kernels._symmetry import mirrored, surely_semidefinite_like

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def tensor(name: str, value: Any) -> Tensor:
    """`value` is a torch.Tensor, or an array."""
    value = tensor_of(name, value)
    if value.layout != torch.strided or value.is_nested:
        got = "a nested one" if value.is_nested else value.layout
        raise TypeError(f"{name}: takes a dense tensor, got {got}")
    return value


def floating(name: str, value: Any, dtypes: tuple[torch.dtype, ...] = FLOATS) -> Tensor:
    """`value` is a tensor of one of `dtypes`."""
    value = tensor(name, value)
    if value.dtype not in dtypes:
        takes = ", ".join(str(d).removeprefix("torch.") for d in dtypes)
        raise TypeError(f"{name}: takes a dtype of {takes}, got {str(value.dtype).removeprefix('torch.')}")
    return value


def same_device(name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    """`value` lies where `other` lies."""
    if value.device != other.device:
        raise ValueError(f"{name}: lies on {value.device}, but {other_name} lies on {other.device}")


def tokens(name: str, value: Any, dtypes: tuple[torch.dtype, ...] = FLOATS) -> Tensor:
    """`value` is `(..., d)` with d >= 1, of a floating dtype."""
    value = floating(name, value, dtypes)
    if value.dim() < 1 or value.shape[-1] < 1:
        raise ValueError(f"{name}: takes shape (..., d) with d >= 1, got {tuple(value.shape)}")
    return value


def vector(name: str, value: Any, size: int) -> Tensor:
    """`value` is `(size,)`, of a floating dtype."""
    value = floating(name, value)
    if tuple(value.shape) != (size,):
        raise ValueError(f"{name}: takes shape ({size},), got {tuple(value.shape)}")
    return value


def mask(name: str, value: Any, shape: tuple[int, ...] | None, *, floats: bool = False) -> Tensor:
    """`value` is a token mask of `shape` (any, if None): bool or uint8, nonzero for a token that is meant; of another
    whole dtype, 0 and 1, which come back as bool; floating where `floats`.
    """
    value = tensor(name, value)
    if value.dtype not in (torch.bool, torch.uint8, *_masks.WHOLE, *(FLOATS if floats else ())):
        takes = "bool, uint8" + ", ".join(["", *(str(d).removeprefix("torch.") for d in FLOATS)] if floats else [])
        got = str(value.dtype).removeprefix("torch.")
        raise TypeError(f"{name}: takes a dtype of {takes}, got {got}; other whole numbers are taken if 0 and 1")
    if shape is not None and tuple(value.shape) != tuple(shape):
        raise ValueError(f"{name}: takes one entry per token, shape {tuple(shape)}, got {tuple(value.shape)}")
    return _masks.of_whole_numbers(name, value) if value.dtype in _masks.WHOLE else value


def square(name: str, value: Any) -> Tensor:
    """`value` is `(..., d, d)` with d >= 1, of a floating dtype."""
    value = floating(name, value)
    if value.dim() < 2 or value.shape[-1] != value.shape[-2] or value.shape[-1] < 1:
        raise ValueError(f"{name}: takes square matrices (..., d, d) with d >= 1, got {tuple(value.shape)}")
    return value


def whole_number(name: str, value: Tensor) -> int:
    """`value`, a tensor with one integer that is not negative, as an int."""
    tensor(name, value)
    if value.dim() != 0 or value.is_floating_point() or value.is_complex() or int(value) < 0:
        got = f"{value.item()} ({value.dtype})" if value.dim() == 0 else f"shape {tuple(value.shape)}"
        raise ValueError(f"{name}: takes one integer of at least 0, got {got}")
    return int(value)


def choice(name: str, value: object, allowed: tuple[str, ...]) -> None:
    """`value` is one of `allowed`."""
    if value not in allowed:
        raise ValueError(f"{name}: takes one of {allowed}, got {value!r}")


def finite(name: str, value: Tensor) -> None:
    """No entry of `value` is NaN or infinite. Reads the device, so it is asked inside operators alone."""
    if value.numel() == 0:
        return
    # Both are NaN where an entry is; four times faster than the maximum norm.
    lowest, highest = torch.aminmax(value.detach())
    if not bool(torch.isfinite(lowest) & torch.isfinite(highest)):
        bad = int((~torch.isfinite(value)).sum())
        raise ValueError(f"{name}: takes finite values, got {bad} that are NaN or infinite")


@functools.cache
def asymmetry_allowed(dtype: torch.dtype) -> float:
    """|a - a^T| that rounding may leave, relative to the largest entry of a matrix."""
    return min(max(1e-8, 64 * torch.finfo(dtype).eps), 1 / 32)


def symmetric(name: str, value: Tensor) -> None:
    """The square `value` is finite, symmetric up to the rounding of its dtype and has no negative diagonal entry.

    Reads the device, so it is asked inside operators alone: there it is asked whoever calls, compiled code too.
    """
    allowed = asymmetry_allowed(value.dtype)
    if surely_semidefinite_like(value, allowed):
        return
    finite(name, value)
    if value.numel() == 0:
        return
    # Few passes over the entries: at d = 2048 each costs as much as a percent of the square root itself.
    x = value.detach()
    x = x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
    rows = torch.maximum(x.amax(-1), -x.amin(-1))
    largest = rows.amax(-1)
    if not mirrored(x):
        off = torch.linalg.vector_norm(x / 2 - x.mT / 2, torch.inf, dim=(-2, -1)) * 2
        if bool((off > allowed * largest).any()):
            worst = float((off / largest.clamp(min=torch.finfo(x.dtype).tiny)).amax())
            raise ValueError(f"{name}: takes symmetric matrices, got |a - a^T| of {worst:.2g} of the largest entry")
    diagonal = x.diagonal(dim1=-2, dim2=-1)
    if bool((diagonal.amin(-1) < -allowed * largest).any()):
        lowest = float(diagonal.amin())
        raise ValueError(f"{name}: takes positive semi-definite matrices, got a diagonal entry {lowest:.3g}")
    if bool(((diagonal <= 0) & (rows > allowed * largest[..., None])).any()):
        raise ValueError(f"{name}: takes positive semi-definite matrices, got a covariance beside a variance of zero")
