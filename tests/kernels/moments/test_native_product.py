"""The compiled product of one triangle: exact on small integers, the same bits for every number of threads."""

import os
import subprocess
import sys

import pytest
import torch

from mir_kernels.ops.moments import StreamingMoments, packed, reference, streaming
from mir_kernels.ops.moments.launch import STREAMING_MOMENTS

if reason := STREAMING_MOMENTS.reason("native", torch.device("cpu")):
    pytest.skip(reason, allow_module_level=True)

from mir_kernels._native import C
from mir_kernels.ops.moments import native

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SIZES = [(0, 3), (1, 1), (5, 95), (128, 96), (129, 97), (300, 257), (7, 600), (1024, 95), (1089, 97), (1024, 257)]


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
    assert torch.equal(shift, centre)
    away = x.double() - shift
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


INTEGERS = torch.bfloat16  # multiplied in 16-bit integers from 1024 rows on


def error(x, **options):
    """The largest error of a covariance entry of x (n, d), relative to the two standard deviations."""
    moments = StreamingMoments(x.shape[1], backend="native", **options)
    moments.update(x)
    true = reference.covariance(x)
    sigma = true.diagonal().sqrt()
    return ((moments.covariance() - true).abs() / (sigma[:, None] * sigma)).max().item()


def outliers(rows, d, columns):
    """Gaussian columns; in `columns`, one value in 577 is a thousand times larger."""
    torch.manual_seed(0)
    x = torch.randn(rows, d)
    x[::577, columns] *= 1000
    return x.to(INTEGERS)


@pytest.mark.parametrize("rows", [1023, 1024, 1025, 1600])
@pytest.mark.parametrize(
    "columns", [[], [3], list(range(0, 200, 9)), list(range(100)), list(range(203))], ids=lambda c: str(len(c))
)
def test_columns_with_outliers_keep_the_promise(rows, columns, monkeypatch):
    monkeypatch.setattr(streaming, "ROWS", {"cpu": rows, "cuda": rows})  # one block
    # No column, one, as many as are multiplied twice, one too many, all.
    assert error(outliers(rows, 203, columns)) <= 6e-6


@pytest.mark.parametrize("probability", [0.5, 0.1, 0.01, 0.003])
def test_columns_of_two_values_keep_the_promise(probability):
    # Every value has the same rounding error, so nothing averages out; equal columns are the worst pair.
    x = 0.03 + (torch.rand(2048, 101) < probability).float() * 1.7
    x[:2] = torch.tensor([[0.0], [1.0]])
    x = torch.cat([x, x[:, :50], torch.randn(2048, 52)], 1)
    assert error(x.to(INTEGERS)) <= 6e-6


@pytest.mark.parametrize("every", [16, 25, 33, 64, 200])
@pytest.mark.parametrize("rows", [1024, 4096])
def test_rounding_does_not_pile_up_where_another_column_marks_the_rounded_rows(rows, every):
    torch.manual_seed(0)
    marked = torch.arange(rows) % every == 0
    for small in (0.4e-4, 0.8e-4, 1.2e-4, 1.8e-4):  # half a unit is 1.2e-4
        x = torch.randn(rows, 24)
        x[:, 0] = torch.where(torch.rand(rows) < 0.5, 1.0, -1.0)
        x[marked, 0] = small
        x[:, 1] = marked.float()
        x[:, 2] = marked.float() * torch.where(marked.cumsum(0) % 2 == 0, 1.0, -1.0)
        assert error(x.to(INTEGERS)) <= 1e-5


@pytest.mark.parametrize("constant", [1, 63, 64, 76, 512])
def test_a_shift_that_the_later_rows_do_not_suit_keeps_the_promise(constant):
    x = torch.randn(1024, 33)
    x[:constant] = 100
    x = x.to(INTEGERS)
    second, shift, _ = update(x, torch.full((33,), 100.0).double())
    away = x.double() - shift
    true = away.T @ away
    scale = true.diagonal().sqrt()
    assert ((packed.unpack(second, 33) - true).abs() <= 1e-6 * scale[:, None] * scale).all()


@pytest.mark.parametrize("scale", [1e-12, 1e-3, 1e6, 1e15])
def test_the_size_of_the_tokens_changes_nothing(scale):
    assert error((torch.randn(1024, 100) * scale).to(INTEGERS)) <= 6e-6


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("row", [0, 700, 1023])
def test_what_is_not_finite_stays_in_its_column(row, value):
    x = torch.randn(1024, 130).to(INTEGERS)
    others = update(x)[0]
    x[row, 7] = value
    second = packed.unpack(update(x)[0], 130)
    assert not second[7].isfinite().any()
    keep = torch.arange(130) != 7
    assert torch.equal(second[keep][:, keep], packed.unpack(others, 130)[keep][:, keep])


LEVELS = """
import torch
from mir_kernels._native import C
from mir_kernels.ops.moments import StreamingMoments, reference
torch.manual_seed(0)
level = torch.randn(1500, 203)
climbing = level + torch.linspace(0, 150, 203)
# Columns away from zero with rows that their shift does not suit: a bfloat16 of the difference leaves a remainder.
few, many = level.clone(), level + 6
few[:, ::20] += 6
few[::577], many[::577] = 1000 * few[::577], 1000 * many[::577]
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    for x in (level, climbing, few, many):
        moments = StreamingMoments(203, backend="native")
        moments.update(x.to(dtype))
        true = reference.covariance(x.to(dtype))
        sigma = true.diagonal().sqrt()
        print(C.CPU_ISA, ((moments.covariance() - true).abs() / (sigma[:, None] * sigma)).max().item())
"""


def at_level(level, *arguments):
    env = os.environ | {"MIR_CPU_ISA": level, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run([sys.executable, *arguments], env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("level", C.CPU_ISAS)
def test_every_instruction_set_of_this_cpu_is_right(level):
    lines = [line.split() for line in at_level(level, "-c", LEVELS).splitlines()]
    assert [name for name, _ in lines] == [level] * 12
    assert all(float(error) <= 1e-5 for _, error in lines)


def test_what_the_product_does_not_take_is_refused():
    x = torch.ones(4, 3)
    zeros = torch.zeros(3, dtype=torch.float64)
    for mask, precision in ((torch.ones(4, dtype=torch.bool), "auto"), (None, "exact")):
        with pytest.raises(ValueError, match="the native product does not support a mask"):
            native.accumulate(torch.zeros(9).double(), x, mask, zeros, torch.zeros(2, 3), torch.zeros(2), precision)
    with pytest.raises(ValueError, match="dtype"):
        update(x.double())
