"""The Triton kernels of the moments, compiled ahead of time as launched: tensor cores, no spills, wide accesses."""

import re

import numpy
import pytest
import torch

pytest.importorskip("triton")

import aot
from mir_kernels.ops.moments import packed, streaming
from mir_kernels.ops.moments import triton as kernels

TENSOR_CORE = {"sm_80": "mma.sync.aligned", "sm_90": "wgmma.mma_async", "sm_100": "tcgen05.mma", "gfx942": "v_mfma_f32"}


def empty(*shape, dtype):
    return torch.empty(shape, dtype=dtype, device="meta")


def products(target, dtype, d=4096, rows=4096, precision="auto", masked=True):
    """The launches of one block update on (rows, d)."""
    second, centre = empty(packed.entries(d), dtype=torch.float64), empty(d, dtype=torch.float64)
    vectors, weights = empty(2, d, dtype=torch.float64), empty(2, dtype=torch.float64)
    x, mask = empty(rows, d, dtype=dtype), empty(rows, dtype=torch.bool) if masked else None
    return aot.record(kernels.accumulate, second, x, mask, centre, vectors, weights, precision, target=target)


def norms(target, dtype, d=4096, rows=4096):
    (launch,) = aot.record(kernels.token_norms, empty(rows, d, dtype=dtype), target=target)
    return launch


@pytest.mark.parametrize(
    ("target", "dtype"),
    [
        *((target, torch.bfloat16) for target in aot.TARGETS),
        ("sm_90", torch.float16),
        *((target, torch.float32) for target in ("sm_80", "sm_90")),
        *(pytest.param(t, torch.float16, marks=pytest.mark.slow) for t in ("sm_80", "sm_100", "gfx942")),
        *(pytest.param(t, torch.float32, marks=pytest.mark.slow) for t in ("sm_100", "gfx942")),
    ],
    ids=str,
)
def test_products_run_on_tensor_cores_without_spills(target, dtype):
    launches = products(target, dtype)
    parts = [launch.keywords.get("FIRST_PART") for launch in launches]
    split = [None, 0 if dtype == torch.float16 else 1]
    assert parts == (split if dtype == torch.float32 else [-1, *split])
    for launch in launches:
        binary = aot.compile_launch(target, launch)
        if launch.kernel is kernels._split_fwd:
            assert (binary.spills, set(binary.stores)) == (0, {16})
            continue
        assert TENSOR_CORE[target] in binary.asm
        assert binary.spills <= aot.SPILLS, f"{binary.spills} bytes of spills with {binary.registers} registers"
        assert 16 in binary.loads
        assert 16 in binary.stores


def test_a_fast_product_is_one_launch_of_bfloat16_as_it_is():
    (launch,) = products("sm_90", torch.bfloat16, precision="fast", masked=False)
    binary = aot.compile_launch("sm_90", launch)
    assert "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16" in binary.asm
    assert binary.spills == 0


def test_products_stay_in_flight_over_the_borders_of_chunks():
    plain, _, split = products("sm_90", torch.bfloat16)
    for launch in (plain, split):
        asm = aot.compile_launch("sm_90", launch).asm
        waits = re.findall(r"wgmma\.wait_group\.sync\.aligned\s+(\d)", asm)
        assert sorted(waits) == ["0", "0", "1"]  # when a chunk is added, after the last chunk, and in every step


def test_sums_that_truncate_keep_the_promise_just_below_the_threshold_of_shifting():
    """Simulates tensor cores: 16 exact products at a time, then the accumulator is rounded toward zero."""
    rows, d = streaming.DIRECT, 32
    x = torch.randn(rows, d, generator=torch.Generator().manual_seed(0)) + 0.97 * kernels.SHIFT_ABOVE
    x = x.bfloat16().double().numpy()
    total = numpy.zeros((d, d), numpy.float32)
    for first in range(0, rows, kernels.CHUNK):
        chunk = numpy.zeros((d, d), numpy.float32)
        for start in range(first, first + kernels.CHUNK, 16):
            exact = chunk + x[start : start + 16].T @ x[start : start + 16]
            nearest = exact.astype(numpy.float32)
            chunk = numpy.where(nearest > exact, numpy.nextafter(nearest, numpy.float32(0)), nearest)  # all positive
        total += chunk
    covariance = total / rows - numpy.outer(x.mean(0), x.mean(0))
    true = numpy.cov(x, rowvar=False, bias=True)
    sigma = numpy.sqrt(true.diagonal())
    error = (covariance - true) / numpy.outer(sigma, sigma)
    assert abs(error).max() <= 5e-6
    assert abs(error.mean()) + 6 * error.std() <= 1e-5  # the largest of the 8 million entries at d = 4096


@pytest.mark.parametrize("target", aot.TARGETS)
def test_norms_read_rows_in_16_byte_accesses_without_spills(target):
    for d in (4096, 8192):
        binary = aot.compile_launch(target, norms(target, torch.bfloat16, d))
        assert binary.spills == 0
        assert set(binary.loads) == {16}


def test_a_new_token_count_compiles_nothing():
    def keys(launches):
        found = []
        for launch in launches:
            fixed = {p.name for p in launch.kernel.params if p.do_not_specialize}
            values = zip(launch.kernel.arg_names, launch.arguments, strict=False)
            runtime = {n: (v == 1, v % 16 == 0) for n, v in values if isinstance(v, int) and n not in fixed}
            found.append((launch.kernel.__name__, runtime, launch.keywords))
        return found

    for d in (576, 4096, 5001):
        for make in (products, lambda *args, **kwargs: [norms(*args, **kwargs)]):
            base = keys(make("sm_90", torch.bfloat16, d))
            for rows in (1, 2, 16, 577, 4096):
                assert keys(make("sm_90", torch.bfloat16, d, rows=rows)) == base
