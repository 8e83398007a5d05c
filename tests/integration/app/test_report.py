"""Tables that show the numbers, and plots that are images."""

import subprocess
import sys

import pytest
from PIL import Image

from integration.results import printed, result
from modality_integration import LayerTerms
from modality_integration.app import report


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


def colours(path):
    with Image.open(path) as image:
        return len(image.convert("RGB").getcolors(1 << 20))


def test_layer_plot_is_an_image_with_a_curve_a_result(tmp_path):
    made = result()
    assert made.plot(tmp_path / "one.png") == tmp_path / "one.png"
    report.plot_layers({"before": made, "after": result(1)}, tmp_path / "two.png")
    assert colours(tmp_path / "two.png") > colours(tmp_path / "one.png") > 10
    made.plot(tmp_path / "one.svg")
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
    code = "import sys, modality_integration.app.report; assert not {'matplotlib', 'rich'} & set(sys.modules)"
    child = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path[:0] = {sys.path!r}; {code}"], capture_output=True, text=True
    )
    assert child.returncode == 0, child.stderr
