"""ModalityIntegrationRate: the value of mir() in one pass, errors that change nothing, and persistent state."""

import math

import pytest
import torch
from torchmetrics.utilities.exceptions import TorchMetricsUserError

from integration.metric.streams import LAYERS, D, assert_same, fed, sample, whole
from modality_integration import ModalityIntegrationRate


@pytest.mark.parametrize("outliers", ["remove", "none"])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("hold", [None, 60])
def test_one_pass_gives_the_value_of_all_features_at_once(outliers, normalize, hold):
    samples = [sample(seed) for seed in range(20)]
    metric = fed(samples, outliers=outliers, normalize=normalize, hold=hold, precision="exact")
    result = metric.compute()
    assert_same(result, whole(samples, outliers=outliers, normalize=normalize))
    assert result.notes == []
    assert outliers == "none" or sum(result.removed["text"]) > 0
    assert metric.held_bytes <= 2 * LAYERS * (hold or 2048) * D * 4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_every_dtype_keeps_the_promise_of_the_default_precision(dtype):
    samples = [sample(seed, dtype=dtype) for seed in range(20)]
    assert_same(fed(samples, hold=60).compute(), whole(samples), tolerance=1e-4)


def test_layout_of_the_batch_does_not_matter():
    samples = [sample(seed) for seed in range(6)]
    flat = [([h.flatten(0, 1) for h in hidden], v.flatten().to(torch.uint8), t.flatten()) for hidden, v, t in samples]
    strided = [([h.mT.contiguous().mT for h in hidden], v, t) for hidden, v, t in samples]
    expected = fed(samples).compute()
    assert fed(flat).compute().per_layer == expected.per_layer
    assert fed(strided).compute().per_layer == expected.per_layer


def test_fewer_tokens_than_dimensions_are_exact():
    samples = [sample(0, tokens=10, batch=1), sample(1, tokens=9, batch=2)]
    assert_same(fed(samples).compute(), whole(samples))


def test_a_modality_may_be_absent_from_an_update():
    hidden, vision, text = sample(0, tokens=200)
    none = torch.zeros_like(vision)
    parts = fed([(hidden, vision, none), (hidden, none, text), (hidden, none, none)])
    assert parts.compute().per_layer == fed([(hidden, vision, text)]).compute().per_layer


def test_a_covariance_short_of_rank_is_survived_and_told_unless_it_is_exact():
    one = sample(0, tokens=14, batch=1)  # the same 14 tokens repeatedly: more tokens than d, but of lower rank
    samples = [one] * 30
    expected = whole(samples)
    rounded = fed(samples, hold=60).compute()
    assert rounded.per_layer == pytest.approx(expected.per_layer, rel=1e-3)
    exact = fed(samples, hold=60, precision="exact").compute()
    assert exact.per_layer == pytest.approx(expected.per_layer, rel=1e-6)
    assert exact.notes == []
    assert any("rank-deficient at the accumulated precision" in note for note in rounded.notes)


def test_a_massive_token_in_every_sample_is_removed():
    samples = [sample(seed) for seed in range(10)]
    for hidden, _, text in samples:
        for states in hidden:
            first = states[0, text[0].nonzero()[0]]
            states[0, text[0].nonzero()[0]] = first * 1000 / first.norm()
    result = fed(samples, hold=60).compute()
    assert_same(result, whole(samples), tolerance=1e-4)
    assert min(result.removed["text"]) == 10


def test_rows_counted_before_the_norms_moved_are_told_and_a_second_pass_is_exact():
    samples = [sample(seed) for seed in range(2)] + [sample(seed, scale=30.0) for seed in range(2, 40)]
    for hidden, _, _ in samples:
        for states in hidden:
            states /= states.norm(dim=-1, keepdim=True) ** 0.9  # narrow the norms, so that the first samples stand out
    metric = fed(samples, hold=50, precision="exact")
    first, expected = metric.compute(), whole(samples)
    missed = first.kept["vision"][0] - expected.kept["vision"][0]
    assert missed > 0
    assert any(note.startswith(f"layer 1, vision: {missed} tokens beyond") for note in first.notes)
    assert first.missed["vision"][0] == missed
    second = metric.second_pass()
    for one in samples:
        second.update(*one)
    assert_same(second.compute(), expected)
    assert second.compute().notes == []
    assert second.compute().total_missed == 0


def test_what_is_held_back_takes_the_memory_that_it_says_and_no_large_update_more():
    metric = fed([sample(0, tokens=2000)], hold=50)
    buffers = sum(tokens.others._buffer.nbytes for stream in metric._layers for tokens in stream.tokens.values())
    assert metric.held_bytes == buffers <= 2 * LAYERS * 50 * D * 4


def test_indices_travel_to_the_device_once_an_update_and_not_once_a_layer(monkeypatch):
    travelled = []

    def sent(tensor, device):
        travelled.append(tuple(tensor.shape))
        return tensor.to(device)

    for module in ("forward_tokens", "accumulator", "outliers"):
        monkeypatch.setattr(f"modality_integration.metric.{module}.sent", sent)
    fed([sample(0)])
    assert len(travelled) == 2  # vision and text


def test_a_second_pass_keeps_what_torchmetrics_was_told():
    def sync(tensor, group=None):
        return [tensor]

    told = {"sync_on_compute": False, "compute_with_cache": False, "dist_sync_on_step": True, "dist_sync_fn": sync}
    second = fed([sample(0)], **told).second_pass()
    assert {name: getattr(second, name) for name in told} == told


def test_second_pass_says_when_it_saw_other_tokens():
    metric = fed([sample(seed) for seed in range(4)])
    second = metric.second_pass()
    second.update(*sample(9))
    assert any("other tokens than the first pass" in note for note in second.compute().notes)


def test_bounds_surround_the_value():
    result = fed([sample(seed) for seed in range(6)], bounds=True, hold=60).compute()
    assert result.lower <= result.value <= result.upper
    assert result.upper - result.lower < 1e-6


def test_compute_is_repeatable_and_changes_nothing():
    samples = [sample(seed) for seed in range(12)]
    asked, never = ModalityIntegrationRate(hold=60), ModalityIntegrationRate(hold=60)
    for index, one in enumerate(samples):
        asked.update(*one)
        never.update(*one)
        if index % 3 == 0:
            assert asked.compute().per_layer == asked.compute().per_layer
    assert asked.compute().to_json() == never.compute().to_json()


def test_forward_gives_the_batch_and_counts_it():
    samples = [sample(seed) for seed in range(4)]
    metric, plain = ModalityIntegrationRate(), fed(samples)
    for one in samples:
        assert metric(*one).to_json() == whole([one]).to_json()
    assert metric.compute().to_json() == plain.compute().to_json()
    assert metric.update_count == 4


def test_forward_of_a_batch_without_a_value_changes_nothing():
    metric = fed([sample(0)])
    before = metric.compute().to_json()
    hidden, vision, text = sample(1)
    with pytest.raises(ValueError, match="layer 1: no token of vision"):
        metric(hidden, torch.zeros_like(vision), text)
    assert metric.compute().to_json() == before


def broken(change):
    hidden, vision, text = sample(7)
    hidden, vision, text = [h.clone() for h in hidden], vision.clone(), text.clone()
    return change(hidden, vision, text) or (hidden, vision, text)


def with_nan(hidden, vision, text):
    hidden[1][1, int(text[1].nonzero()[0]), 3] = math.nan


def with_overlap(hidden, vision, text):
    text[vision] = True


REFUSED = {
    "layer 2: text token \\(1, \\d+\\) is not finite": with_nan,
    "vision_mask and text_mask: \\d+ tokens are in both": with_overlap,
    "hidden_states: has 2 layers, earlier tokens had 3": lambda h, v, t: (h[:2], v, t),
    "hidden_states: layer 3 has d = 20": lambda h, v, t: ([h[0], h[1], h[2][..., :20]], v, t),
    "hidden_states: layer 1 has d = 24, torch.float64": lambda h, v, t: ([h[0].double(), *h[1:]], v, t),
    "hidden_states\\[1\\]: has tokens \\(1, 40\\)": lambda h, v, t: ([h[0], h[1][:1], h[2]], v, t),
    "hidden_states\\[0\\]: expected shape \\(B, T, d\\)": lambda h, v, t: ([x[None] for x in h], v[None], t[None]),
    "vision_mask: expected one entry per token": lambda h, v, t: (h, v[:, :-1], t),
    "text_mask: expected one of the dtypes": lambda h, v, t: (h, v, t.float()),
    "hidden_states\\[2\\]: expected one of the dtypes": lambda h, v, t: ([h[0], h[1], h[2].int()], v, t),
    "hidden_states: expected at least one layer": lambda h, v, t: ([], v, t),
    "hidden_states: expected a list": lambda h, v, t: (torch.stack(h), v, t),
}


@pytest.mark.parametrize("message", REFUSED)
def test_a_refused_update_changes_nothing(message):
    metric = fed([sample(seed) for seed in range(4)], hold=60)
    before, count = metric.state_dict(), metric.update_count
    with pytest.raises((ValueError, TypeError), match=message):
        metric.update(*broken(REFUSED[message]))
    after = metric.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert metric.update_count == count


def test_non_finite_states_outside_the_masks_do_not_matter():
    hidden, vision, text = sample(0)
    poisoned = [h.masked_fill(~(vision | text)[..., None], math.nan) for h in hidden]
    assert fed([(poisoned, vision, text)]).compute().per_layer == fed([(hidden, vision, text)]).compute().per_layer


def test_inputs_are_unchanged_and_not_kept():
    hidden, vision, text = sample(0)
    before = [h.clone() for h in hidden]
    metric = fed([(hidden, vision, text)])
    assert all(torch.equal(h, b) for h, b in zip(hidden, before, strict=True))
    expected = metric.compute().per_layer
    for states in hidden:
        states.fill_(math.nan)
    metric._computed = None
    assert metric.compute().per_layer == expected


def test_states_made_in_inference_mode_and_with_gradients_can_follow_each_other():
    samples = [sample(seed) for seed in range(6)]
    metric = ModalityIntegrationRate(hold=60)
    for index, (hidden, vision, text) in enumerate(samples):
        with torch.inference_mode(index % 2 == 0):
            metric.update([h.clone().requires_grad_(index % 2 == 1) for h in hidden], vision, text)
    assert metric.compute().to_json() == fed(samples, hold=60).compute().to_json()


def test_too_few_tokens_name_layer_and_modality():
    hidden, vision, text = sample(0)
    one = torch.zeros_like(vision)
    one[0, int(vision[0].nonzero()[0])] = True
    with pytest.raises(ValueError, match="layer 1: 1 token of vision; a covariance requires at least 2"):
        fed([(hidden, one, text)]).compute()
    with (
        pytest.warns(UserWarning, match="before the ``update`` method"),
        pytest.raises(ValueError, match="no hidden states yet"),
    ):
        ModalityIntegrationRate().compute()


def test_median_is_refused_with_the_way_out():
    with pytest.raises(ValueError, match=r'outliers: expected .* got "median".* use mir\(\)'):
        ModalityIntegrationRate(outliers="median")


@pytest.mark.parametrize(
    "option", [{"outliers": "iqr"}, {"precision": "tf32"}, {"sqrt_precision": "half"}, {"hold": -1}]
)
def test_options_are_checked(option):
    with pytest.raises(ValueError, match=next(iter(option))):
        ModalityIntegrationRate(**option)


def test_reset_forgets_everything():
    metric = fed([sample(0)], hold=60)
    metric.reset()
    metric.update(*sample(1))
    assert metric.compute().to_json() == fed([sample(1)], hold=60).compute().to_json()


def test_a_synced_metric_refuses_forward():
    metric = fed([sample(0)])
    metric._is_synced = True
    with pytest.raises(TorchMetricsUserError, match="unsync"):
        metric(*sample(1))
