"""The metric on a CUDA device: the same value as on the CPU, however the state got there."""

import warnings

import pytest
import torch

from integration.metric.streams import assert_same, fed, sample, whole
from integration.metric.test_metric import pair
from modality_integration import ModalityIntegrationRate, mir
from modality_integration.metric.host_memory import HostMemory

pytestmark = pytest.mark.gpu


def on_gpu(one):
    hidden, vision, text = one
    return [h.cuda() for h in hidden], vision.cuda(), text.cuda()


@pytest.mark.parametrize(("n", "m"), [(400, 300), (30, 50)])
def test_features_on_the_device_give_the_value_of_the_cpu(n, m):
    vision, text = pair(n, m, 64)
    expected = mir([vision], [text], bounds=True)
    result = mir([vision.cuda()], [text.cuda()], bounds=True)
    assert_same(result, expected, tolerance=1e-6)
    assert result.lower <= expected.value <= result.upper


@pytest.mark.parametrize("precision", ["auto", "exact"])
def test_a_stream_on_the_device_gives_the_value_of_all_features_at_once(precision):
    samples = [sample(seed) for seed in range(20)]
    result = fed([on_gpu(one) for one in samples], hold=60, precision=precision).compute()
    assert_same(result, whole(samples), tolerance=1e-9 if precision == "exact" else 1e-4)


@pytest.mark.parametrize("batch", [1, 4])
def test_finished_groups_leave_the_device_without_a_wait_and_change_no_bit(batch, tmp_path):
    samples = [on_gpu(sample(seed, batch=batch)) for seed in range(30)]
    options = {"hold": 60, "groups": 5, "samples": 30 * batch}
    moved, stays = ModalityIntegrationRate(**options), ModalityIntegrationRate(**options)
    stays._host = HostMemory(of=())
    waits = []
    for metric in (moved, stays):
        metric.update(*samples[0])  # loads kernels
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                for one in samples[1:]:
                    metric.update(*one)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        waits.append(sum("synchronizing" in str(warning.message) for warning in caught))
    assert waits[0] == waits[1]
    for layer in moved._layers:
        assert len(layer.moments.here) <= 4
        away = [tensor for one in layer.moments._away.values() for tensor in (one.state or {}).values()]
        assert away
        assert all(tensor.is_pinned() for tensor in away if tensor.numel())
    assert all(len(layer.moments.here) == 10 for layer in stays._layers)
    assert moved.compute().to_json() == stays.compute().to_json()
    moved.save(tmp_path / "state.safetensors")
    assert ModalityIntegrationRate.from_file(tmp_path / "state.safetensors").to("cuda").compute().kept
    first, second = moved.state_dict(), stays.state_dict()
    assert set(first) == set(second)
    assert all(torch.equal(value.cpu(), second[key].cpu()) for key, value in first.items())


def test_an_update_waits_for_the_device_as_often_for_many_layers_as_for_one():
    def waits(layers):
        samples = [on_gpu(sample(seed)) for seed in range(8)]
        metric = ModalityIntegrationRate(hold=60)
        for hidden, vision, text in samples[:4]:
            metric.update((hidden * layers)[:layers], vision, text)
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                for hidden, vision, text in samples[4:]:
                    metric.update((hidden * layers)[:layers], vision, text)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return sum("synchronizing" in str(warning.message) for warning in caught)

    assert waits(9) == waits(1) <= 4 * 3  # two masks and the norms of all layers


def test_state_follows_the_data_and_to(tmp_path):
    samples = [sample(seed) for seed in range(12)]
    metric = fed([on_gpu(one) for one in samples[:4]], hold=60, precision="exact")
    metric.to("cpu")
    assert {stream.device.type for stream in metric._layers} == {"cpu"}
    for one in samples[4:8]:
        metric.update(*one)
    metric.save(tmp_path / "state.safetensors")
    metric = ModalityIntegrationRate.from_file(tmp_path / "state.safetensors").to("cuda")
    for one in samples[8:]:
        metric.update(*on_gpu(one))
    assert {stream.device.type for stream in metric._layers} == {"cuda"}
    assert_same(metric.compute(), whole(samples))


def test_layers_may_lie_on_different_devices_than_the_masks():
    samples = [sample(seed) for seed in range(6)]
    spread = [([h.cuda() if k else h for k, h in enumerate(hidden)], v, t) for hidden, v, t in samples]
    assert_same(fed(spread, hold=60, precision="exact").compute(), whole(samples))


def test_without_a_rule_nothing_may_be_left_to_decide_at_the_end():
    samples = [on_gpu(sample(seed)) for seed in range(6)]
    metric = fed(samples, hold=60, outliers="none", precision="exact")
    assert_same(metric.compute(), whole([sample(seed) for seed in range(6)], outliers="none"))
