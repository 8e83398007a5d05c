"""Options given without effect are refused, wherever they were given; options with an effect are not."""

import pytest

from integration.app.command_line import mir
from modality_integration import MIRResult
from modality_integration.app import compute, effects, states, study
from modality_integration.app.options import ComputeOptions
from modality_integration.metric.result import LayerTerms

COUNTS = {"vision": [1], "text": [1]}
RESULT = MIRResult([LayerTerms(1.0, 1.0, 1.0, 0.5)], [1.0], COUNTS, COUNTS)
WITHOUT = [
    ("--protocol published --seed 7", "--seed 7 has no effect with --protocol published"),
    ("--protocol published --seed 0", "--seed 0 has no effect with --protocol published"),  # the default, but given
    ("--protocol published --text-tokens 10", "--text-tokens 10 has no effect with --protocol published"),
    ("--protocol published --template auto", "--template auto has no effect with --protocol published"),
    ("--protocol published --study samples --repeat 2", "--repeat 2 has no effect with --protocol published"),
    ("--repeat 3", "--repeat 3 has no effect without --study"),
    ("--repeat 3 --study layers", "--repeat 3 has no effect with --study layers"),
    ("--study template --template chat", "--template chat has no effect with --study template"),
    ("--study normalization --no-normalize", "--no-normalize has no effect with --study normalization"),
    ("--study normalization --normalize", "--normalize has no effect with --study normalization"),
    ("--study normalization --groups 4", "--groups 4 has no effect with --study normalization"),
    ("--study layers --bounds", "--bounds has no effect with --study layers"),
    ("--study samples --second-pass", "--second-pass has no effect with --study samples"),
    ("--study samples --restart", "--restart has no effect with --study samples"),
    ("--study content --checkpoint-every 5", "--checkpoint-every 5 has no effect with --study content"),
    ("--outliers none --second-pass", "--second-pass has no effect with --outliers none"),
    ("--device cpu --device-map auto", "--device cpu has no effect with --device-map auto"),
    ("--revision main", "--revision main has no effect with --model"),
]
WITH = [
    "--protocol published",
    "--protocol published --samples 5 --last raw",
    "--protocol published --study template",
    "--seed 7 --text-tokens 10 --template plain",
    "--study samples --repeat 2 --groups 3",
    "--study layers --no-bounds --no-normalize",
    "--study normalization --groups 0",
    "--study template --text-tokens 10",
    "--second-pass --outliers remove",
    "--device-map auto --device auto",
    "--revision main --processor owner/name",
    "--study content --overwrite --plots pdf --batch-size 2",
]


@pytest.fixture
def base(tmp_path, monkeypatch):
    """The required options; nothing is measured."""
    monkeypatch.setattr(compute, "run", lambda *a, **k: RESULT)
    monkeypatch.setattr(study, "run", lambda *a, **k: [])
    return ["--model", tmp_path, "--images", tmp_path, "--text", tmp_path]


@pytest.mark.parametrize(("typed", "said"), WITHOUT)
def test_an_option_without_effect_is_refused_in_one_line_that_names_both(base, typed, said):
    outcome = mir("compute", *base, *typed.split())
    assert outcome.exit_code == 1
    assert outcome.stderr.startswith(said)
    assert len(outcome.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize("typed", WITH)
def test_an_option_with_one_is_not(base, typed):
    outcome = mir("compute", *base, *typed.split())
    assert outcome.exit_code == 0, outcome.output


def test_all_of_them_are_named(base):
    outcome = mir("compute", *base, "--protocol", "published", "--seed", 7, "--text-tokens", 10, "--template", "plain")
    assert all(option in outcome.stderr for option in ("--seed 7", "--text-tokens 10", "--template plain"))


@pytest.mark.parametrize(
    ("text", "variables", "said"),
    [
        ("seed: 7", {"MIR_PROTOCOL": "published"}, "seed: 7 in {file} has no effect with MIR_PROTOCOL=published"),
        ("protocol: published", {"MIR_COMPUTE_SEED": "7"}, "MIR_COMPUTE_SEED=7 has no effect with protocol: published"),
    ],
)
def test_a_file_and_the_environment_give_options_too(base, tmp_path, text, variables, said):
    file = tmp_path / "run.yaml"
    file.write_text(text + "\n")
    outcome = mir("compute", *base, "--config", file, **variables)
    assert outcome.exit_code == 1
    assert outcome.stderr.startswith(said.format(file=file))


@pytest.mark.parametrize(("outliers", "groups", "code"), [("median", 3, 1), ("median", 0, 0), ("remove", 3, 0)])
def test_groups_of_saved_states_have_no_effect_on_medians(monkeypatch, outliers, groups, code):
    monkeypatch.setattr(states, "run", lambda files, options, console, results: RESULT)
    outcome = mir("states", "x", "--outliers", outliers, "--groups", groups)
    assert outcome.exit_code == code
    assert outcome.stderr.startswith("--groups 3 has no effect with --outliers median") is bool(code)
    assert mir("states", "x", "--outliers", outliers).exit_code == 0


def test_every_row_of_the_table_is_tested_and_is_of_options_that_there_are():
    names = {*ComputeOptions.__dataclass_fields__, "study", "repeat"}
    rows = {(row.option, row.beside) for row in effects.OF_COMPUTE}
    assert {name for row in rows for name in row} <= names
    tested = set()
    for _, said in WITHOUT:
        option, beside = (part.split()[0] for part in (said, said.split(" --", 1)[1]))
        tested.add((option.removeprefix("--").removeprefix("no-").replace("-", "_"), beside.replace("-", "_")))
    assert rows == tested
