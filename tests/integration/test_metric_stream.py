"""ModalityIntegrationRate: the value of mir() in one pass, refusals that change nothing, and state that survives."""

import copy
import math
import pickle
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file
from torchmetrics import MetricCollection
from torchmetrics.utilities.exceptions import TorchMetricsUserError

from modality_integration.metric import ModalityIntegrationRate, mir

LAYERS, D = 3, 24


def sample(seed, *, tokens=40, batch=2, dtype=torch.float32, scale=1.0):
    """Hidden states (B, T, d) of LAYERS layers with heavy-tailed norms, and the two masks; some tokens in neither."""
    generator = torch.Generator().manual_seed(seed)
    size = torch.exp(0.5 * torch.randn(batch, tokens, 1, generator=generator)) * scale
    role = torch.rand(batch, tokens, generator=generator)
    vision, text = role < 0.55, role > 0.65
    hidden = []
    for k in range(LAYERS):
        states = torch.randn(batch, tokens, D, generator=generator) * size * torch.arange(1, D + 1) ** -0.5
        hidden.append((states * (k + 1) + vision[..., None] * 0.5).to(dtype))
    return hidden, vision, text


def whole(samples, **options):
    """mir() of all samples' tokens at once."""
    layers = range(LAYERS)
    vision = [torch.cat([hidden[k][v] for hidden, v, _ in samples]) for k in layers]
    text = [torch.cat([hidden[k][t] for hidden, _, t in samples]) for k in layers]
    return mir(vision, text, **options)


def fed(samples, **options):
    metric = ModalityIntegrationRate(**options)
    for one in samples:
        metric.update(*one)
    return metric


def assert_same(result, expected, tolerance=1e-9):
    assert result.per_layer == pytest.approx(expected.per_layer, rel=tolerance)
    assert result.alpha == pytest.approx(expected.alpha, rel=1e-12)
    assert result.kept == expected.kept
    assert result.removed == expected.removed


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
    one = sample(0, tokens=14, batch=1)  # 14 tokens again and again: many more than d, spanning less
    samples = [one] * 30
    expected = whole(samples)
    rounded = fed(samples, hold=60).compute()
    assert rounded.per_layer == pytest.approx(expected.per_layer, rel=1e-3)
    exact = fed(samples, hold=60, precision="exact").compute()
    assert exact.per_layer == pytest.approx(expected.per_layer, rel=1e-6)
    assert exact.notes == []
    assert any("lacks rank to the precision it was accumulated in" in note for note in rounded.notes)


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
            states /= states.norm(dim=-1, keepdim=True) ** 0.9  # narrow levels, so that the first samples stand out
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
    buffers = sum(tokens._buffer.nbytes for stream in metric._streams for tokens in stream.tokens.values())
    assert metric.held_bytes == buffers <= 2 * LAYERS * 50 * D * 4


def test_indices_travel_to_the_device_once_an_update_and_not_once_a_layer(monkeypatch):
    travelled = []

    def sent(tensor, device):
        travelled.append(tuple(tensor.shape))
        return tensor.to(device)

    for module in ("metric", "layer_stream", "outliers"):
        monkeypatch.setattr(f"modality_integration.{module}.sent", sent)
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
    "hidden_states: has 2 layers, the tokens before had 3": lambda h, v, t: (h[:2], v, t),
    "hidden_states: layer 3 has d = 20": lambda h, v, t: ([h[0], h[1], h[2][..., :20]], v, t),
    "hidden_states: layer 1 has d = 24, torch.float64": lambda h, v, t: ([h[0].double(), *h[1:]], v, t),
    "hidden_states\\[1\\]: has tokens \\(1, 40\\)": lambda h, v, t: ([h[0], h[1][:1], h[2]], v, t),
    "hidden_states\\[0\\]: takes shape \\(B, T, d\\)": lambda h, v, t: ([x[None] for x in h], v[None], t[None]),
    "vision_mask: takes one entry per token": lambda h, v, t: (h, v[:, :-1], t),
    "text_mask: takes a dtype": lambda h, v, t: (h, v, t.float()),
    "hidden_states\\[2\\]: takes a dtype": lambda h, v, t: ([h[0], h[1], h[2].int()], v, t),
    "hidden_states: takes at least one layer": lambda h, v, t: ([], v, t),
    "hidden_states: takes a list": lambda h, v, t: (torch.stack(h), v, t),
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
    with pytest.raises(ValueError, match="layer 1: 1 token of vision, and a covariance takes at least 2"):
        fed([(hidden, one, text)]).compute()
    with (
        pytest.warns(UserWarning, match="before the ``update`` method"),
        pytest.raises(ValueError, match="no hidden states yet"),
    ):
        ModalityIntegrationRate().compute()


def test_median_is_refused_with_the_way_out():
    with pytest.raises(ValueError, match=r'outliers: "median" takes .* use mir\(\)'):
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
    with pytest.raises(RuntimeError, match="another outlier rule"):
        ModalityIntegrationRate(outliers="none").load_state_dict(metric.state_dict())
    with pytest.raises(RuntimeError, match="strange"):
        ModalityIntegrationRate().load_state_dict(metric.state_dict() | {"strange": torch.zeros(1)})
    with pytest.raises(RuntimeError, match="version"):
        ModalityIntegrationRate().load_state_dict({})


def test_state_travels_inside_a_module():
    holder = torch.nn.Module()
    holder.metric, holder.linear = fed([sample(0)]), torch.nn.Linear(2, 2)
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


def test_a_synced_metric_refuses_forward():
    metric = fed([sample(0)])
    metric._is_synced = True
    with pytest.raises(TorchMetricsUserError, match="unsync"):
        metric(*sample(1))


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

    monkeypatch.setattr("modality_integration.state_file.save_file", no_space)
    with pytest.raises(OSError, match="no space"):
        fed([sample(1)]).save(path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["state.safetensors"]


def test_files_that_are_no_state_are_named(tmp_path):
    text, other = tmp_path / "a.txt", tmp_path / "b.safetensors"
    text.write_text("hello")
    save_file({"x": torch.zeros(1)}, other)
    with pytest.raises(ValueError, match=r"a\.txt is no readable safetensors file"):
        ModalityIntegrationRate.from_file(text)
    with pytest.raises(ValueError, match=r"b\.safetensors is no state of ModalityIntegrationRate"):
        ModalityIntegrationRate().load(other)


KILLED = """
import os, signal, sys
sys.path[:0] = {paths!r}
from integration.test_metric_stream import ModalityIntegrationRate, sample
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
