"""The standard error of MIR against explicitly left-out samples and the spread of repetitions; and its state."""

import copy
import math

import numpy as np
import pytest
import torch

from integration.metric.streams import LAYERS, fed, sample, whole
from modality_integration import MIRResult, ModalityIntegrationRate, jackknife


def singles(count):
    """Samples of one sequence each."""
    return [sample(seed, batch=1) for seed in range(count)]


def by_hand(samples, groups, **options):
    """Each layer's distances and MIR with samples g, g + groups, ... left out, from mir() of the others."""
    rest = [[one for i, one in enumerate(samples) if i % groups != g] for g in range(groups)]
    results = [whole(others, **options) for others in rest]
    return [[r.per_layer[k] for r in results] for k in range(LAYERS)], [r.value for r in results]


@pytest.mark.parametrize("outliers", ["remove", "none"])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("hold", [None, 60])
@pytest.mark.parametrize("groups", [3, 5])
def test_it_is_that_of_mir_with_each_groups_samples_left_out(outliers, normalize, hold, groups):
    samples = singles(31)
    result = fed(samples, groups=groups, hold=hold, precision="exact", outliers=outliers, normalize=normalize).compute()
    layers, values = by_hand(samples, groups, outliers=outliers, normalize=normalize)
    np.testing.assert_allclose(result.left_out, layers, rtol=1e-9)
    expected = math.sqrt((groups - 1) / groups * sum((v - np.mean(values)) ** 2 for v in values))
    assert result.error == pytest.approx(expected, rel=1e-6)
    assert result.layer_errors == pytest.approx([jackknife(distances) for distances in layers], rel=1e-6)
    assert result.notes == []


def test_the_value_is_that_without_groups():
    samples = singles(30)
    for options in ({}, {"hold": 60, "precision": "exact", "bounds": True}):
        plain, grouped = fed(samples, **options).compute(), fed(samples, groups=5, **options).compute()
        assert grouped.per_layer == pytest.approx(plain.per_layer, rel=1e-9)
        assert (grouped.kept, grouped.removed) == (plain.kept, plain.removed)
        assert plain.error is None
        assert plain.layer_errors is None


def correlated(rng, count, d=6):
    """A batch of samples whose tokens share an offset: samples are independent, tokens are not."""
    hidden = rng.normal(size=(count, 24, d)) * np.linspace(1, 0.3, d) + 0.7 * rng.normal(size=(count, 1, d))
    mask = np.broadcast_to(np.arange(24) < 12, (count, 24)).copy()
    hidden[:, :12] += 0.5 + 0.4 * rng.normal(size=(count, 1, 1))
    return [([torch.from_numpy(hidden)], torch.from_numpy(mask), torch.from_numpy(~mask))]


@pytest.mark.parametrize("groups", [5, 10])
def test_it_agrees_with_the_spread_of_independent_repetitions(groups):
    rng = np.random.default_rng(7)
    results = [fed(correlated(rng, 60), groups=groups).compute() for _ in range(100)]
    spread = np.std([result.value for result in results], ddof=1)
    root_mean_square = np.sqrt(np.mean([result.error**2 for result in results]))
    assert spread / 1.25 < root_mean_square < spread * 1.25


def test_a_row_of_a_batch_is_a_sample_and_a_flat_update_one_too():
    ones = singles(12)
    batch = [torch.cat(states) for states in zip(*(hidden for hidden, _, _ in ones), strict=True)]
    together = (batch, torch.cat([v for _, v, _ in ones]), torch.cat([t for _, _, t in ones]))
    flat = [([h[0] for h in hidden], v[0], t[0]) for hidden, v, t in ones]
    expected = fed(ones, groups=5).compute()
    for samples in ([together], flat):
        np.testing.assert_allclose(fed(samples, groups=5).compute().left_out, expected.left_out, rtol=1e-9)


def test_accumulators_are_one_a_group_and_none_more_without():
    for groups, expected in ((0, 1), (5, 5)):
        metric = fed(singles(30), hold=60, groups=groups)
        for layer in metric._layers:
            assert len(layer.moments) == 2 * expected


@pytest.mark.parametrize("count", [1, 2])
def test_too_few_samples_have_a_value_and_a_note_in_place_of_the_error(count):
    one = sample(0, batch=1)
    hidden, vision, text = sample(1, batch=1)
    few = torch.zeros_like(vision)
    few[0, vision[0].nonzero()[:1]] = True
    samples = [one, (hidden, few, torch.zeros_like(text))][:count]  # without the first, one vision token is left
    result = fed(samples, groups=5).compute()
    assert math.isfinite(result.value)
    assert result.error is None
    assert result.left_out is None
    assert [note for note in result.notes if note.startswith("no standard error: it requires samples in at least two")]


def test_fewer_samples_than_groups_are_groups_of_one():
    samples = singles(4)
    result = fed(samples, groups=10).compute()
    layers, _ = by_hand(samples, 4)
    np.testing.assert_allclose(result.left_out, layers, rtol=1e-9)


def test_a_value_of_minus_infinity_has_no_error():
    same = torch.eye(3).repeat(4, 1)[None]
    mask = torch.arange(12)[None] < 6
    result = fed([([same], mask, ~mask)] * 4, groups=2).compute()
    assert result.value == -math.inf
    assert result.error is None
    assert MIRResult.from_json(result.to_json()) == result


@pytest.mark.parametrize("groups", [1, -1, 256])
def test_a_number_of_groups_that_cannot_be_is_refused(groups):
    with pytest.raises(ValueError, match=r"groups: expected 0 .* or 2 to 255"):
        ModalityIntegrationRate(groups=groups)


@pytest.mark.parametrize("cut", [0, 3, 17])
def test_state_resumes_with_the_same_bits(cut, tmp_path):
    samples, options = singles(20), {"hold": 60, "groups": 5}
    first = fed(samples[:cut], **options)
    first.save(tmp_path / "state.safetensors")
    resumed = [
        ModalityIntegrationRate.from_file(tmp_path / "state.safetensors"),
        ModalityIntegrationRate(**options),
        copy.deepcopy(first),
    ]
    resumed[1].load_state_dict(first.state_dict())
    expected = fed(samples, **options).compute()
    assert expected.error > 0
    for metric in resumed:
        for one in samples[cut:]:
            metric.update(*one)
        assert metric.compute().to_json() == expected.to_json()


def test_after_a_reset_the_dealing_begins_anew():
    samples = singles(12)
    metric = fed(singles(3), groups=5)
    metric.reset()
    for one in samples:
        metric.update(*one)
    assert metric.compute().to_json() == fed(samples, groups=5).compute().to_json()


def test_merged_metrics_leave_out_the_same_group_of_both():
    samples, options = singles(30), {"hold": 60, "groups": 5, "precision": "exact"}
    left, right = fed(samples[:15], **options), fed(samples[15:], **options)  # 15 is a multiple of the groups
    by_state = copy.deepcopy(left)
    left.merge_state(right)
    by_state.merge_state(right.state_dict())
    layers, _ = by_hand(samples, 5)
    for metric in (left, by_state):
        np.testing.assert_allclose(metric.compute().left_out, layers, rtol=1e-9)
    left.update(*samples[0])
    assert left._samples == 31


def test_a_second_pass_has_an_error_under_the_limits_of_the_first():
    samples = singles(20)
    first = fed(samples, hold=60, groups=5, precision="exact")
    second = first.second_pass()
    for one in samples:
        second.update(*one)
    assert second.compute().value == pytest.approx(first.compute().value, abs=1e-9)
    assert second.compute().error == pytest.approx(first.compute().error, rel=0.2)


def test_states_of_other_groups_are_refused_and_change_nothing():
    metric, other = fed(singles(4), groups=5), fed(singles(4))
    before = metric.compute().to_json()
    with pytest.raises(RuntimeError, match="was gathered in 1 groups, but this metric has groups=5"):
        metric.load_state_dict(other.state_dict())
    with pytest.raises(RuntimeError, match="was gathered in 5 groups, but this metric has groups=0"):
        other.load_state_dict(metric.state_dict())
    with pytest.raises(ValueError, match=r"incoming_state: expected .* groups=5"):
        metric.merge_state(other)
    assert metric.compute().to_json() == before


def test_a_refused_update_takes_no_turn():
    samples = singles(12)
    metric = ModalityIntegrationRate(groups=5)
    for one in samples:
        with pytest.raises(ValueError, match="are in both"):
            metric.update(one[0], one[1], one[1])
        metric.update(*one)
    assert metric.compute().to_json() == fed(samples, groups=5).compute().to_json()


def test_printed_and_written_it_stands_beside_the_value(tmp_path):
    result = fed(singles(20), groups=5).compute()
    assert str(result).startswith(f"MIR {result.value:.4f} +- {result.error:.4f} over 3 layers")
    read = MIRResult.from_json(result.to_json())
    assert read == result
    assert read.error == result.error
