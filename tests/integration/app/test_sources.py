"""Images and prose from data sets, tables, archives, lists and conversations."""

import gzip
import json
import sys

import pytest
from rich.console import Console

from integration.app.written_sources import (
    ROWS,
    SOURCES,
    arrow,
    conversation,
    feather,
    parquet,
    picture,
    plain_parquet,
    png,
    prose,
    saved,
    selected,
    shards,
    tar,
    write_png,
)
from integration.saved_models import write_images, write_texts
from modality_integration.app.errors import InputError
from modality_integration.app.options import ComputeOptions
from modality_integration.app.samples import choose, choose_images, choose_texts, open_image

datasets = pytest.importorskip("datasets")
pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")


@pytest.mark.parametrize("make", SOURCES, ids=lambda make: make.__name__)
def test_one_path_gives_images_and_prose(tmp_path, make):
    path = make(tmp_path)
    images, texts = choose_images(path, 99, None), choose_texts(path, 99, None)
    order = range(ROWS)[::-1] if make is selected else range(ROWS)
    assert [text.content for text in texts.items] == [prose(number) for number in order]
    for image, number in zip(images.items, order, strict=True):
        assert open_image(image).tobytes() == picture(number).tobytes()
        assert image.read_bytes() == png(number)
    assert images.skipped == texts.skipped == []


@pytest.mark.parametrize("make", SOURCES, ids=lambda make: make.__name__)
def test_a_choice_by_seed_is_the_same_every_time_and_of_whole_rows(tmp_path, make):
    path = make(tmp_path)
    first, again, other = (choose_images(path, 5, seed) for seed in (1, 1, 2))
    assert first.digests == again.digests != other.digests
    assert len(set(first.digests)) == 5
    assert [open_image(item).size for item in first.items] == [(7, 9)] * 5


def test_a_data_set_pairs_into_samples_that_name_their_rows(tmp_path):
    path = parquet(tmp_path)
    chosen = choose(ComputeOptions(model="m", images=path, text=path, samples=10), Console(quiet=True))
    assert chosen.groups == 5
    assert chosen.samples[0].name.startswith("data.parquet[")
    assert len(chosen.samples.digest()) == 16


def test_rows_in_order_pair_an_image_with_its_own_text_which_a_note_says(tmp_path):
    path = parquet(tmp_path)
    for protocol in ("random", "published"):
        options = ComputeOptions(model="m", images=path, text=path, samples=10, protocol=protocol)
        chosen = choose(options, Console(quiet=True))
        own = [sample.image.row == int(sample.text.content.split()[3][:-1]) for sample in chosen.samples]
        assert all(own) is (protocol == "published")
        assert any("with its own text" in note for note in chosen.notes) is (protocol == "published")


def test_rows_that_name_one_image_again_and_again_are_one_image(tmp_path):
    rows = {"image": [png(0), png(1), png(2)] * 20, "text": [prose(n) for n in range(60)]}
    pq.write_table(pa.table(rows), tmp_path / "questions.parquet")
    path = tmp_path / "questions.parquet"
    chosen = choose(ComputeOptions(model="m", images=path, text=path, samples=40), Console(quiet=True))
    assert chosen.groups == 0
    assert any("3 unique images and 40 unique texts" in note for note in chosen.notes)


@pytest.mark.parametrize(
    ("kind", "speaker", "said"), [("conversations", "from", "value"), ("messages", "role", "content")]
)
@pytest.mark.parametrize("assistant", ["gpt", "assistant"])
def test_prose_of_a_conversation_is_what_the_assistant_says(tmp_path, kind, speaker, said, assistant):
    turns = [("user", "<image> asks"), (assistant, "answers <image>"), ("human", "asks"), (assistant, "ends")]
    rows = [{"id": 1, kind: [{speaker: who, said: what} for who, what in turns]}]
    (tmp_path / "one.json").write_text(json.dumps(rows))
    (tmp_path / "lines.jsonl").write_text(json.dumps(rows[0]))
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "table.parquet")
    for path in ("one.json", "lines.jsonl", "table.parquet"):
        (text,) = choose_texts(tmp_path / path, 9, 0).items
        assert text.content == "answers\nends"


def test_parts_of_a_message_are_its_text(tmp_path):
    parts = [{"type": "text", "text": "a picture"}, {"type": "image"}, {"type": "text", "text": "of a cat"}]
    record = {"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": parts}]}
    (tmp_path / "chat.jsonl").write_text(json.dumps(record))
    (text,) = choose_texts(tmp_path / "chat.jsonl", 1, 0).items
    assert " ".join(text.content.split()) == "a picture of a cat"


def test_records_without_an_answer_or_an_image_are_skipped_with_the_reason(tmp_path):
    write_png(tmp_path / "coco")
    mute = {"conversations": [{"from": "human", "value": "alone"}]}
    (tmp_path / "list.json").write_text(json.dumps([conversation(0), mute, conversation(99), {"other": 1}, 17]))
    texts, images = (choose(tmp_path / "list.json", 9, None) for choose in (choose_texts, choose_images))
    reasons = dict(texts.skipped)
    assert "no assistant turn" in reasons["list.json[1]"]
    assert "['other']" in reasons["list.json[3]"]
    assert "int" in reasons["list.json[4]"]
    assert [text.name for text in texts.items] == ["list.json[0]", "list.json[2]"]
    assert images.skipped == [("coco/99.png", "the file does not exist")]
    assert len(images.items) == 1


def test_markdown_and_json_are_prose_beside_text_files(tmp_path):
    (tmp_path / "a.md").write_text("# a heading\nand prose")
    (tmp_path / "b.json").write_text('["first", {"text": "second"}]')
    (tmp_path / "c.txt").write_text("third")
    assert {text.content for text in choose_texts(tmp_path, 9, 0).items} == {
        "# a heading\nand prose", "first", "second", "third",
    }  # fmt: skip
    assert choose_texts(tmp_path / "a.md", 9, 0).items[0].name == "a.md"


def test_collections_beside_plain_files_are_named_as_not_read(tmp_path):
    for folder, write in (("images", write_images), ("text", write_texts)):
        write(tmp_path / folder, 3)
        parquet(tmp_path / folder)
    options = ComputeOptions(model="m", images=tmp_path / "images", text=tmp_path / "text", samples=3)
    chosen = choose(options, Console(quiet=True))
    assert sum("not read" in note and "data.parquet" in note for note in chosen.notes) == 2
    assert all(sample.image.suffix == ".png" for sample in chosen.samples)


@pytest.mark.parametrize(
    ("columns", "taken"),
    [
        ({"picture": ["image"], "image": ["image"]}, "image"),
        ({"left": ["image"], "right": ["image"]}, None),
        ({"jpg": ["bytes"], "other": ["bytes"]}, "jpg"),
        ({"a": ["text"], "b": ["number"]}, None),
        ({"image": ["number"]}, None),
    ],
)
def test_the_image_column_is_told_by_its_feature_or_a_usual_name_or_refused_with_all_columns(tmp_path, columns, taken):
    kinds = {"image": datasets.Image(), "bytes": datasets.Value("binary"), "text": datasets.Value("string")}
    kinds["number"] = datasets.Value("int64")
    values = {"image": {"bytes": png(0), "path": None}, "bytes": png(0), "text": "words", "number": 1}
    features = datasets.Features({name: kinds[kind] for name, (kind,) in columns.items()})
    rows = {name: [values[kind]] for name, (kind,) in columns.items()}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "t.parquet")
    if taken:
        (image,) = choose_images(tmp_path / "t.parquet", 1, 0).items
        assert image.column == taken
    else:
        with pytest.raises(InputError, match=r"images: t\.parquet has .*its columns are") as refused:
            choose_images(tmp_path / "t.parquet", 1, 0)
        assert all(name in str(refused.value) for name in columns)


@pytest.mark.parametrize(
    ("columns", "taken"),
    [
        ({"title": "words", "text": "prose"}, "prose"),
        ({"caption": "later", "article": "sooner"}, "sooner"),
        ({"only": "one column", "number": 1}, "one column"),
        ({"one": "words", "two": "words"}, None),
        ({"number": 1}, None),
    ],
)
def test_the_text_column_is_told_by_name_or_is_the_only_one_or_refused_with_all_columns(tmp_path, columns, taken):
    pq.write_table(pa.table({name: [value] for name, value in columns.items()}), tmp_path / "t.parquet")
    if taken:
        assert choose_texts(tmp_path / "t.parquet", 1, 0).items[0].content == taken
    else:
        with pytest.raises(InputError, match=r"text: t\.parquet has .*its columns are") as refused:
            choose_texts(tmp_path / "t.parquet", 1, 0)
        assert all(name in str(refused.value) for name in columns)


def test_the_first_image_of_a_list_of_them_is_taken_and_an_empty_one_skipped(tmp_path):
    features = datasets.Features({"images": [datasets.Image()], "text": datasets.Value("string")})
    stored = [[{"bytes": png(0), "path": None}, {"bytes": png(1), "path": None}], []]
    data = datasets.Dataset.from_dict({"images": stored, "text": ["a", "b"]}, features=features)
    data.to_parquet(tmp_path / "t.parquet")
    data.save_to_disk(tmp_path / "saved")
    for name in ("t.parquet", "saved"):
        chosen = choose_images(tmp_path / name, 9, None)
        assert [item.read_bytes() for item in chosen.items] == [png(0)]
        assert chosen.skipped == [(f"{name}[1]", "it holds no image")]


def test_a_broken_row_is_skipped_with_its_number(tmp_path):
    pq.write_table(pa.table({"image": [png(0), b"no picture", png(2)]}), tmp_path / "t.parquet")
    chosen = choose_images(tmp_path / "t.parquet", 9, None)
    assert [item.row for item in chosen.items] == [0, 2]
    assert chosen.skipped == [("t.parquet[1]", "it is not an image that Pillow recognises")]


@pytest.mark.parametrize("name", ["broken.parquet", "broken.arrow", "broken.tar", "broken.json", "zipped.tar"])
def test_a_file_that_is_not_what_its_name_says_is_refused_with_the_reason_and_skipped_among_others(tmp_path, name):
    content = gzip.compress(tar(tmp_path).read_bytes()) if name == "zipped.tar" else b'[{"text": "a"}, {"te'
    (tmp_path / name).write_bytes(content)
    for choose_of in (choose_images, choose_texts):
        with pytest.raises(InputError, match=f"no usable (image|text) in .*the first, {name}, because"):
            choose_of(tmp_path / name, 3, 0)
    if name != "broken.json":
        (tmp_path / "folder").mkdir()
        (tmp_path / name).rename(tmp_path / "folder" / name)
        plain_parquet(tmp_path / "folder")
        chosen = choose_texts(tmp_path / "folder", 99, 0)
        assert len(chosen.items) == ROWS
        assert [skipped for skipped, _ in chosen.skipped] == [name]


@pytest.mark.parametrize("make", [saved, parquet, arrow, feather, shards], ids=lambda make: make.__name__)
def test_without_the_package_one_line_says_what_to_install(tmp_path, make, monkeypatch):
    path = make(tmp_path)
    monkeypatch.setitem(sys.modules, "datasets", None)
    for choose_of, what in ((choose_images, "images"), (choose_texts, "text")):
        with pytest.raises(InputError, match=f"^{what}: .*package datasets.*pip install datasets") as refused:
            choose_of(path, 3, 0)
        assert "\n" not in str(refused.value)


@pytest.mark.parametrize("name", ["notes.pdf", "table.csv"])
def test_a_file_of_no_kind_that_is_taken_lists_those_that_are(tmp_path, name):
    (tmp_path / name).write_text("words")
    for choose_of in (choose_images, choose_texts):
        with pytest.raises(InputError) as refused:
            choose_of(tmp_path / name, 3, 0)
        for kind in (".jsonl", ".tar", ".parquet", ".arrow", "datasets.save_to_disk"):
            assert kind in str(refused.value)


def test_a_table_that_is_written_anew_is_read_anew(tmp_path):
    for words in (["first"], ["second", "third"]):
        pq.write_table(pa.table({"text": words}), tmp_path / "t.parquet")
        assert [text.content for text in choose_texts(tmp_path / "t.parquet", 9, None).items] == words


def test_rows_of_a_large_row_group_are_read_a_few_at_a_time(tmp_path, monkeypatch):
    from modality_integration.app.samples import tables

    pq.write_table(pa.table({"text": [f"row {n}" for n in range(1000)]}), tmp_path / "t.parquet", row_group_size=1000)
    sizes = []
    read = pq.ParquetFile.iter_batches

    def watched(self, **options):
        for batch in read(self, **options):
            sizes.append(len(batch))
            yield batch

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", watched)
    texts = choose_texts(tmp_path / "t.parquet", 1000, None)
    assert [text.content for text in texts.items] == [f"row {n}" for n in range(1000)]
    assert max(sizes) <= tables.BATCH
    assert sum(sizes) == 1000  # each row once when read in order
