"""Consecutive groups of samples: moving accumulators of finished groups elsewhere gives bit-identical results."""

import copy
import pickle
import weakref

import numpy as np
import pytest
import torch

from integration.metric.streams import LAYERS, D, fed, sample, whole
from modality_integration import ModalityIntegrationRate
from modality_integration.metric import group_moments
from modality_integration.metric.dealing import dealt, share
from modality_integration.metric.host_memory import SMALLEST, HostMemory

GROUPS, COUNT = 5, 30
OPTIONS = {"hold": 60, "groups": GROUPS, "samples": COUNT}


def moving(**options):
    """A metric whose finished groups move to other memory of the CPU, as they do from a GPU to the host."""
    metric = ModalityIntegrationRate(**options)
    metric._host = HostMemory(of=("cpu",))
    return metric


def feed(metric, samples):
    for one in samples:
        metric.update(*one)
    return metric


def stream(batch=1, count=COUNT, **options):
    """`count` newly drawn samples in batches."""
    return [sample(seed, batch=min(batch, count - batch * seed), **options) for seed in range(-(-count // batch))]


def on_device(metric):
    """The largest number of accumulators on the device per layer and modality."""
    return max((len(layer.moments.here) for layer in metric._layers), default=0) / 2


def assert_equal_states(first, second):
    first, second = first.state_dict(), second.state_dict()
    assert set(first) == set(second)
    for key, value in first.items():
        assert torch.equal(value, second[key]), key


@pytest.fixture(params=[1024, 16], ids=["blocks never full", "blocks often full"])
def block_rows(request, monkeypatch):
    """Rows gathered before each matrix product."""
    monkeypatch.setitem(group_moments.ROWS, "cpu", request.param)
    return request.param


@pytest.mark.parametrize("batch", [1, 4, COUNT])
@pytest.mark.parametrize("options", [{"dtype": torch.bfloat16}, {"dtype": torch.float64}])
def test_moving_changes_no_bit_of_result_or_state(block_rows, batch, options):
    samples = stream(batch, **options)
    moved, plain = feed(moving(**OPTIONS), samples), fed(samples, **OPTIONS)
    assert on_device(plain) == GROUPS
    assert on_device(moved) <= (2 if batch > 1 else 1)
    assert all(layer.moments.away_bytes for layer in moved._layers)
    result = moved.compute()
    assert result.to_json() == plain.compute().to_json()
    assert result.error > 0
    assert_equal_states(moved, plain)
    moved._computed = None  # drop torchmetrics' cached result
    assert moved.compute().to_json() == result.to_json()


@pytest.mark.parametrize("options", [{"precision": "exact"}, {"outliers": "none"}, {"hold": 4000}, {"hold": 25}])
def test_moving_changes_no_bit_under_other_options(options):
    samples, options = stream(), {**OPTIONS, **options}
    assert feed(moving(**options), samples).compute().to_json() == fed(samples, **options).compute().to_json()


def test_only_the_group_that_is_filled_is_on_the_device_after_each_sample(block_rows):
    metric = moving(**OPTIONS)
    for one in stream():
        metric.update(*one)
        assert on_device(metric) <= 1
    assert len(metric._layers[0].moments) == 2 * GROUPS


def test_rows_that_are_released_late_are_kept_as_they_are_until_someone_asks():
    metric = feed(moving(**OPTIONS), stream())
    late = [len(rows) for one in metric._layers[0].moments._away.values() for rows in one.late]
    assert sum(late) > 0
    away = metric._layers[0].moments._away
    assert all(sum(map(len, one.late)) <= metric._layers[0].hold for one in away.values())


@pytest.mark.parametrize("groups", [3, 5, 10])
def test_the_result_takes_as_many_accumulators_on_the_device_however_many_groups_there_are(groups, monkeypatch):
    metric = feed(moving(**{**OPTIONS, "groups": groups}), stream())
    alive, most, made = weakref.WeakSet(), 0, group_moments.StreamingMoments.__init__

    def counting(self, *args, **kwargs):
        nonlocal most
        made(self, *args, **kwargs)
        alive.add(self)
        most = max(most, len(alive))

    monkeypatch.setattr(group_moments.StreamingMoments, "__init__", counting)
    metric.compute()
    # Both modalities of the whole, of the previous group left out and of the current one; plus one being merged in.
    assert most <= 7


def test_the_error_is_that_of_mir_with_each_block_of_samples_left_out():
    samples = stream()
    metric = feed(moving(**{**OPTIONS, "precision": "exact"}), samples)
    rest = [[one for i, one in enumerate(samples) if i * GROUPS // COUNT != g] for g in range(GROUPS)]
    results = [whole(others) for others in rest]
    expected = [[r.per_layer[k] for r in results] for k in range(LAYERS)]
    np.testing.assert_allclose(metric.compute().left_out, expected, rtol=1e-9)


@pytest.mark.parametrize("cut", [0, 13])
def test_a_state_goes_on_with_the_same_bits_from_either_place(block_rows, cut, tmp_path):
    samples = stream()
    first = feed(moving(**OPTIONS), samples[:cut])
    first.save(tmp_path / "state.safetensors")
    copied = copy.deepcopy(first)
    pickled = pickle.loads(pickle.dumps(first))
    resumed = ModalityIntegrationRate.from_file(tmp_path / "state.safetensors")
    assert resumed.options == first.options
    moved = moving(**OPTIONS)
    moved.load(tmp_path / "state.safetensors")
    assert on_device(moved) <= 1
    expected = fed(samples, **OPTIONS)
    for metric in (first, copied, pickled, resumed, moved):
        feed(metric, samples[cut:])
        assert_equal_states(metric, expected)
    assert moved.compute().to_json() == expected.compute().to_json()


def test_a_copy_is_no_larger_than_what_is_put_away_and_shares_nothing():
    metric = feed(moving(**OPTIONS), stream())
    assert len(pickle.dumps(metric)) < SMALLEST / 10
    copied, before = copy.deepcopy(metric), metric.compute().to_json()
    copied._layers[0].moments._away["vision", 0].state["second"].fill_(7.0)
    assert metric.compute().to_json() == before


def test_moved_layers_go_to_another_device_and_back():
    samples = stream()
    metric = feed(moving(**OPTIONS), samples[:20])
    for layer in metric._layers:
        layer.to(torch.device("cpu"))
    assert on_device(metric) <= 1
    assert feed(metric, samples[20:]).compute().to_json() == fed(samples, **OPTIONS).compute().to_json()


@pytest.mark.parametrize("by_state", [False, True])
def test_merged_metrics_are_merged_alike_and_go_on(by_state, monkeypatch):
    monkeypatch.setitem(group_moments.ROWS, "cpu", 16)
    samples, more = stream(), stream(count=COUNT + 8)[COUNT:]
    options = {**OPTIONS, "samples": COUNT + 8}
    results = []
    for make in (moving, ModalityIntegrationRate):
        left, right = (feed(make(**options), part) for part in (samples[:12], samples[12:]))
        left.merge_state(right.state_dict() if by_state else right)
        feed(left, more)
        results.append(left)
    assert on_device(results[0]) < on_device(results[1])
    assert results[0].compute().to_json() == results[1].compute().to_json()
    assert_equal_states(*results)


def test_a_second_pass_and_forward_move_too():
    samples, results = stream(), []
    for make in (moving, ModalityIntegrationRate):
        first = make(**OPTIONS)
        batch = first(*sample(99, batch=GROUPS + 1))
        assert len(batch.left_out[0]) == GROUPS  # only of this call's samples
        second = feed(first.second_pass(), samples)
        assert on_device(second) == (1 if make is moving else GROUPS)
        results.append((batch.to_json(), second.compute().to_json()))
    assert results[0] == results[1]


def test_one_sample_more_than_announced_is_refused_and_changes_nothing():
    samples = stream()
    metric = fed(samples, **OPTIONS)
    before = metric.compute().to_json()
    with pytest.raises(ValueError, match="samples: expected at most 30, got sample number 31"):
        metric.update(*samples[0])
    assert metric.compute().to_json() == before
    metric = fed(samples[:29], **OPTIONS)
    with pytest.raises(ValueError, match="samples: expected at most 30, got sample number 32"):
        metric.update(*sample(0, batch=3))
    metric.update(*samples[29])
    assert metric.compute().to_json() == before


def test_fewer_samples_than_announced_have_a_note():
    samples = stream()
    said = "only 27 of 30 announced samples arrived, so the groups of the standard error differ in size"
    assert said in fed(samples[:27], **OPTIONS).compute().notes
    assert fed(samples, **OPTIONS).compute().notes == []
    assert said not in fed(samples[:27], **{**OPTIONS, "groups": 0}).compute().notes


@pytest.mark.parametrize("samples", [0, -3])
def test_a_number_of_samples_that_cannot_be_is_refused(samples):
    with pytest.raises(ValueError, match="samples: expected None or the number of samples to come"):
        ModalityIntegrationRate(samples=samples)


@pytest.mark.parametrize("groups", [2, 5, 10])
@pytest.mark.parametrize("samples", [10, 23, 100])
@pytest.mark.parametrize("processes", [1, 2, 3, 8])
def test_processes_together_deal_as_one_with_all_samples(groups, samples, processes):
    alone = dealt(0, samples, groups, samples)
    assert torch.equal(alone, alone.sort().values)
    sizes = alone.bincount(minlength=groups)
    assert sizes.max() - sizes.min() <= 1
    for process in range(processes):
        count = share(samples, process, processes)
        own = dealt(0, count, groups, samples, process=process, processes=processes)
        assert torch.equal(own, alone[process::processes])
        parts = [dealt(first, 1, groups, samples, process=process, processes=processes) for first in range(count)]
        assert torch.equal(torch.cat(parts), own)


@pytest.mark.parametrize("make", [moving, ModalityIntegrationRate])
@pytest.mark.parametrize("groups", [0, GROUPS])
@pytest.mark.parametrize("batch", [1, 3])
def test_what_a_stream_takes_is_told_from_its_first_samples(make, groups, batch):
    samples = stream(batch)
    metric = make(**{**OPTIONS, "groups": groups})
    with pytest.raises(ValueError, match="samples: expected at least one sample seen before the estimate"):
        metric.memory_to_come(COUNT)
    metric.update(*samples[0])
    told, resting = metric.memory_to_come(COUNT), held(metric)
    feed(metric, samples[1:])
    device, host = (now - before for now, before in zip(held(metric), resting, strict=True))
    # `compute()` also needs 6 matrices d x d and 3 triangles (merged or being merged), with groups 4 more; if nothing
    # moves, also a copy of every group.
    copies = 3 if groups == 0 else 7 if make is moving else 7 + 2 * groups
    computing = 8 * 6 * D * D + copies * 8 * (D * D + 4 * D)
    assert device <= told.devices[torch.device("cpu")] == pytest.approx(device + computing, rel=0.1)
    assert host <= told.host
    assert (told.host > 0) == (make is moving and groups > 0)
    assert metric.memory_to_come(COUNT, groups=0).host <= 0 or groups


def held(metric):
    """Bytes on the device, and elsewhere."""
    moments = [one for layer in metric._layers for one in layer.moments.here]
    away = sum(layer.moments.away_bytes for layer in metric._layers)
    return sum(one.memory_bytes for one in moments) + metric.held_bytes, away


def test_stored_tensors_lie_in_blocks_and_have_their_content():
    host = HostMemory(of=("cpu",))
    tensors = [torch.arange(5), torch.tensor(3.0), torch.empty(0, 7), torch.randn(3, 4).half(), torch.tensor(True)]
    stored = [host.store(tensor) for tensor in tensors]
    host.wait()
    for tensor, copied in zip(tensors, stored, strict=True):
        assert torch.equal(tensor, copied)
        assert tensor.dtype == copied.dtype
    assert len({tensor.untyped_storage().data_ptr() for tensor in stored}) == 1
    numbers = [torch.full((2**23,), float(number)) for number in range(5)]  # 32 MB each
    stored = [host.store(tensor) for tensor in numbers]
    assert all(torch.equal(tensor, copied) for tensor, copied in zip(numbers, stored, strict=True))
    blocks = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in stored}
    assert list(blocks.values()) == [2 * SMALLEST, 4 * SMALLEST, 8 * SMALLEST]
    with torch.inference_mode():
        outlives = host.store(torch.zeros(2))
    outlives += 1
    assert not HostMemory().takes(torch.device("cpu"))
    assert HostMemory().takes(torch.device("cuda", 1))
