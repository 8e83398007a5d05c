"""The square root kernels compiled ahead of time as `polar` launches them: no spills, wide accesses, 64-bit offsets."""

import re

import pytest
import torch

pytest.importorskip("triton")

import aot
from mir_kernels.ops.sqrtm import eager
from mir_kernels.ops.sqrtm import triton as kernels
from mir_kernels.ops.sqrtm import triton_products as products

STEPS = ((3.2, -2.4, 0.5),) * 6
CASES = [
    *((torch.bfloat16, d) for d in (32, 64, 128, 256, 1024)),
    *((torch.float32, d) for d in (32, 64, 256, 1024)),
]


HALF = [(torch.float16, d) for d in (32, 64, 128, 1024)]


def launches(d, dtype, target, batch=4):
    """The launches of one polar factor: one kernel up to SMALL, above it the three products of each step."""
    x = torch.empty(batch, d, d, dtype=dtype, device="meta")
    if d <= kernels.SMALL:
        return aot.record(kernels.small_polar, x, STEPS, target=target)
    row = (products.TABLE if d >= products.LARGE else products.TABLE_BELOW)[dtype][target]
    return aot.record(products.polynomial_step, products.split(x, row), STEPS[0], row, target=target)


@pytest.mark.parametrize("target", aot.TARGETS)
@pytest.mark.parametrize(("dtype", "d"), CASES + HALF, ids=lambda v: str(v).removeprefix("torch."))
def test_no_kernel_spills_and_memory_moves_in_wide_accesses(dtype, d, target):
    for launch in launches(d, dtype, target):
        binary = aot.compile_launch(target, launch)
        assert binary.spills <= aot.SPILLS, (
            f"{launch.kernel.__name__}: {binary.spills} bytes, {binary.registers} registers"
        )
        assert max(binary.stores) >= 8
        if target == "sm_90" and d in (64, 128, 256, 1024) and (dtype != torch.float32 or d >= 256):
            assert "wgmma" in binary.asm


def test_a_batch_of_small_matrices_is_one_launch_and_of_large_ones_three_a_step():
    for d in (8, 64, 100, 128):
        assert len(launches(d, torch.bfloat16, "sm_90", batch=512)) == 1
    recorded = launches(256, torch.bfloat16, "sm_90", batch=256)
    assert [launch.kernel.__name__ for launch in recorded] == [
        "_symmetric_product_fwd",
        "_symmetric_product_fwd",
        "_product_fwd",
    ]


@pytest.mark.parametrize(("d", "each_step"), [(64, 0), (128, 0), (129, 3), (256, 3), (1024, 3)])
@pytest.mark.parametrize("precision", ["bfloat16", "float32"])
def test_launches_of_a_polar_factor_do_not_depend_on_the_batch(d, each_step, precision):
    """The iteration of 256 matrices needs as many launches as that of one matrix."""
    steps = len(eager.steps_for(precision))
    for batch in (1, 256):
        m = torch.empty(batch, d, d, device="meta")
        assert len(aot.record(kernels.polar, m, precision, target="sm_90")) == max(1, each_step * steps)


def test_symmetric_products_launch_half_the_tiles():
    tiles = products.TABLE[torch.bfloat16]["sm_90"]
    symmetric, _, full = launches(8 * tiles.columns, torch.bfloat16, "sm_90", batch=3)
    below = tiles.columns // tiles.rows
    assert symmetric.grid == (3 * 36 * below,)
    assert full.grid == (3 * 64 * below,)


@pytest.mark.parametrize("d", [32, 128, 1024])
def test_batch_offsets_are_64_bits_wide(d):
    """With (320, 2560, 3072) the product of batch index and matrix size overflows 32 bits and must use 64."""
    for launch in launches(d, torch.bfloat16, "sm_80"):
        ir = aot.compile_launch("sm_80", launch).ttir
        narrow = re.findall(r"tt\.addptr %p_\w+, %\w+ : !tt\.ptr<\w+>, (i\d+)", ir)
        scalar = [width for width in narrow if width == "i32"]
        pid_products = re.findall(r"arith\.muli %(\w+), %\w+(?: [^:]*)?: (i\d+)", ir)
        assert any(width == "i64" for _, width in pid_products)
        if d != 128:
            assert "i64" in ir
        assert len(scalar) <= 3, "only the step table is addressed with 32 bits"
