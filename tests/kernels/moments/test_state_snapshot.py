"""The state of StreamingMoments is a snapshot and does not depend on the process's default dtype and device."""

import contextlib

import pytest
import torch

from mir_kernels.ops.moments import StreamingMoments

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def rows(n: int, d: int = 6, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed)) + 3


def fed(n: int = 1500, **arguments) -> StreamingMoments:
    moments = StreamingMoments(6, device="cpu", **arguments)
    moments.update(rows(n))
    return moments


def other() -> StreamingMoments:
    found = StreamingMoments(6, device="cpu")
    found.update(rows(30, seed=1))
    return found


def full_block(moments: StreamingMoments) -> None:
    moments.update(rows(2048))


GOING_ON = {
    "rows": lambda moments: moments.update(rows(7)),
    "a block": full_block,
    "rows by a mask": lambda moments: moments.update(rows(7), torch.arange(7) % 2 == 0),
    "other rows": lambda moments: moments.update(rows(7).double()),
    "the mean": lambda moments: moments.mean,
    "the covariance": lambda moments: moments.covariance(),
    "a merge": lambda moments: moments.merge(other()),
    "a reset": lambda moments: moments.reset(),
    "a load": lambda moments: moments.load_state_dict(other().state_dict()),
    "a move": lambda moments: moments.to("cpu"),
}


@pytest.mark.parametrize("name", GOING_ON)
@pytest.mark.parametrize("n", [0, 5, 1500, 4096])
@pytest.mark.parametrize("cuda_way", [False, True], ids=["known", "on the device"])
def test_going_on_does_not_change_a_state(name, n, cuda_way, monkeypatch):
    monkeypatch.setattr(StreamingMoments, "_waits_for_nothing", lambda self: cuda_way)
    moments = fed(n, backend="eager")
    state = moments.state_dict()
    kept = {key: value.clone() for key, value in state.items()}
    if name != "the covariance" or n > 1:
        GOING_ON[name](moments)
    full_block(moments)
    assert all(torch.equal(value, kept[key]) for key, value in state.items())


@pytest.mark.parametrize("n", [5, 1500])
def test_changing_a_state_does_not_change_the_moments(n):
    moments, expected = fed(n), fed(n)
    for value in moments.state_dict().values():
        value.zero_()
    assert moments.count == n
    assert torch.equal(moments.mean, expected.mean)
    assert torch.equal(moments.covariance(), expected.covariance())


def test_a_state_that_was_loaded_is_not_held():
    moments, state = StreamingMoments(6), fed(1500).state_dict()
    moments.load_state_dict(state)
    for value in state.values():
        value.zero_()
    assert torch.equal(moments.covariance(), fed(1500).covariance())


def test_a_state_taken_in_inference_mode_can_be_written_to():
    with torch.inference_mode():
        state = fed().state_dict()
    assert not any(value.is_inference() for value in state.values())


def test_the_tensors_do_not_share_memory_with_the_moments_or_with_each_other():
    moments = fed()
    live, state = moments._live_state(), moments.state_dict()
    places = [value.untyped_storage().data_ptr() for value in (*live.values(), *state.values())]
    assert len(set(places)) == len(places) == 16


def test_states_with_and_without_what_was_reduced_are_taken():
    plain = fed().state_dict()
    assert set(plain) == {"version", "count", "mean", "second", "owed", "weights", "pending", "bound"}
    moments = StreamingMoments(6)
    moments.load_state_dict(plain | {"reduced": torch.tensor([3, 2**51])})
    again = moments.state_dict()
    assert again["reduced"].tolist() == [3, 2**51]
    assert all(torch.equal(value, again[name]) for name, value in plain.items())
    moments.load_state_dict(plain)
    assert "reduced" not in moments.state_dict()


@pytest.mark.parametrize(
    ("entry", "error", "message"),
    [
        (torch.tensor([1.0]), ValueError, r"state\['reduced'\]: expected int64 of \(n,\), got torch.float32"),
        (torch.tensor(1), ValueError, r"state\['reduced'\]: expected int64 of \(n,\), got torch.int64 of \(\)"),
        ([1], TypeError, r"state\['reduced'\]: expected a torch.Tensor, got list"),
    ],
)
def test_a_wrong_memory_is_refused_and_changes_nothing(entry, error, message):
    moments = fed()
    before = moments.state_dict()
    with pytest.raises(error, match=message):
        moments.load_state_dict(before | {"reduced": entry})
    assert all(torch.equal(value, moments.state_dict()[name]) for name, value in before.items())


@contextlib.contextmanager
def defaults(dtype: torch.dtype, device: str):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            yield
    finally:
        torch.set_default_dtype(before)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("backend", ["native", "eager", "reference"], indirect=True)
@pytest.mark.parametrize("n", [0, 5, 1500])
def test_defaults_of_the_process_change_no_bit(dtype, device, backend, n):
    x, more, mask = rows(n), rows(40, seed=2), torch.arange(40) % 3 > 0

    def run() -> tuple:
        moments, second = (StreamingMoments(6, device="cpu", backend=backend) for _ in range(2))
        moments.update(x)
        second.load_state_dict(moments.state_dict())
        second.update(more, mask)
        second.merge(moments)
        state = second.to("cpu").state_dict()
        return {**state, "mean": second.mean, "covariance": second.covariance()}

    expected = run()
    with defaults(dtype, device):
        found = run()
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            assert (found[name].dtype, found[name].device) == (value.dtype, value.device), name
            assert torch.equal(found[name], value), name


def test_without_a_device_it_is_the_default_one():
    with torch.device("meta"):
        assert StreamingMoments(6, backend="eager").device.type == "meta"
    assert StreamingMoments(6).device.type == "cpu"
