"""Fixes for the interpreter of Triton 3.4 to 3.6: runtime loop bounds, and fused multiply-adds with one rounding.

They replace private names of these versions, and only if kernels are interpreted. Nothing changes on a GPU.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import triton
from triton.runtime import interpreter

MENDED = (3, 7)  # the first version of Triton that needs no fixes


def mend() -> None:
    """Patch Triton's interpreter if its version needs the fixes."""
    if tuple(map(int, triton.__version__.split(".")[:2])) >= MENDED:
        return
    patch = interpreter._patch_lang_tensor

    def patched(tensor: type, *scope: Any) -> None:  # the scope, which undoes the patch, exists since 3.6
        patch(tensor, *scope)
        # These versions store a scalar as an array of one entry, which numpy 2.4 and later do not convert to int.
        (scope[0].set_attr if scope else setattr)(tensor, "__index__", lambda self: int(self.handle.data.item()))

    def create_fma(self: Any, x: Any, y: Any, z: Any) -> Any:
        return interpreter.TensorHandle(fma(x.data, y.data, z.data), z.dtype.scalar)

    interpreter._patch_lang_tensor = patched
    interpreter.InterpreterBuilder.create_fma = create_fma


def fma(x: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
    """x * y + z of arrays of one dtype, with one rounding in float32 and two in float64.

    The product of two float32 numbers is exact in float64. The float64 sum is rounded to odd (an inexact sum ends in a
    1 bit). float64 is wide enough that rounding this sum to float32 equals a single rounding.
    """
    if z.dtype != np.float32:
        return x * y + z
    with np.errstate(invalid="ignore", over="ignore"):
        product = np.multiply(x, y, dtype=np.float64)
        total = np.asarray(product + z)
        second = total - product
        lost = (product - (total - second)) + (z - second)  # total + lost is exact
        even = (total.view(np.int64) & 1) == 0
        move = np.isfinite(lost) & (lost != 0) & even
        return np.where(move, np.nextafter(total, np.copysign(np.inf, lost)), total).astype(np.float32)
