"""Shared by all Triton launchers: the architecture, its row of a block-size table, launch options, casts, tiles."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Mapping
from typing import TypeVar

import torch
import triton
import triton.language as tl

Row = TypeVar("Row")

# TRITON_INTERPRET has to be set before the first import of triton. The interpreter runs the kernels on CPU tensors.
INTERPRET = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
if INTERPRET:
    from mir_kernels import _interpreter

    _interpreter.mend()

# Fusion of a*b+c changes bits, and its default differs between Triton versions. It is off here; kernels use tl.fma
# where they need a single rounding.
LAUNCH = {"enable_fp_fusion": False}


@functools.cache
def architecture(device: torch.device) -> str:
    """The row of the block-size tables for `device`: "sm_80", "sm_90", "sm_100", "gfx942" or "interpreter".

    Devices of one feature level share a row: 8.x and 12.x (no warpgroup or tensor-memory products) run as sm_80,
    10.x as sm_100, every AMD device as gfx942.
    """
    if device.type == "cpu":
        return "interpreter"
    if torch.version.hip is not None:
        return "gfx942"
    major, _ = torch.cuda.get_device_capability(device)
    return {9: "sm_90", 10: "sm_100"}.get(major, "sm_80")


def row(table: Mapping[str, Row], device: torch.device) -> Row:
    """The row of `table` for `device`. The interpreter uses the sm_80 row of a table without an "interpreter" row."""
    name = architecture(device)
    return table[name if name in table else "sm_80"]


def on(device: torch.device) -> contextlib.AbstractContextManager:
    """Make Triton launch on `device`. Does nothing for CPU tensors, which the interpreter handles."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


@triton.jit
def cast(x, dtype: tl.constexpr):
    """x.to(dtype), to nearest, ties to even. The interpreter's own cast from float32 to bfloat16 truncates."""
    if INTERPRET and dtype == tl.bfloat16:
        bits = x.to(tl.float32).to(tl.uint32, bitcast=True)
        nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        nearest = tl.where(x != x, 0x7FC0, nearest)  # adding to the bits of a NaN may carry into the sign
        y = nearest.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        y = x.to(dtype)
    return y


@triton.jit
def column_quarters(x, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Split x [ROWS, COLUMNS] into four tiles with a quarter of its columns each, so that epilogues do not spill."""
    left, right = column_halves(x, ROWS, COLUMNS)
    first, second = column_halves(left, ROWS, COLUMNS // 2)
    third, fourth = column_halves(right, ROWS, COLUMNS // 2)
    return first, second, third, fourth


@triton.jit
def column_halves(x, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The left and right halves of the columns of x [ROWS, COLUMNS]."""
    return tl.split(tl.permute(tl.reshape(x, [ROWS, 2, COLUMNS // 2]), (0, 2, 1)))


@triton.jit
def lower_tile(t, edge, BAND: tl.constexpr):
    """Tile t of the lower triangle in bands of BAND tile rows: first the part left of the band's own triangle."""
    row, _ = triangle(t)
    band = row // BAND * BAND
    height = tl.minimum(edge - band, BAND)
    t -= band * (band + 1) // 2
    square = t < band * height
    i, j = triangle(tl.maximum(t - band * height, 0))
    return tl.where(square, band + t % height, band + i), tl.where(square, t // height, band + j)


@triton.jit
def triangle(t):
    """Tile t of the lower triangle, row by row. Below 2^23 tiles the rounded root is off by at most one."""
    i = ((tl.sqrt(8.0 * t.to(tl.float32) + 1.0) - 1.0) * 0.5).to(tl.int32)
    i = tl.where(i * (i + 1) // 2 > t, i - 1, i)
    i = tl.where((i + 1) * (i + 2) // 2 <= t, i + 1, i)
    return i, t - i * (i + 1) // 2
