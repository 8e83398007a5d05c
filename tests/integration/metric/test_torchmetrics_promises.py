"""Compatibility with torchmetrics' own wrappers, operators and checks."""

import pickle

import matplotlib
import pytest
import torch
from torchmetrics import MeanMetric, Metric, MetricCollection, wrappers
from torchmetrics.utilities.checks import check_forward_full_state_property
from torchmetrics.wrappers import BootStrapper, ClasswiseWrapper, MetricTracker, MinMaxMetric, Running

from integration.metric.streams import fed, sample, whole
from modality_integration import MIRResult, ModalityIntegrationRate

matplotlib.use("agg")
SAMPLES = [sample(seed) for seed in range(4)]


def test_plot_draws_a_value_or_several():
    metric = fed(SAMPLES[:1])
    figure, axes = metric.plot()
    assert axes.lines[0].get_ydata().tolist() == [metric.compute().value]
    assert axes.get_ylabel() == "ModalityIntegrationRate"
    values = [metric(*one) for one in SAMPLES[1:]]
    kept = [MIRResult.from_json(value.to_json()) for value in values]  # no tensors
    for series in (values, tuple(values), kept):
        _, axes = metric.plot(series)
        assert list(axes.lines[0].get_ydata()) == [value.value for value in values]
    none, same = metric.plot(kept[0], ax=figure.add_subplot())
    assert none is None
    assert list(same.lines[0].get_ydata()) == [values[0].value]
    matplotlib.pyplot.close("all")


def test_a_tracker_finds_the_best_step():
    tracker = MetricTracker(ModalityIntegrationRate(), maximize=False)
    for one in SAMPLES:
        tracker.increment()
        tracker.update(*one)
    values = [whole([one]).value for one in SAMPLES]
    assert tracker.compute_all().tolist() == values
    assert tracker.best_metric(return_step=True) == (min(values), values.index(min(values)))
    assert isinstance(tracker.compute(), MIRResult)


def test_a_tracker_of_a_collection_finds_the_best_step():
    tracker = MetricTracker(MetricCollection({"mir": ModalityIntegrationRate()}), maximize=False)
    for one in SAMPLES:
        tracker.increment()
        tracker(*one)
    values = [whole([one]).value for one in SAMPLES]
    best, step = tracker.best_metric(return_step=True)
    assert (best["mir"], step["mir"]) == (min(values), values.index(min(values)))


def test_minmax_remembers_the_extremes():
    metric, values = MinMaxMetric(ModalityIntegrationRate()), []
    for count, one in enumerate(SAMPLES, 1):
        metric.update(*one)
        found = metric.compute()
        values.append(fed(SAMPLES[:count]).compute().value)
        assert (float(found["raw"]), float(found["min"]), float(found["max"])) == (values[-1], min(values), max(values))
    assert isinstance(metric.plot()[0], matplotlib.figure.Figure)
    matplotlib.pyplot.close("all")


def test_a_bootstrap_takes_a_mask_first_by_name():
    boot = BootStrapper(ModalityIntegrationRate(), num_bootstraps=6, raw=True, sampling_strategy="multinomial")
    torch.manual_seed(0)
    many = [sample(seed, batch=8) for seed in range(3)]
    for hidden, vision, text in many:
        boot.update(vision_mask=vision, text_mask=text, hidden_states=hidden)
    found = boot.compute()
    assert found["raw"].shape == (6,)
    assert len(found["raw"].unique()) == 6
    assert abs(found["mean"] - whole(many).value) < 4 * found["std"]
    assert "vision_mask=..." in ModalityIntegrationRate.__doc__


@pytest.mark.parametrize(
    ("compose", "expected"),
    [
        (lambda a, b: a - b, lambda x, y: x - y),
        (lambda a, b: a + 1, lambda x, y: x + 1),
        (lambda a, b: 2 * a, lambda x, y: 2 * x),
        (lambda a, b: a / b, lambda x, y: x / y),
        (lambda a, b: abs(a), lambda x, y: abs(x)),
        (lambda a, b: -a, lambda x, y: -abs(x)),  # torchmetrics negates the absolute value
        (lambda a, b: a**2, lambda x, y: x**2),
        (lambda a, b: a < b, lambda x, y: x < y),
        (lambda a, b: a == b, lambda x, y: x == y),
        (lambda a, b: (a - b) * torch.tensor(2.0), lambda x, y: (x - y) * 2),
    ],
)
def test_compositions_are_those_of_the_values(compose, expected):
    a, b = ModalityIntegrationRate(), ModalityIntegrationRate(normalize=False)
    composed = compose(a, b)
    composed.update(*SAMPLES[0])
    values = (whole(SAMPLES[:1]).value, whole(SAMPLES[:1], normalize=False).value)
    assert composed.compute().item() == pytest.approx(expected(*values), rel=1e-12)
    of_the_batch = (whole(SAMPLES[1:2]).value, whole(SAMPLES[1:2], normalize=False).value)
    assert composed(*SAMPLES[1]).item() == pytest.approx(expected(*of_the_batch), rel=1e-12)


def test_a_mean_of_values_is_taken():
    mean = MeanMetric()
    for seed in range(3):
        mean.update(fed([sample(seed)]).compute())
    assert mean.compute().item() == pytest.approx(sum(whole([sample(seed)]).value for seed in range(3)) / 3, rel=1e-6)


def test_a_collection_computes_plots_and_goes_forward():
    collection = MetricCollection({"mir": ModalityIntegrationRate(), "raw": ModalityIntegrationRate(normalize=False)})
    results = collection(*SAMPLES[0])
    assert results["mir"] == whole(SAMPLES[:1])
    assert collection.compute()["raw"] == whole(SAMPLES[:1], normalize=False)
    assert len(collection.plot()) == 2
    _, axes = collection.plot(together=True)
    assert len(axes.lines) == 2
    matplotlib.pyplot.close("all")
    collection.reset()
    assert not collection["mir"].update_called


@pytest.mark.skipif(not hasattr(wrappers, "LambdaInputTransformer"), reason="came with torchmetrics 1.5")
def test_inputs_are_transformed_on_the_way():
    doubled = wrappers.LambdaInputTransformer(ModalityIntegrationRate(), lambda hidden: [2 * h for h in hidden])
    doubled.update(*SAMPLES[0])
    assert doubled.compute().value == pytest.approx(whole(SAMPLES[:1]).value, abs=1e-9)


def test_wrappers_that_cannot_take_it_say_so():
    with pytest.raises(ValueError, match="`full_state_update` set to `False`"):
        Running(ModalityIntegrationRate())
    classwise = ClasswiseWrapper(ModalityIntegrationRate())
    classwise.update(*SAMPLES[0])
    with pytest.raises(TypeError, match="0-d tensor"):
        classwise.compute()


def test_torchmetrics_check_of_the_forward_pass_finds_both_ways_equal(capsys):
    hidden, vision, text = SAMPLES[0]
    arguments = {"hidden_states": hidden, "vision_mask": vision, "text_mask": text}
    check_forward_full_state_property(ModalityIntegrationRate, input_args=arguments, num_update_to_compare=[2], reps=2)
    assert "Full state for 2 steps took" in capsys.readouterr().out  # printed if the values agree


def test_counts_of_updates_are_those_of_any_metric():
    metric = ModalityIntegrationRate()
    assert (metric.update_called, metric.update_count) == (False, 0)
    metric(*SAMPLES[0])
    metric.update(*SAMPLES[1])
    assert (metric.update_called, metric.update_count, metric._update_count) == (True, 2, 2)
    metric.reset()
    assert (metric.update_called, metric.update_count, metric._computed, metric._forward_cache) == (
        False,
        0,
        None,
        None,
    )


def test_every_metric_has_a_hash_of_its_own():
    metric = fed(SAMPLES[:1])
    assert len({metric, metric.clone(), pickle.loads(pickle.dumps(metric))}) == 3


@pytest.mark.parametrize(
    "move",
    [
        lambda m: m.to("cpu"),
        lambda m: m.cpu(),
        lambda m: m.half(),
        lambda m: m.double(),
        lambda m: m.float(),
        lambda m: m.set_dtype(torch.float16),
        lambda m: m.to(torch.bfloat16),
        lambda m: torch.nn.ModuleList([m]).half(),
    ],
)
def test_moves_and_casts_leave_results_and_state_alone(move):
    metric = ModalityIntegrationRate(hold=60)
    metric(*SAMPLES[0])
    expected, of_the_batch = metric.compute(), metric._forward_cache
    move(metric)
    assert metric.compute() is expected
    assert metric._forward_cache is of_the_batch
    metric._computed = None
    assert metric.compute() == expected
    metric.update(*SAMPLES[1])
    assert metric.compute() == fed(SAMPLES[:2], hold=60).compute()


def test_constants_of_a_metric_cannot_be_set():
    assert isinstance(ModalityIntegrationRate(), Metric)
    with pytest.raises(RuntimeError, match="Can't change const"):
        ModalityIntegrationRate().higher_is_better = True
