"""The state of `ModalityIntegrationRate`: copies, dictionaries and files continue bit-identically."""

import copy
import pickle
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file
from torchmetrics import MetricCollection

from integration.metric.streams import assert_same, fed, sample, whole
from modality_integration import ModalityIntegrationRate


@pytest.mark.parametrize("travel", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), lambda m: m.clone()])
def test_copies_go_on_by_themselves_with_the_same_bits(travel):
    samples = [sample(seed) for seed in range(12)]
    metric = fed(samples[:6], hold=60)
    other = travel(metric)
    before = metric.compute().to_json()
    for one in samples[6:]:
        other.update(*one)
    assert other.compute().to_json() == fed(samples, hold=60).compute().to_json()
    assert metric.compute().to_json() == before


@pytest.mark.parametrize("cut", [0, 1, 5, 11])
def test_state_dict_of_plain_tensors_resumes_with_the_same_bits(cut):
    samples = [sample(seed) for seed in range(12)]
    first = fed(samples[:cut], hold=60)
    state = first.state_dict()
    assert all(type(value) is torch.Tensor for value in state.values())
    resumed = ModalityIntegrationRate(hold=60)
    resumed.load_state_dict(state)
    for one in samples[cut:]:
        resumed.update(*one)
        first.update(*one)
    expected = fed(samples, hold=60).compute().to_json()
    assert resumed.compute().to_json() == expected
    assert first.compute().to_json() == expected


def test_state_of_another_rule_and_strange_keys_are_refused():
    metric = fed([sample(0)])
    with pytest.raises(RuntimeError, match="a different outlier rule"):
        ModalityIntegrationRate(outliers="none").load_state_dict(metric.state_dict())
    with pytest.raises(RuntimeError, match="strange"):
        ModalityIntegrationRate().load_state_dict(metric.state_dict() | {"strange": torch.zeros(1)})
    with pytest.raises(RuntimeError, match="version"):
        ModalityIntegrationRate().load_state_dict({})


def test_state_travels_inside_a_module():
    holder = torch.nn.Module()
    holder.metric, holder.linear = fed([sample(0)]), torch.nn.Linear(2, 2)
    holder.metric.persistent(True)
    other = torch.nn.Module()
    other.metric, other.linear = ModalityIntegrationRate(), torch.nn.Linear(2, 2)
    other.load_state_dict(holder.state_dict())
    assert other.metric.compute().to_json() == holder.metric.compute().to_json()


def test_merged_metrics_are_one():
    samples = [sample(seed) for seed in range(12)]
    left, right = fed(samples[:5], precision="exact", hold=60), fed(samples[5:], precision="exact", hold=60)
    by_state, into_empty = copy.deepcopy(left), ModalityIntegrationRate(precision="exact", hold=60)
    left.merge_state(right)
    by_state.merge_state(right.metric_state)
    into_empty.merge_state(left)
    expected = whole(samples)
    for merged in (left, by_state, into_empty):
        assert_same(merged.compute(), expected)
    with pytest.raises(ValueError, match="incoming_state"):
        left.merge_state(fed(samples[:1], outliers="none"))


def test_dtype_casts_of_the_module_leave_the_state_alone():
    metric = fed([sample(seed) for seed in range(6)], hold=60)
    expected = metric.compute().to_json()
    metric.half().to("cpu").double()
    metric._computed = None
    assert metric.compute().to_json() == expected


def test_it_lives_in_a_collection():
    samples = [sample(seed) for seed in range(3)]
    collection = MetricCollection({"mir": ModalityIntegrationRate(), "raw": ModalityIntegrationRate(normalize=False)})
    for one in samples:
        collection.update(*one)
    results = collection.compute()
    assert results["mir"].to_json() == whole(samples).to_json()
    assert results["raw"].to_json() == whole(samples, normalize=False).to_json()


def test_file_resumes_with_the_same_bits_and_its_options(tmp_path):
    samples = [sample(seed) for seed in range(12)]
    path = tmp_path / "state.safetensors"
    fed(samples[:7], hold=60, normalize=False, bounds=True).save(path)
    assert [p.name for p in tmp_path.iterdir()] == ["state.safetensors"]
    resumed = ModalityIntegrationRate.from_file(path)
    in_place = ModalityIntegrationRate(hold=60, normalize=False, bounds=True).load(path)
    for one in samples[7:]:
        resumed.update(*one)
        in_place.update(*one)
    expected = fed(samples, hold=60, normalize=False, bounds=True).compute().to_json()
    assert resumed.compute().to_json() == expected
    assert in_place.compute().to_json() == expected


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "state.safetensors"
    fed([sample(0)]).save(path)
    before = path.read_bytes()

    def no_space(tensors, target, **kwargs):
        target.write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr("modality_integration.metric.state_file.save_file", no_space)
    with pytest.raises(OSError, match="no space"):
        fed([sample(1)]).save(path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["state.safetensors"]


def test_files_that_are_no_state_are_named(tmp_path):
    text, other = tmp_path / "a.txt", tmp_path / "b.safetensors"
    text.write_text("hello")
    save_file({"x": torch.zeros(1)}, other)
    with pytest.raises(ValueError, match=r"a\.txt is not a readable safetensors file"):
        ModalityIntegrationRate.from_file(text)
    with pytest.raises(ValueError, match=r"b\.safetensors is not a state of ModalityIntegrationRate"):
        ModalityIntegrationRate().load(other)


KILLED = """
import os, signal, sys
sys.path[:0] = {paths!r}
from integration.metric.streams import ModalityIntegrationRate, sample
metric = ModalityIntegrationRate(hold=60)
for seed in range(12):
    metric.update(*sample(seed))
    metric.save({path!r})
    if seed == 6:
        os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_process_is_resumed_from_its_file_with_the_same_bits(tmp_path):
    path = tmp_path / "state.safetensors"
    child = subprocess.run([sys.executable, "-c", KILLED.format(paths=sys.path, path=str(path))], capture_output=True)
    assert child.returncode == -9, child.stderr.decode()
    resumed = ModalityIntegrationRate.from_file(path)
    for seed in range(7, 12):
        resumed.update(*sample(seed))
    expected = fed([sample(seed) for seed in range(12)], hold=60).compute()
    assert resumed.compute().to_json() == expected.to_json()
