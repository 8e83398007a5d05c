"""Device functions of the large products: tile order, the product of one tile, conversion to and from float32.

`HALVES` is `triton_products.Tiles.halves`: with "none" a plane holds the matrices as they are, otherwise there are two
planes, one of high and one of low halves.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mir_kernels._triton import INTERPRET, cast

UNIT = 1024.0  # the scale of halves: no entry of a step exceeds 32, so they fit float16's range
UNIT_IN_KERNELS = tl.constexpr(UNIT)


@triton.jit
def halves(x):
    """x 2^10 as a high and a low float16."""
    scaled = x * UNIT_IN_KERNELS
    high = scaled.to(tl.float16)
    return high, (scaled - high.to(tl.float32)).to(tl.float16)


@triton.jit
def exact_dot(x, y, acc):
    # The interpreter multiplies bfloat16 incorrectly; products of 16-bit values are exact in float32 anyway.
    if INTERPRET:
        out = tl.dot(x.to(tl.float32), y.to(tl.float32), acc, input_precision="ieee")
    else:
        out = tl.dot(x, y, acc, input_precision="ieee")
    return out


@triton.jit
def tile(t, down, across, BAND: tl.constexpr):
    """Tile t of down x across: bands of BAND rows from top to bottom, column by column within a band."""
    band = t // (BAND * across)
    height = tl.minimum(down - band * BAND, BAND)
    t -= band * BAND * across
    return band * BAND + t % height, t // height


@triton.jit
def tile_product(
    left, right, first_left, first_right, plane_left, plane_right, m, n, depth, cols_left, cols_right,
    LEFT_DEPTH_FIRST: tl.constexpr, RIGHT_DEPTH_FIRST: tl.constexpr, HALVES: tl.constexpr, DESCRIPTORS: tl.constexpr,
    TILE_M: tl.constexpr, TILE_N: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """sum_k left (m, k) right (k, n) of one pair of matrices, [TILE_M, TILE_N] in float32.

    first: the row, over all planes, at which a matrix starts; plane: the rows of one plane. A tile that extends past
    the edge of its matrix reads rows of the next one, whose products are not stored.
    """
    acc = tl.zeros((TILE_M, TILE_N), dtype=tl.float32)
    parts: tl.constexpr = 1 if HALVES == "none" else 2
    of_left = (left, m, parts * plane_left, cols_left)
    of_right = (right, n, parts * plane_right, cols_right)
    low_left, low_right = first_left + plane_left, first_right + plane_right
    if HALVES == "none":
        for k in range(0, depth, STEP):
            a = _operand(of_left, first_left, k, False, LEFT_DEPTH_FIRST, DESCRIPTORS, TILE_M, STEP)
            b = _operand(of_right, first_right, k, True, RIGHT_DEPTH_FIRST, DESCRIPTORS, TILE_N, STEP)
            acc = exact_dot(a, b, acc)
    elif HALVES == "in turn":
        for part in range(3):  # low high, high low, high high: the small products first
            from_left = tl.where(part == 0, low_left, first_left)
            from_right = tl.where(part == 1, low_right, first_right)
            for k in range(0, depth, STEP):
                a = _operand(of_left, from_left, k, False, LEFT_DEPTH_FIRST, DESCRIPTORS, TILE_M, STEP)
                b = _operand(of_right, from_right, k, True, RIGHT_DEPTH_FIRST, DESCRIPTORS, TILE_N, STEP)
                acc = exact_dot(a, b, acc)
    else:
        first = tl.zeros((TILE_M, TILE_N), dtype=tl.float32)
        second = tl.zeros((TILE_M, TILE_N), dtype=tl.float32)
        for k in range(0, depth, STEP):
            high_a = _operand(of_left, first_left, k, False, LEFT_DEPTH_FIRST, DESCRIPTORS, TILE_M, STEP)
            high_b = _operand(of_right, first_right, k, True, RIGHT_DEPTH_FIRST, DESCRIPTORS, TILE_N, STEP)
            low_a = _operand(of_left, low_left, k, False, LEFT_DEPTH_FIRST, DESCRIPTORS, TILE_M, STEP)
            low_b = _operand(of_right, low_right, k, True, RIGHT_DEPTH_FIRST, DESCRIPTORS, TILE_N, STEP)
            if HALVES == "together":  # separate accumulators let every product run ahead of the loop
                first = exact_dot(low_a, high_b, first)
                second = exact_dot(high_a, low_b, second)
                acc = exact_dot(high_a, high_b, acc)
            else:
                acc = exact_dot(low_a, high_b, acc)
                acc = exact_dot(high_a, low_b, acc)
                acc = exact_dot(high_a, high_b, acc)
        acc += first
        acc += second
    if HALVES != "none":
        acc /= UNIT_IN_KERNELS * UNIT_IN_KERNELS
    return acc


@triton.jit
def _operand(
    source, first, k, RIGHT: tl.constexpr, DEPTH_FIRST: tl.constexpr, DESCRIPTORS: tl.constexpr,
    WIDTH: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """[WIDTH, STEP] of the left operand, [STEP, WIDTH] of the right; DEPTH_FIRST: depth is the row of its matrix."""
    p, at, last, cols = source
    if DESCRIPTORS:
        found = p.load([first + k, at]) if DEPTH_FIRST else p.load([first + at, k])
        found = found if DEPTH_FIRST == RIGHT else tl.trans(found)
    else:  # loaded in its final shape: a transposed tile would not be prefetched on sm_80
        o_w = at + tl.arange(0, WIDTH)
        o_k = k + tl.arange(0, STEP)
        o_w = o_w[None, :] if RIGHT else o_w[:, None]
        o_k = o_k[:, None] if RIGHT else o_k[None, :]
        found = _gather(p, first, o_k if DEPTH_FIRST else o_w, o_w if DEPTH_FIRST else o_k, last, cols)
    return found


@triton.jit
def _gather(p, first, row, column, last, cols):
    """Elements of planes with `last` rows and `cols` columns in total, from row `first` on; zero outside."""
    inside = (first + row < last) & (column < cols)
    return tl.load(p + (first + row).to(tl.int64) * cols + column, mask=inside, other=0.0)


@triton.jit
def load(p, plane, inside, HALVES: tl.constexpr):
    """Load a tile as float32."""
    x = tl.load(p, mask=inside, other=0.0).to(tl.float32)
    if HALVES != "none":
        x = (x + tl.load(p + plane, mask=inside, other=0.0).to(tl.float32)) / UNIT_IN_KERNELS
    return x


@triton.jit
def store(p, plane, x, inside, MIRRORED: tl.constexpr, HALVES: tl.constexpr):
    """Store a float32 tile, transposed where MIRRORED."""
    if HALVES == "none":
        out = cast(x, p.dtype.element_ty)
        tl.store(p, tl.trans(out) if MIRRORED else out, mask=inside)
    else:
        high, low = halves(x)
        tl.store(p, tl.trans(high) if MIRRORED else high, mask=inside)
        tl.store(p + plane, tl.trans(low) if MIRRORED else low, mask=inside)
