"""Options from a YAML file and from the environment: precedence and refusals."""

from pathlib import Path

import pytest

from integration.app.command_line import mir
from modality_integration import MIRResult
from modality_integration.app import compute, config
from modality_integration.metric.result import LayerTerms

REQUIRED = "model: m\nimages: .\ntext: .\n"


@pytest.fixture
def asked(monkeypatch):
    """The options of each call of `mir compute`."""
    found = []
    counts = {"vision": [1], "text": [1]}
    result = MIRResult([LayerTerms(1.0, 1.0, 1.0, 0.5)], [1.0], counts, counts)
    monkeypatch.setattr(compute, "run", lambda options, console, results: (found.append(options), result)[1])
    return found


@pytest.fixture
def written(tmp_path):
    """Write an options file, the required options first."""

    def write(text, required=REQUIRED):
        path = tmp_path / "run.yaml"
        path.write_text(required + text)
        return path

    return write


@pytest.mark.parametrize("key", ["text-tokens", "text_tokens", "--text-tokens"])
def test_a_file_gives_options_as_they_are_typed_or_with_underscores(asked, written, key):
    outcome = mir("compute", "--config", written(f"{key}: 7\nno-normalize: true\nbounds: yes\nsinks: leave out\n"))
    assert outcome.exit_code == 0, outcome.output
    (options,) = asked
    assert (options.model, options.images, options.text) == ("m", Path("."), Path("."))
    assert (options.text_tokens, options.normalize, options.bounds, options.sinks) == (7, False, True, "leave out")
    assert options.samples == 100


@pytest.mark.parametrize(("text", "normalize"), [("normalize: false", False), ("no_normalize: false", True)])
def test_a_flag_and_its_opposite_take_true_and_false(asked, written, text, normalize):
    assert mir("compute", "--config", written(text)).exit_code == 0
    assert asked[0].normalize is normalize


def test_typed_counts_before_the_environment_before_the_file_before_the_default(asked, written):
    file = written("samples: 3\nseed: 3\nlast: raw\n")
    typed, variables = ["--samples", "1"], {"MIR_COMPUTE_SAMPLES": 2, "MIR_COMPUTE_SEED": 2}
    assert mir("compute", "--config", file, *typed, **variables).exit_code == 0
    (options,) = asked
    assert (options.samples, options.seed, options.last, options.text_role) == (1, 2, "raw", "after")


def test_a_variable_of_the_command_counts_before_one_of_all(asked, written):
    assert mir("compute", MIR_CONFIG=written(""), MIR_SAMPLES=4, MIR_SEED=4, MIR_COMPUTE_SEED=5).exit_code == 0
    assert (asked[0].samples, asked[0].seed) == (4, 5)


def test_a_path_of_the_home_folder_is_one(asked, written, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "i").mkdir()
    assert mir("compute", "--config", written("images: ~/i\n", "model: ~/m\ntext: .\n")).exit_code == 0
    assert (asked[0].model, asked[0].images) == (str(tmp_path / "m"), tmp_path / "i")


def test_nothing_stands_for_no_value_where_an_option_can_be_without(asked, written):
    assert mir("compute", "--config", written("device-map:\nrevision: null\n")).exit_code == 0
    assert asked[0].device_map is asked[0].revision is None


def test_a_file_with_nothing_in_it_says_nothing(asked, written):
    outcome = mir("compute", "--config", written("# nothing\n", ""), "--model", "m", "--images", ".", "--text", ".")
    assert outcome.exit_code == 0, outcome.output


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("sampels: 3", "sampels: no such option; did you mean samples?"),
        ("text_tokns: 3", "text_tokns: no such option; did you mean text-tokens?"),
        ("steps: 3", "steps: no such option (it is an option of mir demo)"),
        ("wingspan: 3", "wingspan: no such option"),
        ("no-second-pass: true", "no-second-pass: no such option"),
        ("compute:\n  samples: 3", "compute: no such option; a config file has no sections"),
        ("config: other.yaml", "config: no such option"),
        ("5: 3", "5: no such option"),
        ("samples: ten", "samples: expected a whole number, got 'ten'"),
        ("samples: 10.5", "samples: expected a whole number, got 10.5"),
        ("samples: true", "samples: expected a whole number, got True"),
        ("samples: 0", "samples: expected a whole number >= 1, got 0"),
        ("samples: [1, 2]", "samples: expected a whole number, got [1, 2]"),
        ("samples:", "samples: expected a whole number, got None"),
        ("bounds: 1", "bounds: expected true or false, got 1"),
        ("no-bounds: 1", "no-bounds: expected true or false, got 1"),
        ("last: middle", "last: expected one of normed, raw, got 'middle'"),
        ("last: [raw]", "last: expected one of normed, raw, got ['raw']"),
        ("dtype: {a: 1}", "dtype: expected one of"),
        ("revision: 1234", "revision: expected text (quote it"),
        ("out: 3", "out: expected text"),
        ("seed: 1\nseed: 2", "seed: is given twice"),
        ("text-tokens: 1\ntext_tokens: 2", "text_tokens: is given twice"),
        ("bounds: true\nno-bounds: true", "no-bounds: is given twice"),
        ("- samples", "expected one `option: value` per line"),
        ("samples: [", "is not YAML"),
        ("seed: !!python/object:os.system 1", "is not YAML"),
    ],
)
def test_a_file_that_cannot_be_meant_is_refused_by_file_and_key(asked, written, text, said):
    file = written(text + "\n", "")
    outcome = mir("compute", "--config", file, "--model", "m", "--images", ".", "--text", ".")
    assert outcome.exit_code == 1, outcome.output
    assert said in outcome.stderr
    assert str(file) in outcome.stderr
    assert len(outcome.stderr.strip().splitlines()) == 1
    assert asked == []


def test_a_file_that_is_not_there_is_refused(asked, tmp_path):
    for path, said in ((tmp_path / "none.yaml", "does not exist"), (tmp_path, "is a folder")):
        outcome = mir("compute", "--config", path)
        assert outcome.exit_code == 1
        assert outcome.stderr.strip() == f"config: {path} {said}"


def test_a_file_gives_arguments_and_labels_too(written, tmp_path):
    file = written(f"results: [{tmp_path / 'a'}, {tmp_path / 'b'}]\nlabel: [one]\n", "")
    outcome = mir("compare", "--config", file)
    assert outcome.exit_code == 1
    assert f"{tmp_path / 'a'} does not exist" in outcome.stderr


@pytest.mark.parametrize(("variable", "value"), [("MIR_COMPUTE_SAMPLES", "ten"), ("MIR_LAST", "middle")])
def test_a_wrong_value_of_the_environment_names_its_variable(asked, written, variable, value):
    outcome = mir("compute", "--config", written(""), **{variable: value})
    assert outcome.exit_code == 2
    assert f"Invalid value for {variable}" in outcome.stderr
    assert asked == []


@pytest.mark.parametrize(
    ("variable", "said"),
    [
        ("MIR_SAMPELS", "note environment variable MIR_SAMPELS is unknown and ignored; did you mean MIR_SAMPLES?"),
        ("MIR_COMPUTE_SAMPLE", "; did you mean MIR_COMPUTE_SAMPLES?"),
        ("MIR_SAMPLES", None),
        ("MIR_CUDA_ARCHS", None),
        ("MIR_CPU_ISA", None),
        ("MIRROR", None),
    ],
)
def test_a_variable_that_no_option_goes_by_is_noted(asked, written, variable, said):
    outcome = mir("compute", "--config", written(""), **{variable: 5})
    assert outcome.exit_code == 0, outcome.output
    assert (said or "") in outcome.stderr
    assert ("is unknown and ignored" in outcome.stderr) is (said is not None)


def test_no_option_goes_by_a_variable_of_others():
    options = {variable for known in config.KNOWN.values() for name in known for variable in (f"MIR_{name}".upper(),)}
    assert options
    assert not options & set(config.OF_OTHERS)
