"""The metric's state in state_dicts: where it is included, that it is a copy, and what loading accepts."""

import copy
import pickle

import pytest
import torch
from torchmetrics import MeanMetric, MetricCollection
from torchmetrics.wrappers import MetricTracker

from integration.metric.streams import fed, sample
from modality_integration import ModalityIntegrationRate
from modality_integration.metric import metric_state

SAMPLES = [sample(seed) for seed in range(6)]


class Model(torch.nn.Module):
    def __init__(self, metric=None):
        super().__init__()
        self.linear = torch.nn.Linear(2, 2)
        self.metric = metric


def nested(metric):
    return torch.nn.Sequential(torch.nn.Linear(2, 2), Model(metric))


def collected(metric):
    return Model(MetricCollection({"mir": metric, "mean": MeanMetric()}, compute_groups=False))


PLACES = [Model, nested, collected, lambda metric: MetricCollection({"mir": metric}), lambda metric: Model(-metric)]


def found_in(model):
    return next(module for module in model.modules() if isinstance(module, ModalityIntegrationRate))


def states_of(state):
    return [key for key in state if key.endswith((".version", ".samples")) or ".layers." in key]


@pytest.mark.parametrize("place", PLACES)
def test_a_model_has_the_state_once_it_is_persistent(place):
    metric = fed(SAMPLES[:3], hold=60)
    model = place(metric)
    assert states_of(model.state_dict()) == []
    metric.persistent(True)
    state = model.state_dict()
    prefix = next(key for key in state if key.endswith("samples")).removesuffix("samples")
    assert {key.removeprefix(prefix) for key in states_of(state)} == set(metric.state_dict())
    other = place(ModalityIntegrationRate(hold=60))  # which is not persistent
    assert other.load_state_dict(state).unexpected_keys == []
    found_in(other).update(*SAMPLES[3])
    assert found_in(other).compute() == fed(SAMPLES[:4], hold=60).compute()
    metric.persistent(False)
    assert states_of(model.state_dict()) == []


@pytest.mark.parametrize("persistent", [None, True, False])
@pytest.mark.parametrize("place", PLACES)
def test_a_checkpoint_without_the_metric_loads_and_leaves_it_alone(place, persistent):
    metric = fed(SAMPLES[:2], hold=60)
    model = place(metric)
    without = model.state_dict()
    if persistent is not None:
        metric.persistent(persistent)
    report = model.load_state_dict(without)
    assert (report.missing_keys, report.unexpected_keys) == ([], [])
    assert metric.compute() == fed(SAMPLES[:2], hold=60).compute()


def test_the_metrics_own_state_dict_has_the_state_unless_told_otherwise(tmp_path):
    metric = fed(SAMPLES[:2], hold=60)
    whole = set(metric.state_dict())
    assert "samples" in whole
    metric.persistent(True)
    assert set(metric.state_dict()) == whole
    metric.persistent()
    assert metric.state_dict() == {}
    assert metric.state_dict(prefix="metric.") == {}
    kept = {"before": torch.zeros(1)}
    assert metric.state_dict(destination=kept) is kept
    # Methods that need the state still have it.
    metric.save(tmp_path / "state.safetensors")
    expected = fed(SAMPLES[:2], hold=60).compute()
    assert ModalityIntegrationRate.from_file(tmp_path / "state.safetensors").compute() == expected
    other = ModalityIntegrationRate(hold=60)
    other.merge_state(metric)
    assert other.compute() == expected
    assert set(metric.metric_state) == whole


@pytest.mark.parametrize(
    "copied",
    [
        copy.deepcopy,
        lambda m: m.clone(),
        lambda m: pickle.loads(pickle.dumps(m)),
        lambda m: m.second_pass(),
        lambda m: m.to("cpu"),
    ],
)
@pytest.mark.parametrize("persistent", [None, True, False])
def test_copies_are_as_persistent(copied, persistent):
    metric = fed(SAMPLES[:2], hold=60)
    if persistent is not None:
        metric.persistent(persistent)
    other = copied(metric)
    assert bool(states_of(Model(other).state_dict())) == (persistent is True)
    assert bool(other.state_dict()) == (persistent is not False)


def test_collections_and_trackers_pass_the_word_on():
    collection = MetricCollection({"mir": fed(SAMPLES[:1])})
    collection.persistent(True)
    assert "mir.samples" in collection.state_dict()
    tracker = MetricTracker(collection)
    tracker.increment()
    assert "1.mir.samples" in tracker.state_dict()


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s | {"metric.layers.0.vision.held": torch.zeros(2, 3)}, "layers.0"),
        (lambda s: s | {"metric.strange": torch.zeros(1)}, "nothing was loaded because of unexpected keys.*strange"),
        (lambda s: s | {"metric.version": torch.tensor(99)}, "version: expected"),
    ],
)
def test_a_state_in_a_model_that_does_not_fit_is_refused_and_nothing_is_counted(change, message, strict):
    metric, other = fed(SAMPLES[:2], hold=60), fed(SAMPLES[2:4], hold=60)
    metric.persistent(True)
    state = dict(Model(metric).state_dict())
    with pytest.raises(RuntimeError, match=message):
        Model(other).load_state_dict(change(state), strict=strict)
    assert other.compute() == fed(SAMPLES[2:4], hold=60).compute()


def test_part_of_a_state_in_a_model_is_missing_what_is_not_there():
    metric = fed(SAMPLES[:2], hold=60)
    metric.persistent(True)
    state = {key: value for key, value in Model(metric).state_dict().items() if key != "metric.samples"}
    other = fed(SAMPLES[2:4], hold=60)
    with pytest.raises(RuntimeError, match=r'Missing key.*"metric\.samples"'):
        Model(other).load_state_dict(state)
    assert Model(other).load_state_dict(state, strict=False).missing_keys == ["metric.samples"]
    assert other.compute() == fed(SAMPLES[2:4], hold=60).compute()


@pytest.mark.parametrize("state", [{}, {"weight": torch.zeros(1)}, MeanMetric().state_dict()])
def test_a_metric_by_itself_refuses_what_is_no_state_of_it(state):
    metric = fed(SAMPLES[:2], hold=60)
    with pytest.raises(RuntimeError, match=r"Missing key.*version"):
        metric.load_state_dict(state)
    assert metric.compute() == fed(SAMPLES[:2], hold=60).compute()


def test_keys_beside_the_state_are_passed_by_where_that_is_asked_for():
    state = fed(SAMPLES[:2], hold=60).state_dict() | {"strange": torch.zeros(1)}
    metric = fed(SAMPLES[2:4], hold=60)
    with pytest.raises(RuntimeError, match=r'Unexpected key.*"strange"'):
        metric.load_state_dict(state)
    assert metric.compute() == fed(SAMPLES[2:4], hold=60).compute()
    assert metric.load_state_dict(state, strict=False).unexpected_keys == ["strange"]
    assert metric.compute() == fed(SAMPLES[:2], hold=60).compute()
    with pytest.raises(RuntimeError, match="strange"):
        metric.load_state_dict(state)


TAKEN = {
    "state_dict": lambda metric: metric.state_dict(),
    "in inference mode": lambda metric: torch.inference_mode()(metric.state_dict)(),
    "metric_state": lambda metric: metric.metric_state,
    "in a model": lambda metric: {
        key.removeprefix("metric."): value
        for key, value in (metric.persistent(True), Model(metric).state_dict())[1].items()
        if key.startswith("metric.")
    },
}
CHANGES = {
    "update": lambda metric: metric.update(*SAMPLES[4]),
    "compute": lambda metric: metric.compute(),
    "forward": lambda metric: metric(*SAMPLES[4]),
    "merge_state": lambda metric: metric.merge_state(fed(SAMPLES[4:], groups=metric.options.groups)),
    "load_state_dict": lambda metric: metric.load_state_dict(
        fed(SAMPLES[4:], hold=60, groups=metric.options.groups).state_dict()
    ),
    "reset": lambda metric: metric.reset(),
}


@pytest.mark.parametrize(
    ("taken", "change", "groups"),
    [
        *(("state_dict", change, groups) for change in CHANGES for groups in (0, 2)),
        *((taken, change, 0) for taken in TAKEN for change in ("update", "compute") if taken != "state_dict"),
    ],
)
def test_a_state_that_was_taken_stays_as_it_was(taken, change, groups):
    metric = fed(SAMPLES[:4], hold=60, groups=groups)
    state = TAKEN[taken](metric)
    before = copy.deepcopy(state)
    CHANGES[change](metric)
    for key, value in before.items():
        assert torch.equal(state[key], value), key
        assert not state[key].is_inference()
    fresh = ModalityIntegrationRate(hold=60, groups=groups)
    fresh.load_state_dict(state)
    assert fresh.compute() == fed(SAMPLES[:4], hold=60, groups=groups).compute()


@pytest.mark.parametrize("taken", TAKEN)
def test_what_is_done_to_a_state_that_was_taken_leaves_the_metric(taken):
    metric = fed(SAMPLES[:4], hold=60)
    for value in TAKEN[taken](metric).values():
        value.zero_()
    assert metric.compute() == fed(SAMPLES[:4], hold=60).compute()


def test_what_was_loaded_or_merged_is_a_copy():
    state = fed(SAMPLES[:4], hold=60).state_dict()
    before, metric, merged = copy.deepcopy(state), *(ModalityIntegrationRate(hold=60) for _ in range(2))
    metric.load_state_dict(state)
    merged.merge_state(state)
    for one in (metric, merged):
        one.update(*SAMPLES[4])
        one.compute()
    assert all(torch.equal(state[key], before[key]) for key in before)
    for value in state.values():
        value.zero_()
    for one in (metric, merged):
        one._computed = None
        assert one.compute() == fed(SAMPLES[:5], hold=60).compute()


def test_merged_metrics_go_on_by_themselves():
    one, other = fed(SAMPLES[:2], hold=60), fed(SAMPLES[2:4], hold=60)
    empty = ModalityIntegrationRate(hold=60)
    empty.merge_state(one)
    one.update(*SAMPLES[4])
    assert empty.compute() == fed(SAMPLES[:2], hold=60).compute()
    empty.merge_state(other)
    empty.update(*SAMPLES[5])
    assert one.compute() == fed([*SAMPLES[:2], SAMPLES[4]], hold=60).compute()
    assert other.compute() == fed(SAMPLES[2:4], hold=60).compute()


def test_a_metric_is_not_merged_into_itself():
    metric = fed(SAMPLES[:4], hold=60)
    with pytest.raises(ValueError, match="incoming_state: expected another metric"):
        metric.merge_state(metric)
    metric._computed = None
    assert metric.compute() == fed(SAMPLES[:4], hold=60).compute()


def test_what_stays_inside_is_not_copied():
    metric = fed(SAMPLES, hold=60)
    state = metric_state.to_tensors(metric._layers, metric._samples)
    for k, layer in enumerate(metric._layers):
        for modality in ("vision", "text"):
            (moments,) = (layer.moments.on_device(slot) for slot in layer.moments.slots() if slot[0] == modality)
            assert state[f"layers.{k}.{modality}.moments.0.second"].data_ptr() == moments._second.data_ptr()
