"""The emulated CUDA device reports planted errors, accepts correct kernels, and rounds and fails like a real device."""

import re

import pytest
import torch

from native.emulated import DEFINED, READ, WRITE

N = 64  # elements of the arrays a and out


@pytest.fixture
def device(emulated_device):
    if not emulated_device.checks:
        pytest.skip("built with sanitizers in place of the device's own checks")
    return emulated_device


def arrays(device):
    """a = 0, 1, ... and an `out` of NaN, N elements each inside larger buffers, as the only memory declared to the
    device."""
    buffer, out = torch.arange(4 * N, dtype=torch.float32), torch.full((4 * N,), float("nan"))
    device.start()
    device.declare(buffer[N:].data_ptr(), 1, 4 * N, use=READ | DEFINED)
    device.declare(out[N:].data_ptr(), 1, 4 * N, use=READ | WRITE)
    return buffer[N : 2 * N], out[N : 2 * N], out


# Kernel, n without error, n with the error, threads per block, report of the error.
PLANTED = [
    ("previous", 1, 0, N, r"block \(0, 0, 0\), thread \(1, 0, 0\): read-after-write race: read .* shared memory"),
    ("shift", 1, 0, N, r"thread \(1, 0, 0\): write-after-read race: write .* shared memory"),
    ("threads", N, N // 2, N, r"thread \(32, 0, 0\): write-after-write race: write of 4 bytes, 0 bytes into"),
    ("blocks", 1, 0, 2, r"block \(1, 0, 0\), thread \(0, 0, 0\): write-after-write race"),
    ("chain", 0, 1, 2, r"block \(1, 0, 0\), thread \(0, 0, 0\): read-after-write race"),
    ("read", 0, 1, N, r"thread \(63, 0, 0\): forbidden read of 4 bytes at an address that was not declared"),
    ("read", 0, -1, N, r"thread \(0, 0, 0\): forbidden read of 4 bytes at an address"),
    ("write", 0, 1, N, r"illegal memory access.*thread \(63, 0, 0\): forbidden write of 4 bytes at an address"),
    ("vectors", 0, 1, 8, r"misaligned address; .*line \d+: misaligned by 4 of 16 bytes"),
    ("vectors", 0, 52, 4, r"thread \(3, 0, 0\): forbidden read of 16 bytes"),
    ("unwritten", N, N - 1, N, r"thread \(63, 0, 0\): uninitialised read of 4 bytes of shared"),
    ("divergent", 0, 1, N, r"63 threads of a block wait at a barrier, but 1 have returned"),
    ("large", 6000, 7000, N, r"more than 48 KB of shared memory"),
]


@pytest.mark.parametrize(
    ("name", "right", "wrong", "threads", "report"), PLANTED, ids=[f"{name}{wrong}" for name, _, wrong, *_ in PLANTED]
)
def test_planted_errors_are_reported_and_their_right_twins_are_not(device, name, right, wrong, threads, report):
    grid = (2 if name in ("blocks", "chain") else 1, 1, 1)
    a, out, _ = arrays(device)
    device.planted(name, a, out, right, grid, (threads, 1, 1))
    assert not out[: grid[0] if name in ("blocks", "chain") else threads].isnan().any()
    a, out, out_buffer = arrays(device)
    with pytest.raises(RuntimeError, match=report):
        device.planted(name, a, out, wrong, grid, (threads, 1, 1))
    assert out_buffer[:N].isnan().all()
    assert out_buffer[2 * N :].isnan().all()
    assert device.last_error() == 0  # a failed launch leaves no error


def test_barriers_order_and_shared_memory_is_right(device):
    a, out, _ = arrays(device)
    device.planted("previous", a, out, 1, (1, 1, 1), (N, 1, 1))
    assert torch.equal(out, torch.cat([a[:1], a[:-1]]))
    a, out, _ = arrays(device)
    device.planted("shift", a, out, 1, (1, 1, 1), (N, 1, 1))
    assert torch.equal(out, 2 * a.roll(-1))


@pytest.mark.parametrize("backwards", [False, True])
def test_a_race_is_found_in_either_order_of_threads_and_blocks(device, backwards):
    second = ["read-after-write race: read", "write-after-read race: write"]  # the later thread reads or writes
    device.set_backwards(backwards)
    try:
        a, out, _ = arrays(device)
        with pytest.raises(RuntimeError, match=f"{second[not backwards]} of 4 bytes of shared memory"):
            device.planted("shift", a, out, 0, (1, 1, 1), (N, 1, 1))
        a, out, _ = arrays(device)
        device.declare(out.data_ptr(), 1, 4 * N, use=DEFINED)  # else block 1 may read first: uninitialised
        with pytest.raises(RuntimeError, match=f"{second[backwards]} of 4 bytes, 0 bytes into"):
            device.planted("chain", a, out, 1, (2, 1, 1), (1, 1, 1))
    finally:
        device.set_backwards(False)


def test_only_the_rows_that_were_chosen_and_nothing_between_rows_may_be_used(device):
    a, out, _ = arrays(device)
    for chosen, width, good in (([1, 1], 16, True), ([1, 1], 12, False), ([1, 0], 16, False)):
        rows = torch.tensor(chosen, dtype=torch.uint8)
        device.start()
        device.declare(a.data_ptr(), 2, width, 16, rows.data_ptr(), READ | DEFINED)
        device.declare(out.data_ptr(), 1, 4 * N, use=WRITE)
        if good:
            device.planted("read", a, out, 0, (1, 1, 1), (8, 1, 1))
            assert torch.equal(out[:8], a[:8])
        else:
            with pytest.raises(RuntimeError, match=rf"forbidden read of 4 bytes, {width} bytes into an array of"):
                device.planted("read", a, out, 0, (1, 1, 1), (8, 1, 1))


def test_memory_for_reading_is_not_written_and_memory_not_written_is_not_read(device):
    a, out, _ = arrays(device)
    device.start()
    device.declare(a.data_ptr(), 1, 4 * N, use=READ | DEFINED)
    device.declare(out.data_ptr(), 1, 4 * N, use=READ | DEFINED)
    with pytest.raises(RuntimeError, match="forbidden write"):
        device.planted("read", a, out, 0, (1, 1, 1), (N, 1, 1))
    a, out, _ = arrays(device)
    with pytest.raises(RuntimeError, match="uninitialised read of 4 bytes, 0 bytes into an array"):
        device.planted("read", out, out, 0, (1, 1, 1), (N, 1, 1))
    device.planted("write", a, out, 0, (1, 1, 1), (N, 1, 1))
    device.planted("read", out, out, 0, (1, 1, 1), (N, 1, 1))  # in a later launch


@pytest.mark.parametrize(
    ("grid", "block"),
    [
        ((0, 1, 1), (1, 1, 1)),
        ((1, 0, 1), (1, 1, 1)),
        ((2**31, 1, 1), (1, 1, 1)),
        ((1, 65536, 1), (1, 1, 1)),
        ((1, 1, 65536), (1, 1, 1)),
        ((1, 1, 1), (0, 1, 1)),
        ((1, 1, 1), (1025, 1, 1)),
        ((1, 1, 1), (32, 33, 1)),
        ((1, 1, 1), (1, 1, 65)),
    ],
)
def test_sizes_that_no_device_takes_are_refused_and_nothing_runs(device, grid, block):
    a, out, _ = arrays(device)
    with pytest.raises(RuntimeError, match=re.escape("planted: invalid configuration argument")):
        device.planted("read", a, out, 0, grid, block)
    assert out.isnan().all()
    assert device.last_error() == 0


def test_the_largest_block_runs(device):
    device.start()
    source, target = torch.arange(1024.0), torch.full((1024,), float("nan"))
    device.declare(source.data_ptr(), 1, 4096, use=READ | DEFINED)
    device.declare(target.data_ptr(), 1, 4096, use=WRITE)
    device.planted("read", source, target, 0, (1, 1, 1), (1024, 1, 1))
    assert torch.equal(source, target)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_conversions_round_as_torch_rounds(emulated_device, dtype):
    name = str(dtype).removeprefix("torch.")
    every = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype)
    wide = torch.empty(2**16)
    emulated_device.convert[f"from_{name}"](every.data_ptr(), wide.data_ptr(), len(every))
    torch.testing.assert_close(wide, every.float(), rtol=0, atol=0, equal_nan=True)
    # Every value, the midpoints between neighbours, the numbers next to these, and random bits.
    halves = every.float()[every.isfinite()]
    step = torch.where(halves == 0, 1e-30, halves.abs()) * (1 + 2.0 ** -(8 if dtype == torch.bfloat16 else 11))
    bits = torch.cat([halves, step, -step, halves.abs() + 2**-25]).view(torch.int32)
    random = torch.randint(-(2**31), 2**31 - 1, (200000,), generator=torch.Generator().manual_seed(0)).int()
    x = torch.cat([bits - 1, bits, bits + 1, random]).view(torch.float32).contiguous()
    narrow = torch.empty(len(x), dtype=dtype)
    emulated_device.convert[f"to_{name}"](x.data_ptr(), narrow.data_ptr(), len(x))
    expected = x.to(dtype)
    assert torch.equal(narrow.isnan(), expected.isnan())
    assert torch.equal(narrow.view(torch.int16)[~narrow.isnan()], expected.view(torch.int16)[~expected.isnan()])
