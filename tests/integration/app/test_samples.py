"""Choosing, reading and pairing of images and prose."""

import json
import math

import numpy as np
import pytest
from PIL import Image

from integration.saved_models import tiny_tokenizer, write_images, write_texts
from modality_integration.app.errors import InputError
from modality_integration.app.prompts import truncate
from modality_integration.app.samples import (
    Text,
    choose_images,
    choose_texts,
    open_image,
    pair,
)
from modality_integration.app.samples.pairing import in_blocks
from modality_integration.app.samples.sample import content_digest
from modality_integration.metric.files import read_json, write_json


def test_the_same_seed_chooses_the_same_images_and_another_seed_others(tmp_path):
    write_images(tmp_path, 20)
    first, again, other = (choose_images(tmp_path, 8, seed).items for seed in (1, 1, 2))
    assert first == again
    assert first != other
    assert len(set(first)) == 8


def test_a_random_order_has_the_same_samples_and_is_the_same_every_time(tmp_path):
    texts = [Text(str(number), "words") for number in range(30)]
    in_order = pair([tmp_path / f"{number}.png" for number in range(30)], texts, 30, None)
    samples, mixed = list(in_order), list(in_blocks(in_order, 5))
    assert mixed == list(in_blocks(in_order, 5)) != samples
    assert sorted(mixed, key=samples.index) == samples
    firsts = {sample.text.name for sample in mixed[:10]}  # a third of the samples: from the beginning, middle and end
    assert all(firsts & {str(number) for number in range(start, start + 10)} for start in (0, 10, 20))


def test_images_are_found_below_subfolders_and_through_links_but_hidden_and_other_files_are_not(tmp_path):
    write_images(tmp_path / "images" / "deep" / "deeper", 2)
    write_images(tmp_path / "elsewhere", 1)
    (tmp_path / "images" / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "images" / "loop").symlink_to(tmp_path / "images")
    (tmp_path / "images" / "notes.txt").write_text("no image")
    (tmp_path / "images" / ".hidden.png").write_bytes(b"x")
    Image.new("RGB", (4, 4)).save(tmp_path / "images" / "without_extension", format="PNG")
    chosen = choose_images(tmp_path / "images", 10, 0)
    assert len(chosen.items) == 4
    assert chosen.skipped == []


def test_broken_images_are_skipped_with_the_reason_and_replaced_by_others(tmp_path):
    write_images(tmp_path, 5)
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "words.jpg").write_text("these are words")
    whole = (tmp_path / "image-00.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    chosen = choose_images(tmp_path, 8, 0)
    assert len(chosen.items) == 5
    assert {name for name, _ in chosen.skipped} == {"empty.png", "words.jpg", "cut.png"}
    reasons = dict(chosen.skipped)
    assert "not an image that Pillow recognises" in reasons["words.jpg"]
    assert "truncated" in reasons["cut.png"]


@pytest.mark.parametrize("content", [None, b"not an image"])
def test_no_usable_image_is_an_error_that_names_the_folder(tmp_path, content):
    if content:
        (tmp_path / "bad.png").write_bytes(content)
    with pytest.raises(InputError, match=f"no usable image in {tmp_path}"):
        choose_images(tmp_path, 3, 0)


@pytest.mark.parametrize("choose", [choose_images, choose_texts])
def test_a_folder_that_is_not_there_is_an_error_that_names_it(tmp_path, choose):
    with pytest.raises(InputError, match="nowhere does not exist"):
        choose(tmp_path / "nowhere", 3, 0)


@pytest.mark.parametrize(
    ("mode", "value", "expected"),
    [
        ("RGBA", (255, 0, 0, 0), (255, 255, 255)),
        ("RGBA", (255, 0, 0, 255), (255, 0, 0)),
        ("L", 7, (7, 7, 7)),
        ("1", 1, (255, 255, 255)),
        ("CMYK", (0, 255, 255, 0), (255, 0, 0)),
        ("I;16", 65535, (255, 255, 255)),
        ("I;16", 257 * 9, (9, 9, 9)),
    ],
)
def test_every_mode_becomes_rgb_with_transparency_on_white(tmp_path, mode, value, expected):
    path = tmp_path / "image.tiff"
    Image.new(mode, (3, 2), value).save(path)
    image = open_image(path)
    assert image.mode == "RGB"
    assert image.size == (3, 2)
    assert image.getpixel((1, 1)) == expected


def test_float_grey_is_spread_over_8_bits(tmp_path):
    Image.fromarray(np.linspace(-3.0, 5.0, 6, dtype=np.float32).reshape(2, 3)).save(tmp_path / "image.tiff")
    values = np.asarray(open_image(tmp_path / "image.tiff"))
    assert values.min() == 0
    assert values.max() == 255


def test_an_image_is_turned_as_its_exif_tag_says(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (8, 4)).save(tmp_path / "turned.jpg", exif=exif)
    assert open_image(tmp_path / "turned.jpg").size == (4, 8)


def test_an_animation_gives_its_first_frame(tmp_path):
    frames = [Image.new("RGB", (4, 4), color) for color in ("red", "blue")]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    assert open_image(tmp_path / "moving.gif").getpixel((0, 0)) == (255, 0, 0)


def test_text_comes_from_txt_story_and_jsonl(tmp_path):
    (tmp_path / "a.txt").write_text("\ufeffplain prose\n", encoding="utf-8")
    (tmp_path / "b.story").write_text("an article\n\n@highlight\n\nits summary")
    lines = [json.dumps("just a string"), "", json.dumps({"id": 1, "article": "under a key"})]
    (tmp_path / "c.jsonl").write_text("\n".join(lines))
    (tmp_path / "d.csv").write_text("not,read")
    chosen = choose_texts(tmp_path, 10, 0)
    assert {t.name: t.content for t in chosen.items} == {
        "a.txt": "plain prose",
        "b.story": "an article",
        "c.jsonl:1": "just a string",
        "c.jsonl:3": "under a key",
    }
    assert chosen.skipped == []


def test_broken_texts_are_skipped_with_the_reason(tmp_path):
    (tmp_path / "good.txt").write_text("prose")
    (tmp_path / "empty.txt").write_text("  \n")
    (tmp_path / "latin.txt").write_bytes("déjà".encode("latin-1"))
    (tmp_path / "lines.jsonl").write_text('{"text": "fine"}\n{"text": \n{"other": "x"}\n17\n')
    chosen = choose_texts(tmp_path, 10, 0)
    assert {t.name for t in chosen.items} == {"good.txt", "lines.jsonl:1"}
    reasons = dict(chosen.skipped)
    assert reasons["empty.txt"] == "it is empty"
    assert "not UTF-8" in reasons["latin.txt"]
    assert "not JSON" in reasons["lines.jsonl:2"]
    assert "['other']" in reasons["lines.jsonl:3"]
    assert "int" in reasons["lines.jsonl:4"]


def test_no_usable_text_is_an_error_that_names_the_folder(tmp_path):
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(InputError, match=rf"no usable text in {tmp_path}.*empty.txt"):
        choose_texts(tmp_path, 2, 0)


def test_a_single_text_file_is_taken_and_one_of_another_kind_is_refused(tmp_path):
    write_texts(tmp_path, 1)
    assert len(choose_texts(tmp_path / "text-00.txt", 3, 0).items) == 1
    (tmp_path / "prose.pdf").write_text("prose")
    with pytest.raises(InputError, match=r"text: expected \.txt, \.story, \.jsonl"):
        choose_texts(tmp_path / "prose.pdf", 3, 0)


def test_pairs_use_everything_once_a_round_and_pair_anew_each_round():
    images, texts = [Image.new("L", (1, 1), i) for i in range(5)], [Text(str(i), str(i)) for i in range(5)]
    samples = pair(images, texts, 15, 0)
    pairs = [(s.image.getpixel((0, 0)), s.text.name) for s in samples]
    for start in (0, 5, 10):
        assert sorted(p[0] for p in pairs[start : start + 5]) == [0, 1, 2, 3, 4]
        assert sorted(p[1] for p in pairs[start : start + 5]) == ["0", "1", "2", "3", "4"]
    assert len(set(pairs)) > 5
    assert pairs == [(s.image.getpixel((0, 0)), s.text.name) for s in pair(images, texts, 15, 0)]


def test_without_a_seed_files_come_in_order_and_again_in_order(tmp_path):
    write_images(tmp_path / "images", 3)
    write_texts(tmp_path / "text", 2)
    images = choose_images(tmp_path / "images", 2, None).items
    texts = choose_texts(tmp_path / "text", 5, None).items
    assert [path.name for path in images] == ["image-00.png", "image-01.png"]
    pairs = [(sample.image.name, sample.text.name) for sample in pair(images, texts, 3, None)]
    assert pairs == [(f"image-0{i % 2}.png", f"text-0{i % 2}.txt") for i in range(3)]


def test_prose_may_be_taken_whole():
    prose = "the cat sits " * 1000
    assert truncate(prose, tiny_tokenizer(), None) == prose


@pytest.mark.parametrize("tokens", [1, 3, 100])
def test_truncate_gives_a_prefix_of_at_most_so_many_tokens(tokens):
    tokenizer = tiny_tokenizer()
    prose = "the cat  sits on\nthe mountain and runs to the river"
    cut = truncate(prose, tokenizer, tokens)
    assert prose.startswith(cut)
    assert len(tokenizer(cut, add_special_tokens=False)["input_ids"]) == min(tokens, 11)


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        (Image.new("RGB", (2, 2), "red"), Image.new("RGB", (2, 2), "red"), True),
        (Image.new("RGB", (2, 2), "red"), Image.new("RGB", (4, 1), "red"), False),
        (Image.new("RGB", (2, 2), "red").quantize(), Image.new("RGB", (2, 2), "green").quantize(), False),
        (Image.new("RGB", (2, 2), "red").quantize(), Image.new("RGB", (2, 2), "red"), True),
    ],
)
def test_pictures_in_memory_are_told_apart_by_what_they_show(one, other, same):
    assert (content_digest(one) == content_digest(other)) is same


def test_written_json_has_words_for_what_is_not_finite(tmp_path):
    write_json(tmp_path / "a.json", {"mir": -math.inf, "loss": [1.5, math.inf], "of": {1: math.nan}})
    assert "Infinity" not in (tmp_path / "a.json").read_text()
    assert read_json(tmp_path / "a.json") == {"mir": "-inf", "loss": [1.5, "inf"], "of": {"1": "nan"}}


def test_json_that_is_nested_too_deeply_is_refused(tmp_path):
    (tmp_path / "a.json").write_text("[" * 200_000)
    with pytest.raises(ValueError, match="nested too deeply"):
        read_json(tmp_path / "a.json")
