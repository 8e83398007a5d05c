"""Plots as they appear in a paper."""

import itertools
import math
import warnings

import pytest
from matplotlib.collections import LineCollection, PolyCollection

from integration.app.drawings import assert_readable, colours, made, marks
from integration.results import result
from modality_integration.app import plots
from modality_integration.metric import drawing, figures, fonts

WORST = "runs/2026-01-31/llava-v1.5-7b-mlp2x-336px-pretrain-558k/checkpoint-{}/evaluation-of-the-held-out-pictures"


def layers_of(**results):
    return figures.layer_figure(results)


def bands(axes):
    return [band for band in axes.collections if isinstance(band, PolyCollection)]


def bars(axes):
    return [bar for bar in axes.collections if isinstance(bar, LineCollection)]


def labels_in(figure):
    return [text.get_text() for text in figure.legends[0].get_texts()]


# Scales


@pytest.mark.parametrize(
    ("distances", "scale"),
    [
        ([1.0, 2.0, 9.9], "linear"),
        ([0.3, 0.2, 0.1, 0.95], "linear"),
        ([1.0, 10.0], "log"),
        ([5e-3, 2.0, 400.0], "log"),
        ([0.0, 1.0, 2.0], "linear"),
        ([0.0, 1.0, 20.0], "log"),
        ([0.0, 0.0], "linear"),
        ([3.0], "linear"),
    ],
)
def test_axis_is_logarithmic_from_a_decade_on(distances, scale):
    figure, axes = layers_of(run=made(distances))
    assert axes.get_yscale() == scale
    (line,) = axes.lines
    expected = [math.nan if scale == "log" and distance == 0 else distance for distance in distances]
    assert list(line.get_ydata()) == pytest.approx(expected, nan_ok=True)
    assert axes.get_xlim() == (0.5, len(distances) + 0.5)
    figure.draw_without_rendering()
    assert all(float(text.get_text()) == int(text.get_text()) >= 1 for text in marks(axes.xaxis))


def test_scale_is_of_all_that_is_drawn():
    assert layers_of(a=made([1.0, 2.0]), b=made([20.0, 30.0]))[1].get_yscale() == "log"
    assert layers_of(a=made([1.0, 2.0], without_sinks=[0.1, 0.1]))[1].get_yscale() == "log"


@pytest.mark.parametrize("top", [20.0, 900.0, 5e4, 3e7])
def test_marks_of_a_logarithmic_axis_are_plain_numbers_and_several(top):
    figure, axes = layers_of(run=made([1.0, top]))
    figure.draw_without_rendering()
    numbers = [float(text.get_text()) for text in (*marks(axes.yaxis), *marks(axes.yaxis, minor=True))]
    low, high = axes.get_ylim()
    assert sum(low <= number <= high for number in numbers) >= 3


# Errors


def test_bands_are_the_standard_errors_of_the_layers():
    _, axes = layers_of(run=made([1.0, 4.0, 2.0], [0.1, 0.25, 0.5]))
    (band,) = bands(axes)
    corners = {(x, round(y, 9)) for x, y in band.get_paths()[0].vertices}
    assert corners == {(1, 0.9), (1, 1.1), (2, 3.0), (2, 5.0), (3, 1.0), (3, 3.0)}
    low, high = axes.get_ylim()
    assert low < 0.9
    assert high > 5.0


def test_band_that_reaches_zero_leaves_a_logarithmic_axis_at_its_foot():
    figure, axes = layers_of(run=made([100.0, 1.0, 50.0], [0.5, 1.5, 0.1]))
    (band,) = bands(axes)
    figure.draw_without_rendering()
    foot, _ = axes.get_ylim()
    assert 0.05 < foot < 1.0  # not so low that the curve looks flat
    assert min(y for x, y in band.get_paths()[0].vertices if x == 2) < foot
    assert max(y for x, y in band.get_paths()[0].vertices if x == 2) == pytest.approx(2.5)
    assert all(y > 0 for _, y in band.get_paths()[0].vertices)


def test_band_stops_at_gaps_and_a_point_alone_has_a_bar():
    _, axes = layers_of(run=made([1.0, 20.0, 0.0, 3.0, 0.0], [0.1, 0.1, 0.1, 0.2, 0.1]))
    (band,) = bands(axes)
    assert {x for x, _ in band.get_paths()[0].vertices} == {1, 2}
    (bar,) = bars(axes)
    assert bar.get_segments()[0].tolist() == [[4, pytest.approx(2.4)], [4, pytest.approx(3.6)]]


@pytest.mark.parametrize(("errors", "known"), [(None, False), ([0.0, 0.0], False), ([0.1, 0.1], True)])
def test_legend_says_what_a_band_is_where_there_is_one(errors, known):
    figure, axes = layers_of(run=made([1.0, 2.0], errors))
    assert (drawing.ERROR_LABEL in labels_in(figure)) == bool(bands(axes)) == known


def test_label_has_the_value_with_its_error():
    one = made([1.0, 2.0], [0.1, 0.1])
    assert figures.mir_label(one) == f"MIR {one.value:.3f} ± {one.error:.3f}"
    assert figures.mir_label(made([1.0, 2.0]), "run") == "run (MIR 0.477)"
    assert figures.mir_label(made([0.0])) == "MIR -inf"


def test_distance_without_sinks_is_a_dotted_line_of_the_same_colour():
    figure, axes = layers_of(run=made([5.0, 60.0], without_sinks=[5.0, 6.0]), other=made([1.0, 2.0]))
    with_sinks, without, other = axes.lines
    assert with_sinks.get_color() == without.get_color() != other.get_color()
    assert (with_sinks.get_linestyle(), without.get_linestyle()) == ("-", ":")
    assert without.get_linewidth() < with_sinks.get_linewidth()
    assert labels_in(figure) == ["run", f"run, {math.log10(11):.3f} without sinks", "other"]


# Legends and names


@pytest.mark.parametrize(
    "names",
    [
        ["run"],
        ["before", "after"],
        [f"run-{k}" for k in range(12)],
        [WORST.format(k) for k in range(12)],
        ["x" * 300, "x" * 150 + "y" + "x" * 150],
        ["_old", "__", "new"],
        ["модель_$a$_{b}", r"a\$b$c", "<b>&amp;</b>"],
    ],
    ids=["one", "two", "twelve", "twelve long", "without folders", "underscores", "signs"],
)
def test_legend_is_outside_the_axes_and_all_of_it_on_the_page(names):
    figure, axes = plots.layers_figure({name: made([30.0, 2.0, 1.0], [0.1] * 3) for name in names})
    assert_readable(figure)
    assert len(set(labels_in(figure))) == len(names) + 1
    assert axes.get_window_extent().height > 0.6 * figures.HEIGHT * figure.dpi


def test_middle_of_long_labels_goes_unless_it_tells_them_apart():
    long = "a" * 40 + "/" + "b" * 40
    assert drawing.legend_labels([long, "short"]) == [f"{'a' * 31}…{'b' * 32}", "short"]
    both = drawing.legend_labels([WORST.format(1), WORST.format(2)])
    assert both[0].startswith("…/checkpoint-1/")
    assert both[1].startswith("…/checkpoint-2/")
    apart = ["x" * 50 + "1" + "x" * 50, "x" * 50 + "2" + "x" * 50 + " (MIR 1.000 ± 0.100)"]
    whole = drawing.legend_labels(apart)
    assert ["".join(label.split()) for label in whole] == ["".join(label.split()) for label in apart]
    assert whole[1].endswith("(MIR 1.000 ± 0.100)")


def test_curves_differ_in_colour_and_dashes_and_in_grey():
    looks = [drawing.look(index) for index in range(28)]
    assert len({(look["color"], str(look["linestyle"])) for look in looks}) == 28
    assert len({(look["marker"], str(look["linestyle"])) for look in looks}) == 28
    assert len({look["color"] for look in looks[:7]}) == 7


@pytest.mark.parametrize("label", ["a_$b$_c", r"\alpha $x_1$", "$", "100%"])
def test_labels_are_no_formulas(label, tmp_path):
    plots.plot_layers({label: made([1.0, 2.0])}, tmp_path / "a.svg")
    svg = (tmp_path / "a.svg").read_text()
    assert f"{label} (MIR 0.477)</text>" in svg


def test_characters_that_no_font_has_are_said_and_whole_in_svg(tmp_path):
    unassigned = "\U0001fae8\u1c50"  # an emoji and an Ol Chiki digit, or any characters that the machine's fonts lack
    figure, _ = layers_of(**{unassigned: made([1.0, 2.0])})
    lacking = fonts.characters_without_font(figure)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        figures.save_figure(figure, tmp_path / "a.png")
        if lacking:
            assert any(f"no installed font has {lacking}" in str(one.message) for one in caught)
        caught.clear()
        figures.save_figure(figure, tmp_path / "a.svg")
        assert not any("no installed font" in str(one.message) for one in caught)
    assert unassigned in (tmp_path / "a.svg").read_text(encoding="utf-8")


# Training


STEPS = (0, 10, 20)
LOSS = {step: 3.0 - 0.1 * step for step in range(1, 21)}


@pytest.mark.parametrize("as_history", [False, True], ids=["mapping", "history"])
def test_training_has_mir_with_its_error_above_and_losses_below(as_history):
    results = {step: made([1.0 + step, 2.0], [0.1, 0.2]) for step in STEPS}
    figure = plots.training_figure(list(results.items()) if as_history else results, LOSS, {0: 3.0, 20: 1.0})
    above, below = figure.axes
    assert above.get_shared_x_axes().joined(above, below)
    (line,) = above.lines
    assert line.get_xydata().tolist() == [[step, pytest.approx(results[step].value)] for step in STEPS]
    (band,) = bands(above)
    ends = [(s, r.value + side * r.error) for s, r in results.items() for side in (-1, 1)]
    assert sorted(map(tuple, band.get_paths()[0].vertices[:-1].tolist()))[:2] == [
        pytest.approx(end) for end in ends[:2]
    ]
    assert [list(line.get_xdata()) for line in below.lines] == [sorted(LOSS), [0, 20]]
    assert labels_in(figure) == [drawing.ERROR_LABEL, "training loss", "held-out loss"]
    assert (above.get_ylabel(), below.get_ylabel(), below.get_xlabel()) == (
        "MIR",
        "loss, nats per token",
        "training step",
    )
    assert_readable(figure)


@pytest.mark.parametrize(("loss", "held_out", "panels"), [({}, None, 1), (None, {}, 1), ({1: 2.0}, None, 2)])
def test_training_without_errors_or_losses_shows_what_there_is(loss, held_out, panels, tmp_path):
    figure = plots.training_figure({0: result(0), 20: 0.9, 40: 0.7}, loss, held_out)
    assert len(figure.axes) == panels
    assert not bands(figure.axes[0])
    assert_readable(figure)
    assert colours(plots.plot_training({0: 0.5}, loss, tmp_path / "training.png", held_out)) > 10


def test_training_leaves_out_what_is_not_finite():
    figure = plots.training_figure({0: made([0.0]), 1: 2.0, 2: 1.0}, {1: math.inf, 2: 3.0})
    assert [list(axes.lines[0].get_ydata()) for axes in figure.axes] == [
        pytest.approx([math.nan, 2.0, 1.0], nan_ok=True),
        pytest.approx([math.nan, 3.0], nan_ok=True),
    ]


@pytest.mark.parametrize("results", [{}, []])
def test_training_without_results_is_refused(results):
    with pytest.raises(ValueError, match="results: expected at least one measurement, got none"):
        plots.training_figure(results, {1: 2.0})


# Studies


def content(images, texts):
    return [
        {"images": image, "text": text, "mir": 2.0 + 0.1 * index, "error": 0.04}
        for index, (image, text) in enumerate(itertools.product(images, texts))
    ]


STUDIES = {
    "samples": [{"samples": n, "mir": 3 + 1 / n, "error": 1 / n} for n in (5, 10, 20, 50, 100, 200, 500, 800, 1000)],
    "sets": [{"set": s, "samples": n, "mir": 3 + s / n, "error": 1 / n} for s in (1, 2) for n in (5, 10, 13)],
    "normalization": [{"layer": n, "normalized": 1 / n, "unnormalized": 9.0**n} for n in range(1, 33)],
    "layers": [{"layer": n, "distance": 9.0 / n**2, "error": 0.1 / n} for n in range(1, 33)],
    "template": [{"template": "chat", "mir": 2.0, "error": 0.1}, {"template": "plain", "mir": 2.5, "error": None}],
    "content": content(["photographs", "emoji"], ["news", "captions"]),
    "content, one text": content(["photographs", "emoji"], ["news"]),
    "content, one kind of image": content(["photographs"], ["news", "captions"]),
    "content, many": content([f"kind_of_image_{k}" for k in range(12)], [f"$prose$ of sort {k}" for k in range(6)]),
    "content, very many": content([f"folder-with-a-very-long-name-{k}" for k in range(40)], ["news"]),
}


@pytest.fixture
def drawn(monkeypatch):
    """Collect the figures that are saved."""
    figures_drawn = []
    monkeypatch.setattr(figures, "save_figure", lambda figure, path: figures_drawn.append(figure))
    return figures_drawn


@pytest.mark.parametrize("study", STUDIES)
def test_studies_are_readable(study, drawn, tmp_path):
    name = study.partition(",")[0].replace("sets", "samples")
    plots.plot_study(name, STUDIES[study], tmp_path / "study.png")
    (figure,) = drawn
    assert_readable(figure)
    (axes,) = figure.axes
    assert all(line.get_xydata().size for line in axes.lines)


def test_content_groups_kinds_of_text_over_each_kind_of_image(drawn, tmp_path):
    plots.plot_study("content", STUDIES["content"], tmp_path / "study.png")
    (axes,) = drawn[0].axes
    assert [text.get_text() for text in axes.get_xticklabels()] == ["photographs", "emoji"]
    assert labels_in(drawn[0]) == ["news", "captions"]
    news, captions = (container.lines[0].get_xydata() for container in axes.containers)
    assert news[:, 1].tolist() == [2.0, pytest.approx(2.2)]
    assert captions[:, 1].tolist() == [pytest.approx(2.1), pytest.approx(2.3)]
    assert (captions[:, 0] > news[:, 0]).all()
