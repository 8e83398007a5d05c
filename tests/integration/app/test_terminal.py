"""Output to stdout and stderr, as text or JSON, and its verbosity."""

import json
import logging
import warnings

import pytest

from integration.app.command_line import mir
from integration.saved_models import save_tiny_llava, write_images, write_texts
from modality_integration import MIRResult
from modality_integration.app import compute, demo, study
from modality_integration.app.results import NotWritten
from modality_integration.metric.result import LayerTerms

COUNTS = {"vision": [1], "text": [1]}
RESULT = MIRResult([LayerTerms(1.0, 1.0, 1.0, 0.5)], [1.0], COUNTS, COUNTS)
REQUIRED = ["--model", "m", "--images", ".", "--text", "."]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("terminal")
    save_tiny_llava(root / "model")
    write_images(root / "images", 6)
    write_texts(root / "text", 6)
    (root / "images" / "broken.jpg").write_bytes(b"")
    return root


def measure(folders, out, *words, **variables):
    paths = {"model": folders / "model", "images": folders / "images", "text": folders / "text", "out": out}
    given = [word for name, path in paths.items() for word in (f"--{name}", path)]
    return mir("compute", *given, "--samples", 6, "--device", "cpu", *words, **variables)


@pytest.fixture(scope="module")
def runs(folders):
    """The folders of two runs, and the outcome of the first."""
    outcome = measure(folders, folders / "a")
    assert outcome.exit_code == 0, outcome.output
    assert measure(folders, folders / "b", "--last", "raw").exit_code == 0
    return folders / "a", folders / "b", outcome


@pytest.fixture
def measured(monkeypatch):
    """Make `mir compute` return its result immediately."""
    monkeypatch.setattr(compute, "run", lambda options, console, results: (results.print("MIR"), RESULT)[1])


def test_the_result_goes_to_stdout_and_what_happens_on_the_way_to_stderr(runs):
    *_, outcome = runs
    assert "standard error over the choice of samples" in outcome.stdout
    assert "wrote mir.json" in outcome.stdout
    for on_the_way in ("model, pass 1", "broken image broken.jpg"):
        assert on_the_way in outcome.stderr
        assert on_the_way not in outcome.stdout


def test_quiet_leaves_the_result_alone(runs, folders, tmp_path):
    _, _, loud = runs
    outcome = measure(folders, tmp_path, "--quiet")
    assert outcome.exit_code == 0
    assert outcome.stderr == ""
    assert "note" in loud.stdout
    assert "note" not in outcome.stdout
    (value,) = (line for line in loud.stdout.splitlines() if line.startswith("MIR "))
    assert value in outcome.stdout.splitlines()


def test_quiet_still_says_what_is_wrong(folders, tmp_path):
    outcome = mir("compute", "--quiet", *REQUIRED, "--images", tmp_path / "none")
    assert outcome.exit_code == 1
    assert len(outcome.stderr.strip().splitlines()) == 1
    assert mir("plot", tmp_path / "none", "-q").stderr.strip() == f"{tmp_path / 'none'} does not exist"


def test_verbose_tells_what_is_loaded_and_how_long_it_takes(folders, tmp_path):
    logger = logging.getLogger("modality_integration")
    before = logger.level, list(logger.handlers)
    outcome = measure(folders, tmp_path, "--verbose", "--checkpoint-every", 2, columns=500)
    assert outcome.exit_code == 0, outcome.output
    for said in (
        "INFO",
        "DEBUG",
        "loaded",
        "LlavaForConditionalGeneration",
        "checkpoint after 2 samples",
        "distances of",
    ):
        assert said in outcome.stderr
        assert said not in outcome.stdout
    assert (logger.level, logger.handlers) == before


@pytest.mark.parametrize(
    "words", [["--quiet", "compute"], ["compute", "--quiet"], ["-q", "compute"], ["compute", "-q"]]
)
def test_quiet_is_taken_before_and_after_the_command(measured, monkeypatch, words):
    seen = []
    monkeypatch.setattr(compute, "run", lambda options, console, results: (seen.append(console.quiet), RESULT)[1])
    assert mir(*words, *REQUIRED).exit_code == 0
    assert seen == [True]


@pytest.mark.parametrize("words", [["--json", "compute"], ["compute", "--json"]])
def test_json_is_taken_before_and_after_the_command(measured, words):
    outcome = mir(*words, *REQUIRED)
    assert outcome.stdout == RESULT.to_json()


@pytest.mark.parametrize(
    "words",
    [["compute", "--quiet", "--verbose"], ["--quiet", "compute", "--verbose"], ["-v", "-q", "compute"]],
)
def test_quiet_and_verbose_exclude_one_another(measured, words):
    outcome = mir(*words, *REQUIRED)
    assert outcome.exit_code == 2
    assert "--quiet and --verbose are mutually exclusive" in outcome.stderr
    assert outcome.stdout == ""


@pytest.mark.parametrize(("typed", "variable", "quiet"), [("-v", "MIR_QUIET", False), ("-q", "MIR_VERBOSE", True)])
def test_of_quiet_and_verbose_the_typed_one_counts(monkeypatch, typed, variable, quiet):
    seen = []
    monkeypatch.setattr(compute, "run", lambda options, console, results: (seen.append(console.quiet), RESULT)[1])
    outcome = mir("compute", *REQUIRED, typed, **{variable: 1})
    assert outcome.exit_code == 0, outcome.output
    assert seen == [quiet]


def test_json_of_a_measurement_is_its_file(folders, tmp_path):
    outcome = measure(folders, tmp_path, "--json")
    assert outcome.exit_code == 0, outcome.output
    assert outcome.stdout == (tmp_path / "mir.json").read_text()
    assert "model, pass 1" in outcome.stderr


def test_json_of_a_study_is_its_rows_and_a_number_without_bound_is_a_word(monkeypatch):
    rows = [{"layer": 1, "distance": float("-inf"), "error": None}]
    monkeypatch.setattr(study, "run", lambda name, options, console, repeat, results: (results.print("no"), rows)[1])
    outcome = mir("compute", *REQUIRED, "--study", "layers", "--json")
    assert outcome.exit_code == 0, outcome.output
    assert json.loads(outcome.stdout) == [{"layer": 1, "distance": "-inf", "error": None}]


def test_json_of_the_demo_is_its_history(monkeypatch, tmp_path):
    def run(options, console, results):
        results.print("a table")
        (options.out / "history.json").write_text('{"steps": [0]}')

    monkeypatch.setattr(demo, "run", run)
    assert json.loads(mir("demo", "--out", tmp_path, "--json").stdout) == {"steps": [0]}


def test_json_of_a_comparison_has_values_differences_and_verdicts(runs):
    a, b, _ = runs
    document = json.loads(
        mir("compare", a, b, a / "mir.json", "--json", "--label", "x", "--label", "y", "--label", "z").stdout
    )
    assert document["reference"] == "x"
    assert [result["name"] for result in document["results"]] == ["x", "y", "z"]
    values = [MIRResult.from_json(run / "mir.json").value for run in (a, b)]
    assert document["comparisons"][0]["difference"] == pytest.approx(values[1] - values[0])


def test_json_of_what_writes_a_file_is_its_path(runs, tmp_path):
    for command, name in (("plot", "p.pdf"), ("report", "r.html")):
        outcome = mir(command, *runs[:2], "--out", tmp_path / name, "--json")
        assert outcome.exit_code == 0, outcome.output
        assert json.loads(outcome.stdout) == {"written": str(tmp_path / name)}
        assert (tmp_path / name).exists()


def test_json_of_the_doctor_is_an_object():
    document = json.loads(mir("doctor", "--json").stdout)
    assert document["installed"]["torch"]
    assert {"device", "free_memory"} <= document["devices"][0].keys()
    assert {"operation", "backend", "here"} <= document["kernels"][0].keys()
    assert all(isinstance(line, str) for line in document["missing"])


def test_json_of_a_result_that_could_not_be_written_is_not_lost(monkeypatch):
    def full(options, console, results):
        raise NotWritten("out: no space left", RESULT)

    monkeypatch.setattr(compute, "run", full)
    outcome = mir("compute", *REQUIRED, "--json")
    assert outcome.exit_code == 1
    assert outcome.stdout == RESULT.to_json()
    assert outcome.stderr.strip() == "out: no space left"


def test_of_several_processes_the_first_prints_the_json(measured):
    assert mir("compute", *REQUIRED, "--json", RANK=1).stdout == ""


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], ["warning features are odd"]),
        (["--verbose"], ["warning features are odd   (UserWarning, test_terminal.py:"]),
        (["--quiet"], []),
    ],
)
def test_a_warning_of_another_library_is_a_line_on_stderr(monkeypatch, words, said):
    def warn(options, console, results):
        warnings.warn("features are odd\n  and more of that", stacklevel=1)
        return RESULT

    monkeypatch.setattr(compute, "run", warn)
    shown = warnings.showwarning
    outcome = mir("compute", *REQUIRED, *words)
    lines = outcome.stderr.splitlines()
    assert len(lines) == len(said)
    assert all(line.startswith(start) for line, start in zip(lines, said, strict=True))
    assert outcome.stdout == ""
    assert warnings.showwarning is shown


@pytest.mark.parametrize(
    ("variables", "colors"), [({}, False), ({"FORCE_COLOR": 1}, True), ({"FORCE_COLOR": 1, "NO_COLOR": 1}, False)]
)
def test_colors_are_for_terminals_that_want_them(tmp_path, monkeypatch, variables, colors):
    for name in ("FORCE_COLOR", "NO_COLOR", "TERM"):
        monkeypatch.delenv(name, raising=False)
    outcome = mir("plot", tmp_path / "none", **variables)
    assert outcome.exit_code == 1
    assert ("\x1b[31m" in outcome.stderr) is colors


def test_a_report_takes_labels_and_replaces_a_file_only_where_asked(runs, tmp_path):
    out = tmp_path / "r.html"
    words = ["report", *runs[:2], "--out", out, "--label", "first one", "--label", "second one"]
    assert mir(*words).exit_code == 0
    assert "second one" in out.read_text()
    assert mir(*words).exit_code == 1
    assert mir(*words, "--overwrite").exit_code == 0


def test_a_plot_takes_labels_and_replaces_a_file_only_where_asked(runs, tmp_path):
    out = tmp_path / "p.svg"
    words = ["plot", *runs[:2], "--out", out, "--label", "first one", "--label", "second one"]
    assert mir(*words).exit_code == 0
    assert "second one" in out.read_text()
    assert "p.svg already exists" in mir(*words).stderr
    assert mir(*words, "--overwrite").exit_code == 0
    assert "label: expected one label per result (2), got 1" in mir(*words[:5], "--label", "a", "--overwrite").stderr


def test_the_training_of_a_demo_can_be_drawn_again(tmp_path):
    history = {
        "steps": [0, 2],
        "mir": [3.0, 2.0],
        "error": [0.1, None],
        "held_out_loss": [5.0, 4.0],
        "loss": [6.0, 5.0],
    }
    (tmp_path / "history.json").write_text(json.dumps(history))
    outcome = mir("plot", tmp_path / "history.json", "--out", tmp_path / "t.svg")
    assert outcome.exit_code == 0, outcome.output
    assert "training step" in (tmp_path / "t.svg").read_text()
    for words, said in ((["--label", "a"], "label: "), ([tmp_path / "history.json"], "plotted alone")):
        outcome = mir("plot", tmp_path / "history.json", *words, "--out", tmp_path / "u.svg")
        assert outcome.exit_code == 1
        assert said in outcome.stderr


def test_every_measurement_draws_in_the_format_asked_for(folders, tmp_path):
    assert measure(folders, tmp_path / "out", "--plots", "pdf").exit_code == 0
    assert [path.name for path in (tmp_path / "out").glob("layers.*")] == ["layers.pdf"]
    outcome = measure(folders, tmp_path / "study", "--study", "layers", "--plots", "svg")
    assert outcome.exit_code == 0, outcome.output
    assert (tmp_path / "study" / "study_layers.svg").read_text().startswith("<?xml")
