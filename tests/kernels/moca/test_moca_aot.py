"""MoCa's Triton kernels, compiled ahead of time with the options of their launchers: no spills, 16-byte accesses."""

import pytest
import torch

pytest.importorskip("triton")

import aot
from mir_kernels.ops.moca import triton as kernels

KERNELS = ("forward", "backward", "add_rms_forward", "add_rms_backward", "row_dot", "column_sum")


def launches(d, dtype, target, *, rows=16384, mask_dtype=torch.bool):
    """The last launch of each kernel, by name, from the four launchers on (rows, d) of `dtype`."""

    def empty(*shape, dtype=dtype):
        return torch.empty(shape, dtype=dtype, device="meta")

    wide = kernels.accumulator(empty(1))
    x, mask, rstd = empty(rows, d), empty(rows, dtype=mask_dtype), empty(rows, dtype=wide)
    scale = empty(d, dtype=wide)
    calls = (
        (kernels.forward, x, scale, scale, mask, x),
        (kernels.backward, x, x, scale, mask, x),
        (kernels.add_rms_forward, x, x, scale, scale, mask, scale, 1e-6, x, x, rstd),
        (kernels.add_rms_backward, x, x, x, x, x, scale, mask, scale, rstd, x),
    )
    found = [launch for call in calls for launch in aot.record(*call, target=target)]
    return {launch.kernel.__name__.removesuffix("_kernel"): launch for launch in found}


def compiled(name, d, dtype, target, **constexprs):
    return aot.compile_launch(target, launches(d, dtype, target)[name], **constexprs)


@pytest.mark.parametrize("target", aot.TARGETS)
@pytest.mark.parametrize("name", KERNELS)
def test_no_kernel_spills_and_rows_move_in_16_byte_accesses(name, target):
    # 8200 is only a multiple of 8, and wider than the whole rows of the fused backward on every target.
    for d in (4096, 8200):
        if name not in (of_d := launches(d, torch.bfloat16, target)):
            continue
        binary = aot.compile_launch(target, of_d[name])
        assert binary.spills == 0, f"d = {d}: {binary.spills} bytes of spills with {binary.registers} registers"
        moved = (*binary.loads, *binary.stores)
        assert 2 not in moved, f"d = {d}: bf16 rows move in scalars, {moved}"
        if name != "column_sum" or d == 4096:
            assert 16 in moved, f"d = {d}: {moved}"


@pytest.mark.parametrize(
    ("dtype", "d"), [(torch.float16, 576), (torch.float32, 4096), (torch.float64, 4096)], ids=["f16", "f32", "f64"]
)
def test_no_kernel_spills_in_other_dtypes_and_widths(dtype, d):
    for name, launch in launches(d, dtype, "sm_90").items():
        binary = aot.compile_launch("sm_90", launch)
        assert binary.spills == 0, f"{name}: {binary.spills} bytes, {binary.registers} registers"


REGISTERS = {"gfx942": 131072}  # per multiprocessor: 65536 on NVIDIA; on AMD four units of 512 for 64 lanes


@pytest.mark.parametrize("target", aot.TARGETS)
@pytest.mark.parametrize("d", [576, 1024, 2048, 4096, 8200])
def test_backward_programs_are_as_many_as_run_at_once(target, d):
    for name, launch in launches(d, torch.bfloat16, target).items():
        if name not in ("backward", "add_rms_backward"):
            continue
        blocks, warps = kernels.TABLE[target], launch.keywords["num_warps"]
        registers = -(-aot.compile_launch(target, launch).registers // 8) * 8 * warps * blocks.lanes
        fit = blocks.processors * (REGISTERS.get(target, 65536) // registers)
        programs = launch.grid[0] * launch.grid[1]
        assert programs <= fit, f"{name}: {programs} programs, {fit} fit"
        assert programs + launch.grid[1] > fit / 2, f"{name}: {programs} programs, where {fit} fit"


@pytest.mark.parametrize("target", aot.TARGETS)
def test_a_backward_of_kept_rows_fits_and_moves_as_the_other(target):
    x, scale, mask, x_rows = (
        torch.empty(shape, dtype=dtype, device="meta")
        for shape, dtype in (
            *(((16384, 4096), torch.bfloat16), (4096, torch.float32)),
            *((16384, torch.bool), (16384, torch.int64)),
        )
    )
    launch = aot.record(kernels.backward, x, x, scale, mask, x, x_rows, target=target)[0]
    binary = aot.compile_launch(target, launch)
    assert (binary.spills, 2 in binary.loads, 16 in binary.loads) == (0, False, True)
    assert binary.registers <= 128


def test_forward_multiplies_and_adds_with_one_rounding():
    binary = compiled("forward", 4096, torch.bfloat16, "sm_90", IN_PLACE=False)
    assert "fma.rn.f32" in binary.asm
    assert "mul.f32" not in binary.asm
    assert "mul.rn.f32" not in binary.asm


def test_a_new_token_count_or_mask_compiles_nothing():
    def key(launch):
        fixed = {p.name for p in launch.kernel.params if p.do_not_specialize}
        values = dict(zip(launch.kernel.arg_names, launch.arguments, strict=False))
        runtime = {n: (v == 1, v % 16) for n, v in values.items() if isinstance(v, int) and n not in fixed}
        return runtime, launch.keywords

    for d in (1, 7, 576, 4096, 8200):
        base = {name: key(launch) for name, launch in launches(d, torch.bfloat16, "sm_90").items()}
        for rows in (1, 2, 15, 16, 577, 1 << 20):
            assert {n: key(v) for n, v in launches(d, torch.bfloat16, "sm_90", rows=rows).items()} == base


def test_one_wide_and_odd_rows_compile():
    # On AMD, Triton 3.6 spills a few registers for rows that do not allow wide accesses; 3.9 spills none.
    for d, target, spills in ((1, "sm_80", 0), (7, "sm_90", 0), (7, "gfx942", 64)):
        for launch in launches(d, torch.bfloat16, target).values():
            assert aot.compile_launch(target, launch).spills <= spills
