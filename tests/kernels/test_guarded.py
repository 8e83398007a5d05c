"""Every kernel against float64 in guarded, poisoned memory; twice; in CUDA graphs; on side streams and other devices.

Runs on a GPU (`-m gpu`), or with TRITON_INTERPRET=1 on CPU tensors at small sizes (test_guarded_interpreted.py).
"""

import os

import pytest
import torch

pytest.importorskip("triton")

from kernels.jobs import every_job
from mir_kernels import _native
from mir_kernels.ops.moments import triton as moments
from tolerances import assert_close

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
pytestmark = [] if INTERPRETED else [pytest.mark.gpu]
JOBS = every_job()
CASES = [pytest.param(job, dtype, id=f"{job.name}-{str(dtype)[6:]}") for job in JOBS for dtype in job.dtypes]
SIZES = [(1, 1), (13, 37)] if INTERPRETED else [(1, 1), (37, 7), (129, 577), (301, 4096), (65, 8200)]
on_gpu = pytest.mark.skipif(INTERPRETED, reason="needs a CUDA device")


def need(job):
    """Skip if a job's kernels do not run on this device."""
    if job.module.endswith("native") and DEVICE == "cuda":
        if reason := _native.cuda_reason():
            pytest.skip(reason)
        if job.name.startswith("add_rms"):
            pytest.skip("the fused operation has no CUDA C++ kernel")


def inputs(job, dtype, rows, d, device=DEVICE):
    return {name: tensor.to(device) for name, tensor in job.make(dtype, rows, d).items()}


def same_bits(first, second):
    return all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(first, second, strict=True))


def clones(found):
    return [tensor.contiguous().clone() for tensor in found]


@pytest.mark.parametrize(("rows", "d"), SIZES)
@pytest.mark.parametrize(("job", "dtype"), CASES)
def test_right_twice_the_same_and_nothing_else_is_written(job, dtype, rows, d, guards):
    need(job)
    plain = inputs(job, dtype, rows, d)
    guarded = {name: guards.around(tensor) for name, tensor in plain.items()}
    with guards.on_every_allocation():
        first = clones(job.run(guarded))
        second = clones(job.run(guarded))
    guards.assert_whole()
    assert same_bits(clones(guarded.values()), clones(plain.values())), "an input was changed"
    assert same_bits(first, second)
    for found, exact in zip(first, job.exact(plain, first), strict=True):
        assert_close(found, exact, dtype=job.arithmetic or dtype, factor=job.factor)


def test_a_guard_that_is_written_is_noticed(guards):
    x = guards.poisoned((4, 4), torch.float32, DEVICE)
    x.as_strided((17,), (1,)).zero_()
    with pytest.raises(AssertionError, match="written after a buffer"):
        guards.assert_whole()


@on_gpu
@pytest.mark.parametrize(("job", "dtype"), CASES)
def test_a_captured_graph_replays_on_new_inputs(job, dtype):
    need(job)
    given = inputs(job, dtype, 129, 576)
    job.run(given)  # compiles
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        found = job.run(given)
    given["x"].mul_(0.5)
    expected = clones(job.run(given))
    for tensor in found:
        tensor.fill_(float("nan"))
    graph.replay()
    torch.cuda.synchronize()
    assert same_bits(clones(found), expected)


@on_gpu
@pytest.mark.parametrize(("job", "dtype"), CASES)
def test_kernels_follow_the_current_stream(job, dtype):
    need(job)
    given = inputs(job, dtype, 129, 576)
    expected = clones(job.run(given))
    late = {name: torch.zeros_like(tensor) for name, tensor in given.items()}
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)  # a kernel on any other stream would now read zeros
        for name, tensor in late.items():
            tensor.copy_(given[name])
        found = job.run(late)
    stream.synchronize()
    assert same_bits(clones(found), expected)


@on_gpu
@pytest.mark.parametrize(("job", "dtype"), CASES)
def test_kernels_run_where_their_tensors_lie(job, dtype):
    need(job)
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    expected = clones(job.run(inputs(job, dtype, 37, 130)))
    found = job.run(inputs(job, dtype, 37, 130, "cuda:1"))
    assert all(tensor.device.index == 1 for tensor in found)
    assert same_bits([tensor.to("cuda:0") for tensor in clones(found)], expected)


@on_gpu
def test_norms_and_products_find_rows_beyond_2_to_the_31():
    d, apart = 16, 2**30
    if torch.cuda.mem_get_info()[0] < 5 * apart:
        pytest.skip("needs 5 GB of free GPU memory")
    near = torch.randint(-4, 5, (3, d), device="cuda").bfloat16()
    far = torch.empty(2 * apart + d, dtype=torch.bfloat16, device="cuda").as_strided((3, d), (apart, 1))
    far.copy_(near)
    assert torch.equal(moments.token_norms(far), moments.token_norms(near))
    zeros = {"dtype": torch.float64, "device": "cuda"}
    products = []
    for x in (near, far):
        second = torch.zeros(d * d, **zeros)
        moments.accumulate(second, x, None, torch.zeros(d, **zeros), torch.zeros(2, d, **zeros), torch.zeros(2, **zeros), "fast")  # fmt: skip  # noqa: E501
        products.append(second)
    assert torch.equal(*products)
