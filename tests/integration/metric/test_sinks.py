"""Attention sinks: detected by their activation, reported or left out, and equal for features, streams and files."""

import pytest
import torch

from modality_integration import MIRResult, ModalityIntegrationRate, mir
from modality_integration.metric.saved_states import mir_of_states, save_states
from modality_integration.metric.sinks import NEARBY, TIMES, concentrated, massive_tokens

LAYERS, WIDTH, TOKENS = 4, 64, 30
MASSIVE_LAYERS = (2, 3)  # 1..K
CHANNELS = [5, 17]


def sample(seed, *, sink=True, position=0, strength=60.0, dtype=torch.float32, modality="vision"):
    """(hidden states, vision mask, text mask): 12 vision and 16 text tokens, 2 in neither; one token is massive."""
    generator = torch.Generator().manual_seed(seed)
    vision, text = torch.zeros(2, 1, TOKENS, dtype=torch.bool)
    vision[0, :12], text[0, 14:] = True, True
    hidden = []
    for layer in range(1, LAYERS + 1):
        states = torch.randn(1, TOKENS, WIDTH, generator=generator) + vision[..., None] * 0.3
        if sink and layer in MASSIVE_LAYERS:
            states[0, position, CHANNELS] += strength * WIDTH**0.5 * (1 + 0.1 * torch.rand(1, generator=generator))
        hidden.append(states.to(dtype))
    return hidden, vision, text


def fed(samples, **options):
    metric = ModalityIntegrationRate(**options)
    for one in samples:
        metric.update(*one)
    return metric


def without_position(samples, position=0):
    """The same samples, with one position removed from both modalities."""
    for hidden, vision, text in samples:
        others = torch.ones(TOKENS, dtype=torch.bool)
        others[position] = False
        yield hidden, vision & others, text & others


WITH = [sample(seed) for seed in range(9)]
BARE = [sample(seed, sink=False) for seed in range(9)]


def test_a_sink_is_counted_where_it_is_massive_and_told_with_what_it_makes_of_the_value():
    result = fed(WITH, outliers="none").compute()
    assert result.massive == {"vision": [0, 9, 9, 0], "text": [0, 0, 0, 0]}
    assert result.sink_positions == {"vision": {0: 9}, "text": {}}
    found, effect = result.notes
    assert found == ("attention sinks: 9 vision tokens of massive activation, all at position 0, in layers 2-3")
    assert f"MIR is {result.value:.4f} with the attention sinks and {result.value_without_sinks:.4f} without" in effect
    assert result.value > result.value_without_sinks + 1


@pytest.mark.parametrize("outliers", ["remove", "none"])
@pytest.mark.parametrize("groups", [0, 3])
def test_left_out_is_as_if_the_sinks_had_never_been_in_the_masks(outliers, groups):
    left_out = fed(WITH, sinks="leave out", outliers=outliers, groups=groups).compute()
    expected = fed(without_position(WITH), outliers=outliers, groups=groups).compute()
    assert left_out.per_layer == expected.per_layer
    assert left_out.alpha == expected.alpha
    assert left_out.error == expected.error
    assert (left_out.kept, left_out.removed) == (expected.kept, expected.removed)
    assert left_out.without_sinks is None
    assert left_out.notes == [
        "attention sinks: 9 vision tokens of massive activation, all at position 0, in layers 2-3; they are left out "
        "of every layer"
    ]


@pytest.mark.parametrize("hold", [None, 70])
@pytest.mark.parametrize("outliers", ["remove", "none"])
def test_reported_distances_without_sinks_are_those_of_leaving_them_out(outliers, hold):
    reported = fed(WITH, outliers=outliers, hold=hold).compute()
    assert reported.without_sinks == pytest.approx(
        fed(WITH, sinks="leave out", outliers=outliers, hold=hold).compute().per_layer, rel=1e-9
    )


@pytest.mark.parametrize("outliers", ["remove", "none"])
@pytest.mark.parametrize("sinks", ["report", "leave out"])
def test_without_sinks_nothing_is_said_and_every_bit_is_the_same(outliers, sinks, monkeypatch):
    made = fed(BARE, outliers=outliers, sinks=sinks, groups=3).compute()
    assert made.notes == []
    assert made.without_sinks is None
    monkeypatch.setattr("modality_integration.metric.forward_tokens.massive_tokens", lambda *arguments: None)
    blind = fed(BARE, outliers=outliers, groups=3).compute()
    assert (made.per_layer, made.alpha, made.left_out) == (blind.per_layer, blind.alpha, blind.left_out)


@pytest.mark.parametrize("outliers", ["remove", "none"])
def test_the_value_with_sinks_is_the_papers(outliers, monkeypatch):
    kept_apart = fed(WITH, outliers=outliers, groups=3).compute()
    monkeypatch.setattr("modality_integration.metric.forward_tokens.massive_tokens", lambda *arguments: None)
    blind = fed(WITH, outliers=outliers, groups=3).compute()
    assert kept_apart.per_layer == pytest.approx(blind.per_layer, rel=1e-9)
    assert kept_apart.alpha == pytest.approx(blind.alpha, rel=1e-12)
    assert kept_apart.error == pytest.approx(blind.error, rel=1e-6)
    assert (kept_apart.kept, kept_apart.removed) == (blind.kept, blind.removed)


@pytest.mark.parametrize("sinks", ["report", "leave out"])
@pytest.mark.parametrize("position", [0, 20])
def test_features_streams_and_files_agree(tmp_path, sinks, position):
    samples = [sample(seed, position=position) for seed in range(9)]
    streamed = fed(samples, sinks=sinks, outliers="none").compute()
    vision, text = ([torch.cat([h[k][m] for h, *masks in samples for m in masks[i : i + 1]]) for k in range(LAYERS)]
                    for i in (0, 1))  # fmt: skip
    whole = mir(vision, text, sinks=sinks, outliers="none")
    for number, one in enumerate(samples):
        save_states(tmp_path / f"{number}.safetensors", *one)
    saved = mir_of_states(sorted(tmp_path.glob("*.safetensors")), sinks=sinks, outliers="none")
    for other in (whole, saved):
        assert other.per_layer == pytest.approx(streamed.per_layer, rel=1e-9)
        assert other.massive == streamed.massive
        if sinks == "report":
            assert other.without_sinks == pytest.approx(streamed.without_sinks, rel=1e-9)
    assert saved.sink_positions == streamed.sink_positions
    assert whole.sink_positions == {"vision": {}, "text": {}}  # positions of features are unknown


@pytest.mark.parametrize("outliers", ["remove", "median"])
def test_files_with_column_medians_leave_sinks_out_too(tmp_path, outliers):
    for number, one in enumerate(WITH):
        save_states(tmp_path / f"{number}.safetensors", *one)
        save_states(tmp_path / f"bare{number}.safetensors", *next(without_position([one])))
    found = mir_of_states(sorted(tmp_path.glob("[0-9]*")), sinks="leave out", outliers=outliers)
    expected = mir_of_states(sorted(tmp_path.glob("bare*")), outliers=outliers)
    assert found.per_layer == pytest.approx(expected.per_layer, rel=1e-12)


def test_sinks_of_the_text_are_sinks_too_and_out_of_alpha():
    samples = [sample(seed, position=20) for seed in range(9)]
    reported = fed(samples, outliers="none").compute()
    assert reported.massive["text"] == [0, 9, 9, 0]
    assert reported.sink_positions["text"] == {20: 9}
    left_out = fed(samples, outliers="none", sinks="leave out").compute()
    expected = fed(without_position(samples, 20), outliers="none").compute()
    assert left_out.alpha == pytest.approx(expected.alpha, rel=1e-12)
    assert reported.alpha[1] < left_out.alpha[1] / 2


def test_scattered_sinks_are_said_to_be():
    samples = [sample(seed, position=seed) for seed in range(9)]
    (note, _) = fed(samples, outliers="none").compute().notes
    assert "scattered over 9 positions, 1 of them at position 0" in note


def test_a_strong_outlier_that_is_spread_over_all_channels_is_no_sink():
    hidden, vision, text = sample(0, sink=False)
    hidden[1][0, 3] *= 100
    metric = fed([*BARE[1:], (hidden, vision, text)])
    assert metric.compute().sink_positions["vision"] == {}


def test_tokens_near_a_sink_count_from_a_lower_norm_on_and_only_in_its_modality():
    norms = torch.ones(2, 1, 8)
    norms[0, 0, 0], norms[1, 0, 1], norms[1, 0, 6] = TIMES + 1, NEARBY + 1, NEARBY + 1
    vision = torch.arange(8)[None] < 4
    every = massive_tokens(norms, {"vision": vision, "text": ~vision}, lambda k, places: torch.ones(len(places)) > 0)
    assert every.nonzero().tolist() == [[0, 0, 0], [1, 0, 1]]
    none = massive_tokens(norms, {"vision": vision, "text": ~vision}, lambda k, places: torch.zeros(len(places)) > 0)
    assert none is None
    norms[0, 0, 0] = TIMES - 1
    assert massive_tokens(norms, {"vision": vision, "text": ~vision}, None) is None


def test_few_channels_hold_nine_tenths():
    rows = torch.ones(3, 64)
    rows[1, :4], rows[2, :5] = 100.0, 100.0
    assert concentrated(rows).tolist() == [False, True, False]  # five equal channels: four hold four fifths
    assert concentrated(torch.tensor([[9.0, 0, 0]])).tolist() == [False]  # with 3 channels, d / 8 is 0


@pytest.mark.parametrize("sinks", ["report", "leave out"])
def test_a_state_with_sinks_goes_on_with_the_same_bits(tmp_path, sinks):
    whole = fed(WITH, sinks=sinks, groups=3, hold=70).compute()
    first = fed(WITH[:4], sinks=sinks, groups=3, hold=70)
    first.save(tmp_path / "state.safetensors")
    resumed = ModalityIntegrationRate.from_file(tmp_path / "state.safetensors")
    for one in WITH[4:]:
        resumed.update(*one)
    assert resumed.compute() == whole


@pytest.mark.parametrize("sinks", ["report", "leave out"])
def test_merged_metrics_have_the_sinks_of_both(sinks):
    one, other = fed(WITH[:4], sinks=sinks), fed(WITH[4:], sinks=sinks)
    one.merge_state(other)
    merged, whole = one.compute(), fed(WITH, sinks=sinks).compute()
    assert merged.massive == whole.massive
    assert merged.sink_positions == whole.sink_positions
    assert merged.per_layer == pytest.approx(whole.per_layer, rel=1e-9)
    with pytest.raises(ValueError, match="sinks"):
        one.merge_state(fed(WITH, sinks={"report": "leave out", "leave out": "report"}[sinks]))


def test_more_sinks_than_are_held_leave_the_value_right_and_say_what_is_not_known():
    samples = [sample(seed) for seed in range(WIDTH + 6)]  # the minimum hold is WIDTH + 1
    options = {"outliers": "none", "precision": "exact"}
    result, expected = fed(samples, hold=2, **options).compute(), fed(samples, **options).compute()
    assert result.per_layer == pytest.approx(expected.per_layer, rel=1e-9)
    assert result.without_sinks is None
    assert any("70 tokens are attention sinks, more than the 65 kept" in note for note in result.notes)
    left_out = fed(samples, hold=2, sinks="leave out", **options).compute()
    assert left_out.per_layer == pytest.approx(expected.without_sinks, rel=1e-9)


def test_a_second_pass_with_sinks_is_exact():
    samples = [sample(seed) for seed in range(30)]
    first = fed(samples, hold=70)
    second = first.second_pass()
    for one in samples:
        second.update(*one)
    exact = fed(samples, hold=10_000).compute()
    assert second.compute().per_layer == pytest.approx(exact.per_layer, rel=1e-9)


def twice(samples, hold):
    """The result of a second pass, and that of leaving out the sinks."""
    second = fed(samples, hold=hold).second_pass()
    for one in samples:
        second.update(*one)
    return second.compute(), fed(samples, sinks="leave out", hold=10_000).compute()


def test_a_second_pass_knows_the_distance_without_sinks_too():
    samples = [sample(seed) for seed in range(30)]
    for hidden, _, _ in samples[1::6]:  # outliers besides the sinks, within the limits widened by the sinks
        for states in hidden:
            states[0, 4] *= 4
    result, expected = twice(samples, hold=70)
    assert result.without_sinks == pytest.approx(expected.per_layer, rel=1e-9)
    assert not any("wrong side" in note for note in result.notes)


def test_what_the_distance_without_sinks_lacks_in_a_second_pass_is_said():
    samples = [sample(seed, sink=seed % 2 == 0) for seed in range(100)]
    for hidden, _, _ in samples:  # more outliers than are held
        hidden[1][0, 4] *= 10
    result, expected = twice(samples, hold=2)
    assert result.without_sinks[1] > 1.1 * expected.per_layer[1]
    assert any("layer 2, vision: the distance without attention sinks has" in note for note in result.notes)
    # A token of layer 1 beyond the limits from all norms, but within those from the norms without sinks.
    result, expected = twice([sample(seed) for seed in range(30)], hold=70)
    assert result.without_sinks[0] != pytest.approx(expected.per_layer[0], rel=1e-4)
    assert any("layer 1, vision: the distance without attention sinks has 1 token" in note for note in result.notes)


def test_batches_and_single_samples_find_the_same_sinks():
    batch = [torch.cat([one[0][k] for one in WITH]) for k in range(LAYERS)]
    vision, text = (torch.cat([one[i] for one in WITH]) for i in (1, 2))
    together = fed([(batch, vision, text)]).compute()
    assert together.massive == fed(WITH).compute().massive


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_every_dtype(dtype):
    result = fed([sample(seed, dtype=dtype) for seed in range(5)], outliers="none").compute()
    assert result.massive["vision"] == [0, 5, 5, 0]


def test_a_result_with_sinks_survives_json_shows_and_draws_them(tmp_path):
    result = fed(WITH, outliers="none", groups=3).compute()
    again = MIRResult.from_json(result.to_json())
    assert again == result
    assert [str(column.header) for column in result.table().columns][-1] == "no sinks"
    assert result.plot(tmp_path / "layers.svg").read_text().count("<path") > fed(BARE).compute().plot(
        tmp_path / "bare.svg"
    ).read_text().count("<path")


def test_an_unknown_handling_is_refused():
    with pytest.raises(ValueError, match=r"sinks: expected one of \('report', 'leave out'\), got 'ignore'"):
        ModalityIntegrationRate(sinks="ignore")


@pytest.mark.parametrize("shape", [(1, 0), (0, TOKENS), (0,)])
def test_a_pass_without_tokens_adds_nothing(shape):
    metric = fed(WITH)
    nothing = torch.zeros(shape, dtype=torch.bool)
    metric.update([torch.zeros(*shape, WIDTH)] * LAYERS, nothing, nothing)
    assert metric.compute() == fed(WITH).compute()


def features(count=40):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(count, WIDTH, generator=generator) for _ in range(LAYERS)]


@pytest.mark.parametrize("sinks", ["report", "leave out"])
@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
@pytest.mark.parametrize("token", [0, 5])
def test_a_token_that_is_not_finite_is_no_sink_and_named_by_its_own_index(sinks, bad, token):
    vision, text = features(), features()
    vision[2][0, CHANNELS] = 1e4
    vision[1][token, 3] = bad
    with pytest.raises(ValueError, match=f"layer 2: vision token {token} is not finite"):
        mir(vision, text, sinks=sinks)


def zero_text(seed):
    """A sample whose only non-zero text token is a sink."""
    hidden, vision, text = sample(seed, sink=False)
    text[0, 20:] = False
    for states in hidden:
        states[text] = 0.0
        states[0, 14, CHANNELS] = 1e4
    return hidden, vision, text


def test_text_of_nothing_but_sinks_has_its_value_and_none_without_them():
    samples = [zero_text(seed) for seed in range(5)]
    streamed = fed(samples, outliers="none").compute()
    hidden = [torch.cat([one[0][k] for one in samples]) for k in range(LAYERS)]
    vision, text = (torch.cat([one[i] for one in samples]) for i in (1, 2))
    whole = mir([h[vision] for h in hidden], [h[text] for h in hidden], outliers="none")
    for result in (streamed, whole):
        assert result.massive["text"] == [5] * LAYERS
        assert result.without_sinks is None
    assert whole.per_layer == pytest.approx(streamed.per_layer, rel=1e-9)
    with pytest.raises(ValueError, match="every text token is zero"):
        fed(samples, outliers="none", sinks="leave out").compute()


def test_a_group_of_samples_with_nothing_but_sinks_is_left_out_in_its_turn():
    hidden, vision, text = sample(100, sink=False)
    for k, states in enumerate(hidden):
        start = 14 * (k % 2)  # the image in even layers, the text in odd ones
        states[0, start : start + 12 + 4 * (k % 2), CHANNELS] += 2000.0
    vision[0, 12:14] = False
    few = text.clone()
    few[0, 14:], few[0, 26:] = False, True
    samples = [sample(seed, sink=False) for seed in range(2)]
    metric = fed([*samples, (hidden, vision, text)], groups=3, outliers="none")
    assert len(metric.compute().left_out[0]) == 3


@pytest.mark.parametrize(("gathered", "asked"), [("report", "leave out"), ("leave out", "report")])
def test_a_state_gathered_with_the_other_handling_is_refused_in_words(tmp_path, gathered, asked):
    fed(WITH, sinks=gathered).save(tmp_path / "state.safetensors")
    with pytest.raises(ValueError, match=f'gathered with a different handling of attention sinks than sinks="{asked}"'):
        ModalityIntegrationRate.from_file(tmp_path / "state.safetensors", sinks=asked)
