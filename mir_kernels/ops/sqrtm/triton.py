"""Newton-Schulz in Triton: symmetric products at half the work, the fused step, and small batches in one launch.

A batch is one launch: the matrix index is part of the grid and every offset is 64 bits wide. Products are accumulated
in float32. A float32 product is three of float16 on tensor cores: every entry here is below 32, so that its high and
its low half fit float16's range and hold 22 bits together, as two tf32 would at half the rate.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from mir_kernels import _triton
from mir_kernels._triton import INTERPRET, cast
from mir_kernels.ops.sqrtm import eager
from mir_kernels.ops.sqrtm.coefficients import Step

SMALL = 128  # up to this size all steps of a matrix are one program's
ALIGN = 16  # rows are padded with zeros to a multiple of this: 16-byte loads, and zero columns stay zero


class Blocks(NamedTuple):
    """One architecture's tiles.

    tile, step: edge of an output tile and depth of one product.  warps, stages: of the tiled kernels.
    small: {edge: warps} of the kernels that keep a whole matrix of that size in registers.
    looped: edge of a tile of the kernel that keeps a matrix in the first-level cache.
    float32: how float32 products are made, "fp16x3" or "ieee".
    """

    tile: int
    step: int
    warps: int
    stages: int
    small: dict[int, int]
    looped: int
    float32: str


TABLE = {
    torch.bfloat16: {
        "sm_80": Blocks(128, 32, 8, 3, {16: 1, 32: 1, 64: 4}, 64, "ieee"),
        "sm_90": Blocks(128, 64, 8, 3, {16: 1, 32: 1, 64: 4}, 64, "ieee"),
        "sm_100": Blocks(128, 64, 8, 3, {16: 1, 32: 1, 64: 4}, 64, "ieee"),
        "gfx942": Blocks(128, 32, 8, 2, {16: 1, 32: 2, 64: 4}, 64, "ieee"),
        "interpreter": Blocks(32, 32, 4, 1, {16: 1, 32: 1, 64: 1}, 64, "ieee"),
    },
    torch.float32: {
        "sm_80": Blocks(128, 32, 8, 3, {16: 1, 32: 4}, 64, "fp16x3"),
        "sm_90": Blocks(128, 32, 8, 3, {16: 1, 32: 4, 64: 4}, 64, "fp16x3"),
        "sm_100": Blocks(128, 32, 8, 3, {16: 1, 32: 4, 64: 4}, 64, "fp16x3"),
        "gfx942": Blocks(64, 32, 4, 2, {16: 1, 32: 4}, 32, "ieee"),
        "interpreter": Blocks(32, 32, 4, 1, {16: 1, 32: 1}, 32, "fp16x3"),
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
    x = torch.nn.functional.pad(x, (0, -cols % ALIGN, 0, -rows % ALIGN))
    for coefficients in steps:
        x = polynomial_step(x, coefficients)
    return x[..., :rows, :cols]


def small_polar(x: Tensor, steps: tuple[Step, ...]) -> Tensor:
    """Every step for every normalized matrix of x (batch, m, n) in one launch, a program a matrix.

    Up to the edge in the table a matrix stays in registers; above, in four scratch matrices of its own that fit the
    first-level cache.
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
    # A copy, for the kernel writes over its input.
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


def polynomial_step(x: Tensor, coefficients: Step) -> Tensor:
    """a X + X (b G + c G^2), G = X^T X, for contiguous (batch, m, n): two symmetric products and one full one."""
    a, b, c = coefficients
    g = symmetric_product(x, transposed=True)
    z = symmetric_product(g, transposed=False, add=g, alpha=c, beta=b)
    return product(x, z, beta=a)


def symmetric_product(
    x: Tensor, *, transposed: bool, add: Tensor | None = None, alpha: float = 1.0, beta: float = 0.0
) -> Tensor:
    """alpha X X^T + beta add (X^T X where `transposed`) for contiguous (batch, m, n); `add` is symmetric.

    Only the tiles on and below the diagonal are computed; those below are stored twice, once mirrored.
    """
    batch, rows, cols = x.shape
    size, depth = (cols, rows) if transposed else (rows, cols)
    out = torch.empty(batch, size, size, dtype=x.dtype, device=x.device)
    blocks = _triton.row(TABLE[x.dtype], x.device)
    tiles = triton.cdiv(size, blocks.tile)
    if batch:
        with _triton.on(x.device):
            _symmetric_product_fwd[(batch * (tiles * (tiles + 1) // 2),)](
                *(x, out if add is None else add, out, alpha, beta, size, depth, rows * cols),
                *((1, cols) if transposed else (cols, 1)),
                HAS_ADD=add is not None, FLOAT32=blocks.float32, TILE=blocks.tile, STEP=blocks.step,
                num_warps=blocks.warps, num_stages=blocks.stages, **_triton.LAUNCH,
            )  # fmt: skip
    return out


def product(x: Tensor, z: Tensor, *, beta: float) -> Tensor:
    """X Z + beta X for contiguous (batch, m, n) and symmetric (batch, n, n), rounded once."""
    batch, rows, cols = x.shape
    out = torch.empty_like(x)
    blocks = _triton.row(TABLE[x.dtype], x.device)
    tiles = triton.cdiv(rows, blocks.tile) * triton.cdiv(cols, blocks.tile)
    if batch:
        with _triton.on(x.device):
            _product_fwd[(batch * tiles,)](
                *(x, z, out, beta, rows, cols),
                FLOAT32=blocks.float32, TILE=blocks.tile, STEP=blocks.step,
                num_warps=blocks.warps, num_stages=blocks.stages, **_triton.LAUNCH,
            )  # fmt: skip
    return out


@functools.lru_cache(maxsize=64)
def _step_table(steps: tuple[Step, ...], device: torch.device) -> Tensor:
    """The coefficients on the device. Kept: a CUDA graph cannot capture a copy from the host."""
    return torch.tensor(steps, dtype=torch.float32).to(device)


def _edge(x: Tensor) -> int:
    return max(16, triton.next_power_of_2(max(x.shape[-2:])))


@triton.jit
def _dot(x, y, acc, FLOAT32: tl.constexpr):
    """acc + x y, or acc + UNIT x y for float32 by "fp16x3"; see `_unit`."""
    if x.dtype == tl.float32 and FLOAT32 == "fp16x3":
        x_high, x_low = _halves(x)
        y_high, y_low = _halves(y)
        acc = _exact_dot(x_low, y_high, acc)
        acc = _exact_dot(x_high, y_low, acc)
        return _exact_dot(x_high, y_high, acc)
    return _exact_dot(x, y, acc)


@triton.jit
def _exact_dot(x, y, acc):
    # The interpreter multiplies bfloat16 wrongly; products of 16 bits are exact in float32 anyway.
    if INTERPRET:
        return tl.dot(x.to(tl.float32), y.to(tl.float32), acc, input_precision="ieee")
    return tl.dot(x, y, acc, input_precision="ieee")


@triton.jit
def _halves(x):
    """x 2^10 as two float16: of 0.01, the size of an entry at d = 4096, the low one is no subnormal yet."""
    scaled = x * 1024.0
    high = scaled.to(tl.float16)
    return high, (scaled - high.to(tl.float32)).to(tl.float16)


@triton.jit
def _unit(dtype: tl.constexpr, FLOAT32: tl.constexpr):
    """What `_dot` multiplies products with."""
    return 1048576.0 if dtype == tl.float32 and FLOAT32 == "fp16x3" else 1.0


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
    # One program a matrix, whose four scratch matrices stay in its multiprocessor's cache; a barrier after each product
    # makes what the program's other threads wrote visible.
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


@triton.jit(do_not_specialize=["alpha", "beta"])
def _symmetric_product_fwd(
    p_x, p_add, p_out, alpha, beta, size, depth, matrix, stride_size, stride_depth,
    HAS_ADD: tl.constexpr, FLOAT32: tl.constexpr, TILE: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(size, TILE)
    triangle = tiles * (tiles + 1) // 2
    batch = (tl.program_id(0) // triangle).to(tl.int64)
    t = tl.program_id(0) % triangle
    # Tile t of the lower triangle, row by row; the root may be off by one, never by two, below 2^23 tiles.
    i = ((tl.sqrt(8.0 * t.to(tl.float32) + 1.0) - 1.0) * 0.5).to(tl.int32)
    i = tl.where(i * (i + 1) // 2 > t, i - 1, i)
    i = tl.where((i + 1) * (i + 2) // 2 <= t, i + 1, i)
    j = t - i * (i + 1) // 2
    o_i = i * TILE + tl.arange(0, TILE)
    o_j = j * TILE + tl.arange(0, TILE)
    o_k = tl.arange(0, STEP)
    p_x += batch * matrix
    p_i = p_x + o_i[:, None].to(tl.int64) * stride_size + o_k[None, :].to(tl.int64) * stride_depth  # [TILE, STEP]
    p_j = p_x + o_j[None, :].to(tl.int64) * stride_size + o_k[:, None].to(tl.int64) * stride_depth  # [STEP, TILE]
    acc = tl.zeros((TILE, TILE), dtype=tl.float32)
    for k in range(0, depth, STEP):
        left = depth - k
        b_i = tl.load(p_i, mask=(o_i[:, None] < size) & (o_k[None, :] < left), other=0.0)
        b_j = tl.load(p_j, mask=(o_j[None, :] < size) & (o_k[:, None] < left), other=0.0)
        acc = _dot(b_i, b_j, acc, FLOAT32)
        p_i += STEP * stride_depth
        p_j += STEP * stride_depth
    acc = acc * (alpha / _unit(p_x.dtype.element_ty, FLOAT32))
    if i == j:
        acc = 0.5 * (acc + tl.trans(acc))  # three products of halves do not come out the same in both triangles
    base = batch * size * size
    inside = (o_i[:, None] < size) & (o_j[None, :] < size)
    offsets = base + o_i[:, None].to(tl.int64) * size + o_j[None, :]
    if HAS_ADD:
        acc += beta * tl.load(p_add + offsets, mask=inside, other=0.0).to(tl.float32)
    out = cast(acc, p_out.dtype.element_ty)
    tl.store(p_out + offsets, out, mask=inside)
    if i != j:
        mirrored = base + o_j[:, None].to(tl.int64) * size + o_i[None, :]
        tl.store(p_out + mirrored, tl.trans(out), mask=(o_j[:, None] < size) & (o_i[None, :] < size))


@triton.jit(do_not_specialize=["beta"])
def _product_fwd(
    p_x, p_z, p_out, beta, rows, cols,
    FLOAT32: tl.constexpr, TILE: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    across = tl.cdiv(cols, TILE)
    tiles = tl.cdiv(rows, TILE) * across
    batch = (tl.program_id(0) // tiles).to(tl.int64)
    t = tl.program_id(0) % tiles
    o_m = (t // across) * TILE + tl.arange(0, TILE)
    o_n = (t % across) * TILE + tl.arange(0, TILE)
    o_k = tl.arange(0, STEP)
    p_x += batch * rows * cols
    p_a = p_x + o_m[:, None].to(tl.int64) * cols + o_k[None, :]  # [TILE, STEP]
    # Z is symmetric: column n of it is its row n, read along memory.
    p_b = p_z + batch * cols * cols + o_k[:, None].to(tl.int64) * cols + o_n[None, :]  # [STEP, TILE]
    acc = tl.zeros((TILE, TILE), dtype=tl.float32)
    for k in range(0, cols, STEP):
        left = cols - k
        b_a = tl.load(p_a, mask=(o_m[:, None] < rows) & (o_k[None, :] < left), other=0.0)
        b_b = tl.load(p_b, mask=(o_k[:, None] < left) & (o_n[None, :] < cols), other=0.0)
        acc = _dot(b_a, b_b, acc, FLOAT32)
        p_a += STEP
        p_b += STEP * cols
    inside = (o_m[:, None] < rows) & (o_n[None, :] < cols)
    offsets = o_m[:, None].to(tl.int64) * cols + o_n[None, :]
    acc = acc / _unit(p_x.dtype.element_ty, FLOAT32)
    acc += beta * tl.load(p_x + offsets, mask=inside, other=0.0).to(tl.float32)
    tl.store(p_out + batch * rows * cols + offsets, cast(acc, p_out.dtype.element_ty), mask=inside)
