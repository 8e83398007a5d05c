"""The 3-sigma rule: limits computed by hand, and the one-pass rule against the two-pass rule."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modality_integration.metric.outliers import Limits, OnePass, replace_by_column_medians, three_sigma


def stream_through(norms, *, hold, sizes, limits=None):
    """Push rows that contain their own number; returns the numbers counted at the end, and the decision."""
    rule = OnePass(1, torch.float32, hold=hold, limits=limits)
    numbers, counted, most = torch.arange(len(norms), dtype=torch.float32)[:, None], [], 0
    start = 0
    while start < len(norms):
        size = sizes[start % len(sizes)]
        released = rule.push(numbers[start : start + size].clone(), norms[start : start + size])
        if released is not None:
            counted.append(released.rows)
        most = max(most, rule.held)
        start += size
    assert most <= hold
    decision = rule.decide()
    counted.append(decision.rows)
    kept = sorted(int(i) for i in torch.cat(counted).flatten())
    assert len(kept) == len(set(kept)) == decision.kept
    assert decision.kept + decision.removed == len(norms)
    return kept, decision


def two_pass(norms):
    return three_sigma(norms).keep(norms).nonzero().flatten().tolist()


def test_limits_are_the_lower_median_and_three_deviations_with_ddof_1():
    norms = torch.tensor([1.0, 2.0, 3.0, 10.0])
    limits = three_sigma(norms)
    assert limits.center == 2.0
    assert math.isclose(limits.radius, 3 * np.std([1, 2, 3, 10], ddof=1), rel_tol=1e-12)


def test_rule_is_two_sided_and_keeps_what_lies_on_the_limit():
    limits = Limits(10.0, 2.0)
    assert limits.keep(torch.tensor([7.9, 8.0, 10.0, 12.0, 12.1])).tolist() == [False, True, True, True, False]


@pytest.mark.parametrize("scale", [1e-30, 3.7, 1e30])
def test_rule_does_not_depend_on_the_scale(scale):
    norms = torch.from_numpy(np.random.default_rng(0).lognormal(0, 1, 3000)).float()
    assert two_pass(norms) == two_pass((norms.double() * scale).float())
    assert len(two_pass(norms)) < 3000


def test_norms_equal_to_rounding_have_no_outliers():
    norms = torch.full((5000,), 32.0)
    norms[::977] = float(np.nextafter(np.float32(32), np.float32(33)))
    assert two_pass(norms) == list(range(5000))
    assert two_pass(torch.zeros(10)) == list(range(10))


@pytest.mark.parametrize("shape", [(0,), (1,), (3, 2)])
def test_limits_need_two_norms(shape):
    with pytest.raises(ValueError, match="norms: expected shape"):
        three_sigma(torch.ones(shape))


def test_replacement_takes_lower_column_medians_of_all_rows_and_leaves_the_input():
    features = torch.tensor([[1.0, 8.0], [2.0, 7.0], [3.0, 6.0], [99.0, 99.0]])
    before = features.clone()
    replaced = replace_by_column_medians(features, torch.tensor([False, False, False, True]))
    assert replaced.tolist() == [[1.0, 8.0], [2.0, 7.0], [3.0, 6.0], [2.0, 7.0]]
    assert torch.equal(features, before)


def heavy(rng, n, tail):
    return np.exp(rng.normal(0, 0.2, n)) + tail * np.abs(rng.standard_t(2.5, n))


STREAMS = {
    "shuffled": lambda rng, n, tail: heavy(rng, n, tail),
    "rising": lambda rng, n, tail: heavy(rng, n, tail) * np.linspace(1, 3, n),
    "falling": lambda rng, n, tail: heavy(rng, n, tail) * np.linspace(3, 1, n),
    "waving": lambda rng, n, tail: heavy(rng, n, tail) * (2 + np.sin(np.linspace(0, 20, n))),
    "massive first token of each sample": lambda rng, n, tail: np.where(
        np.arange(n) % 200 == 0, 1000.0, heavy(rng, n, tail)
    ),
}


@pytest.mark.parametrize("name", STREAMS)
@settings(max_examples=8, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    n=st.integers(1500, 6000),
    tail=st.floats(0, 3),
    sizes=st.lists(st.integers(30, 700), min_size=1, max_size=5),
)
def test_one_pass_keeps_exactly_what_two_passes_keep(name, seed, n, tail, sizes):
    norms = torch.from_numpy(STREAMS[name](np.random.default_rng(seed), n, tail)).float()
    kept, decision = stream_through(norms, hold=1024, sizes=sizes)
    assert decision.missed == 0
    assert kept == two_pass(norms)


@settings(max_examples=30, deadline=None)
@given(
    blocks=st.lists(st.tuples(st.integers(1, 300), st.floats(0.01, 1e6), st.floats(0, 1)), min_size=1, max_size=8),
    hold=st.integers(2, 200),
    seed=st.integers(0, 2**32 - 1),
    ordered=st.booleans(),
)
def test_whatever_the_order_nothing_is_lost_and_every_miss_is_told(blocks, hold, seed, ordered):
    rng = np.random.default_rng(seed)
    norms = np.concatenate([level * np.exp(spread * rng.normal(size=n)) for n, level, spread in blocks])
    norms = torch.from_numpy(np.sort(norms) if ordered else norms).float()
    if len(norms) < 2:
        norms = norms.repeat(2)
    kept, decision = stream_through(norms, hold=hold, sizes=[37, 5])
    exact = set(two_pass(norms))
    assert exact <= set(kept)
    assert decision.missed == len(set(kept) - exact)


def test_a_second_pass_with_the_first_ones_limits_is_exact():
    norms = torch.cat([torch.full((300,), 1.0), torch.full((9000,), 10.0)]) * (1 + 0.01 * torch.rand(9300))
    _, first = stream_through(norms, hold=64, sizes=[50])
    assert first.missed == 300
    kept, second = stream_through(norms, hold=64, sizes=[50], limits=three_sigma(norms))
    assert second.missed == 0
    assert kept == two_pass(norms)


def test_without_a_rule_everything_is_kept_and_nothing_is_held_beyond_the_gathering():
    norms = torch.tensor([1.0] * 500 + [1e9])
    kept, decision = stream_through(norms, hold=64, sizes=[100], limits=Limits(0.0, math.inf))
    assert kept == list(range(501))
    assert decision.removed == 0


@pytest.mark.parametrize("cut", [0, 40, 700, 1999])
def test_a_stream_goes_on_from_its_state_with_the_same_bits(cut):
    norms = torch.from_numpy(heavy(np.random.default_rng(3), 2000, 1.0)).float()
    rows = torch.randn(2000, 3, generator=torch.Generator().manual_seed(0)).bfloat16()

    def run(rule, start, stop):
        return [rule.push(rows[i : i + 10].clone(), norms[i : i + 10]) for i in range(start, stop, 10)]

    whole = OnePass(3, torch.bfloat16, hold=128)
    released = run(whole, 0, 2000)
    first = OnePass(3, torch.bfloat16, hold=128)
    before = run(first, 0, cut // 10 * 10)
    resumed = OnePass(3, torch.bfloat16, hold=128)
    resumed.load_state_dict(first.state_dict())
    after = run(resumed, cut // 10 * 10, 2000)
    for one, other in zip(released, before + after, strict=True):
        assert (one is None) == (other is None)
        assert one is None or torch.equal(one.rows, other.rows)
    assert torch.equal(whole.decide().rows, resumed.decide().rows)
    assert torch.equal(whole.norms, resumed.norms)


def test_merged_streams_decide_over_the_norms_of_both():
    norms = torch.from_numpy(heavy(np.random.default_rng(4), 3000, 2.0)).float()
    parts = [OnePass(1, torch.float32, hold=400) for _ in range(2)]
    counted = []
    for start in range(0, 3000, 100):
        numbers = torch.arange(start, start + 100, dtype=torch.float32)[:, None]
        released = parts[start % 200 // 100].push(numbers, norms[start : start + 100])
        counted += [] if released is None else [released.rows]
    parts[0].merge(parts[1])
    decision = parts[0].decide()
    kept = sorted(int(i) for i in torch.cat([*counted, decision.rows]).flatten())
    assert kept == two_pass(norms)
    assert decision.missed == 0


def test_no_push_however_large_makes_the_buffer_larger_than_what_is_held():
    norms = torch.from_numpy(heavy(np.random.default_rng(5), 50_000, 1.0)).float()
    whole, parts = (OnePass(4, torch.bfloat16, hold=100) for _ in range(2))
    rows = torch.randn(50_000, 4).bfloat16()
    whole.push(rows, norms)
    assert whole.held_bytes <= 100 * 4 * 2
    for start in range(0, 50_000, 60):
        parts.push(rows[start : start + 60], norms[start : start + 60])
        assert parts.held_bytes <= 100 * 4 * 2
    whole.merge(parts)
    assert whole.held_bytes >= whole.held * 4 * 2 > 100 * 4 * 2
    whole.push(rows[:1], norms[:1])
    assert whole.held_bytes <= 100 * 4 * 2


def test_hold_takes_at_least_two_rows():
    with pytest.raises(ValueError, match="hold: expected 2 rows or more, got 1"):
        OnePass(4, torch.float32, hold=1)


def test_a_state_stays_as_it_was_while_the_stream_goes_on():
    rule = OnePass(1, torch.float32, hold=8)
    rule.push(torch.arange(6.0)[:, None], torch.arange(6.0))
    state = rule.state_dict()
    rule.push(torch.arange(6.0, 12.0)[:, None], torch.arange(6.0, 12.0))
    assert state["held"].flatten().tolist() == state["held_norms"].tolist() == [0, 1, 2, 3, 4, 5]


def test_a_stream_loaded_or_fed_in_inference_mode_goes_on_outside():
    norms = torch.arange(30.0)
    with torch.inference_mode():
        rule = OnePass(1, torch.float32, hold=8)
        rule.push(norms[:5, None].clone(), norms[:5].clone())
        other = OnePass(1, torch.float32, hold=8)
        other.load_state_dict(rule.state_dict())
        other.to(torch.device("cpu"))
    for stream in (rule, other):
        released = stream.push(norms[5:, None], norms[5:])
        assert sorted([*released.rows.flatten().tolist(), *stream.decide().rows.flatten().tolist()]) == norms.tolist()
