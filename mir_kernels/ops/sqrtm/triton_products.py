"""Products of matrices too large for one program, in Triton: symmetric ones at half the work, and the fused step.

All functions accept and return *planes*, (parts, batch, m, n) with m and n padded to multiples of ALIGN: one part, the
matrices themselves, or two, float32 matrices times 2^10 as the sum of a high and a low float16 (`split`). Halves are
kept in memory, not in registers: every operand of a matrix instruction then comes straight from shared memory, and the
tensor cores do not wait for threads to split their operands. A batch is one launch.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from mir_kernels import _triton
from mir_kernels._triton import column_quarters, lower_tile
from mir_kernels.ops.sqrtm.coefficients import Step
from mir_kernels.ops.sqrtm.triton_tiles import UNIT, load, store, tile, tile_product

ALIGN = 64  # a multiple of every step, so that the last step of a product stays inside its own matrix
LARGE = 1024  # from this size on a single matrix fills a GPU with large tiles


class Tiles(NamedTuple):
    """How one architecture multiplies.

    rows, columns: of an output tile; columns equals rows or 2 * rows.  step: depth of one product.
    halves: how three products of halves make one float32 product: "together", in one loop with three accumulators
    (every tile is read once); "in turn", in three loops over one accumulator (larger tiles); "chained", in one loop
    with one accumulator (if accumulators are not in registers, or products wait for one another anyway). "none"
    multiplies the matrices as they are.
    descriptors: tiles are fetched by the copy engine (sm_90 and later), not by the program's threads.
    band: rows of tiles that concurrent programs work on, so that they share their reads in the L2 cache.
    """

    rows: int
    columns: int
    step: int
    warps: int
    stages: int
    halves: str = "none"
    descriptors: bool = False
    band: int = 8


_HALF = {
    "sm_80": Tiles(128, 128, 32, 8, 3),
    "sm_90": Tiles(128, 256, 64, 8, 4, descriptors=True),
    "sm_100": Tiles(128, 256, 64, 8, 4, descriptors=True),
    "gfx942": Tiles(128, 128, 32, 8, 2),
    "interpreter": Tiles(32, 64, 32, 4, 1, descriptors=True, band=2),
}
_HALF_BELOW = _HALF | {
    "sm_90": Tiles(128, 128, 64, 8, 3, descriptors=True),
    "sm_100": Tiles(128, 128, 64, 8, 3, descriptors=True),
    "interpreter": Tiles(32, 32, 32, 4, 1, band=2),
}
_FLOAT32 = {
    "sm_80": Tiles(128, 128, 32, 8, 3, "chained"),
    "sm_90": Tiles(128, 128, 64, 8, 3, "together", descriptors=True),
    "sm_100": Tiles(128, 128, 32, 8, 3, "chained", descriptors=True),
    "gfx942": Tiles(64, 64, 32, 4, 2),
    "interpreter": Tiles(32, 32, 32, 4, 1, "together", descriptors=True, band=2),
}
_FLOAT32_BELOW = _FLOAT32 | {
    "sm_90": Tiles(64, 128, 32, 4, 3, "together", descriptors=True),
    "interpreter": Tiles(32, 64, 32, 4, 1, "chained", band=2),
}
# For sizes from LARGE on, and below LARGE.
TABLE = {torch.bfloat16: _HALF, torch.float16: _HALF, torch.float32: _FLOAT32}
TABLE_BELOW = {torch.bfloat16: _HALF_BELOW, torch.float16: _HALF_BELOW, torch.float32: _FLOAT32_BELOW}


def tiles_for(rows: int, cols: int, dtype: torch.dtype, device: torch.device) -> Tiles:
    """The row of the tables for matrices of this size."""
    tables = TABLE if max(rows, cols) >= LARGE else TABLE_BELOW
    return _triton.row(tables[dtype], device)


def split(x: Tensor, tiles: Tiles) -> Tensor:
    """(batch, m, n) as planes. The low half of 0.01, a typical entry at d = 4096, is not yet subnormal."""
    rows, cols = x.shape[-2:]
    x = torch.nn.functional.pad(x, (0, -cols % ALIGN, 0, -rows % ALIGN))
    if tiles.halves == "none":
        return x.contiguous()[None]
    scaled = x * UNIT
    high = scaled.half()
    return torch.stack((high, (scaled - high.float()).half()))


def join(planes: Tensor, rows: int, cols: int) -> Tensor:
    """The matrices (batch, rows, cols) stored in planes."""
    if planes.shape[0] == 1:
        return planes[0, :, :rows, :cols]
    return (planes[0, :, :rows, :cols].float() + planes[1, :, :rows, :cols].float()) / UNIT


def polynomial_step(x: Tensor, coefficients: Step, tiles: Tiles) -> Tensor:
    """a X + X (b G + c G^2), G = X^T X, of planes of m x n matrices: two symmetric products and one full one."""
    a, b, c = coefficients
    g = symmetric_product(x, tiles, transposed=True)
    z = symmetric_product(g, tiles, transposed=False, add=g, alpha=c, beta=b)
    return product(x, z, tiles, beta=a)


def symmetric_product(
    x: Tensor, tiles: Tiles, *, transposed: bool, add: Tensor | None = None, alpha: float = 1.0, beta: float = 0.0
) -> Tensor:
    """Planes of alpha X X^T + beta add (X^T X where `transposed`); `add` is symmetric.

    Only tiles that touch or lie below the diagonal are computed; those below it are stored twice, once mirrored.
    """
    parts, batch, rows, cols = x.shape
    size = cols if transposed else rows
    out = x.new_empty(parts, batch, size, size)
    edge = triton.cdiv(size, tiles.columns)
    if batch:
        with _triton.on(x.device):
            _symmetric_product_fwd[(batch * (edge * (edge + 1) // 2) * (tiles.columns // tiles.rows),)](
                *(_source(x, tiles, transposed, tiles.rows), _source(x, tiles, transposed, tiles.columns)),
                *(out if add is None else add, out, alpha, beta, batch, rows, cols),
                HAS_ADD=add is not None, TRANSPOSED=transposed, HALVES=tiles.halves, DESCRIPTORS=tiles.descriptors,
                TILE_M=tiles.rows, TILE_N=tiles.columns, STEP=tiles.step, BAND=tiles.band,
                num_warps=tiles.warps, num_stages=tiles.stages, **_triton.LAUNCH,
            )  # fmt: skip
    return out


def product(x: Tensor, z: Tensor, tiles: Tiles, *, beta: float) -> Tensor:
    """Planes of X Z + beta X from planes of X (m, n) and symmetric Z (n, n), rounded once."""
    _, batch, rows, cols = x.shape
    out = torch.empty_like(x)
    if batch:
        with _triton.on(x.device):
            _product_fwd[(batch * triton.cdiv(rows, tiles.rows) * triton.cdiv(cols, tiles.columns),)](
                *(_source(x, tiles, False, tiles.rows), _source(z, tiles, True, tiles.columns)),
                *(x, out, beta, batch, rows, cols),
                HALVES=tiles.halves, DESCRIPTORS=tiles.descriptors,
                TILE_M=tiles.rows, TILE_N=tiles.columns, STEP=tiles.step, BAND=tiles.band,
                num_warps=tiles.warps, num_stages=tiles.stages, **_triton.LAUNCH,
            )  # fmt: skip
    return out


def _source(planes: Tensor, tiles: Tiles, depth_first: bool, width: int) -> Tensor | TensorDescriptor:
    """The source of tiles [width, step], [step, width] where `depth_first`, over all rows of all planes."""
    if not tiles.descriptors:
        return planes
    shape = [tiles.step, width] if depth_first else [width, tiles.step]
    cols = planes.shape[-1]
    return TensorDescriptor(planes, [planes.numel() // cols, cols], [cols, 1], shape)


@triton.jit(do_not_specialize=["alpha", "beta"])
def _symmetric_product_fwd(
    left, right, p_add, p_out, alpha, beta, batch, rows, cols,
    HAS_ADD: tl.constexpr, TRANSPOSED: tl.constexpr, HALVES: tl.constexpr, DESCRIPTORS: tl.constexpr,
    TILE_M: tl.constexpr, TILE_N: tl.constexpr, STEP: tl.constexpr, BAND: tl.constexpr,
):  # fmt: skip
    size = cols if TRANSPOSED else rows
    depth = rows if TRANSPOSED else cols
    edge = tl.cdiv(size, TILE_N)
    split_in: tl.constexpr = TILE_N // TILE_M
    tiles = edge * (edge + 1) // 2 * split_in
    b = tl.program_id(0) // tiles
    t = tl.program_id(0) % tiles
    i, j = lower_tile(t // split_in, edge, BAND)
    m = i * TILE_N + t % split_in * TILE_M
    n = j * TILE_N
    acc = tile_product(
        left, right, b * rows, b * rows, batch * rows, batch * rows, m, n, depth, cols, cols,
        TRANSPOSED, TRANSPOSED, HALVES, DESCRIPTORS, TILE_M, TILE_N, STEP,
    )  # fmt: skip
    for_all = (p_add, p_out, alpha, beta, b, batch, size, m)
    quarter: tl.constexpr = TILE_N // 4
    # In quarters of the columns: a whole tile and its addend would not fit the registers.
    one, two, three, four = column_quarters(acc, TILE_M, TILE_N)
    _finish_symmetric(one, for_all, n, i > j, HAS_ADD, HALVES, TILE_M, quarter)
    _finish_symmetric(two, for_all, n + quarter, i > j, HAS_ADD, HALVES, TILE_M, quarter)
    _finish_symmetric(three, for_all, n + 2 * quarter, i > j, HAS_ADD, HALVES, TILE_M, quarter)
    _finish_symmetric(four, for_all, n + 3 * quarter, i > j, HAS_ADD, HALVES, TILE_M, quarter)


@triton.jit
def _finish_symmetric(
    acc, for_all, n, below,
    HAS_ADD: tl.constexpr, HALVES: tl.constexpr, TILE_M: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Store [TILE_M, WIDTH] of a symmetric result and its mirror image. below: the tile lies below the diagonal."""
    p_add, p_out, alpha, beta, b, batch, size, m = for_all
    o_m = m + tl.arange(0, TILE_M)
    o_n = n + tl.arange(0, WIDTH)
    base = b.to(tl.int64) * size * size
    plane = batch.to(tl.int64) * size * size
    offsets = base + o_m[:, None].to(tl.int64) * size + o_n[None, :]
    mirrored = base + o_n[:, None].to(tl.int64) * size + o_m[None, :]
    inside = (o_m[:, None] < size) & (o_n[None, :] < size)
    inside_mirrored = (o_n[:, None] < size) & (o_m[None, :] < size)
    acc = acc * alpha
    if HAS_ADD:
        acc += beta * load(p_add + offsets, plane, inside, HALVES)
    if below:
        store(p_out + offsets, plane, acc, inside, False, HALVES)
        store(p_out + mirrored, plane, acc, inside_mirrored, True, HALVES)
    else:
        # The part above the diagonal is the exact mirror image of the part below.
        store(p_out + offsets, plane, acc, inside & (o_m[:, None] >= o_n[None, :]), False, HALVES)
        store(p_out + mirrored, plane, acc, inside_mirrored & (o_m[None, :] > o_n[:, None]), True, HALVES)


@triton.jit(do_not_specialize=["beta"])
def _product_fwd(
    left, right, p_x, p_out, beta, batch, rows, cols,
    HALVES: tl.constexpr, DESCRIPTORS: tl.constexpr,
    TILE_M: tl.constexpr, TILE_N: tl.constexpr, STEP: tl.constexpr, BAND: tl.constexpr,
):  # fmt: skip
    across = tl.cdiv(cols, TILE_N)
    down = tl.cdiv(rows, TILE_M)
    b = tl.program_id(0) // (across * down)
    i, j = tile(tl.program_id(0) % (across * down), down, across, BAND)
    # Z is symmetric: its column n is read as row n, contiguous in memory.
    acc = tile_product(
        left, right, b * rows, b * cols, batch * rows, batch * cols, i * TILE_M, j * TILE_N, cols, cols, cols,
        False, True, HALVES, DESCRIPTORS, TILE_M, TILE_N, STEP,
    )  # fmt: skip
    for_all = (p_x, p_out, beta, b, batch, rows, cols, i * TILE_M)
    n = j * TILE_N
    quarter: tl.constexpr = TILE_N // 4
    one, two, three, four = column_quarters(acc, TILE_M, TILE_N)
    _finish(one, for_all, n, HALVES, TILE_M, quarter)
    _finish(two, for_all, n + quarter, HALVES, TILE_M, quarter)
    _finish(three, for_all, n + 2 * quarter, HALVES, TILE_M, quarter)
    _finish(four, for_all, n + 3 * quarter, HALVES, TILE_M, quarter)


@triton.jit
def _finish(acc, for_all, n, HALVES: tl.constexpr, TILE_M: tl.constexpr, WIDTH: tl.constexpr):
    """Store [TILE_M, WIDTH] of acc + beta X."""
    p_x, p_out, beta, b, batch, rows, cols, m = for_all
    o_m = m + tl.arange(0, TILE_M)
    o_n = n + tl.arange(0, WIDTH)
    inside = (o_m[:, None] < rows) & (o_n[None, :] < cols)
    plane = batch.to(tl.int64) * rows * cols
    offsets = b.to(tl.int64) * rows * cols + o_m[:, None].to(tl.int64) * cols + o_n[None, :]
    store(p_out + offsets, plane, acc + beta * load(p_x + offsets, plane, inside, HALVES), inside, False, HALVES)
