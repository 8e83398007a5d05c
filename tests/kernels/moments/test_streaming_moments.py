"""StreamingMoments against float64: any split, order, mask, dtype and mean; refusals; what an update may not touch."""

import copy
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from mir_kernels.moments import StreamingMoments, packed, reference, streaming

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def large_mean(n, d, ratio, dtype, seed=0):
    """Rows whose first column has mean / deviation `ratio`, forty others up to ratio / 15, the rest none."""
    x = torch.randn(n, d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    x[:, 0] = 2 * x[:, 0] + 2 * ratio
    x[:, 1:41] -= torch.linspace(0, ratio / 15, 40, dtype=torch.float64)
    return x.to(dtype)


@pytest.mark.parametrize("d", [1, 3, 255, 256, 257, 600])
def test_packed_triangle_gives_back_a_symmetric_matrix(d):
    vectors = torch.randn(3, d, dtype=torch.float64)
    weights = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    flat = torch.zeros(packed.entries(d), dtype=torch.float64)
    packed.add_outer(flat, d, vectors, weights)
    expected = vectors.T @ (vectors * weights[:, None])
    full = packed.unpack(flat, d)
    torch.testing.assert_close(full, expected, rtol=1e-13, atol=1e-13)
    assert torch.equal(full, full.T)
    assert torch.equal(packed.diagonal(flat, d), full.diagonal())
    assert packed.entries(d) <= d * (d + 1) // 2 + d * packed.PANEL // 2


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("ratio", [0, 150, 1e4])
def test_error_is_within_the_promise_whatever_the_mean(run, dtype, ratio, assert_moments):
    if dtype == torch.float16 and ratio > 1000:
        ratio = 1000  # float16 itself ends at 65504
    x = large_mean(2500, 300, ratio, dtype).to(run.device)
    moments = StreamingMoments(300, device=run.device, backend=run.backend)
    moments.update(x)
    assert_moments(moments, x, 1e-5 if dtype != torch.float64 else 1e-9)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_exact_is_exact(run, dtype, assert_moments):
    x = large_mean(1500, 130, 150, dtype).to(run.device)
    moments = StreamingMoments(130, device=run.device, backend=run.backend, precision="exact")
    moments.update(x[:700])
    moments.update(x[700:])
    assert_moments(moments, x, 1e-10)


@pytest.mark.parametrize(
    "stream",
    [
        lambda x: x.sort(0).values,  # every column drifts through its whole range
        lambda x: torch.cat([x[:5] * 0, x[5:] + 1e4]),  # the first rows say nothing about the rest
        lambda x: torch.cat([x[:1000], x[1000:] * 1000 - 5e4]),
        lambda x: x * torch.where(torch.arange(len(x)) % 577 == 0, 1000.0, 1.0)[:, None],  # massive activations
        lambda x: (x > 1).to(x.dtype) + 300,  # two values
        lambda x: x * torch.logspace(-12, 12, x.shape[1]),  # deviations far apart
    ],
    ids=["sorted", "late", "jump", "massive", "binary", "scales"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_error_is_within_the_promise_on_hard_streams(run, stream, dtype, assert_moments):
    x = stream(torch.randn(3000, 60, generator=torch.Generator().manual_seed(1))).to(dtype).to(run.device)
    moments = StreamingMoments(60, device=run.device, backend=run.backend)
    for part in x.split(577):
        moments.update(part)
        moments.mean  # noqa: B018  # reading folds in what was gathered, so that blocks are small and uneven
    assert_moments(moments, x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("part", [0.9, 1.3])
def test_products_that_are_lost_beside_a_large_one_stay_within_the_promise(run, dtype, part, assert_moments):
    x = torch.full((4096, 8), (part * 2**-24) ** 0.5)
    x[1::2] *= -1
    x[0] = 1  # each further product is less than the last place of this one's, and all of them are more
    moments = StreamingMoments(8, device=run.device, backend=run.backend)
    moments.update(x.to(dtype).to(run.device))
    assert_moments(moments, x.to(dtype))


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_split_order_mask_merge_tree_and_dtype_gives_the_same_moments(data):
    d = data.draw(st.integers(1, 5), "d")
    parts = data.draw(st.lists(st.integers(0, 40), min_size=1, max_size=8), "rows")
    seed = data.draw(st.integers(0, 2**31), "seed")
    precision = data.draw(st.sampled_from(["fast", "auto", "exact"]), "precision")
    generator = torch.Generator().manual_seed(seed)
    before, streaming.ROWS = streaming.ROWS, {"cpu": 16, "cuda": 16}
    try:
        kept, accumulators = [], []
        for rows in parts:
            dtype = data.draw(st.sampled_from(DTYPES))
            x = (torch.randn(rows, d, generator=generator) * 2 + 5).to(dtype)
            mask = data.draw(st.sampled_from([None, torch.bool, torch.uint8]))
            if mask is not None:
                mask = (torch.rand(rows, generator=generator) < 0.6).to(mask)
            kept.append(x.double() if mask is None else x.double()[mask != 0])
            if not accumulators or data.draw(st.booleans()):
                accumulators.append(StreamingMoments(d, precision=precision))
            data.draw(st.sampled_from(accumulators)).update(x, mask)
            if data.draw(st.booleans()):
                accumulators[-1].mean  # noqa: B018
        while len(accumulators) > 1:
            left = accumulators.pop(data.draw(st.integers(0, len(accumulators) - 1)))
            accumulators[data.draw(st.integers(0, len(accumulators) - 1))].merge(left)
        moments, x = accumulators[0], torch.cat(kept)
    finally:
        streaming.ROWS = before
    assert moments.count == x.shape[0]
    if x.shape[0] == 0:
        assert not moments.mean.any()
    if x.shape[0] > 1:
        limit = 1e-11 if precision == "exact" else 1e-5
        torch.testing.assert_close(moments.mean, reference.mean(x), rtol=0, atol=limit)
        torch.testing.assert_close(moments.covariance(), reference.covariance(x), rtol=0, atol=4 * limit)


@settings(max_examples=10, deadline=None)
@given(data=st.data())
def test_blocks_as_large_as_they_are_give_the_same_moments_whatever_split_mask_and_dtype(data):
    """Integer products, a second macro-tile of 96 columns and a second panel of 256, each with a remainder."""
    d = data.draw(st.sampled_from([97, 257, 300]), "d")
    parts = data.draw(st.lists(st.sampled_from([1, 63, 511, 1024, 1500]), min_size=1, max_size=4), "rows")
    dtype = data.draw(st.sampled_from(DTYPES), "dtype")
    ratio = data.draw(st.sampled_from([0, 5, 300]), "mean / deviation")
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31), "seed"))
    kept, moments = [], StreamingMoments(d)
    for rows in (1100, *parts):
        x = torch.randn(rows, d, generator=generator) * torch.linspace(0.1, 3, d)
        x[:, ::50] += ratio * torch.linspace(0.1, 3, d)[::50]
        x[::577, 1::60] *= 1000
        x = x.to(dtype)
        mask = torch.rand(rows, generator=generator) < 0.95 if data.draw(st.booleans(), "mask") else None
        kept.append(x if mask is None else x[mask])
        other = StreamingMoments(d) if data.draw(st.booleans(), "merge") else moments
        other.update(x, mask)
        if other is not moments:
            moments.merge(other)
    rows = torch.cat(kept).double()
    true = reference.covariance(rows)
    sigma = true.diagonal().sqrt()
    assert moments.count == len(rows)
    assert ((moments.covariance() - true).abs() <= 1e-5 * sigma[:, None] * sigma).all()
    assert ((moments.mean - reference.mean(rows)).abs() <= 1e-5 * sigma).all()


def test_bits_do_not_depend_on_how_rows_were_split(small_blocks):
    x = torch.randn(130, 40).bfloat16()
    mask = torch.rand(130) < 0.7
    results = []
    for split in ([130], [1] * 130, [16, 50, 64], [15, 17, 98]):
        moments = StreamingMoments(40)
        for part, keep in zip(x.split(split), mask.split(split), strict=True):
            moments.update(part, keep)
        results.append((moments.mean, moments.covariance()))
    for mean, covariance in results[1:]:
        assert torch.equal(mean, results[0][0])
        assert torch.equal(covariance, results[0][1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_constant_column_has_no_covariance_at_all(run, dtype):
    x = torch.randn(2100, 6).to(dtype)
    x[:, 2], x[:, 4] = 0.1, -3000.0
    moments = StreamingMoments(6, device=run.device, backend=run.backend)
    moments.update(x.to(run.device))
    covariance = moments.covariance()
    for column in (2, 4):
        assert moments.mean[column].item() == pytest.approx(x[0, column].item(), rel=1e-15)
        assert covariance[column].abs().max() <= 1e-12 * x[0, column].abs()
        assert covariance[column, column] >= 0


def test_no_rows_and_one_row(run):
    moments = StreamingMoments(4, device=run.device, backend=run.backend)
    moments.update(torch.empty(0, 4, device=run.device))
    moments.update(torch.ones(2, 3, 4, device=run.device), torch.zeros(2, 3, dtype=torch.bool, device=run.device))
    assert moments.count == 0
    assert moments.mean.tolist() == [0, 0, 0, 0]
    with pytest.raises(ValueError, match="count: a covariance with ddof 1 takes more than 1 rows, got 0"):
        moments.covariance()
    row = torch.arange(4.0, device=run.device)
    moments.update(row)
    assert moments.count == 1
    assert moments.mean.tolist() == [0, 1, 2, 3]
    assert moments.covariance(ddof=0).abs().max() == 0
    with pytest.raises(ValueError, match="got 1"):
        moments.covariance()


@pytest.mark.parametrize("masked", [False, True])
def test_any_strides_are_read_and_inputs_are_left_alone(run, masked, assert_moments):
    base = torch.randn(12, 30, 14)
    for x in (base.transpose(0, 2), base[:, ::2, 1:8].transpose(1, 2), base[:, :1].expand(12, 20, 14), base.flip(0)):
        x = x.to(run.device)
        before, d = x.clone(), x.shape[-1]
        mask = torch.rand(x.shape[:-1], device=run.device) < 0.5 if masked else None
        kept = None if mask is None else mask.clone()
        moments = StreamingMoments(d, device=run.device, backend=run.backend)
        moments.update(x, mask)
        assert_moments(moments, x.reshape(-1, d) if mask is None else x[mask])
        assert torch.equal(x, before)
        assert mask is None or torch.equal(mask, kept)


def test_what_a_mask_leaves_out_may_be_anything(run, assert_moments):
    x = torch.randn(50, 9, device=run.device)
    mask = torch.arange(50, device=run.device) % 3 == 0
    poisoned = torch.where(mask[:, None], x, float("nan"))
    moments = StreamingMoments(9, device=run.device, backend=run.backend)
    moments.update(poisoned, mask)
    assert_moments(moments, x[mask])


def bits(moments):
    return {key: value.clone() for key, value in moments.state_dict().items()}


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([1.0, 2.0, 3.0],), TypeError, "x: takes a torch.Tensor"),
        ((torch.ones(5, 3, dtype=torch.int64),), TypeError, "x: takes a dtype of float32, .* got int64"),
        ((torch.ones(5, 4),), ValueError, r"x: takes shape \(..., 3\), got \(5, 4\)"),
        ((torch.ones(5, 3, device="meta"),), ValueError, "x: lies on meta, but the moments lie on cpu"),
        ((torch.ones(5, 3), torch.ones(4, dtype=torch.bool)), ValueError, r"mask: .* shape \(5,\), got \(4,\)"),
        ((torch.ones(5, 3), torch.ones(5)), TypeError, "mask: takes a dtype of bool, uint8, got float32"),
        ((torch.ones(5, 3), torch.ones(5, dtype=torch.bool, device="meta")), ValueError, "mask: lies on meta"),
    ],
)
def test_a_refused_update_says_why_and_changes_nothing(arguments, error, message):
    moments = StreamingMoments(3)
    moments.update(torch.randn(1500, 3))
    before = bits(moments)
    with pytest.raises(error, match=message):
        moments.update(*arguments)
    for key, value in bits(moments).items():
        assert torch.equal(value, before[key]), key


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"hidden_size": 0}, "hidden_size: takes an integer of at least 1, got 0"),
        ({"hidden_size": 2.0}, "hidden_size: takes an integer"),
        ({"hidden_size": 2, "precision": "half"}, "precision: takes one of"),
        ({"hidden_size": 2, "backend": "cublas"}, "backend: streaming_moments has no backend 'cublas'"),
    ],
)
def test_a_refused_construction_names_the_argument(arguments, message):
    with pytest.raises(ValueError, match=message):
        StreamingMoments(**arguments)


def test_merge_leaves_the_other_as_it_is_and_refuses_what_does_not_fit(small_blocks, assert_moments):
    x = torch.randn(75, 5) + 20
    first, second = StreamingMoments(5), StreamingMoments(5)
    first.update(x[:23])
    second.update(x[23:])
    before = bits(second)
    first.merge(second)
    assert_moments(first, x)
    assert all(torch.equal(value, before[key]) for key, value in bits(second).items())
    before = bits(first)
    for other, error in ((StreamingMoments(6), ValueError), (first, ValueError), (x, TypeError)):
        with pytest.raises(error, match="other: "):
            first.merge(other)
    assert all(torch.equal(value, before[key]) for key, value in bits(first).items())


@pytest.mark.parametrize("precision", ["auto", "exact"])
@pytest.mark.parametrize("cut", [0, 1, 16, 37, 64])
def test_going_on_from_a_state_gives_the_bits_of_never_having_stopped(precision, cut, small_blocks):
    x = torch.randn(90, 7).bfloat16()
    whole, first, resumed = (StreamingMoments(7, precision=precision) for _ in range(3))
    for part in x.split(9):
        whole.update(part)
    done = 0
    for part in x.split(9):
        if done >= cut:
            break
        first.update(part)
        done += len(part)
    resumed.update(torch.randn(20, 7))  # replaced by what is loaded
    resumed.load_state_dict({key: value.clone() for key, value in first.state_dict().items()})
    first.update(x)  # what was loaded is a copy
    for part in x[done:].split(9):
        resumed.update(part)
    assert resumed.count == 90
    assert torch.equal(resumed.mean, whole.mean)
    assert torch.equal(resumed.covariance(), whole.covariance())


def test_a_state_that_does_not_fit_is_refused_and_changes_nothing():
    moments, other = StreamingMoments(3), StreamingMoments(4)
    moments.update(torch.randn(10, 3))
    before = bits(moments)
    good = bits(moments)
    wrong = [
        ({}, "state: takes the keys"),
        ({**good, "version": torch.tensor(99)}, "version 1, got 99"),
        (other.state_dict(), "hidden_size 3"),
        ({**good, "mean": good["mean"].float()}, r"state\['mean'\]: takes torch.float64"),
        ({**good, "pending": torch.zeros(2, 5)}, r"takes shape \(rows, 3\)"),
    ]
    for state, message in wrong:
        with pytest.raises(ValueError, match=message):
            moments.load_state_dict(state)
    assert all(torch.equal(value, before[key]) for key, value in bits(moments).items())


def test_reset_copies_and_moves_are_whole(assert_moments):
    x = torch.randn(1500, 8)
    moments = StreamingMoments(8)
    moments.update(x)
    twin = copy.deepcopy(moments)
    assert moments.to("cpu") is moments
    assert_moments(moments, x)
    moments.reset()
    assert moments.count == 0
    assert_moments(twin, x)


@pytest.mark.parametrize("device", ["meta", "no device of torch"])
def test_a_move_that_fails_changes_nothing(device, assert_moments):
    x = torch.randn(1500, 8)
    moments = StreamingMoments(8, backend="eager")
    moments.update(x)
    if device == "meta":
        moments._asked = "native"  # takes CPU tensors only
    with pytest.raises(RuntimeError):
        moments.to(device)
    assert moments.device == torch.device("cpu")
    assert moments.backend == "eager"
    assert_moments(moments, x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("deviation", [2e-15, 4e16])
def test_the_ends_of_the_range_keep_the_promise(run, dtype, deviation, assert_moments):
    x = (deviation * (torch.randn(4096, 40, dtype=torch.float64) + 3.9)).to(dtype).to(run.device)
    moments = StreamingMoments(40, device=run.device, backend=run.backend)
    moments.update(x)
    assert_moments(moments, x)


def test_memory_is_one_triangle_and_a_block_of_rows():
    moments = StreamingMoments(2048)
    triangle = 8 * 2048 * 2049 // 2
    assert moments.memory_bytes < 1.13 * triangle + 5 * 8 * 2048
    moments.update(torch.zeros(5, 2048, dtype=torch.bfloat16))
    assert moments.memory_bytes < 1.13 * triangle + 5 * 8 * 2048 + 2 * 2048 * (streaming.ROWS["cpu"] + 1)


@pytest.fixture
def matmul_precision():
    before = torch.get_float32_matmul_precision()
    yield torch.set_float32_matmul_precision
    torch.set_float32_matmul_precision(before)


def test_the_process_settings_do_not_reach_the_products(run, matmul_precision, assert_moments):
    x = torch.randn(2000, 50, device=run.device)
    matmul_precision("medium")
    moments = StreamingMoments(50, device=run.device, backend=run.backend)
    with torch.autocast(run.device, dtype=torch.bfloat16):
        moments.update(x[:1500])
    assert torch.get_float32_matmul_precision() == "medium"
    with torch.inference_mode():
        moments.update(x[1500:1600])
        inside = StreamingMoments(50, device=run.device, backend=run.backend)
        inside.update(x[:300])
    inside.update(x[300:].clone().requires_grad_())
    moments.update(x[1600:].clone().requires_grad_())
    assert_moments(moments, x)
    assert_moments(inside, x)
    assert not moments.covariance().requires_grad


@pytest.mark.parametrize("rows", [5, 40])
def test_an_update_never_asks_the_device_for_a_number(rows, small_blocks):
    """Meta tensors take CUDA's way and have no values: every question for one raises."""
    moments = StreamingMoments(8, device="meta")
    for masked, dtype in itertools.product((False, True), DTYPES):
        x = torch.zeros(3, rows, 8, dtype=dtype, device="meta").transpose(0, 1)
        mask = torch.zeros(rows, 3, dtype=torch.bool, device="meta") if masked else None
        for _ in range(3):
            moments.update(x, mask)
    moments.merge(copy.deepcopy(moments))
    assert moments.mean.shape == (8,)
    with pytest.raises(RuntimeError, match="meta"):
        int(moments.count)


class Operations(TorchDispatchMode):
    """How many torch operations run, views aside: each is a launch on a GPU."""

    count = 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        self.count += not (function.is_view or "empty" in function.name())
        return function(*arguments, **(keywords or {}))


def test_gathering_rows_without_a_mask_takes_two_operations():
    moments = StreamingMoments(8, device="meta")
    x = torch.zeros(576, 8, device="meta")
    moments.update(x)
    for masked, most in ((False, 2), (True, 9)):
        with Operations() as operations:
            moments.update(x, torch.zeros(576, dtype=torch.bool, device="meta") if masked else None)
        assert 0 < operations.count <= most + masked  # the mask itself


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["triton", "eager"])
def test_an_update_does_not_synchronise(backend, assert_moments):
    x = torch.randn(9000, 300, device="cuda").bfloat16()
    mask = torch.rand(9000, device="cuda") < 0.7
    moments = StreamingMoments(300, device="cuda", backend=backend)
    moments.update(x[:5000], mask[:5000])  # compiles
    moments.update(x[5000:])
    moments.reset()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for part, keep in zip(x.split(576), mask.split(576), strict=True):
            moments.update(part, keep)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert_moments(moments, x[mask])
