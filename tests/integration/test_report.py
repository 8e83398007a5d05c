"""Tables that show the numbers, plots that are images, and comparisons that say what cannot be compared."""

import math
import subprocess
import sys

import pytest
import torch
from PIL import Image
from rich.console import Console

from modality_integration import report
from modality_integration.metric import mir
from modality_integration.result import LayerTerms


def result(seed=0, layers=3, **options):
    generator = torch.Generator().manual_seed(seed)
    vision = [torch.randn(90, 8, generator=generator) + 0.2 * seed for _ in range(layers)]
    text = [torch.randn(80, 8, generator=generator) for _ in range(layers)]
    return mir(vision, text, **options)


def printed(table, width=80):
    console = Console(width=width, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(table)
    return console.export_text()


def test_table_shows_every_layer_and_the_value_in_eighty_columns():
    made = result()
    text = printed(made.table())
    assert f"{made.value:.4f}" in text
    for index, distance in enumerate(made.per_layer):
        row = next(line for line in text.splitlines() if line.split()[:1] == [str(index + 1)])
        assert f"{distance:.4g}" in row
        assert f"{made.kept['vision'][index]} -{made.removed['vision'][index]}" in row
        assert f"{made.alpha[index]:.3g}" in row
    assert "…" not in text


def test_comparison_table_has_a_column_a_result_and_gaps_where_one_is_shorter():
    before, after = result(0), result(1, layers=2)
    text = printed(report.comparison_table({"before": before, "after": after}))
    assert "before" in text
    assert f"{before.value:.4f}" in text
    assert f"{after.value:.4f}" in text
    third = next(line for line in text.splitlines() if line.split()[:1] == ["3"])
    assert third.split() == ["3", f"{before.per_layer[2]:.4g}"]


def test_comparison_gives_difference_and_ratios():
    a, b = result(0), result(1)
    both = report.compare(a, b)
    assert both.difference == b.value - a.value
    assert both.per_layer == [y / x for x, y in zip(a.per_layer, b.per_layer, strict=True)]
    assert both.disjoint is None
    assert both.notes == []
    text = printed(both.table(("old", "new")))
    assert "new / old" in text
    assert f"{both.difference:+.4f}" in text
    assert f"{both.per_layer[0]:.3f}" in text


def test_comparison_with_bounds_says_whether_the_intervals_overlap():
    a, b = result(0, bounds=True), result(1, bounds=True)
    assert report.compare(a, b).disjoint is True
    assert report.compare(a, a).disjoint is False


def with_left_out(made, spread):
    """The result with two groups, whose standard error is `spread` (in MIR)."""
    made.left_out = [[d * 10**spread, d * 10**-spread] for d in made.per_layer]
    assert made.error == pytest.approx(spread)
    return made


@pytest.mark.parametrize(
    ("errors", "words"),
    [
        (1 / 2.2, "B seems to blend the modalities better, more samples would tell: its MIR is"),
        (1 / 3.01, "B blends the modalities better: its MIR is"),
        (1 / 1.99, "no difference beyond the standard error: B's MIR is"),
        (2.0, "no difference beyond the standard error: B's MIR is"),
    ],
)
def test_comparison_holds_the_difference_against_both_errors_together(errors, words):
    a, b = result(1), result(0)
    total = (a.value - b.value) * errors
    both = report.compare(with_left_out(a, 0.6 * total), with_left_out(b, 0.8 * total))
    assert both.error == pytest.approx(total)
    assert both.z == pytest.approx(-1 / errors)
    assert both.verdict().startswith(words)
    assert f"below A's, {1 / errors:.1f} standard errors of the difference" in both.verdict()
    swapped = report.compare(b, a)
    assert swapped.z == pytest.approx(1 / errors)
    assert "below B's" in swapped.verdict()


def test_comparison_without_an_error_on_both_sides_has_the_plain_words():
    a, b = result(1, bounds=True), result(0, bounds=True)
    both = report.compare(with_left_out(a, 0.1), b)
    assert both.error is None
    assert both.z is None
    difference = a.value - b.value
    assert both.verdict(("old", "new")) == (
        f"new blends the modalities better: its MIR is {difference:.4f} below old's "
        "(their proved intervals do not overlap)"
    )


def test_comparison_of_a_result_with_itself_is_no_difference():
    a = with_left_out(result(0), 0.1)
    assert report.compare(a, a).z == 0.0
    assert report.compare(a, a).verdict() == "the same MIR"
    exact, other = with_left_out(result(0), 0.0), with_left_out(result(1), 0.0)
    assert report.compare(exact, other).z == math.inf
    assert report.compare(exact, other).verdict().startswith("A blends the modalities better")


def test_comparison_names_settings_that_differ_and_refuses_other_depths():
    both = report.compare(result(0), result(0, normalize=False, outliers="none"))
    assert both.notes == ["outliers differs: remove and none", "normalize differs: True and False"]
    with pytest.raises(ValueError, match="a has 3 layers and b has 2"):
        report.compare(result(0), result(0, layers=2))


def test_zeros_and_infinities_are_compared_without_nan():
    zero = result(0)
    zero.terms = [LayerTerms(0.0, 1.0, 1.0, 1.0)] * 3
    assert report.compare(zero, zero).difference == 0.0
    assert report.compare(zero, zero).per_layer == [1.0] * 3
    assert report.compare(zero, result(1)).difference == math.inf
    assert report.compare(zero, result(1)).per_layer == [math.inf] * 3


def colours(path):
    with Image.open(path) as image:
        return len(image.convert("RGB").getcolors(1 << 20))


def test_layer_plot_is_an_image_with_a_curve_a_result(tmp_path):
    made = result()
    assert made.plot(tmp_path / "one.png") == tmp_path / "one.png"
    report.plot_layers({"before": made, "after": result(1)}, tmp_path / "two.png")
    assert colours(tmp_path / "two.png") > colours(tmp_path / "one.png") > 10
    report.plot_layers(made, tmp_path / "one.svg")
    assert "<svg" in (tmp_path / "one.svg").read_text()


def test_layer_plot_survives_zero_distances(tmp_path):
    made = result()
    made.terms = [LayerTerms(0.0, 1.0, 1.0, 1.0)] * 3
    assert colours(made.plot(tmp_path / "zero.png")) > 10


@pytest.mark.parametrize("loss", [{}, {1: 2.0, 2: 1.5, 20: 1.0}])
def test_training_plot_is_an_image_with_and_without_loss(tmp_path, loss):
    path = report.plot_training({0: result(0), 20: result(1), 40: 0.7}, loss, tmp_path / "training.png")
    assert colours(path) > 10


def test_importing_the_report_loads_neither_matplotlib_nor_rich():
    code = "import sys, modality_integration.report; assert not {'matplotlib', 'rich'} & set(sys.modules)"
    child = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path[:0] = {sys.path!r}; {code}"], capture_output=True, text=True
    )
    assert child.returncode == 0, child.stderr
