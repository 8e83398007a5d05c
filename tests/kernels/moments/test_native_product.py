"""The compiled product of one triangle: exact on small integers, the same bits for every number of threads."""

import os
import subprocess
import sys

import pytest
import torch

from mir_kernels.moments import packed
from mir_kernels.moments.streaming import OPERATION

if reason := OPERATION.reason("native", torch.device("cpu")):
    pytest.skip(reason, allow_module_level=True)

from mir_kernels._native import C
from mir_kernels.moments import native

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SIZES = [(0, 3), (1, 1), (5, 95), (128, 96), (129, 97), (300, 257), (7, 600)]


def update(x, centre=None, vectors=None, weights=None, second=None):
    d = x.shape[1]
    second = torch.zeros(packed.entries(d), dtype=torch.float64) if second is None else second
    centre = torch.zeros(d, dtype=torch.float64) if centre is None else centre
    vectors = torch.zeros(2, d, dtype=torch.float64) if vectors is None else vectors
    weights = torch.zeros(2, dtype=torch.float64) if weights is None else weights
    shift, sums = native.accumulate(second, x, None, centre, vectors, weights, "auto")
    return second, shift, sums


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "d"), SIZES)
def test_small_integers_multiply_exactly(rows, d, dtype):
    x = torch.randint(-4, 5, (rows, d + 7)).to(dtype)[:, 3 : d + 3]
    before = x.clone()
    centre = torch.randint(-2, 3, (d,)).double()
    vectors, weights = torch.randint(-9, 9, (2, d)).double(), torch.tensor([3.0, -2.0], dtype=torch.float64)
    start = torch.full((packed.entries(d),), 0.5, dtype=torch.float64)
    second, shift, sums = update(x, centre, vectors, weights, start.clone())
    away = x.double() - centre
    assert torch.equal(shift, centre)
    assert torch.equal(sums, away.sum(0))
    assert torch.equal(packed.unpack(second, d), 0.5 + away.T @ away + vectors.T @ (weights[:, None] * vectors))
    for first, _, panel in packed.panels(second, d):
        assert (panel[:, first:].triu(1) == torch.full_like(panel[:, first:], 0.5).triu(1)).all()
    assert torch.equal(x, before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_bit_depends_on_threads_or_runs(dtype):
    x = (torch.randn(700, 411) * 3 + 40).to(dtype)
    centre = x.double().mean(0)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3, 3):
            torch.set_num_threads(count)
            results.append(update(x, centre))
    finally:
        torch.set_num_threads(threads)
    for second, _, sums in results[1:]:
        assert torch.equal(second, results[0][0])
        assert torch.equal(sums, results[0][2])


@pytest.mark.parametrize("level", ["x86-64", "x86-64-v3", "x86-64-v4"])
def test_every_instruction_set_of_this_cpu_is_right(level):
    levels = ["x86-64", "x86-64-v3", "x86-64-v4"]
    if C.CPU_ISA not in levels or levels.index(level) > levels.index(C.CPU_ISA):
        pytest.skip(f"this CPU has {C.CPU_ISA}")
    code = """
import torch
from mir_kernels._native import C
from mir_kernels.moments import StreamingMoments, reference
torch.manual_seed(0)
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    x = (torch.randn(1500, 203) + torch.linspace(0, 150, 203)).to(dtype)
    moments = StreamingMoments(203, backend="native")
    moments.update(x)
    true = reference.covariance(x)
    sigma = true.diagonal().sqrt()
    print(C.CPU_ISA, ((moments.covariance() - true).abs() / (sigma[:, None] * sigma)).max().item())
"""
    env = os.environ | {"MIR_CPU_ISA": level, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    assert [name for name, _ in lines] == [level] * 3
    assert all(float(error) <= 1e-5 for _, error in lines)


def test_what_the_product_does_not_take_is_refused():
    x = torch.ones(4, 3)
    zeros = torch.zeros(3, dtype=torch.float64)
    for mask, precision in ((torch.ones(4, dtype=torch.bool), "auto"), (None, "exact")):
        with pytest.raises(ValueError, match="the native product takes every row"):
            native.accumulate(torch.zeros(9).double(), x, mask, zeros, torch.zeros(2, 3), torch.zeros(2), precision)
    with pytest.raises(ValueError, match="dtype"):
        update(x.double())
