"""What the interpreter of Triton 3.4 to 3.6 lacks and later ones have: loop bounds, products added in one rounding.

Private names of these versions are replaced, and only where kernels are interpreted: on a GPU nothing is.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import triton
from triton.runtime import interpreter

MENDED = (3, 7)  # the first version of Triton that needs none of this


def mend() -> None:
    """Replaces what is amiss in Triton's interpreter, where this is a version in which it is."""
    if tuple(map(int, triton.__version__.split(".")[:2])) >= MENDED:
        return
    patch = interpreter._patch_lang_tensor

    def patched(tensor: type, *scope: Any) -> None:  # the scope that takes it back came with 3.6
        patch(tensor, *scope)
        # A scalar is an array of one entry there, which numpy 2.4 and later no longer convert to int.
        (scope[0].set_attr if scope else setattr)(tensor, "__index__", lambda self: int(self.handle.data.item()))

    def create_fma(self: Any, x: Any, y: Any, z: Any) -> Any:
        return interpreter.TensorHandle(fma(x.data, y.data, z.data), z.dtype.scalar)

    interpreter._patch_lang_tensor = patched
    interpreter.InterpreterBuilder.create_fma = create_fma


def fma(x: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
    """x * y + z of arrays of one dtype, in float32 with one rounding; in float64 with two.

    A product of float32 is exact in float64. The sum is rounded to odd there (one that is not exact ends in a 1 bit),
    which float64 is wide enough for: rounding it again to float32 is as good as rounding once.
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
