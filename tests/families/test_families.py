"""The walk over transformers' families: each proved family passes, and the proof can fail."""

import re
from functools import partial
from pathlib import Path

import pytest
import torch
import transformers

from families import proof, walk
from families.batches import batch, pixels
from families.pictures import IMAGES
from families.shrunken import FAMILIES, tiny_model
from families.walk import REFUSALS, judge
from modality_integration import add_moca

PAGE = Path(__file__).parents[2] / "docs" / "models.md"


def installed(family):
    if family not in FAMILIES:
        pytest.skip(f"transformers {transformers.__version__} has no {family}")
    return family


@pytest.mark.parametrize("family", IMAGES)
def test_vision_tokens_are_those_that_the_picture_changes(family):
    row = judge(installed(family))
    assert row.verdict == "proved", row


@pytest.mark.parametrize("family", REFUSALS)
def test_models_without_one_stream_that_holds_both_are_refused_with_the_reason(family):
    row = judge(installed(family))
    assert row.verdict == "refused", row


@pytest.mark.slow
def test_of_all_families_none_is_wrong_and_those_with_pictures_are_proved():
    rows = [judge(family) for family in FAMILIES]
    assert not [str(row) for row in rows if row.verdict in ("wrong", "not run")]
    assert {row.family for row in rows if row.verdict == "proved"} == IMAGES.keys() & set(FAMILIES)
    assert {row.family for row in rows if row.verdict == "refused"} == REFUSALS.keys() & set(FAMILIES)


def test_the_page_lists_the_families_that_are_proved_and_refused():
    rows = [line.strip("| ").split(" | ") for line in PAGE.read_text().splitlines() if line.startswith("| ")]
    listed = {row[0]: re.findall(r"`([^`]+)`", row[-1]) for row in rows if row[0].startswith(("proved", "refused"))}
    proved = listed.pop("proved")
    assert proved == sorted(IMAGES)
    assert sorted(name for names in listed.values() for name in names) == sorted(REFUSALS)


def shifted(vision, text, states):
    return vision.roll(1, -1), text, states


def one_too_few(vision, text, states):
    vision = vision.clone()
    vision[1, vision[1].int().argmax()] = False
    return vision, text, states


def with_padding(vision, text, states):
    return vision, proof.behind(vision), states


def of_the_layer_before(vision, text, states):
    return vision, text, [torch.zeros_like(states[0]), *states]


def with_another_end(vision, text, states):
    return vision, text, [*states[:-1], states[-1].roll(1, -1)]


@pytest.mark.parametrize(
    ("change", "part"),
    [
        (shifted, "vision_mask"),
        (one_too_few, "vision_mask"),
        (with_padding, "text_mask"),
        (of_the_layer_before, "hidden_states"),
        (with_another_end, "hidden_states"),
    ],
)
@pytest.mark.parametrize("family", ["llava", "qwen2_vl"])
def test_a_capture_that_is_wrong_is_reported(monkeypatch, family, change, part):
    right = proof.captured
    monkeypatch.setattr(proof, "captured", lambda model, inputs: change(*right(model, inputs)))
    row = judge(family)
    assert row.verdict == "wrong"
    assert part in row.reason


def test_placeholders_of_sound_among_the_text_are_reported(monkeypatch):
    family, right = installed("qwen2_5_omni_thinker"), proof.captured

    def hearing_none(model, inputs):
        vision, _, states = right(model, inputs)
        return vision, proof.behind(vision) & inputs["attention_mask"].bool(), states

    monkeypatch.setattr(proof, "captured", hearing_none)
    assert "text_mask: too many" in judge(family).reason


def test_moca_at_text_tokens_is_reported(monkeypatch):
    monkeypatch.setattr(proof, "add_moca", partial(add_moca, vision_mask="attention_mask"))
    row = judge("llava")
    assert row.verdict == "wrong"
    assert "add_moca: too many" in row.reason


def test_moca_that_does_nothing_is_reported(monkeypatch):
    monkeypatch.setattr(proof, "add_moca", lambda model, **options: None)
    assert "add_moca: too many [], missing [[0, 4]" in judge("llava").reason


def test_a_model_that_does_not_see_the_picture_proves_nothing():
    model = tiny_model("llava")
    for parameter in model.model.multi_modal_projector.parameters():
        parameter.data.zero_()
    with pytest.raises(proof.NotRun, match="the image changes nothing"):
        proof.prove(model, "llava")


def test_newlines_among_the_features_are_found_though_no_picture_changes_them():
    model = tiny_model("llava_next")
    image = IMAGES["llava_next"]
    before = model.model.image_newline.detach().clone()
    with proof.other_marks(model):
        assert not torch.equal(model.model.image_newline, before)
    assert torch.equal(model.model.image_newline, before)
    given = batch(model, image).inputs
    one, other = (given | pixels(model, image, seed) for seed in (1, 2))
    first = proof.decoder_layers(model)[0]
    found = proof.of_the_picture(model, first, one, [other])
    assert (found & ~proof.changed(proof.stream(model, first, one), proof.stream(model, first, other))).any()


def test_a_refusal_without_a_known_reason_is_wrong(monkeypatch):
    assert judge("mllama").verdict == "refused"
    monkeypatch.setitem(REFUSALS, "mllama", "another reason")
    assert judge("mllama").verdict == "wrong"
    monkeypatch.delitem(REFUSALS, "mllama")
    assert judge("mllama").verdict == "wrong"
    monkeypatch.setitem(REFUSALS, "llava", "no reason")
    assert judge("llava").verdict == "wrong"


def test_a_family_without_a_picture_is_compared_by_its_ids(monkeypatch):
    monkeypatch.delitem(IMAGES, "llava")
    assert judge("llava").verdict == "ids alone"
    right = proof.captured
    monkeypatch.setattr(proof, "captured", lambda model, inputs: shifted(*right(model, inputs)))
    assert judge("llava").verdict == "wrong"


def test_models_that_do_not_build_or_run_are_told_apart_from_wrong_ones(monkeypatch):
    monkeypatch.setitem(IMAGES, "llava", IMAGES["llava"]._replace(tokens=3))
    assert judge("llava").verdict == "not run"

    def missing(family):
        raise ImportError("a package | that is missing")

    monkeypatch.setattr(walk, "tiny_model", missing)
    row = judge("llava")
    assert (row.verdict, row.reason) == ("not built", "a package / that is missing")


def test_the_walk_prints_a_row_a_family_and_fails_where_one_is_wrong(monkeypatch, capsys):
    monkeypatch.setattr(walk, "FAMILIES", ("llava", "mllama"))
    assert walk.main() == 0
    out = capsys.readouterr().out
    assert re.search(r"^llava +proved$", out, re.MULTILINE)
    assert re.search(r"^mllama +refused +model: MllamaFor.*cross-attention", out, re.MULTILINE)
    assert "2 families: {'proved': 1, 'ids alone': 0, 'refused': 1," in out
    monkeypatch.delitem(REFUSALS, "mllama")
    assert walk.main() == 1
