"""Comparison of two results: differences, their standard errors, verdicts, and incomparable results."""

import math
from dataclasses import replace

import pytest

from integration.results import printed, result
from modality_integration import LayerTerms, compare, jackknife
from modality_integration.metric.comparison import compare_several


def test_comparison_gives_difference_and_ratios():
    a, b = result(0), result(1)
    both = compare(a, b)
    assert both.difference == b.value - a.value
    assert both.per_layer == [y / x for x, y in zip(a.per_layer, b.per_layer, strict=True)]
    assert both.disjoint is None
    assert both.notes == []
    text = printed(both.table(("old", "new")))
    assert "new / old" in text
    assert f"{both.difference:+.4f}" in text
    assert f"{both.per_layer[0]:.3f}" in text


def test_comparison_with_bounds_knows_whether_the_intervals_overlap():
    a, b = result(0, bounds=True), result(1, bounds=True)
    assert compare(a, b).disjoint is True
    assert compare(a, a).disjoint is False


BEYOND = "exceeds arithmetic rounding, which says nothing about other samples"


@pytest.mark.parametrize("errors", [True, False])
@pytest.mark.parametrize("apart", [True, False])
def test_intervals_are_spoken_of_only_where_no_error_is_and_as_the_arithmetics(errors, apart):
    a, b = result(0, bounds=True), result(0, bounds=True)
    if apart:
        b = result(1, bounds=True)
    else:
        b.terms = [replace(terms, mean=math.nextafter(terms.mean, 2.0)) for terms in b.terms]
    if errors:
        a, b = with_left_out(a, 0.1), with_left_out(b, 0.1)
    verdict = compare(a, b).verdict()
    assert (BEYOND in verdict) == (apart and not errors)
    assert ("within arithmetic rounding" in verdict) == (not apart and not errors)
    assert "prove" not in verdict
    assert "interval" not in verdict


def with_left_out(made, spread, groups=6):
    """The result with an even number of groups and the standard error `spread` (in MIR)."""
    step = spread / math.sqrt(groups - 1)
    made.left_out = [[d * 10 ** (step * (-1) ** g) for g in range(groups)] for d in made.per_layer]
    assert made.error == pytest.approx(spread)
    return made


@pytest.mark.parametrize(
    ("errors", "words"),
    [
        (1 / 2.2, "B seems to blend the modalities better (more samples are needed to be sure): its MIR is"),
        (1 / 3.01, "B blends the modalities better: its MIR is"),
        (1 / 1.99, "no difference beyond the standard error: B's MIR is"),
        (2.0, "no difference beyond the standard error: B's MIR is"),
    ],
)
def test_comparison_holds_the_difference_against_both_errors_together(errors, words):
    a, b = result(1), result(0)
    total = (a.value - b.value) * errors
    both = compare(with_left_out(a, 0.6 * total), with_left_out(b, 0.8 * total))
    assert both.error == pytest.approx(total)
    assert both.z == pytest.approx(-1 / errors)
    assert both.verdict().startswith(words)
    assert f"below A's, {1 / errors:.1f} standard errors of the difference" in both.verdict()
    swapped = compare(b, a)
    assert swapped.z == pytest.approx(1 / errors)
    assert "below B's" in swapped.verdict()


def test_comparison_without_an_error_on_both_sides_names_none_better():
    a, b = result(1, bounds=True), result(0, bounds=True)
    both = compare(with_left_out(a, 0.1), b)
    assert both.error is None
    assert both.z is None
    difference = a.value - b.value
    assert both.verdict(("old", "new")) == (
        f"new's MIR is {difference:.4f} below old's; whether this holds for other samples is unknown without a "
        f"standard error of both (mir compute --groups 5); the difference {BEYOND}"
    )


def test_comparison_with_few_groups_is_never_sure_and_says_so():
    a, b = result(1), result(0)
    both = compare(with_left_out(a, 1e-6, groups=4), with_left_out(b, 1e-6))
    assert abs(both.z) > 1000
    assert both.verdict().startswith("B seems to blend the modalities better")
    assert both.notes == ["A's standard error is based on 4 groups of samples; use 5 or more"]


def with_samples(made, digest, **settings):
    made.settings = {"chosen_samples": digest, "processes": 1, **settings}
    return made


def test_comparison_of_the_same_samples_goes_by_the_differences_group_by_group():
    a, b = with_left_out(result(1), 0.1), with_left_out(result(1), 0.1)
    b.left_out = [[d * 0.98 * (1 + 1e-4 * g) for g, d in enumerate(layer)] for layer in a.left_out]
    b.terms = [replace(t, **{name: 0.98 * value for name, value in vars(t).items() if value}) for t in a.terms]
    differences = [y - x for x, y in zip(a.left_out_values, b.left_out_values, strict=True)]
    apart, same = compare(a, b), compare(with_samples(a, "x"), with_samples(b, "x"))
    assert not apart.paired
    assert apart.verdict().startswith("no difference beyond the standard error")
    assert same.paired
    assert same.error == jackknife(differences) < apart.error / 100
    assert same.verdict().startswith("B blends the modalities better")
    assert same.notes == ["the same samples in both: the error is computed from group-by-group differences"]
    blocks = {"dealt": "in blocks"}
    assert compare(with_samples(a, "x", **blocks), with_samples(b, "x", processes=2, **blocks)).paired
    assert not compare(with_samples(a, "x"), with_samples(b, "x", **blocks)).paired
    assert not compare(with_samples(a, "y", **blocks), with_samples(b, "x", **blocks)).paired
    with_samples(a, "x")
    for other in (with_samples(b, "y"), with_samples(b, "x", processes=2), with_left_out(with_samples(b, "x"), 0.1, 8)):
        assert not compare(a, other).paired
    assert compare(a, with_left_out(with_samples(b, "y"), 0.1), paired=True).paired
    with pytest.raises(
        ValueError, match=r"paired: expected results with the same number of groups of samples, got 6 and 0"
    ):
        compare(a, result(0), paired=True)


def test_comparison_of_a_result_with_itself_is_no_difference():
    a = with_left_out(result(0), 0.1)
    assert compare(a, a).z == 0.0
    assert compare(a, a).verdict() == "the same MIR"


def test_comparison_names_every_setting_that_differs():
    a, b = result(0), result(0, normalize=False, outliers="none")
    a.settings = {"model": "one", "last": "normed", "text_tokens": 512, "seed": 0, "only_here": 1}
    b.settings = {"model": "two", "last": "raw", "text_tokens": None, "seed": 0}
    assert compare(a, b).notes == [
        *("outliers differ: remove and none", "normalize differs: True and False", "model differs: one and two"),
        *("last differs: normed and raw", "text tokens differ: 512 and None"),
    ]


def test_models_of_other_depths_are_compared_without_the_layers_ratios():
    a, b = result(1), result(0, layers=2)
    both = compare(with_left_out(a, 1e-4), with_left_out(b, 1e-4))
    assert both.per_layer == []
    assert both.difference == b.value - a.value
    assert both.verdict().startswith("B blends the modalities better")
    assert "3 and 2 layers: MIR is a sum over layers and is compared without correction for depth" in both.notes
    text = printed(both.table())
    assert f"{a.per_layer[2]:.4g}" in text
    assert "B / A" not in text


def test_zeros_and_infinities_are_compared_without_nan():
    zero = result(0)
    zero.terms = [LayerTerms(0.0, 1.0, 1.0, 1.0)] * 3
    assert compare(zero, zero).difference == 0.0
    assert compare(zero, zero).per_layer == [1.0] * 3
    assert compare(zero, result(1)).difference == math.inf
    assert compare(zero, result(1)).per_layer == [math.inf] * 3


@pytest.mark.parametrize("ends", [("", 0.3), ("no standard error: 1 image for 40 samples; take more", 0.3)])
@pytest.mark.parametrize("groups", [None, 1, 6])
def test_without_an_error_that_tells_something_the_verdict_is_open_and_says_why(ends, groups):
    note, _ = ends
    a, b = with_left_out(result(1), 0.1), result(0)
    b.notes = [note] if note else []
    b.left_out = groups and [[distance] * groups for distance in b.per_layer]  # an error of 0
    both = compare(a, b, names=("old", "new"))
    assert both.error is both.z is None
    verdict = both.verdict()
    assert verdict.startswith(
        f"new's MIR is {a.value - b.value:.4f} below old's; whether this holds for other samples is unknown"
    )
    why = (
        "1 image for 40 samples"
        if note
        else {None: None, 1: "one group of samples", 6: "all groups of samples are identical"}[groups]
    )
    if why:
        assert verdict.endswith(f"is unknown: new has no standard error ({why})")
    else:
        assert verdict.endswith("without a standard error of both (mir compute --groups 5)")
    assert " inf" not in verdict


def test_differences_that_are_the_same_in_every_group_are_not_held_against_rounding():
    a, b = with_left_out(result(1), 0.1), with_left_out(result(1), 0.1)
    b.left_out = [[2.0 * d for d in layer] for layer in a.left_out]
    b.terms = [replace(t, **{name: 2.0 * value for name, value in vars(t).items() if value}) for t in a.terms]
    both = compare(a, b, paired=True)
    assert both.error < 1e-12
    assert both.z is None
    assert both.verdict() == "A's MIR is 0.3010 below B's, by the same amount whichever group of samples is left out"


def test_an_infinite_difference_is_said_in_words():
    zero = result(0)
    zero.terms = [LayerTerms(0.0, 1.0, 1.0, 1.0)] * 3
    assert compare(zero, result(1)).verdict().startswith("A's MIR is -inf: its modalities are indistinguishable")
    assert compare(result(1), zero).verdict().startswith("B's MIR is -inf")


@pytest.mark.parametrize(
    ("difference", "said"), [(3e-7, "3.0e-07 below"), (6e-5, "6.0e-05 below"), (0.25, "0.2500 below")]
)
def test_a_small_difference_is_not_said_to_be_none(difference, said):
    a, b = result(0), result(0)
    b.terms = [replace(t, **{n: v * 10**difference for n, v in vars(t).items() if v}) for t in b.terms]
    assert said in compare(a, b).verdict()


def test_names_stand_in_notes_verdict_table_and_text():
    a, b = with_left_out(result(1), 1e-6, groups=4), with_left_out(result(0), 1e-6)
    both = compare(a, b, names=("old", "new"))
    assert both.verdict().startswith("new seems to blend the modalities better")
    assert both.notes == ["old's standard error is based on 4 groups of samples; use 5 or more"]
    assert "new / old" in printed(both.table())
    assert str(both) == f"{both.verdict()}\nnote: {both.notes[0]}"
    with pytest.raises(ValueError, match="names: expected two different names, got 'x' twice"):
        compare(a, b, names=("x", "x"))
    with pytest.raises(ValueError, match="names: expected two different names, got 'x' twice"):
        both.table(("x", "x"))


def test_printed_as_an_object_it_is_one_short_line():
    a, b = with_left_out(result(1, layers=40), 0.01), with_left_out(result(0, layers=40), 0.01)
    both, several = compare(a, b), compare_several({"a": a, "b": b, "c": result(2)})
    assert repr(both) == f"<Comparison B - A = {both.difference:.4f} +- 0.0141>"
    assert (
        repr(several)
        == f"<Comparisons a {a.value:.4f} +- 0.0100, b {b.value:.4f} +- 0.0100, c {result(2).value:.4f}, 2 notes>"
    )
    assert repr(compare(a, b, paired=True)).endswith("paired, 1 note>")
