"""The state of StreamingMoments: errors leave it unchanged; merges, copies, moves and resuming preserve it."""

import copy

import pytest
import torch

from mir_kernels.ops.moments import StreamingMoments, streaming


def bits(moments):
    return {key: value.clone() for key, value in moments.state_dict().items()}


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([1.0, 2.0, 3.0],), TypeError, "x: expected a torch.Tensor"),
        ((torch.ones(5, 3, dtype=torch.int64),), TypeError, "x: expected one of the dtypes float32, .* got int64"),
        ((torch.ones(5, 4),), ValueError, r"x: expected shape \(..., 3\), got \(5, 4\)"),
        ((torch.ones(5, 3, device="meta"),), ValueError, "x: is on meta, but the moments are on cpu"),
        ((torch.ones(5, 3), torch.ones(4, dtype=torch.bool)), ValueError, r"mask: .* shape \(5,\), got \(4,\)"),
        ((torch.ones(5, 3), torch.ones(5)), TypeError, "mask: expected one of the dtypes bool, uint8, .* got float32"),
        ((torch.ones(5, 3), torch.ones(5, dtype=torch.bool, device="meta")), ValueError, "mask: is on meta"),
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
        ({"hidden_size": 0}, "hidden_size: expected an integer of at least 1, got 0"),
        ({"hidden_size": 2.0}, "hidden_size: expected an integer"),
        ({"hidden_size": 2, "precision": "half"}, "precision: expected one of"),
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
    resumed.update(torch.randn(20, 7))  # replaced by the loaded state
    resumed.load_state_dict({key: value.clone() for key, value in first.state_dict().items()})
    first.update(x)  # the loaded state is a copy
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
        ({}, "state: expected the keys"),
        ({**good, "version": torch.tensor(99)}, "version 1, got 99"),
        (other.state_dict(), "hidden_size 3"),
        ({**good, "mean": good["mean"].float()}, r"state\['mean'\]: expected torch.float64"),
        ({**good, "pending": torch.zeros(2, 5)}, r"expected shape \(rows, 3\)"),
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
        moments._asked = "native"  # supports CPU tensors only
    with pytest.raises(RuntimeError):
        moments.to(device)
    assert moments.device == torch.device("cpu")
    assert moments.backend == "eager"
    assert_moments(moments, x)


def test_memory_is_one_triangle_and_a_block_of_rows():
    moments = StreamingMoments(2048)
    triangle = 8 * 2048 * 2049 // 2
    assert moments.memory_bytes < 1.13 * triangle + 5 * 8 * 2048
    moments.update(torch.zeros(5, 2048, dtype=torch.bfloat16))
    assert moments.memory_bytes < 1.13 * triangle + 5 * 8 * 2048 + 2 * 2048 * (streaming.ROWS["cpu"] + 1)
