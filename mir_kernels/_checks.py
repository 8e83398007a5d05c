"""Input checks shared by all operations. Each message names the argument, what was expected and what was given.

Checks of a tensor return it, converted if the caller passed an array (`_arrays`); use the returned tensor.
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
    """Check that `value` is a dense torch.Tensor or an array."""
    value = tensor_of(name, value)
    if value.layout != torch.strided or value.is_nested:
        got = "a nested tensor" if value.is_nested else value.layout
        raise TypeError(f"{name}: expected a dense tensor, got {got}")
    return value


def floating(name: str, value: Any, dtypes: tuple[torch.dtype, ...] = FLOATS) -> Tensor:
    """Check that `value` is a tensor with one of `dtypes`."""
    value = tensor(name, value)
    if value.dtype not in dtypes:
        expected = ", ".join(str(d).removeprefix("torch.") for d in dtypes)
        raise TypeError(f"{name}: expected one of the dtypes {expected}, got {str(value.dtype).removeprefix('torch.')}")
    return value


def same_device(name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    """Check that `value` is on the device of `other`."""
    if value.device != other.device:
        raise ValueError(f"{name}: is on {value.device}, but {other_name} is on {other.device}")


def tokens(name: str, value: Any, dtypes: tuple[torch.dtype, ...] = FLOATS) -> Tensor:
    """Check that `value` is `(..., d)` with d >= 1 and a floating dtype."""
    value = floating(name, value, dtypes)
    if value.dim() < 1 or value.shape[-1] < 1:
        raise ValueError(f"{name}: expected shape (..., d) with d >= 1, got {tuple(value.shape)}")
    return value


def vector(name: str, value: Any, size: int) -> Tensor:
    """Check that `value` is `(size,)` with a floating dtype."""
    value = floating(name, value)
    if tuple(value.shape) != (size,):
        raise ValueError(f"{name}: expected shape ({size},), got {tuple(value.shape)}")
    return value


def mask(name: str, value: Any, shape: tuple[int, ...] | None, *, floats: bool = False) -> Tensor:
    """Check that `value` is a token mask of `shape` (any shape if None).

    bool and uint8 masks select a token by a nonzero entry, as do floating ones, accepted if `floats`. Other integer
    dtypes must contain only 0 and 1 and are returned as bool.
    """
    value = tensor(name, value)
    if value.dtype not in (torch.bool, torch.uint8, *_masks.WHOLE, *(FLOATS if floats else ())):
        expected = "bool, uint8" + ", ".join(["", *(str(d).removeprefix("torch.") for d in FLOATS)] if floats else [])
        got = str(value.dtype).removeprefix("torch.")
        raise TypeError(f"{name}: expected one of the dtypes {expected}, or integers 0 and 1, got {got}")
    if shape is not None and tuple(value.shape) != tuple(shape):
        raise ValueError(f"{name}: expected one entry per token, shape {tuple(shape)}, got {tuple(value.shape)}")
    return _masks.of_whole_numbers(name, value) if value.dtype in _masks.WHOLE else value


def square(name: str, value: Any) -> Tensor:
    """Check that `value` is `(..., d, d)` with d >= 1 and a floating dtype."""
    value = floating(name, value)
    if value.dim() < 2 or value.shape[-1] != value.shape[-2] or value.shape[-1] < 1:
        raise ValueError(f"{name}: expected square matrices (..., d, d) with d >= 1, got {tuple(value.shape)}")
    return value


def whole_number(name: str, value: Tensor) -> int:
    """Check that `value` is a tensor with one non-negative integer, and return it as an int."""
    tensor(name, value)
    if value.dim() != 0 or value.is_floating_point() or value.is_complex() or int(value) < 0:
        got = f"{value.item()} ({value.dtype})" if value.dim() == 0 else f"shape {tuple(value.shape)}"
        raise ValueError(f"{name}: expected one non-negative integer, got {got}")
    return int(value)


def choice(name: str, value: object, allowed: tuple[str, ...]) -> None:
    """Check that `value` is one of `allowed`."""
    if value not in allowed:
        raise ValueError(f"{name}: expected one of {allowed}, got {value!r}")


def finite(name: str, value: Tensor) -> None:
    """Check that no entry of `value` is NaN or infinite. Waits for the device, so call it only inside operators."""
    if value.numel() == 0:
        return
    # Both are NaN if any entry is. Four times faster than the maximum norm.
    lowest, highest = torch.aminmax(value.detach())
    if not bool(torch.isfinite(lowest) & torch.isfinite(highest)):
        bad = int((~torch.isfinite(value)).sum())
        raise ValueError(f"{name}: expected finite values, got {bad} that are NaN or infinite")


@functools.cache
def asymmetry_allowed(dtype: torch.dtype) -> float:
    """The |a - a^T| that is accepted as rounding, relative to the largest entry of a matrix."""
    return min(max(1e-8, 64 * torch.finfo(dtype).eps), 1 / 32)


def symmetric(name: str, value: Tensor) -> None:
    """Check that the square `value` is finite, symmetric up to rounding of its dtype, and has no negative variance.

    Waits for the device, so call it only inside operators, where it also runs for compiled code.
    """
    allowed = asymmetry_allowed(value.dtype)
    if surely_semidefinite_like(value, allowed):
        return
    finite(name, value)
    if value.numel() == 0:
        return
    # Few passes over the entries: at d = 2048 each costs as much as 1 % of the square root itself.
    x = value.detach()
    x = x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
    rows = torch.maximum(x.amax(-1), -x.amin(-1))
    largest = rows.amax(-1)
    if not mirrored(x):
        off = torch.linalg.vector_norm(x / 2 - x.mT / 2, torch.inf, dim=(-2, -1)) * 2
        if bool((off > allowed * largest).any()):
            worst = float((off / largest.clamp(min=torch.finfo(x.dtype).tiny)).amax())
            raise ValueError(f"{name}: expected symmetric matrices, got |a - a^T| = {worst:.2g} of the largest entry")
    diagonal = x.diagonal(dim1=-2, dim2=-1)
    if bool((diagonal.amin(-1) < -allowed * largest).any()):
        lowest = float(diagonal.amin())
        raise ValueError(f"{name}: expected positive semi-definite matrices, got a diagonal entry {lowest:.3g}")
    if bool(((diagonal <= 0) & (rows > allowed * largest[..., None])).any()):
        raise ValueError(f"{name}: expected positive semi-definite matrices, got zero variance but nonzero covariance")
