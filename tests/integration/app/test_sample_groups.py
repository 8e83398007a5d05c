"""Groups of samples for the standard error: no image or text occurs in two groups, or there is no error."""

import io
import itertools
import random
import shutil

import pytest
from PIL import Image
from rich.console import Console

from integration.app.compute_runs import quiet_run
from integration.saved_models import WORDS, write_images, write_texts
from modality_integration import MIRResult
from modality_integration.app import compute, demo, study
from modality_integration.app.demo import probe
from modality_integration.app.demo.pictures import Captioned
from modality_integration.app.options import ComputeOptions
from modality_integration.app.samples import Sample, Text, choose, groups_of, pair, samples_digest
from modality_integration.metric.dealing import dealt


def stand_ins(images, texts):
    return [Image.new("L", (1, 1), index) for index in range(images)], [Text(str(i), f"t{i}") for i in range(texts)]


def groups_in(samples, groups, processes=1, in_turn=False):
    """The images and texts of each group, as the metric assigns the samples of `processes` processes."""
    found = [set() for _ in range(groups)]
    for process in range(processes):
        mine = samples[process::processes]
        announced = None if in_turn else len(samples)
        numbers = dealt(0, len(mine), groups, announced, process=process, processes=processes)
        for sample, group in zip(mine, numbers.tolist(), strict=True):
            found[group] |= {("image", name_of(sample.image)), ("text", sample.text.content)}
    return found


def name_of(image):
    return image.getpixel((0, 0)) if isinstance(image, Image.Image) else image.read_bytes()


def share_nothing(found):
    return all(one.isdisjoint(other) for one, other in itertools.combinations(found, 2))


@pytest.mark.parametrize("processes", [1, 2, 3])
@pytest.mark.parametrize(
    ("images", "texts", "count", "groups"),
    [(5, 5, 40, 5), (7, 9, 12, 5), (40, 6, 40, 5), (8, 100, 60, 4), (11, 13, 97, 10), (2, 2, 9, 2), (6, 40, 41, 3)],
)
def test_blocks_share_no_image_and_no_text_whatever_the_number_of_processes(images, texts, count, groups, processes):
    pictures, prose = stand_ins(images, texts)
    samples = pair(pictures, prose, count, 0, groups)
    assert samples.groups == groups
    found = groups_in(samples, groups, processes)
    assert all(found)
    assert share_nothing(found)
    assert set().union(*found) >= {("image", index) for index in range(min(images, count // groups))}


@pytest.mark.parametrize(("images", "texts", "groups"), [(5, 5, 5), (7, 9, 4), (40, 6, 3)])
def test_dealt_in_turn_they_share_none_after_any_number_of_samples(images, texts, groups):
    pictures, prose = stand_ins(images, texts)
    samples = pair(pictures, prose, 60, 0, groups, in_turn=True)
    assert (samples.groups, samples.in_turn) == (groups, True)
    for count in (5, 10, 41, 60):
        assert share_nothing(groups_in(samples[:count], groups, in_turn=True))


@pytest.mark.parametrize(("images", "texts"), [(1, 40), (40, 1), (4, 40), (40, 4), (4, 4)])
def test_with_fewer_images_or_texts_than_groups_there_are_none_and_pairs_go_round_all(images, texts):
    pictures, prose = stand_ins(images, texts)
    samples = pair(pictures, prose, 40, 0, 5)
    assert samples.groups == 0
    assert [(s.image.getpixel((0, 0)), s.text.name) for s in samples] == [
        (s.image.getpixel((0, 0)), s.text.name) for s in pair(pictures, prose, 40, 0)
    ]


def test_where_nothing_repeats_groups_change_no_pair():
    pictures, prose = stand_ins(20, 30)
    for groups in (0, 2, 5, 7):
        samples = pair(pictures, prose, 20, 0, groups)
        assert [(s.image, s.text) for s in samples] == list(zip(pictures, prose[:20], strict=True))
        assert samples.groups == groups


def test_items_of_one_key_fall_into_one_group():
    pictures, prose = stand_ins(24, 24)
    keys = [index % 6 for index in range(24)], range(24)
    samples = pair(pictures, prose, 24, 0, 3, keys=keys)
    assert samples.groups == 3
    places = [{name_of(s.image) % 6 for s in samples[begin : begin + 8]} for begin in (0, 8, 16)]
    assert share_nothing(places)
    assert pair(pictures, prose, 24, 0, 7, keys=keys).groups == 0


def test_any_number_of_samples_takes_no_memory_and_time_and_is_the_same_wherever_it_is_asked():
    pictures, prose = stand_ins(7, 11)
    samples = pair(pictures, prose, 10**12, 0, 5)
    assert len(samples) == 10**12
    assert len(samples[3::4]) == 10**12 // 4
    late = [samples[10**11 + index] for index in (5, 0, 3)]
    again = samples[10**11 : 10**11 + 6]
    assert late == [again[5], again[0], again[3]]
    assert samples[-1] == samples[10**12 - 1]
    assert (
        samples.digest() == pair(pictures, prose, 10**12, 0, 5).digest() != pair(pictures, prose, 10**12, 1, 5).digest()
    )
    with pytest.raises(IndexError):
        samples[10**12]


@pytest.mark.parametrize("changed", [{"seed": 1}, {"groups": 4}, {"count": 41}, {"texts": 7}])
def test_the_digest_of_repeated_samples_tells_them_apart(changed):
    asked = {"images": 8, "texts": 9, "count": 40, "seed": 0, "groups": 5}

    def digest(images, texts, **rest):
        pictures, prose = stand_ins(images, texts)
        return pair(pictures, prose, **rest).digest()

    assert digest(**asked) == digest(**asked) != digest(**asked | changed)


def test_the_digest_of_a_list_is_that_of_the_pairs(tmp_path):
    write_images(tmp_path, 3)
    samples = pair(sorted(tmp_path.iterdir()), stand_ins(0, 3)[1], 3, 0)
    assert samples_digest(samples) == samples_digest(list(samples)) != samples_digest(list(samples)[::-1])


def test_groups_that_samples_were_not_made_for_are_none():
    pictures, prose = stand_ins(8, 8)
    samples = pair(pictures, prose, 40, 0, 4)
    assert groups_of(samples, 4) == 4
    assert groups_of(samples, 5) == groups_of(samples, 2) == groups_of(samples, 4, in_turn=True) == 0
    assert groups_of(pair(pictures, prose, 8, 0), 3) == 3
    assert groups_of([Sample(pictures[0], prose[0])], 3) == 3


def chosen(tmp_path, images, texts, **changes):
    """The samples that `choose` makes from newly written images and texts."""
    if images:
        write_images(tmp_path / "images", images)
    if texts:
        write_texts(tmp_path / "text", texts)
    options = {"model": "m", "images": tmp_path / "images", "text": tmp_path / "text", **changes}
    return choose(ComputeOptions(**options), Console(quiet=True))


@pytest.mark.parametrize(("protocol", "groups"), [("random", 5), ("published", 2)])
def test_identical_bytes_under_two_names_are_one_image(tmp_path, protocol, groups):
    write_images(tmp_path / "images", 6)
    for index in range(4):
        shutil.copy(tmp_path / "images" / "image-00.png", tmp_path / "images" / f"copy-{index}.png")
    got = chosen(tmp_path, 0, 10, samples=10, protocol=protocol, groups=groups)
    assert got.groups == groups
    assert share_nothing(groups_in(got.samples, groups))
    if protocol == "random":
        assert "skipped 4 duplicate images" in got.notes
        assert len({name_of(sample.image) for sample in got.samples}) == 6


def test_files_in_order_that_make_fewer_groups_than_were_asked_for_name_how_many(tmp_path):
    got = chosen(tmp_path, 6, 4, samples=12, protocol="published")
    assert got.groups == 0
    (note,) = [note for note in got.notes if "no standard error" in note]
    assert note.endswith("or --groups 2")


def test_copies_alone_make_no_error(tmp_path):
    write_images(tmp_path / "images", 1)
    for index in range(40):
        shutil.copy(tmp_path / "images" / "image-00.png", tmp_path / "images" / f"copy-{index}.png")
    for protocol in ("random", "published"):
        got = chosen(tmp_path, 0, 40, samples=40, protocol=protocol)
        assert got.groups == 0
        assert any(note.startswith("no standard error: 1 unique image and") for note in got.notes)


def test_texts_of_the_same_words_are_one(tmp_path):
    (tmp_path / "text").mkdir()
    for index in range(12):
        (tmp_path / "text" / f"{index}.txt").write_text(f" {WORDS[index % 3]}\n")
    got = chosen(tmp_path, 12, 0, samples=12)
    assert got.groups == 0
    (note,) = [note for note in got.notes if "no standard error" in note]
    assert "12 unique images and 3 unique texts" in note
    assert note.endswith("or --groups 3")
    assert chosen(tmp_path, 0, 0, samples=12, groups=3).groups == 3


@pytest.mark.parametrize(
    ("images", "texts", "samples", "groups", "holds"),
    [(40, 40, 80, 5, True), (10, 5, 20, 5, True), (6, 4, 12, 2, True), (7, 5, 35, 5, False), (3, 3, 12, 4, False)],
)
def test_the_published_files_in_order_are_ordered_into_groups_where_that_is_possible(
    tmp_path, images, texts, samples, groups, holds
):
    got = chosen(tmp_path, images, texts, samples=samples, protocol="published", groups=groups)
    assert got.groups == (groups if holds else 0)
    in_order = pair(sorted((tmp_path / "images").iterdir()), [], samples, None).images
    expected = sorted((in_order[i % images].name, f"text-{i % texts:02d}.txt") for i in range(samples))
    assert sorted((sample.image.name, sample.text.name) for sample in got.samples) == expected
    assert share_nothing(groups_in(got.samples, groups)) is holds
    assert any("in file order" in note for note in got.notes) is not holds


def test_published_files_that_do_not_repeat_are_in_random_order(tmp_path):
    got = chosen(tmp_path, 9, 9, samples=8, protocol="published")
    images = sorted((tmp_path / "images").iterdir())
    order = random.Random("order of the pass").sample(range(8), 8)
    assert order != sorted(order)
    assert [sample.image for sample in got.samples] == [images[number] for number in order]
    assert got.groups == 5


def test_whether_an_error_is_wanted_changes_no_sample(tmp_path):
    with_error = chosen(tmp_path, 7, 9, samples=40)
    without = chosen(tmp_path, 0, 0, samples=40, groups=0)
    assert list(with_error.samples) == list(without.samples)
    assert (with_error.groups, without.groups) == (5, 0)
    assert not any("standard error" in note for note in without.notes)


@pytest.mark.parametrize(("images", "texts"), [(1, 9), (7, 1), (4, 9)])
def test_a_run_of_too_few_files_prints_the_value_alone_and_says_why(options, tmp_path, images, texts):
    write_images(tmp_path / "few" / "images", images)
    write_texts(tmp_path / "few" / "text", texts)
    changes = {"images": tmp_path / "few" / "images", "text": tmp_path / "few" / "text"}
    progress, results = (Console(record=True, file=io.StringIO(), width=400) for _ in range(2))
    result = compute.run(ComputeOptions(**{**vars(options), **changes}), progress, results)
    assert result.error is None
    assert result.left_out is None
    said = results.export_text()
    assert "+-" not in said
    assert "±" not in said
    few = f"{images} unique image{'s' * (images > 1)} and {texts} unique text{'s' * (texts > 1)}"
    assert f"no standard error: {few}" in said
    assert ("or --groups 4" in said) is (images == 4)
    read = MIRResult.from_json(options.out / "mir.json")
    assert read.error is None
    assert any(few in note for note in read.notes)


def test_compare_has_no_error_of_a_difference_where_one_run_has_none(options, tmp_path):
    from modality_integration import compare

    whole = quiet_run(options, samples=7)
    write_images(tmp_path / "one", 1)
    single = quiet_run(options, images=tmp_path / "one", samples=7, out=tmp_path / "single")
    comparison = compare(whole, single)
    assert whole.error is not None
    assert comparison.difference == pytest.approx(single.value - whole.value)
    assert comparison.error is None


@pytest.mark.parametrize("name", ["samples", "layers", "content"])
def test_studies_have_errors_of_groups_that_share_nothing_or_none(options, tmp_path, name, monkeypatch):
    seen = []
    fresh = study.Subject.fresh_metric
    monkeypatch.setattr(
        study.Subject, "fresh_metric", lambda self, samples=None: (seen.append(self.groups), fresh(self, samples))[1]
    )
    for kind, count in (("few", 3), ("enough", 6)):
        write_images(tmp_path / "images" / kind, count, seed=count)
        write_texts(tmp_path / "text" / "prose", 8)
    images = tmp_path / "images" if name == "content" else tmp_path / "images" / "few"
    changes = {"images": images, "text": tmp_path / "text" / "prose", "samples": 12, "text_tokens": 8}
    rows = study.run(name, ComputeOptions(**{**vars(options), **changes}), Console(quiet=True))
    if name == "content":
        assert {row["images"]: row["error"] is None for row in rows} == {"few": True, "enough": False}
        assert sorted(seen) == [0, 5]
    else:
        assert all(row["error"] is None for row in rows)
        assert seen == [0]


@pytest.mark.parametrize(("count", "sources", "held"), [(8, 8, True), (40, 10, True), (40, 3, False)])
def test_the_demo_gives_no_error_where_pictures_come_of_too_few_sources(count, sources, held, monkeypatch):
    class Few:
        def held_out(self, count, kinds):
            return [Captioned(Image.new("L", (1, 1), i), "", "digits", i % sources) for i in range(count)]

    samples = probe.probe_samples(Few(), count, 0, prose=stand_ins(0, 50)[1])
    assert groups_of(samples, demo.probe.GROUPS) == (5 if held else 0)
    if held:
        parts = [{name_of(s.image) % sources for s in samples[g * count // 5 : (g + 1) * count // 5]} for g in range(5)]
        assert share_nothing(parts) or count % 5
