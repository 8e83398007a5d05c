"""`mir report`: everything known about the runs, on one page of valid, self-contained HTML."""

import base64
import io
import json
import re
from fnmatch import fnmatch
from itertools import pairwise
from pathlib import Path

import pytest
from PIL import Image
from rich.console import Console

from integration.app import report_pages as pages
from integration.results import result
from modality_integration.app import compute, report
from modality_integration.app.errors import InputError
from modality_integration.metric.comparison import compare_several
from modality_integration.metric.standard_error import arithmetic, missing_error

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return pages.all_runs(tmp_path_factory.mktemp("runs"))


PAGES = {
    "one": ["a"],
    "two": ["a", "b"],
    "four": ["a", "b", "bounds", "sinks"],
    "demo": ["demo"],
    "studies": ["studies"],
    "ugly": ["ugly"],
    "all": ["ugly", "a", "b", "bounds", "sinks", "demo", "studies"],
}


@pytest.fixture(params=PAGES)
def page(request, runs, tmp_path):
    return pages.write(tmp_path / "report.html", *(runs[name] for name in PAGES[request.param]))


def test_page_is_sound_html(page):
    (html,) = page.all("html")
    assert html.attributes["lang"] == "en"
    ids = [e.attributes["id"] for e in page._below() if "id" in e.attributes]
    assert len(ids) == len(set(ids))
    links = [e.attributes["href"] for e in page.all("a")]
    assert links
    assert {link.removeprefix("#") for link in links} == set(ids)
    assert len(page.all("head")[0].all("title")) == 1
    for name in ("main", "header", "nav", "h1"):
        assert len(page.all(name)) == 1, name


def test_page_takes_nothing_from_outside_and_runs_nothing(page):
    assert not [e for tag in ("script", "link", "iframe", "object", "base") for e in page.all(tag)]
    for element in page._below():
        for name, value in element.attributes.items():
            assert not name.startswith("on"), (element.tag, name)
            if name in ("src", "href", "srcset", "xlink:href", "style"):
                assert re.match(r"#\w+$|data:image/jpeg;base64,[\w+/=]+$", value), (element.tag, value[:80])
    style = page.all("style")[0].text
    assert "url(" not in style
    assert "@import" not in style
    (policy,) = [m for m in page.all("meta") if "http-equiv" in m.attributes]
    assert "default-src 'none'" in policy.attributes["content"]


def test_page_can_be_heard(page):
    levels = [int(e.tag[1]) for e in page._below() if re.fullmatch(r"h[1-6]", e.tag)]
    assert levels[0] == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))
    for table in page.all("table"):
        assert table.all("caption")[0].text.strip()
        columns = table.all("thead")[0].all("th")
        assert {e.attributes["scope"] for e in columns} == {"col"}
        for row in table.all("tbody")[0].all("tr"):
            assert row.inside[0].attributes.get("scope") == "row"
            assert len(row.inside) == len(table.all("thead")[0].all("tr")[0].inside)
    for image in page.all("img"):
        assert len(image.attributes["alt"]) > 5
    for drawing in page.all("svg"):
        assert drawing.attributes.get("aria-hidden") == "true" or len(drawing.attributes["aria-label"]) > 20


def test_one_run_is_all_there(runs, tmp_path):
    made = pages.with_groups(result(0))
    page = pages.write(tmp_path / "one.html", runs["a"])
    (card,) = page.all("article")
    assert f"{made.value:.4f} ± {made.error:.4f}" in card.text
    assert "standard error over the choice of samples, from 5 groups" in card.text
    distances = pages.rows(pages.section(page, "Layers").all("table")[0])
    for layer, distance in enumerate(made.per_layer, 1):
        assert distances[str(layer)][0] == f"{distance:.4g}"
        assert distances[str(layer)][-1] == f"{made.alpha[layer - 1]:.3g}"
    assert distances["MIR"][0] == f"{made.value:.4f}"
    summary, tokens = map(pages.rows, pages.section(page, "Outliers").all("table"))
    assert summary["a, vision"][0] == "remove"
    assert summary["a, text"][2] == str(sum(made.removed["text"]))
    for layer in range(3):
        counts = [made.kept["vision"], made.removed["vision"], made.missed["vision"], made.massive["vision"]]
        assert tokens[str(layer + 1)][:4] == [str(count[layer]) for count in counts]
    settings = pages.section(page, "Settings").text
    assert all(words in settings for words in ("models/a", "photos", "news", "2.9.0", "transformers"))
    assert "bad.png: it is empty" in pages.section(page, "Skipped files").text
    samples = pages.section(page, "Samples")
    assert [p.text for p in samples.all("p", class_="prose")] == ["prose 0", "prose 1", "prose 2"]
    for image in samples.all("img"):
        data = base64.b64decode(image.attributes["src"].partition(",")[2])
        assert Image.open(io.BytesIO(data)).size == (40, 30)


def test_accuracy_is_said_or_why_it_is_not_known(runs, tmp_path):
    page = pages.write(tmp_path / "report.html", runs["bounds"])
    made = result(1, bounds=True)
    made.settings = {"groups": 0}
    (card,) = page.all("article")
    assert arithmetic(made) in card.text
    assert missing_error(made) in card.text
    assert "±" not in card.text


def test_sinks_have_their_table_and_curve(runs, tmp_path):
    page = pages.write(tmp_path / "report.html", runs["sinks"])
    made = pages.with_sinks(result(3, layers=30))
    assert f"{made.value_without_sinks:.4f} without attention sinks" in page.all("article")[0].text
    sinks = pages.rows(pages.section(page, "Attention sinks").all("table")[0])
    assert sinks["sinks, vision"] == ["7", "29 of 30", "0 (5), 35 (2)", "counted", f"{made.value_without_sinks:.4f}"]
    dashed = page.all("svg", class_="chart wide")[0].all("path", class_="dashed")
    assert [path.attributes["d"].count("L") for path in dashed] == [29]
    without = pages.write(tmp_path / "without.html", runs["a"])
    assert "No token with massive activations" in pages.section(without, "Attention sinks").text
    assert not pages.section(without, "Attention sinks").all("table")


def test_runs_stand_side_by_side_with_verdict_and_differences(runs, tmp_path):
    made = {"a": pages.with_groups(result(0)), "b": pages.with_groups(result(2), 0.01)}
    for name, one in made.items():
        one.settings = {"model": f"models/{name}", "samples": 40, "groups": 5}
    page = pages.write(tmp_path / "report.html", runs["a"], runs["b"])
    several, values = compare_several(made), pages.section(page, "MIR")
    for line in several.lines() + several.notes:
        assert line in values.text
    difference = pages.rows(values.all("table")[0])["b"]
    assert difference[0] == f"{several.against['b'].difference:+.4f}"
    marked = {row.inside[0].text for row in page.all("tr", class_="differs")}
    assert marked == {"model differs", "transformers differs"}
    layers = pages.rows(pages.section(page, "Layers").all("table")[0])
    assert [cell.split(" ")[0] for cell in layers["2"][:2]] == [f"{one.per_layer[1]:.4g}" for one in made.values()]
    assert layers["2"][2] == f"{made['b'].per_layer[1] / made['a'].per_layer[1]:.3g}"
    samples = pages.section(page, "Samples")
    assert [h.text for h in samples.all("h3")] == ["a, b"]
    assert len(samples.all("img")) == 3


def test_many_runs_stand_in_tables_that_fit_on_paper(runs, tmp_path):
    labels = [f"run {k}" for k in range(12)]
    page = pages.write(tmp_path / "report.html", *[runs["a"], runs["b"]] * 6, labels=labels)
    layers = [t for t in pages.section(page, "Layers").all("table") if "by layer, with" in t.all("caption")[0].text]
    heads = [[cell.text for cell in table.all("thead")[0].all("th")][1:] for table in layers]
    assert heads == [labels[:5], labels[5:10], labels[10:]]
    values = [cell for table in layers for cell in pages.rows(table)["MIR"]]
    assert values[:2] * 6 == values
    settings = [pages.rows(t) for t in pages.section(page, "Settings").all("table") if t.text.count("models/")]
    assert [len(table["model differs"]) for table in settings] == [5, 5, 2]
    drawn = page.all("svg", class_="chart wide")[0]
    shapes = [re.sub(r"[\d. ]+", "", g.all("path", class_="dot")[0].attributes["d"]) for g in drawn.all("g")[3:]]
    assert shapes[:4] == shapes[4:8]
    assert len(set(shapes[:4])) == 4
    assert shapes[8] != shapes[0]  # same colour, another mark


def test_labels_are_the_folders_names_or_what_a_person_says(runs, tmp_path):
    page = pages.write(tmp_path / "report.html", runs["a"], runs["b"])
    assert page.all("h1")[0].text == "MIR of a, b"
    page = pages.write(tmp_path / "report.html", runs["a"], runs["b"] / "mir.json", labels=("before <", "after"))
    assert page.all("title")[0].text == "MIR of before <, after"
    with pytest.raises(InputError, match="label"):
        pages.write(tmp_path / "report.html", runs["a"], labels=("x", "y"))


def test_very_long_labels_are_shortened_only_if_they_stay_different(runs, tmp_path):
    alike = [f"{'x' * 100}{k}{'y' * 100}" for k in range(2)]
    page = pages.write(tmp_path / "report.html", runs["a"], runs["b"], labels=alike)
    assert alike[0] in page.all("h1")[0].text
    page = pages.write(tmp_path / "report.html", runs["a"], runs["b"], labels=("x" * 100, "y"))
    assert f"{'x' * 30}…{'x' * 29}, y" in page.all("h1")[0].text


@pytest.mark.parametrize("name", pages.UGLY)
def test_ugly_words_are_words_and_nothing_else(runs, tmp_path, name):
    word = pages.UGLY[name]
    page = pages.write(tmp_path / "report.html", runs["ugly"], labels=(word.replace("\udcff", "?"),))
    shown = re.sub("[\x00\x1b\u202e\udcff]", "\N{REPLACEMENT CHARACTER}", word)
    for part in ("Notes", "Skipped files", "Samples"):
        assert shown in pages.section(page, part).text
    assert not [e for e in page._below() if e.tag in ("script", "b") or "onerror" in e.attributes]
    assert len(page.all("img")) == len(pages.UGLY)  # and none that was not a JPEG
    assert "49" not in page.all("h1")[0].text


def test_training_of_a_demo_is_drawn(runs, tmp_path):
    training = pages.section(pages.write(tmp_path / "report.html", runs["demo"]), "Training")
    mir, loss = training.all("svg", class_="chart wide")
    assert len(mir.all("path", class_="dot")) == 3
    assert "2 at 0, 1 at 20" in mir.attributes["aria-label"]
    assert [len(p.attributes["d"].split("L")) for p in loss.all("path", class_="thin")] == [20]
    assert pages.rows(training.all("table")[0])["10"] == ["1.5000", "0.0200", "4"]


@pytest.mark.parametrize(
    ("name", "drawn"), [("samples", 2), ("normalization", 6), ("content", 2), ("template", 2), ("layers", 2)]
)
def test_study_has_its_table_and_is_drawn(tmp_path, name, drawn):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / f"study_{name}.csv").write_text(pages.STUDIES[name])
    study = pages.section(pages.write(tmp_path / "report.html", folder), "Studies")
    lines = pages.STUDIES[name].splitlines()
    assert len(study.all("tbody")[0].all("tr")) == len(lines) - 1
    charts = study.all("svg", class_="chart wide")
    marks = charts[0].all("path", class_="dot") if charts else study.all("path", class_="spot")
    assert len(marks) == drawn


@pytest.mark.parametrize("table", ["a,b\nx,1.5\n", "layer,else\n1,2\n"])
def test_table_of_an_unknown_study_stands_as_it_is(tmp_path, table):
    (tmp_path / "study_layers.csv").write_text(table)
    study = pages.section(pages.write(tmp_path / "report.html", tmp_path), "Studies")
    assert len(pages.rows(study.all("table")[0])) == 2
    assert not study.all("svg")


def test_same_runs_give_the_same_bytes(runs, tmp_path):
    for name in ("1.html", "2.html"):
        pages.write(tmp_path / name, runs["a"], runs["b"], runs["demo"])
    assert (tmp_path / "1.html").read_bytes() == (tmp_path / "2.html").read_bytes()


def test_results_in_memory_have_a_page_too(tmp_path):
    made = {"before <1>": pages.with_groups(result(0)), "after": result(1)}
    path = report.write_report(made, tmp_path / "new" / "report.html")
    page = pages.read(path)
    assert page.all("h1")[0].text == "MIR of before <1>, after"
    assert all(f"{one.value:.4f}" in page.text for one in made.values())
    with pytest.raises(ValueError, match="results"):
        report.write_report({}, path)


def test_run_of_mir_compute_comes_with_its_samples(options, tmp_path):
    made = compute.run(options, pages.QUIET)
    page = pages.write(tmp_path / "report.html", options.out)
    assert f"{made.value:.4f}" in page.all("article")[0].text
    samples = pages.section(page, "Samples")
    assert len(samples.all("img")) == len(samples.all("p", class_="prose")) == 12
    recorded = json.loads((options.out / "run.json").read_text())
    settings = pages.section(page, "Settings").text
    assert recorded["versions"]["torch"] in settings
    assert Path(options.model).name in settings


def test_templates_are_in_the_package():
    tomllib = pytest.importorskip("tomllib")
    patterns = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    package = ROOT / "python" / "modality_integration"
    files = [p for p in (package / "app" / "report").iterdir() if p.suffix in (".jinja", ".css")]
    assert len(files) == 3
    for file in files:
        name = file.relative_to(package).as_posix()
        assert any(fnmatch(name, pattern) for pattern in patterns["modality_integration"]), name


@pytest.mark.parametrize("name", ["mir.json", "run.json", "page", "layers.png"])
def test_a_result_is_never_made_a_page(tmp_path, name):
    written = tmp_path / name
    result().to_json(tmp_path / "mir.json")
    written.write_bytes(before := (tmp_path / "mir.json").read_bytes())
    with pytest.raises(InputError, match=f"out: expected the name of an .html file, got .*{name}"):
        report.run([tmp_path], written, (), Console(quiet=True), overwrite=True)
    assert written.read_bytes() == before


def test_a_result_is_never_made_a_page_from_python_either(tmp_path):
    result().to_json(tmp_path / "mir.json")
    before = (tmp_path / "mir.json").read_bytes()
    with pytest.raises(ValueError, match=r"expected the name of an \.html file, got .*mir\.json"):
        report.write_report({"a": result()}, tmp_path / "mir.json")
    assert (tmp_path / "mir.json").read_bytes() == before


def test_an_empty_table_is_no_study(tmp_path):
    (tmp_path / "study_layers.csv").write_text("\n")
    with pytest.raises(InputError, match=r"study_layers\.csv is not the table of a study: it is empty"):
        report.run([tmp_path], tmp_path / "report.html", (), Console(quiet=True))
