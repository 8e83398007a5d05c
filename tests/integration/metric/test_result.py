"""MIRResult: values derived from the terms, and the JSON round trip."""

import json
import math

import pytest

from modality_integration import LayerTerms, MIRResult


def result(*terms, **options):
    layers = len(terms)
    counts = {"vision": [90] * layers, "text": [80] * layers}
    removed = {"vision": [1] * layers, "text": list(range(layers))}
    return MIRResult(list(terms), [0.25] * layers, counts, removed, **options)


def test_value_is_the_logarithm_of_the_sum_of_the_distances():
    made = result(LayerTerms(90.0, 8.0, 6.0, 2.0), LayerTerms(895.0, 10.0, 5.0, 5.0))
    assert made.per_layer == [100.0, 900.0]
    assert made.value == 3.0
    assert float(made) == 3.0
    assert made.lower is None
    assert made.upper is None


def test_a_distance_is_never_negative_nor_below_what_can_be_resolved():
    assert LayerTerms(0.0, 1.0, 1.0, 1.0 + 1e-15).distance == 0.0
    assert LayerTerms(0.0, 1.0, 1.0, 1.0 - 1e-15).distance == 0.0
    assert LayerTerms(0.0, 1.0, 1.0, 1.0 - 1e-9).distance == pytest.approx(2e-9)


def test_bounds_of_the_root_turn_into_bounds_of_the_value_outward():
    made = result(LayerTerms(1.0, 8.0, 6.0, 5.0, 4.9, 5.1), LayerTerms(2.0, 8.0, 6.0, 5.0, 5.0, 5.0))
    assert made.lower < math.log10(4.8 + 6.0)
    assert made.lower == pytest.approx(math.log10(4.8 + 6.0), abs=1e-11)
    assert made.upper > math.log10(5.2 + 6.0)
    assert made.upper == pytest.approx(math.log10(5.2 + 6.0), abs=1e-11)
    exact = result(LayerTerms(0.0, 1.0, 1.0, 1.0, 1.0, 1.0))
    assert exact.lower == exact.value == -math.inf
    assert exact.upper < -11


def test_one_layer_without_bounds_leaves_the_value_without():
    assert result(LayerTerms(1.0, 8.0, 6.0, 5.0, 4.9, 5.1), LayerTerms(2.0, 8.0, 6.0, 5.0)).lower is None


@pytest.mark.parametrize(
    "made",
    [
        result(LayerTerms(0.1, 1 / 3, 2 / 3, 0.4), LayerTerms(1e-9, 3.0, 4.0, 1.0), notes=["a note"], normalize=False),
        result(LayerTerms(0.0, 1.0, 1.0, 1.0, 0.9, 1.1), outliers="median"),
        result(LayerTerms(0.0, 1.0, 1.0, 1.0, 1.0, 1.0)),
        result(LayerTerms(0.3, 1.0, 1.0, 1.0, -1e-17, math.inf, 0.1, 0.4, 1e-3)),
        result(LayerTerms(0.1, 1.0, 1.0, 0.5), missed={"vision": [3], "text": [0]}, left_out=[[1.0, 1 / 3, 1e-9]]),
        result(LayerTerms(0.1, 1.0, 1.0, 0.5), settings={"model": "a", "text_tokens": None, "in_order": False}),
    ],
)
def test_json_comes_back_as_it_was(made, tmp_path):
    path = tmp_path / "mir.json"
    text = made.to_json(path)
    assert path.read_text() == text
    for source in (path, str(path), text):
        assert MIRResult.from_json(source) == made
    json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


def test_json_has_the_documented_keys():
    document = json.loads(result(LayerTerms(0.0, 1.0, 1.0, 1.0)).to_json())
    assert document["schema"] == "modality-integration-rate"
    assert document["version"] == 5
    assert document["mir"] == "-inf"
    assert document["lower"] is None
    assert set(document) == {
        *(
            "schema",
            "version",
            "mir",
            "error",
            "lower",
            "upper",
            "mir_without_sinks",
            "outliers",
            "normalize",
            "sinks",
            "sink_positions",
            "notes",
            "settings",
            "layers",
        ),
    }
    assert set(document["layers"][0]) == {
        *("layer", "distance", "alpha", "mean", "trace_vision", "trace_text", "trace_root", "deviations"),
        *("root_lower", "root_upper", "mean_lower", "mean_upper"),
        *("kept", "removed", "missed", "massive", "error", "left_out", "without_sinks"),
    }
    assert document["layers"][0]["removed"] == {"vision": 1, "text": 0}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(version=6), "version 6 of the schema; this reader supports version 5"),
        (lambda d: d.update(version=4), "version 4 of the schema; this reader supports version 5"),
        (lambda d: d.update(version=True), "version True of the schema; this reader supports version 5"),
        (lambda d: d.update(schema="other"), "is not a MIR result"),
        (lambda d: d.update(sinks="forget"), "incomplete.*sinks: expected one of"),
        (lambda d: d["sink_positions"].update(vision={"-1": 2}), "incomplete.*sink_positions: expected counts"),
        (lambda d: d["sink_positions"].update(vision={"1": -2}), "incomplete.*expected a number of tokens"),
        (lambda d: d["layers"][0].update(massive={"vision": 1}), "incomplete.*text"),
        (lambda d: d["layers"][0].update(without_sinks=-0.5), "incomplete.*expected distances, got one below 0"),
        (lambda d: d["layers"][0].update(without_sinks="nan"), "incomplete.*expected a finite number"),
        (lambda d: d["layers"][0].pop("mean"), "incomplete.*mean"),
        (lambda d: d.pop("layers"), "incomplete.*layers"),
        (lambda d: d.update(settings=["model"]), "incomplete.*settings: expected an object"),
        (lambda d: d.update(settings={"seed": [0]}), "incomplete.*settings: expected an object"),
    ],
)
def test_json_of_something_else_is_refused_by_name(change, message, tmp_path):
    document = json.loads(result(LayerTerms(0.1, 1.0, 1.0, 0.5)).to_json())
    change(document)
    path = tmp_path / "odd.json"
    path.write_text(json.dumps(document))
    with pytest.raises(ValueError, match=rf"odd\.json.*{message}"):
        MIRResult.from_json(path)


def test_missed_tokens_are_counted_over_layers_and_modalities():
    made = result(LayerTerms(0.1, 1.0, 1.0, 0.5), LayerTerms(0.2, 1.0, 1.0, 0.5))
    assert made.total_missed == 0
    made.missed["vision"][1], made.missed["text"][0] = 3, 4
    assert made.total_missed == 7


def test_text_that_is_no_json_is_refused(tmp_path):
    with pytest.raises(ValueError, match="the text is not JSON"):
        MIRResult.from_json("{half")
    with pytest.raises(FileNotFoundError):
        MIRResult.from_json(tmp_path / "missing.json")


def test_printed_it_says_value_bounds_and_notes():
    text = str(result(LayerTerms(90.0, 8.0, 6.0, 2.0, 1.9, 2.1), notes=["something moved"]))
    assert text.startswith("MIR 2.0000 over 1 layers, arithmetic exact to 8.7e-04\n")
    assert "note: something moved" in text


def test_a_result_formats_as_its_value():
    made = result(LayerTerms(90.0, 8.0, 6.0, 2.0))
    assert f"{made:.3f}" == "2.000"
    assert f"{made}" == str(made)


def test_writing_that_fails_leaves_the_file_before_it(tmp_path, monkeypatch):
    path = tmp_path / "mir.json"
    before = result(LayerTerms(90.0, 8.0, 6.0, 2.0)).to_json(path)
    write = type(path).write_text

    def full(self, text, **kwargs):
        write(self, text[:40], **kwargs)
        raise OSError("no space left on device")

    monkeypatch.setattr(type(path), "write_text", full)
    with pytest.raises(OSError, match="no space"):
        result(LayerTerms(1.0, 8.0, 6.0, 2.0)).to_json(path)
    assert path.read_text() == before
