"""Printing of a value, its standard error and its arithmetic accuracy."""

import io
import math

import pytest
from rich.console import Console

from integration.results import result
from modality_integration import LayerTerms, MIRResult
from modality_integration.app.console import show_notes
from modality_integration.metric.standard_error import (
    arithmetic,
    chance,
    error_cell,
    finite_jackknife,
    missing_error,
    tells,
    why_no_error,
    with_error,
)


@pytest.mark.parametrize(
    ("error", "places", "text"),
    [
        (0.002, 4, "3.3740 +- 0.0020"),
        (0.002, 3, "3.374 +- 0.002"),
        (0.0004, 4, "3.3740 +- 0.0004"),
        (0.0004, 3, "3.374 +- 4.0e-04"),
        (2e-6, 4, "3.3740 +- 2.0e-06"),
        (12.5, 4, "3.3740 +- 12.5000"),
        (None, 4, "3.3740"),
        (0.0, 4, "3.3740"),
        (3e-16, 4, "3.3740"),
        (math.inf, 3, "3.374"),
        (math.nan, 4, "3.3740"),
    ],
)
def test_a_value_and_its_error_are_rounded_alike_and_an_error_that_tells_nothing_is_not_printed(error, places, text):
    assert with_error(3.374, error, places) == text
    assert error_cell(error, places) == text.partition(" +- ")[2]
    assert tells(error) == ("+-" in text)


@pytest.mark.parametrize("error", [10.0**-k * digit for k in range(-2, 12) for digit in (1.0, 4.9, 9.999)])
@pytest.mark.parametrize("places", [2, 3, 4, 6])
def test_no_error_is_printed_as_zero(error, places):
    printed = float(error_cell(error, places))
    assert printed == pytest.approx(error, rel=0.51)


def exact(root, lower, upper):
    return MIRResult([LayerTerms(90.0, 8.0, 6.0, root, lower, upper)], [1.0], *[{"vision": [9], "text": [9]}] * 2)


@pytest.mark.parametrize("width", [0.1, 1e-5, 1e-9])
def test_arithmetic_is_exact_to_what_the_bounds_leave_and_never_less(width):
    made = exact(2.0, 2.0 - width, 2.0 + width)
    said = arithmetic(made)
    assert said.startswith("arithmetic exact to ")
    to = float(said.split()[-1])
    off = max(made.value - made.lower, made.upper - made.value)
    assert off <= to <= 1.1 * off
    assert to == pytest.approx((made.upper - made.lower) / 2, rel=0.11)
    assert said in str(made)


def test_a_value_at_the_end_of_its_interval_is_off_by_all_of_it():
    made = exact(2.0, 2.0, 2.5)
    assert float(arithmetic(made).split()[-1]) >= made.value - made.lower > 0.9 * (made.upper - made.lower)


def test_without_bounds_nothing_is_said_of_the_arithmetic():
    assert arithmetic(result()) is None
    assert "arithmetic" not in str(result())


def test_arithmetic_that_holds_no_digit_is_said_in_words():
    made = MIRResult([LayerTerms(0.0, 1.0, 1.0, 0.75, 0.7, 1.0)], [1.0], *[{"vision": [9], "text": [9]}] * 2)
    assert made.lower == -math.inf
    assert arithmetic(made) == f"arithmetic exact to no digit: at most {made.upper:.6g}"
    assert "inf" not in str(made)


NOTE = "no standard error: 1 image for 40 samples"


@pytest.mark.parametrize(
    ("notes", "groups", "settings", "why"),
    [
        ([], None, {}, ""),
        ([], None, {"groups": 0}, "groups 0"),
        ([NOTE], None, {"groups": 0}, "1 image for 40 samples"),
        (["first", f"{NOTE}; take more"], None, {}, "1 image for 40 samples"),
        ([], 1, {}, "one group of samples"),
        ([], 5, {}, "all groups of samples are identical"),
    ],
)
def test_why_there_is_no_error_stands_beside_the_value(notes, groups, settings, why):
    made = result()
    made.notes, made.settings = notes, settings
    made.left_out = groups and [[distance] * groups for distance in made.per_layer]
    assert why_no_error(made) == why
    assert missing_error(made) == (f"no standard error: {why}" if why else "no standard error")
    first = str(made).splitlines()[0]
    assert first == f"MIR {made.value:.4f}{f' (no standard error: {why})' if why else ''} over 3 layers"


def test_a_group_that_makes_mir_infinite_is_why_there_is_no_error():
    made = result()
    made.left_out = [[distance, 0.0] for distance in made.per_layer]
    assert made.error is None
    assert why_no_error(made) == "MIR is not finite with one group of samples left out"


def test_with_an_error_there_is_no_why():
    made = result()
    made.left_out = [[distance, 1.1 * distance] for distance in made.per_layer]
    assert why_no_error(made) is None
    assert missing_error(made) == ""


def test_one_group_gives_no_standard_error():
    assert finite_jackknife([1.0]) is None
    assert finite_jackknife([]) is None
    assert finite_jackknife([1.0, 3.0]) == 1.0


# From a table of Student's t: two-sided tail probabilities.
@pytest.mark.parametrize(
    ("degrees", "value", "share"),
    [(1, 12.706, 0.05), (2, 4.303, 0.05), (3, 3.182, 0.05), (4, 4.604, 0.01), (8, 3.355, 0.01), (99, 1.984, 0.05)],
)
def test_chance_is_that_of_the_tables(degrees, value, share):
    assert chance(value, degrees) == pytest.approx(share, rel=2e-3)
    assert chance(-value, degrees) == chance(value, degrees)
    assert chance(0.0, degrees) == 1.0


def test_a_note_with_brackets_is_printed_as_it_is():
    console = Console(file=io.StringIO(), width=80)
    show_notes(["pip install x[y], [red]z[/]"], console)
    assert "pip install x[y], [red]z[/]" in console.file.getvalue()
