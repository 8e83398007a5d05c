"""Triton kernels: token norms, and the block update of the second moment in its packed triangle."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from mir_kernels import _triton
from mir_kernels._triton import INTERPRET, cast, column_quarters, triangle
from mir_kernels.ops.moments.packed import PANEL

NORM_BLOCK = 4096  # elements per program of the norms: 32 per thread
CHUNK = 256  # rows summed in the tensor cores before their sum is added to the tile's total, rounded to nearest
SHIFT_ABOVE = 4.0  # columns whose mean is more than this many deviations from zero are shifted
SPLIT_ROWS = 32  # rows per program of _split_fwd
SAMPLE = 512  # rows sampled to estimate the deviations


class Blocks(NamedTuple):
    """Tile edge (divides GRAIN and PANEL), rows per step, warps, stages."""

    tile: int
    step: int
    warps: int
    stages: int


TABLE = {
    "sm_80": Blocks(128, 32, 8, 3),
    "sm_90": Blocks(128, 64, 8, 3),
    "sm_100": Blocks(128, 64, 8, 3),
    "gfx942": Blocks(128, 32, 8, 2),
    "interpreter": Blocks(32, 32, 4, 1),
}
GRAIN = 128  # columns that are shifted together or not at all; a multiple of every tile edge


def token_norms(x: Tensor) -> Tensor:
    """l2 norms of the contiguous rows of x `(rows, d)`, as float32 `(rows,)`."""
    rows, d = x.shape
    out = torch.empty(rows, dtype=torch.float32, device=x.device)
    if rows == 0:
        return out
    block = min(triton.next_power_of_2(d), NORM_BLOCK)
    height = NORM_BLOCK // block
    with _triton.on(x.device):
        _token_norms_fwd[(triton.cdiv(rows, height),)](
            x,
            out,
            rows,
            x.stride(0),
            d,
            HEIGHT=height,
            BLOCK=block,
            ONE_BLOCK=d <= block,
            num_warps=4,
            **_triton.LAUNCH,
        )
    return out


def accumulate(
    second: Tensor, x: Tensor, mask: Tensor | None, centre: Tensor, vectors: Tensor, weights: Tensor, precision: str
) -> tuple[Tensor, Tensor]:
    """The block update of `eager.accumulate` for precision "fast" and "auto", one program per lower tile.

    16-bit columns with a moderate mean are multiplied unshifted: their products are exact in float32. Tiles that
    contain a column with a mean of more than SHIFT_ABOVE deviations use differences from a shift that the dtype can
    represent, split into a high part and a remainder; the differences are exact except for outliers. float32 is always
    shifted, scaled by a power of two per column, and split into two float16: 22 bits, or 11 (the high part) for "fast".
    """
    if x.dtype == torch.float64:
        raise TypeError("x: expected float32, bfloat16 or float16 for the Triton product, got float64")
    if x.stride(1) != 1:
        x = x.contiguous()
    shift = _shift(x, mask, centre, precision)
    grains = torch.nn.functional.pad(shift != 0, (0, -x.shape[1] % GRAIN)).view(-1, GRAIN).any(1).to(torch.uint8)
    sums = torch.zeros(x.shape[1], dtype=torch.float64, device=x.device)
    for_all = (second, grains, vectors, weights, sums)
    if x.dtype == torch.float32:
        scale = _scale_to_float16(x, mask, shift)
        planes = _split(x, mask, shift, scale, torch.ones_like(grains[:1]))
        _launch(planes, None, 1 / scale.double(), for_all, first_part=3 if precision == "fast" else 1, every_tile=True)
        return shift.double(), sums
    # Both launches cover all tiles and each skips the other's, because only the device knows which are shifted.
    _launch(x, mask, None, for_all, first_part=None, every_tile=precision == "fast")
    if precision != "fast":
        planes = _split(x, mask, shift, None, grains.amax())
        # The remainder is not small if a difference exceeds the range of float16.
        _launch(planes, None, None, for_all, first_part=0 if x.dtype == torch.float16 else 1, every_tile=False)
    return shift.double(), sums


def _scale_to_float16(x: Tensor, mask: Tensor | None, shift: Tensor) -> Tensor:
    """(d,) powers of two that scale the largest difference of each float32 column to between 2^14 and 2^15."""
    away = (x - shift).abs()
    largest = (away if mask is None else away.masked_fill_(~mask[:, None], 0.0)).amax(0)
    exponent = torch.frexp(largest).exponent
    scale = torch.ldexp(torch.ones_like(largest), (15 - exponent).clamp(-126, 126).masked_fill(largest == 0, 0))
    # The high part is clamped and would hide infinity from "fast", which uses nothing else: NaN scale if not finite.
    return scale.masked_fill(~largest.isfinite(), float("nan"))


def _split(x: Tensor, mask: Tensor | None, shift: Tensor, scale: Tensor | None, wanted: Tensor) -> Tensor:
    """(x - shift) * scale as a 16-bit high part and remainder, (2, rows, d); zero in rows outside the mask.

    Computed once for all tiles, which would otherwise split the same columns repeatedly. Writes nothing if `wanted` is
    0.
    """
    rows, d = x.shape
    dtype = torch.float16 if x.dtype == torch.float32 else x.dtype
    planes = torch.empty(2, rows, d + -d % 8, dtype=dtype, device=x.device)  # aligns rows to 16 bytes
    if rows:
        with _triton.on(x.device):
            _split_fwd[(triton.cdiv(rows, SPLIT_ROWS), triton.cdiv(d, GRAIN))](
                *(x, x if mask is None else mask.view(torch.uint8), shift, shift if scale is None else scale),
                *(wanted, planes, rows, x.stride(0), planes.stride(1), d),
                HAS_MASK=mask is not None, HAS_SCALE=scale is not None,
                ROWS=SPLIT_ROWS, COLUMNS=GRAIN, num_warps=4, **_triton.LAUNCH,
            )  # fmt: skip
    return planes[:, :, :d]


def _launch(
    x: Tensor,
    mask: Tensor | None,
    unit: Tensor | None,
    for_all: tuple[Tensor, ...],
    first_part: int | None,
    every_tile: bool,
) -> None:
    """Add the products of x (rows, d), or from `first_part` on of the planes x (2, rows, d) in units of `unit` (d,)."""
    second, grains, vectors, weights, sums = for_all
    rows, d = x.shape[-2:]
    blocks = _triton.row(TABLE, x.device)
    tiles = triton.cdiv(d, blocks.tile)
    with _triton.on(x.device):
        _accumulate_fwd[(tiles * (tiles + 1) // 2,)](
            *(second, x, x if mask is None else mask.view(torch.uint8), sums if unit is None else unit),
            *(grains, vectors, weights, sums, rows, x.stride(-2), d),
            HAS_MASK=mask is not None,
            HAS_UNIT=unit is not None,
            FIRST_PART=-1 if first_part is None else first_part,
            EVERY_TILE=every_tile,
            PANEL=PANEL,
            GRAIN=GRAIN,
            TILE=blocks.tile,
            STEP=blocks.step,
            CHUNK=CHUNK,
            num_warps=blocks.warps,
            num_stages=blocks.stages,
            **_triton.LAUNCH,
        )


def _shift(x: Tensor, mask: Tensor | None, centre: Tensor, precision: str) -> Tensor:
    """The shift (d,) as float32, representable in x's dtype; zero for columns that are not shifted."""
    if precision == "fast":
        return torch.zeros_like(centre, dtype=torch.float32)
    shift = centre.to(x.dtype).float()
    if x.dtype == torch.float32:
        return shift
    step = -(-x.shape[0] // SAMPLE)
    away = x[::step].float() - shift
    if mask is not None:
        away = torch.where(mask[::step, None], away, 0.0)
    rows = away.shape[0] if mask is None else mask[::step].sum().clamp(min=1)
    deviation = (away.square().sum(0) / rows).sqrt()
    return torch.where(shift.abs() > SHIFT_ABOVE * deviation, shift, 0.0)


@triton.jit(do_not_specialize=["rows"])
def _token_norms_fwd(
    x, out, rows, x_stride, d, HEIGHT: tl.constexpr, BLOCK: tl.constexpr, ONE_BLOCK: tl.constexpr
):  # fmt: skip
    """One program computes the norms of HEIGHT rows, scaled by a power of two per row to keep squares in range."""
    row = tl.program_id(0).to(tl.int64) * HEIGHT + tl.arange(0, HEIGHT)  # [HEIGHT]
    m_row = row < rows
    column = tl.arange(0, BLOCK)  # [BLOCK]
    p_row = x + row[:, None] * x_stride
    wide: tl.constexpr = x.dtype.element_ty == tl.float64
    kind: tl.constexpr = tl.float64 if wide else tl.float32
    if ONE_BLOCK:
        b_x = tl.load(p_row + column[None, :], mask=m_row[:, None] & (column < d)[None, :], other=0.0).to(kind)
        scale, back = _scale(tl.max(tl.abs(b_x), axis=1), wide)
        scaled = b_x * scale[:, None]
        squares = tl.sum(scaled * scaled, axis=1)
    else:
        largest = tl.zeros([HEIGHT, BLOCK], dtype=kind)
        for start in range(0, d, BLOCK):
            m_x = m_row[:, None] & (start + column < d)[None, :]
            largest = tl.maximum(
                largest, tl.abs(tl.load(p_row + start + column[None, :], mask=m_x, other=0.0).to(kind))
            )
        scale, back = _scale(tl.max(largest, axis=1), wide)
        partial = tl.zeros([HEIGHT, BLOCK], dtype=kind)
        for start in range(0, d, BLOCK):
            m_x = m_row[:, None] & (start + column < d)[None, :]
            scaled = tl.load(p_row + start + column[None, :], mask=m_x, other=0.0).to(kind) * scale[:, None]
            partial += scaled * scaled
        squares = tl.sum(partial, axis=1)
    tl.store(out + row, (tl.sqrt(squares) * back).to(tl.float32), mask=m_row)


@triton.jit
def _scale(largest, WIDE: tl.constexpr):
    """The power of two that scales the normal number `largest` to between 1 and 4, and its inverse; 1 for float64."""
    if WIDE:
        scale = tl.full(largest.shape, 1.0, tl.float64)
        back = scale
    else:
        exponent = tl.minimum(tl.maximum(largest.to(tl.uint32, bitcast=True) >> 23, 1), 253)
        scale = ((254 - exponent) << 23).to(tl.float32, bitcast=True)
        back = (exponent << 23).to(tl.float32, bitcast=True)
    return scale, back


@triton.jit(do_not_specialize=["rows"])
def _accumulate_fwd(
    second, x, mask, unit, grains, vectors, weights, sums, rows, x_stride, d,
    HAS_MASK: tl.constexpr, HAS_UNIT: tl.constexpr, FIRST_PART: tl.constexpr, EVERY_TILE: tl.constexpr,
    PANEL: tl.constexpr, GRAIN: tl.constexpr, TILE: tl.constexpr, STEP: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """One program per lower tile (i, j): its product over all rows, then one pass over its float64 entries.

    second: packed triangle. x: the tokens, or planes of `_split` if FIRST_PART >= 0, with columns in units of unit
    (d,). grains: whether each group of GRAIN columns is shifted; tiles of the other kind are skipped unless EVERY_TILE.
    vectors (2, d), weights (2,): outer products to add. sums: (d,), written by the diagonal tiles.
    """
    i, j = triangle(tl.program_id(0))
    if not EVERY_TILE:
        touched = tl.load(grains + i * TILE // GRAIN).to(tl.int32) | tl.load(grains + j * TILE // GRAIN).to(tl.int32)
        if (touched != 0) != (FIRST_PART >= 0):
            return
    column_i = i * TILE + tl.arange(0, TILE)  # [TILE]
    column_j = j * TILE + tl.arange(0, TILE)  # [TILE]
    b_total = tl.zeros([TILE, TILE], dtype=tl.float32)
    b_sums = tl.zeros([TILE], dtype=tl.float32)
    for_tile = (mask, rows, x_stride, column_i, column_j, column_i < d, column_j < d)
    if FIRST_PART < 0:
        b_total, b_sums = _products(x, x, for_tile, i == j, b_total, b_sums, HAS_MASK, TILE, STEP, CHUNK)
    else:
        # low low, low high, high low, high high: small products first. In sequence, so that a tile needs only one
        # accumulator in addition to its total.
        plane = rows.to(tl.int64) * x_stride
        for part in range(FIRST_PART, 4):
            left = x + tl.where(part < 2, plane, 0)
            right = x + tl.where(part % 2 == 0, plane, 0)
            summed = (i == j) & (part % 2 == 1)  # sums each plane once
            b_total, b_sums = _products(left, right, for_tile, summed, b_total, b_sums, False, TILE, STEP, CHUNK)
    if i == j:
        b_column = b_sums.to(tl.float64)
        if HAS_UNIT:
            b_column *= tl.load(unit + column_i, mask=column_i < d, other=0.0)
        tl.store(sums + column_i, b_column, mask=column_i < d)
    # In quarters of the columns, because a whole tile in float64 would fill all registers.
    first, second_quarter, third, fourth = column_quarters(b_total, TILE, TILE)
    quarter: tl.constexpr = TILE // 4
    for_all = (second, unit, vectors, weights, i, j, d)
    _add_to_second(first, for_all, 0, HAS_UNIT, PANEL, TILE, quarter)
    _add_to_second(second_quarter, for_all, quarter, HAS_UNIT, PANEL, TILE, quarter)
    _add_to_second(third, for_all, 2 * quarter, HAS_UNIT, PANEL, TILE, quarter)
    _add_to_second(fourth, for_all, 3 * quarter, HAS_UNIT, PANEL, TILE, quarter)


@triton.jit
def _add_to_second(
    b, for_all, skip, HAS_UNIT: tl.constexpr, PANEL: tl.constexpr, TILE: tl.constexpr, WIDTH: tl.constexpr
):
    """Add b [TILE, WIDTH] and the deferred outer products to the packed triangle, `skip` columns into tile (i, j)."""
    second, unit, vectors, weights, i, j, d = for_all
    row = i * TILE + tl.arange(0, TILE)  # [TILE]
    column = j * TILE + skip + tl.arange(0, WIDTH)  # [WIDTH]
    m_row, m_column = row < d, column < d
    panel = i * TILE // PANEL
    before = panel.to(tl.int64) * (panel + 1) // 2 * (PANEL * PANEL)
    stride = tl.minimum((panel + 1) * PANEL, d)
    p_second = second + before + (row - panel * PANEL).to(tl.int64)[:, None] * stride + column[None, :]
    m_second = m_row[:, None] & m_column[None, :]
    b_product = b.to(tl.float64)  # [TILE, WIDTH]
    if HAS_UNIT:
        b_product *= tl.load(unit + row, mask=m_row, other=0.0)[:, None]
        b_product *= tl.load(unit + column, mask=m_column, other=0.0)[None, :]
    b_second = tl.load(p_second, mask=m_second, other=0.0) + b_product
    for r in tl.static_range(2):
        left = tl.load(vectors + r * d + row, mask=m_row, other=0.0) * tl.load(weights + r)
        b_second += left[:, None] * tl.load(vectors + r * d + column, mask=m_column, other=0.0)[None, :]
    tl.store(p_second, b_second, mask=m_second)


@triton.jit
def _products(
    left, right, for_tile, summed, b_total, b_sums,
    HAS_MASK: tl.constexpr, TILE: tl.constexpr, STEP: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """b_total + left_i^T right_j [TILE, TILE] and, where summed, b_sums + the sums of left_i [TILE], in float32."""
    mask, rows, x_stride, column_i, column_j, m_i, m_j = for_tile
    b_chunk = tl.zeros([TILE, TILE], dtype=tl.float32)
    b_column = tl.zeros([TILE], dtype=tl.float32)
    p_row = tl.arange(0, STEP).to(tl.int64)[:, None] * x_stride
    step = tl.full((), STEP, tl.int64) * x_stride
    p_i = left + p_row + column_i[None, :]  # [STEP, TILE]
    p_j = right + p_row + column_j[None, :]  # [STEP, TILE]
    # One loop over all steps, not one per chunk, so that the next chunk is loaded while this one is added.
    for start in range(0, rows, STEP):
        row = start + tl.arange(0, STEP)  # [STEP]
        m_row = row < rows
        if HAS_MASK:
            m_row = m_row & (tl.load(mask + row, mask=m_row, other=0) != 0)
        b_i = tl.load(p_i, mask=m_row[:, None] & m_i[None, :], other=0.0)  # [STEP, TILE]
        b_j = tl.load(p_j, mask=m_row[:, None] & m_j[None, :], other=0.0)  # [STEP, TILE]
        p_i += step
        p_j += step
        b_chunk = _dot(b_i, b_j, b_chunk)
        if summed:
            b_column += tl.sum(b_i.to(tl.float32), axis=0)
        if (start + STEP) % CHUNK == 0:
            b_total += b_chunk
            b_sums += b_column
            b_chunk = tl.zeros([TILE, TILE], dtype=tl.float32)
            b_column = tl.zeros([TILE], dtype=tl.float32)
    return b_total + b_chunk, b_sums + b_column


@triton.jit(do_not_specialize=["rows"])
def _split_fwd(
    x, mask, shift, scale, wanted, planes, rows, x_stride, plane_stride, d,
    HAS_MASK: tl.constexpr, HAS_SCALE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    if tl.load(wanted) == 0:
        return
    kind: tl.constexpr = planes.dtype.element_ty
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    m_row, m_column = row < rows, column < d
    inside = m_row[:, None] & m_column[None, :]
    counted = m_row
    if HAS_MASK:
        counted = m_row & (tl.load(mask + row, mask=m_row, other=0) != 0)
    b = tl.load(x + row[:, None] * x_stride + column[None, :], mask=counted[:, None] & m_column[None, :], other=0.0)
    away = b.to(tl.float32) - tl.load(shift + column, mask=m_column, other=0.0)[None, :]
    if HAS_SCALE:
        away *= tl.load(scale + column, mask=m_column, other=0.0)[None, :]
    away = tl.where(counted[:, None], away, 0.0)  # [ROWS, COLUMNS]
    high = _high(away, kind)
    p_high = planes + row[:, None] * plane_stride + column[None, :]
    tl.store(p_high, high, mask=inside)
    tl.store(p_high + rows.to(tl.int64) * plane_stride, cast(away - high.to(tl.float32), kind), mask=inside)


@triton.jit
def _high(b, dtype: tl.constexpr):
    """b in dtype, clamped to its finite range if float16."""
    if dtype == tl.float16:
        b = tl.clamp(b, -65504.0, 65504.0)
    return cast(b, dtype)


@triton.jit
def _dot(a, b, acc):
    """a^T b + acc. The interpreter multiplies bfloat16 incorrectly, so it uses float32, whose products are equal."""
    if INTERPRET:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(tl.trans(a), b, acc, input_precision="ieee", out_dtype=tl.float32)
