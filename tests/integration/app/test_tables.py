"""Tables at any console width: every number complete, no line too wide, and a line naming dropped columns."""

import io
import re
from collections import Counter
from dataclasses import replace

import pytest
from rich.console import Console
from rich.panel import Panel
from rich.table import Table

from integration.results import printed, result
from modality_integration import MIRResult, compare
from modality_integration.app import doctor, tables
from modality_integration.app.demo.history import History
from modality_integration.metric.comparison import compare_several
from modality_integration.metric.tables import distance_table, empty_table

WIDTHS = (120, 80, 60, 40, 28)
NAMES = ("before", "llava-1.5-7b-hf-moca-lr-2e-5/checkpoint-1200", "a run with words", "[red]x[1]", "実験-二", "f")


def text_of(table, width):
    """The output of a console of that width, after checking that nothing is cut: no line too wide, no ellipsis."""
    text = printed(table, width)
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text
    return text


def row_of(text, first):
    """The cells of the row that begins with `first`, across all tables in a text."""
    return " ".join(line for line in text.splitlines() if line.split()[:1] == [first]).split()


def grown(made, factor, groups=0):
    """The result with larger distances and with groups of samples for a standard error."""
    made.terms = [replace(terms, mean=terms.mean * factor) for terms in made.terms]
    if groups:
        made.left_out = [[d * (1 + 0.01 * (-1) ** g) for g in range(groups)] for d in made.per_layer]
    return made


def results(count, **options):
    return {name: grown(result(k, **options), 1.0 + 999.0 * k, groups=6) for k, name in enumerate(NAMES[:count])}


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("factor", [1.0, 1e6], ids=["small", "wide numbers"])
def test_the_layers_of_a_result_have_their_distance_at_any_width(width, factor):
    made = grown(result(layers=12), factor)
    made.kept["vision"] = [57_600_000] * 12
    text = text_of(made.table(), width)
    for index, distance in enumerate(made.per_layer):
        assert f"{distance:.4g}" in row_of(text, str(index + 1))
    assert row_of(text, "MIR") == ["MIR", f"{made.value:.4f}"]


ALL = ("mean", "Tr v", "Tr t", "Tr root", "alpha", "vision -out", "text -out")


@pytest.mark.parametrize(
    ("width", "gone"),
    [
        (120, ()),
        (80, ()),
        (60, ("Tr root",)),
        (40, ("Tr v", "Tr t", "Tr root", "alpha")),
        (28, ("mean", "Tr v", "Tr t", "Tr root", "alpha", "text -out")),
        (16, ALL),
    ],
)
def test_a_narrow_console_leaves_out_the_terms_by_importance_and_says_so_in_a_line(width, gone):
    made = result()
    text = text_of(made.table(), width)
    said = " ".join(text.split())
    if not gone:
        assert "not shown" not in text
    else:
        assert f"not shown at this width: {', '.join(gone)} (mir.json has all terms)" in said
    cells = {
        "mean": [f"{terms.mean:.3g}" for terms in made.terms],
        "alpha": [f"{alpha:.3g}" for alpha in made.alpha],
        "Tr root": [f"{terms.trace_root:.3g}" for terms in made.terms],
    }
    for index, row in enumerate([row_of(text, str(layer)) for layer in (1, 2, 3)]):
        for name, of_layers in cells.items():
            assert (of_layers[index] in row) == (name not in gone)


def test_distances_without_sinks_stay_longer_than_the_terms():
    made = result()
    made.without_sinks = [0.5 * distance for distance in made.per_layer]
    text = text_of(made.table(), 40)
    assert "Tr root" in text
    assert row_of(text, "layer")[-1] == "sinks"
    assert row_of(text, "1")[-1] == f"{made.without_sinks[0]:.4g}"
    assert row_of(text, "MIR")[-1] == f"{made.value_without_sinks:.4f}"


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("count", [2, 3, 6])
def test_several_results_have_every_number_at_any_width_and_whole_names(width, count):
    made = results(count, layers=4)
    several = compare_several(made)
    text = text_of(several.table(), width)
    for layer in range(4):
        row = row_of(text, str(layer + 1))
        for one in made.values():
            assert f"{one.per_layer[layer]:.4g}" in row
    assert [cell for cell in row_of(text, "MIR") if cell != "MIR"] == [f"{one.value:.4f}" for one in made.values()]
    assert [cell for cell in row_of(text, "error") if cell != "error"] == [f"{one.error:.4f}" for one in made.values()]
    differences = [f"{one.difference:+.4f}" for one in several.against.values()]
    assert [cell for cell in row_of(text, "difference") if cell != "difference"] == differences
    heads = "".join(line.split("─")[0] for line in text.splitlines() if not re.match(r" *(\d+|MIR|error) ", line))
    assert set(re.sub(r"\s", "", "".join(made))) <= set(heads)  # wrapped, but no character of a name is lost


def test_a_name_that_looks_like_markup_is_printed_as_it_is():
    text = text_of(distance_table({"[red]x[1]": result(), "b": result(1)}), 80)
    assert "[red]x[1]" in text


def test_a_number_in_a_name_is_not_broken():
    text = text_of(distance_table({"a": result(), "run_with_long_words-1200.75": result(1)}), 22)
    assert "1200.75" in text


def test_comparison_table_has_a_column_a_result_and_gaps_where_one_is_shorter():
    before, after = result(0), result(1, layers=2)
    text = printed(distance_table({"before": before, "after": after}))
    assert "before" in text
    assert row_of(text, "MIR") == ["MIR", f"{before.value:.4f}", f"{after.value:.4f}"]
    assert row_of(text, "3") == ["3", f"{before.per_layer[2]:.4g}"]
    assert "error" not in text


@pytest.mark.parametrize("names", [("A", "B"), ("before", NAMES[1])])
def test_the_ratio_of_two_is_the_first_to_go(names):
    both = compare(result(0), result(1), names=names)
    wide, narrow = text_of(both.table(), 80), text_of(both.table(), 30)
    assert row_of(wide, "1")[-1] == f"{both.per_layer[0]:.3f}"
    header = "B / A" if names == ("A", "B") else "ratio"
    assert header in wide
    assert f"not shown at this width: {header}" in " ".join(narrow.split()) or row_of(narrow, "1")[-1] in row_of(
        wide, "1"
    )


STUDIES = {
    "samples": {
        "samples": 1000,
        "vision_tokens": 576000,
        "text_tokens": 123456,
        "mir": 3.4,
        "error": 0.0123,
        "missed": 0,
    },
    "repeated": {"set": 3, "samples": 1000, "vision_tokens": 576000, "text_tokens": 12345, "mir": 3.4, "error": None},
    "normalization": {"layer": 3, "alpha": 1.23456, "normalized": 1.2e-5, "unnormalized": 123456.0, "missed": 12},
    "content": {"images": "photographs_of_cats", "text": "news of 2024", "samples": 20, "mir": 0.5, "error": 1e-6},
    "template": {"template": "chat", "samples": 20, "mir": 0.53, "error": 0.02, "missed": 0},
    "layers": {"layer": 1, "distance": 1.5e-7, "error": 1e-9, "mean": 1.25e-7, "trace_vision": 1.5e5, "trace_text": 3.0}
    | {"trace_root": 1.0, "mean_lower": None, "mean_upper": None, "deviations": 0.0, "alpha": 0.4, "missed": 1},
}
READ_FOR = {"mir": "{:.4f}", "distance": "{:.4g}", "normalized": "{:.4g}", "unnormalized": "{:.4g}"}


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", STUDIES)
def test_a_study_shows_what_it_is_read_for_at_any_width(name, width):
    text = text_of(tables.rows_table([STUDIES[name]] * 3), width)
    said = " ".join(text.split())
    for key, form in READ_FOR.items():
        if key in STUDIES[name]:
            assert text.count(form.format(STUDIES[name][key])) >= 3
    assert "0.0000" not in text
    assert "mean lower" not in text  # empty in every row
    assert ("not shown at this width" in said) == ("the CSV has all columns" in said)


def test_a_study_says_which_columns_a_narrow_console_leaves_out():
    said = " ".join(text_of(tables.rows_table([STUDIES["layers"]]), 40).split())
    assert (
        "not shown at this width: mean, trace vision, trace text, trace root, deviations (the CSV has all columns)"
        in said
    )
    wide = text_of(tables.rows_table([STUDIES["layers"]]), 120)
    assert "1.5e+05" in wide
    assert "not shown" not in wide


@pytest.mark.parametrize("width", WIDTHS)
def test_the_tables_of_the_doctor_fit(width):
    versions = text_of(doctor.versions(), width)
    assert doctor.installed("torch") in versions
    assert doctor.installed("rich") in versions
    text_of(doctor.devices(), width)
    text_of(doctor.backends(), width)


@pytest.mark.parametrize("width", WIDTHS)
def test_the_probes_of_a_demo_fit(tmp_path, width, monkeypatch):
    history = History(tmp_path)
    for step, one in zip((0, 40, 80, 120, 160, 1000), results(6).values(), strict=True):
        history.results[step], history.held_out_loss[step] = one, 2.0
    console = Console(width=width, file=io.StringIO())
    monkeypatch.setattr("modality_integration.app.plots.plot_layers", lambda *_: None)
    monkeypatch.setattr("modality_integration.app.plots.plot_training", lambda *_: None)
    history.show(console)
    text = console.file.getvalue()
    assert max(map(len, text.splitlines())) <= width
    values = [f"{one.value:.4f}" for one in history.results.values()]
    assert [cell for cell in row_of(text, "MIR") if cell != "MIR"] == values
    assert "step 40" in " ".join(text.split())


def test_the_width_is_that_of_the_console_that_prints():
    table = result().table()
    assert isinstance(table, Table)
    wide, narrow = printed(table, 120), printed(table, 40)
    assert "not shown" in narrow
    assert "not shown" not in wide
    assert printed(table, 120) == wide
    framed = text_of(Panel(table), 44)
    assert f"{result().value:.4f}" in framed


@pytest.mark.parametrize("width", [120, 60, 40, 30])
def test_words_are_broken_and_none_is_lost(width):
    cells = ["trace_sqrt_product", "cuda:0", "linalg", "no: a CPU tensor needs an interpreter, 12.5 GB"]
    table = empty_table("kernels", index=4)
    for name in ("operation", "device", "backend", "here"):
        table.add_column(name)
    table.add_row(*cells)
    text = text_of(table, width)
    assert not Counter("".join(cells)) - Counter(text) - Counter(" " * 99)
    assert "12.5" in text


def test_words_wrap_and_markup_is_kept_in_a_table_of_words():
    table = empty_table("things", index=2)
    table.add_column("name")
    table.add_column("what")
    table.add_row("a_long_name_with_12345678_in_it", "[green]several words of it[/]")
    text = text_of(table, 24)
    assert "12345678" in text
    assert "[green]" not in text
    assert {"several", "words", "of", "it"} <= set(text.split())


def test_a_result_from_json_has_the_same_table(tmp_path):
    made = result()
    assert printed(MIRResult.from_json(made.to_json()).table()) == printed(made.table())
