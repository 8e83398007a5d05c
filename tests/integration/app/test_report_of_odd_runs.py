"""`mir report` of damaged, old, unfinished or unusual runs: shown, or refused in one line."""

import io
import json
import math
import re

import pytest
from rich.console import Console

from integration.app import report_pages as pages
from integration.results import result
from modality_integration import LayerTerms
from modality_integration.app import report
from modality_integration.app.errors import InputError


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return pages.save(tmp_path_factory.mktemp("runs") / "a", result(0))


@pytest.mark.parametrize(
    "distances", [[0.0, 0.0, 0.0], [0.0, 2.0, 3.0], [1e-300, 1.0, 1e300], [2.0], [5.0, 5.0 * (1 + 1e-12), 5.0]]
)
def test_any_distances_can_be_shown(tmp_path, distances):
    made = result(layers=len(distances))
    made.terms = [LayerTerms(distance, 0.0, 0.0, 0.0) for distance in distances]
    page = pages.write(tmp_path / "report.html", pages.save(tmp_path / "run", made))
    charts = page.all("svg", class_="chart wide")
    assert sum(len(chart.all("path", class_="dot")) for chart in charts) == sum(d > 0 for d in distances)
    for chart in charts:
        for axis in chart.all("g", class_="ticks"):
            ticks = [text.text for text in axis.all("text")]
            assert 1 <= len(ticks) == len(set(ticks))
        numbers = [
            float(x) for x in re.findall(r"(?<=[MLV ])-?[\d.]+", " ".join(p.attributes["d"] for p in chart.all("path")))
        ]
        assert all(math.isfinite(x) and -20 <= x <= 800 for x in numbers)


def test_measurement_that_is_not_finite_is_a_gap(tmp_path):
    document = {"steps": [0, 1, 2, 3], "mir": ["-inf", 1.5, 1.25, 1], "error": [None, 0.1, None, math.nan]}
    (tmp_path / "history.json").write_text(json.dumps({**document, "loss": [3, math.nan, 2]}))
    page = pages.write(tmp_path / "report.html", tmp_path)
    mir, loss = page.all("svg", class_="chart wide")
    assert len(mir.all("path", class_="dot")) == 3
    assert loss.all("path", class_="thin")[0].attributes["d"].count("M") == 2
    assert not [path for path in page.all("path") if re.search("nan|inf", path.attributes["d"])]
    assert pages.rows(page.all("table")[0])["0"] == ["-inf", "", ""]
    assert pages.rows(page.all("table")[0])["3"] == ["1.0000", "", ""]


@pytest.mark.parametrize("left_out", [math.inf, 0.0])
def test_layer_whose_error_is_not_known_has_none(tmp_path, left_out):
    made = pages.with_groups(result(0))
    made.left_out[1][2] = left_out
    known = [math.isfinite(error) for error in made.layer_errors]
    page = pages.write(tmp_path / "report.html", pages.save(tmp_path / "run", made))
    cells = pages.rows(pages.section(page, "Layers").all("table")[0])
    assert [cells[str(layer)][1] != "" for layer in (1, 2, 3)] == known
    assert "nan" not in pages.section(page, "Layers").text
    assert not [path for path in page.all("path") if re.search("nan|inf", path.attributes["d"])]


def test_old_runs_of_one_file_are_shown(tmp_path):
    made = result(0)
    made.to_json(tmp_path / "some.json")
    page = pages.write(tmp_path / "report.html", tmp_path / "some.json")
    assert f"{made.value:.4f}" in page.all("article")[0].text
    assert page.all("h1")[0].text == "MIR of some"
    assert "Samples" not in [h.text for h in page.all("h2")]


def put(name, text):
    def damage(folder):
        (folder / name).write_text(text)

    return damage


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda folder: (folder / "mir.json").unlink(), "holds no mir.json"),
        (put("mir.json", '{"schema": "modality-integration-rate", "version": 99}'), r"mir.json has version 99"),
        (put("mir.json", "{"), "mir.json is not JSON"),
        (put("run.json", "{"), "run.json is not JSON"),
        (put("run.json", "[]"), "run.json: expected an object, got list"),
        (put("run.json", '{"samples": 3}'), "run.json: samples: expected a list of objects"),
        (put("run.json", '{"skipped": ["x"]}'), "run.json: skipped: expected a list of objects"),
        (put("run.json", '{"versions": []}'), "run.json: versions: expected an object"),
        (put("history.json", "{}"), "history.json is not the history"),
        (put("history.json", '{"steps": [Infinity], "mir": [1]}'), "history.json is not the history"),
        (put("history.json", '{"steps": [1, 2], "mir": [1], "error": [null]}'), "history.json is not the history"),
        (put("study_x.csv", "a,b\n1\n"), "study_x.csv is not the table"),
        (put("study_x.csv", ""), "study_x.csv is not the table"),
    ],
)
def test_damaged_run_is_named_in_one_line_and_nothing_is_written(tmp_path, damage, words):
    folder = pages.save(tmp_path / "run", result(0))
    damage(folder)
    with pytest.raises(InputError, match=words) as refusal:
        report.run([folder], tmp_path / "report.html", (), pages.QUIET)
    assert "\n" not in str(refusal.value)
    assert str(folder) in str(refusal.value)
    assert not (tmp_path / "report.html").exists()


def test_folder_without_a_result_says_where_there_may_be_one(tmp_path):
    pages.save(tmp_path / "runs" / "a", result(0))
    (tmp_path / "unfinished" / "checkpoint").mkdir(parents=True)
    for folder, words in (("runs", f"pass the folders that do: {tmp_path / 'runs' / 'a'}"), ("unfinished", "resume")):
        with pytest.raises(InputError, match=re.escape(words)):
            report.run([tmp_path / folder], tmp_path / "report.html", (), pages.QUIET)
    with pytest.raises(InputError, match="does not exist"):
        report.run([tmp_path / "nowhere"], tmp_path / "report.html", (), pages.QUIET)


def test_nothing_is_overwritten_unasked(folder, tmp_path):
    out = tmp_path / "report.html"
    out.write_text("mine")
    with pytest.raises(InputError, match="already exists"):
        report.run([folder], out, (), pages.QUIET)
    assert out.read_text() == "mine"
    with pytest.raises(InputError, match="got the folder"):
        report.run([folder], tmp_path, (), pages.QUIET, overwrite=True)
    console = Console(record=True, width=200, file=io.StringIO())
    assert report.run([folder], tmp_path / "new" / "[b].html", (), console) == tmp_path / "new" / "[b].html"
    assert f"wrote {tmp_path / 'new' / '[b].html'} (" in console.export_text()
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["[b].html"]


def test_long_lists_of_skipped_files_are_cut(tmp_path):
    skipped = [{"name": f"{k}.png", "reason": "it is empty"} for k in range(1000)]
    page = pages.write(tmp_path / "report.html", pages.save(tmp_path / "run", result(0), pages.record(skipped=skipped)))
    listed = pages.section(page, "Skipped files")
    assert "49.png" in listed.text
    assert "50.png" not in listed.text
    assert "and 950 more" in listed.text
