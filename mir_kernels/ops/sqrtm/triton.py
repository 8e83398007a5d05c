"""Newton-Schulz in Triton: steps of large matrices by `triton_products`, a batch of small ones in one launch.

One program runs all steps of a small matrix. Products are accumulated in float32. A float32 product is three float16
products on tensor cores: every entry is below 32, so that its high and low halves fit float16's range and together hold
22 bits, like two tf32 at half the rate.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from mir_kernels import _triton
from mir_kernels._triton import cast
from mir_kernels.ops.sqrtm import eager, triton_products
from mir_kernels.ops.sqrtm.coefficients import Step
from mir_kernels.ops.sqrtm.triton_tiles import UNIT_IN_KERNELS, exact_dot, halves

SMALL = 128  # up to this size one program runs all steps of a matrix


class Blocks(NamedTuple):
    """How one architecture stores a small matrix.

    small: {edge: warps} of the kernels that keep a whole matrix of that size in registers.
    looped: tile edge of the kernel that keeps a matrix in the L1 cache.
    float32: how float32 products are computed, "fp16x3" or "ieee".
    """

    small: dict[int, int]
    looped: int
    float32: str


TABLE = {
    torch.bfloat16: {
        "sm_80": Blocks({16: 1, 32: 1, 64: 4}, 64, "ieee"),
        "sm_90": Blocks({16: 1, 32: 1, 64: 4}, 64, "ieee"),
        "sm_100": Blocks({16: 1, 32: 1, 64: 4}, 64, "ieee"),
        "gfx942": Blocks({16: 1, 32: 2, 64: 4}, 64, "ieee"),
        "interpreter": Blocks({16: 1, 32: 1, 64: 1}, 64, "ieee"),
    },
    torch.float32: {
        "sm_80": Blocks({16: 1, 32: 4}, 64, "fp16x3"),
        "sm_90": Blocks({16: 1, 32: 4, 64: 4}, 64, "fp16x3"),
        "sm_100": Blocks({16: 1, 32: 4, 64: 4}, 64, "fp16x3"),
        "gfx942": Blocks({16: 1, 32: 4}, 32, "ieee"),
        "interpreter": Blocks({16: 1, 32: 1}, 32, "fp16x3"),
    },
}
TABLE[torch.float16] = TABLE[torch.bfloat16]  # the same instructions


def polar(m: Tensor, precision: str, *, iterations: int | None = None, lower: float | None = None) -> Tensor:
    """The orthogonal polar factor of (batch, m, n), m >= n, in bfloat16, float16 or float32; see `eager.polar`."""
    dtype = eager.DTYPES[precision]
    steps = eager.steps_for(precision, iterations, lower)
    x = eager.normalize(m, dtype).contiguous()
    if _edge(x) <= SMALL:
        return small_polar(x, steps)
    rows, cols = x.shape[-2:]
    tiles = triton_products.tiles_for(rows, cols, dtype, x.device)
    planes = triton_products.split(x, tiles)
    for coefficients in steps:
        planes = triton_products.polynomial_step(planes, coefficients, tiles)
    return triton_products.join(planes, rows, cols)


def small_polar(x: Tensor, steps: tuple[Step, ...]) -> Tensor:
    """All steps for all normalized matrices of x (batch, m, n) in one launch, with one program per matrix.

    Up to the edge in the table a matrix stays in registers; above, it uses four scratch matrices that fit the L1 cache.
    """
    batch, rows, cols = x.shape
    blocks = _triton.row(TABLE[x.dtype], x.device)
    edge = _edge(x)
    table = _step_table(steps, x.device)
    if edge in blocks.small:
        out = torch.empty_like(x)
        if batch:
            with _triton.on(x.device):
                _small_polar_fwd[(batch,)](
                    *(x, out, table, len(steps), rows, cols, x.stride(0)),
                    EDGE=edge, FLOAT32=blocks.float32, num_warps=blocks.small[edge], num_stages=1, **_triton.LAUNCH,
                )  # fmt: skip
        return out
    # A copy, because the kernel overwrites its input.
    x = torch.nn.functional.pad(x, (0, edge - cols, 0, edge - rows)).contiguous()
    x = x.clone() if (rows, cols) == (edge, edge) else x
    g, z, out = (torch.empty_like(x) for _ in range(3))
    if batch:
        with _triton.on(x.device):
            _looped_polar_fwd[(batch,)](
                *(x, g, z, out, table, len(steps), edge * edge),
                EDGE=edge, TILE=blocks.looped, FLOAT32=blocks.float32, num_warps=4, num_stages=1, **_triton.LAUNCH,
            )  # fmt: skip
    return (out if len(steps) % 2 else x)[:, :rows, :cols]


@functools.lru_cache(maxsize=64)
def _step_table(steps: tuple[Step, ...], device: torch.device) -> Tensor:
    """The coefficients on the device. Cached, because a CUDA graph cannot capture a copy from the host."""
    return torch.tensor(steps, dtype=torch.float32, device="cpu").to(device)


def _edge(x: Tensor) -> int:
    return max(16, triton.next_power_of_2(max(x.shape[-2:])))


@triton.jit
def _dot(x, y, acc, FLOAT32: tl.constexpr):
    """acc + x y, or acc + UNIT x y for float32 by "fp16x3"; see `_unit`."""
    if x.dtype == tl.float32 and FLOAT32 == "fp16x3":
        x_high, x_low = halves(x)
        y_high, y_low = halves(y)
        acc = exact_dot(x_low, y_high, acc)
        acc = exact_dot(x_high, y_low, acc)
        return exact_dot(x_high, y_high, acc)
    return exact_dot(x, y, acc)


@triton.jit
def _unit(dtype: tl.constexpr, FLOAT32: tl.constexpr):
    """The factor by which `_dot` scales products."""
    return UNIT_IN_KERNELS * UNIT_IN_KERNELS if dtype == tl.float32 and FLOAT32 == "fp16x3" else 1.0


@triton.jit
def _small_polar_fwd(
    p_x, p_out, p_steps, steps, rows, cols, stride,
    EDGE: tl.constexpr, FLOAT32: tl.constexpr,
):  # fmt: skip
    o_m = tl.arange(0, EDGE)[:, None]
    o_n = tl.arange(0, EDGE)[None, :]
    inside = (o_m < rows) & (o_n < cols)
    offsets = tl.program_id(0).to(tl.int64) * stride + o_m * cols + o_n
    x = tl.load(p_x + offsets, mask=inside, other=0.0)  # [EDGE, EDGE]
    dtype: tl.constexpr = x.dtype
    unit: tl.constexpr = _unit(dtype, FLOAT32)
    zero = tl.zeros((EDGE, EDGE), dtype=tl.float32)
    for s in range(steps):
        a = tl.load(p_steps + 3 * s)
        b = tl.load(p_steps + 3 * s + 1)
        c = tl.load(p_steps + 3 * s + 2)
        g = cast(_dot(tl.trans(x), x, zero, FLOAT32) / unit, dtype)
        z = cast(c / unit * _dot(g, g, zero, FLOAT32) + b * g.to(tl.float32), dtype)
        x = cast(_dot(x, z, a * unit * x.to(tl.float32), FLOAT32) / unit, dtype)
    tl.store(p_out + offsets, x, mask=inside)


@triton.jit
def _looped_polar_fwd(
    p_x, p_g, p_z, p_out, p_steps, steps, batch_stride,
    EDGE: tl.constexpr, TILE: tl.constexpr, FLOAT32: tl.constexpr,
):  # fmt: skip
    # One program per matrix, whose four scratch matrices stay in its multiprocessor's cache; a barrier after each
    # product makes the writes of the program's other threads visible.
    base = tl.program_id(0).to(tl.int64) * batch_stride
    p_x += base
    p_g += base
    p_z += base
    p_out += base
    o_r = tl.arange(0, TILE)[:, None]
    o_c = tl.arange(0, TILE)[None, :]
    tiles: tl.constexpr = EDGE // TILE
    unit: tl.constexpr = _unit(p_x.dtype.element_ty, FLOAT32)
    for s in range(steps):
        a = tl.load(p_steps + 3 * s)
        b = tl.load(p_steps + 3 * s + 1)
        c = tl.load(p_steps + 3 * s + 2)
        for t in range(tiles * tiles):
            i = t // tiles * TILE
            j = t % tiles * TILE
            if i >= j:
                acc = tl.zeros((TILE, TILE), dtype=tl.float32)
                for k in range(0, EDGE, TILE):
                    left = tl.load(p_x + (k + o_c) * EDGE + i + o_r)
                    acc = _dot(left, tl.load(p_x + (k + o_r) * EDGE + j + o_c), acc, FLOAT32)
                _store_mirrored(p_g, acc / unit, i, j, o_r, o_c, EDGE)
        tl.debug_barrier()
        for t in range(tiles * tiles):
            i = t // tiles * TILE
            j = t % tiles * TILE
            if i >= j:
                acc = tl.zeros((TILE, TILE), dtype=tl.float32)
                for k in range(0, EDGE, TILE):
                    left = tl.load(p_g + (i + o_r) * EDGE + k + o_c)
                    acc = _dot(left, tl.load(p_g + (k + o_r) * EDGE + j + o_c), acc, FLOAT32)
                acc = c / unit * acc + b * tl.load(p_g + (i + o_r) * EDGE + j + o_c).to(tl.float32)
                _store_mirrored(p_z, acc, i, j, o_r, o_c, EDGE)
        tl.debug_barrier()
        for t in range(tiles * tiles):
            i = t // tiles * TILE
            j = t % tiles * TILE
            acc = a * unit * tl.load(p_x + (i + o_r) * EDGE + j + o_c).to(tl.float32)
            for k in range(0, EDGE, TILE):
                left = tl.load(p_x + (i + o_r) * EDGE + k + o_c)
                acc = _dot(left, tl.load(p_z + (k + o_r) * EDGE + j + o_c), acc, FLOAT32)
            tl.store(p_out + (i + o_r) * EDGE + j + o_c, cast(acc / unit, p_out.dtype.element_ty))
        tl.debug_barrier()
        # The result of this step is the input of the next.
        p_x, p_out = p_out, p_x


@triton.jit
def _store_mirrored(p_out, acc, i, j, o_r, o_c, EDGE: tl.constexpr):
    out = cast(acc, p_out.dtype.element_ty)
    tl.store(p_out + (i + o_r) * EDGE + j + o_c, out)
    if i != j:
        tl.store(p_out + (j + o_r) * EDGE + i + o_c, tl.trans(out))
