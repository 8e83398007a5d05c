"""`build_probe`: the samples of `mir compute` as batches for a trainer."""

import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from integration.app.compute_runs import quiet_run
from integration.saved_models import WORDS
from modality_integration import build_probe, measure_mir
from modality_integration.app.samples import open_image
from modality_integration.app.samples.sample import content_digest


@pytest.fixture(scope="module")
def loaded(folders):
    folder = folders / "model"
    return AutoModelForImageTextToText.from_pretrained(folder).eval(), AutoProcessor.from_pretrained(folder)


def prose_of(count):
    return [" ".join([WORDS[(i + j) % len(WORDS)] for j in range(5)] + [WORDS[i % 7]]) for i in range(count)]


def rows(probe):
    return [row for batch in probe for row in zip(*batch.values(), strict=True)]


@pytest.mark.parametrize("samples", [5, 12])
@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_mir_of_the_probe_is_that_of_the_command(loaded, folders, options, samples, batch_size):
    model, processor = loaded
    probe = build_probe(
        processor, folders / "images", folders / "text", samples=samples, batch_size=batch_size, text_tokens=20
    )
    assert [len(batch["input_ids"]) for batch in probe] == [
        min(batch_size, samples - start) for start in range(0, samples, batch_size)
    ]
    expected = quiet_run(options, samples=samples)
    result = measure_mir(model, probe)
    assert result.value == pytest.approx(expected.value, rel=1e-6)
    assert result.kept == expected.kept
    if batch_size == 1:
        assert (result.error is None) == (expected.error is None)


def test_lists_do_as_well_as_folders(loaded, folders):
    _, processor = loaded
    files = sorted((folders / "images").iterdir())
    prose = [file.read_text() for file in sorted((folders / "text").iterdir())]
    by_name = build_probe(processor, [str(file) for file in files], prose, samples=4, text_tokens=20)
    in_memory = build_probe(processor, [open_image(file) for file in files], prose, samples=4, text_tokens=20)
    assert len(by_name) == 4
    for one, other in zip(rows(by_name), rows(in_memory), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_the_seed_chooses_and_pairs_and_the_same_one_again(loaded, folders):
    _, processor = loaded
    made = [
        build_probe(processor, folders / "images", folders / "text", samples=4, text_tokens=20, seed=seed)
        for seed in (0, 0, 1)
    ]
    ids = [[batch["input_ids"].tolist() for batch in probe] for probe in made]
    assert ids[0] == ids[1] != ids[2]


@pytest.mark.parametrize("images", [7, 5])
def test_images_that_come_again_stay_in_their_group(loaded, folders, images):
    model, processor = loaded
    pictures = [open_image(file) for file in sorted((folders / "images").iterdir())][:images]
    prose = prose_of(20)
    result = measure_mir(model, build_probe(processor, pictures, prose, samples=20, text_tokens=20))
    assert len({content_digest(picture) for picture in pictures}) == images
    assert result.error > 0


def test_too_few_images_give_no_error(loaded, folders):
    model, processor = loaded
    pictures = [open_image(file) for file in sorted((folders / "images").iterdir())][:3]
    prose = prose_of(12)
    result = measure_mir(model, build_probe(processor, pictures, prose, samples=12, text_tokens=20))
    assert result.error is None
    assert any(note.startswith("no standard error: 3 images for 12 samples") for note in result.notes)


def test_pixels_come_in_the_dtype_of_the_model(loaded, folders):
    _, processor = loaded
    probe = build_probe(processor, folders / "images", folders / "text", samples=2, dtype=torch.bfloat16)
    assert {batch["pixel_values"].dtype for batch in probe} == {torch.bfloat16}
    assert {batch["input_ids"].dtype for batch in probe} == {torch.int64}


def test_what_is_broken_is_left_out_with_a_warning(loaded, folders, tmp_path):
    _, processor = loaded
    Image.new("RGB", (16, 16), "red").save(tmp_path / "good.png")
    (tmp_path / "bad.png").write_bytes(b"no picture")
    with pytest.warns(UserWarning, match=r"images: skipped bad\.png: it is not an image that Pillow recognises"):
        probe = build_probe(processor, tmp_path, folders / "text", samples=2, text_tokens=20)
    assert len(probe) == 2


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"samples": 0}, "samples: expected a whole number >= 1, got 0"),
        ({"samples": 1.5}, "samples: expected a whole number >= 1, got 1.5"),
        ({"batch_size": True}, "batch_size: expected a whole number >= 1, got True"),
        ({"batch_size": -1}, "batch_size: expected a whole number >= 1, got -1"),
        ({"images": []}, "images: expected a folder, a file, or a list of pictures and files, got none"),
        ({"images": 3}, "images: expected a folder, .* got int"),
        ({"images": [3]}, r"images\[0\]: expected a folder, .* got 3"),
        ({"text": ["prose", " "]}, r"text\[1\]: expected a folder, a file, or a list of pieces of prose, got ' '"),
        ({"text": [b"prose"]}, r"text\[0\]: expected"),
        ({"images": "nowhere"}, "images: nowhere does not exist"),
    ],
)
def test_what_cannot_be_is_refused_by_name(loaded, folders, wrong, said):
    arguments = {"images": folders / "images", "text": folders / "text", "samples": 2, **wrong}
    with pytest.raises(ValueError, match=said):
        build_probe(loaded[1], arguments.pop("images"), arguments.pop("text"), **arguments)


def test_what_is_broken_in_a_list_is_left_out_too(loaded, folders, tmp_path):
    _, processor = loaded
    good = sorted((folders / "images").iterdir())[0]
    with pytest.warns(UserWarning, match=r"images: skipped gone\.png: the file does not exist"):
        probe = build_probe(processor, [tmp_path / "gone.png", good], folders / "text", samples=2, text_tokens=20)
    assert len(probe) == 2
    gone = [tmp_path / "gone.png"]
    with pytest.warns(UserWarning, match="skipped"), pytest.raises(ValueError, match="images: nothing usable found"):
        build_probe(processor, gone, folders / "text", samples=2)


def test_a_tokenizer_alone_is_no_processor(loaded, folders):
    with pytest.raises(ValueError, match="processor: expected one with a tokenizer and an image processor"):
        build_probe(loaded[1].tokenizer, folders / "images", folders / "text")
