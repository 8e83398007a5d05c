"""Samples of a probe that share an image or a text: no standard error that ignores the shared one."""

import random

import pytest
import torch

from integration.tiny_models import tiny_batch, tiny_model
from integration.tiny_trainers import ROWS
from modality_integration import MIRCallback, compare, measure_mir
from modality_integration.training import repeats


@pytest.fixture(scope="module")
def model():
    return tiny_model("llava", dtype=torch.float32)


def probe_of(model, count=10, *, image=None, text=None, rows=("tittttttt",)):
    """Batches of random samples; image, text: for each batch, the index of the batch whose image or text it uses."""
    made = [tiny_batch(model, "llava", list(rows), seed=seed).inputs for seed in range(count)]
    image, text = image or list(range(count)), text or list(range(count))
    return [{**made[t], "pixel_values": made[i]["pixel_values"]} for i, t in zip(image, text, strict=True)]


def test_samples_that_share_nothing_have_an_error(model):
    result = measure_mir(model, probe_of(model, rows=ROWS))
    assert result.error > 0
    assert not [note for note in result.notes if "no standard error" in note]


@pytest.mark.parametrize(
    ("image", "text", "found"),
    [
        ([0] * 10, None, "1 image"),
        (None, [3] * 10, "1 text"),
        ([0] * 10, [0] * 10, "1 image and 1 text"),
        ([0, 1] * 5, None, "2 images"),  # five groups of two samples
        ([0, 1, 2, 3, 4, 5, 6, 0, 0, 0], None, "7 images"),  # one image in four samples, groups of two
        (list(range(10)), [0, 0, 2, 2, 4, 4, 6, 6, 8, 0], "5 texts"),
        ([0, 0, 2, 2, 4, 4, 6, 6, 8, 8], [0, 1, 1, 3, 3, 5, 5, 7, 7, 0], "5 images and 5 texts"),  # a ring
    ],
)
def test_samples_of_several_groups_that_share_one_have_no_error_and_a_note_says_why(model, image, text, found):
    probe = probe_of(model, image=image, text=text)
    result = measure_mir(model, probe)
    assert result.error is None
    assert result.left_out is None
    assert [note for note in result.notes if "no standard error" in note] == [
        f"no standard error: {found} for 10 samples; groups that share one are not independent"
    ]
    assert result.value == pytest.approx(measure_mir(model, probe, metric={"groups": 0}).value, rel=1e-12)
    assert "standard error" in compare(result, result).verdict() or compare(result, result).error is None


@pytest.mark.parametrize("image", [[0, 0, 2, 2, 4, 4, 6, 6, 8, 8], [0, 1, 2, 3, 4, 5, 6, 7, 8, 0]])
def test_what_is_shared_within_a_group_alone_is_left_out_together(model, image):
    probe = probe_of(model, image=image)
    result = measure_mir(model, probe)
    assert result.error > 0
    order = repeats.order_apart([repeats.contents(batch, 1) for batch in probe], 5, repeats.shuffled(10))
    groups = [order[2 * g : 2 * g + 2] for g in range(5)]
    assert all(
        len({g for g, members in enumerate(groups) for i in members if image[i] == shown}) == 1 for shown in image
    )
    rest = [[probe[i] for g in groups if g is not left for i in g] for left in groups]
    for k, distances in enumerate(result.left_out):
        alone = [measure_mir(model, batches, metric={"groups": 0}).per_layer[k] for batches in rest]
        assert distances == pytest.approx(alone, rel=1e-6)


@pytest.mark.parametrize("metric", [{"samples": 10}, {"samples": 10, "groups": 2}, {"groups": 10}, {"groups": 3}])
def test_however_groups_are_dealt(model, metric):
    assert measure_mir(model, probe_of(model, image=[0] * 10), metric=metric).error is None
    assert measure_mir(model, probe_of(model), metric=metric).error > 0


def test_padding_hides_no_text(model):
    """The same text in rows of different lengths, and another text."""
    ids, fill = torch.arange(5, 10), torch.zeros(2, dtype=torch.int64)
    padded = {"input_ids": torch.cat([fill, ids])[None], "attention_mask": torch.tensor([[0, 0, 1, 1, 1, 1, 1]])}
    plain = {"input_ids": ids[None], "attention_mask": torch.ones(1, 5)}
    assert repeats.contents(padded, 1) == repeats.contents(plain, 1)
    assert repeats.contents({"input_ids": ids[None] + 1}, 1) != repeats.contents(plain, 1)


def test_patches_of_several_images_are_one_where_all_are(model):
    ids, patches = torch.arange(6).view(2, 3), torch.randn(7, 4)
    batch = {"input_ids": ids, "pixel_values": patches}
    one, other = repeats.contents(batch, 2)
    assert not one & other
    assert repeats.contents({**batch, "input_ids": ids + 1}, 2)[0] & one
    assert not repeats.contents({"input_ids": ids + 1, "pixel_values": patches + 1}, 2)[0] & one


@pytest.mark.parametrize("seed", range(20))
def test_order_is_a_permutation_and_untouched_where_nothing_is_shared(seed):
    draw = random.Random(seed)
    sizes = [draw.randint(1, 3) for _ in range(12)]
    kinds = draw.choice([1000, 12, 3])
    batches = [[{f"image {draw.randrange(kinds)}"} for _ in range(size)] for size in sizes]
    order = repeats.order_apart(batches, 5, repeats.shuffled(12))
    assert sorted(order) == list(range(12))
    apart = [[{f"image {i}-{row}"} for row in range(size)] for i, size in enumerate(sizes)]
    assert repeats.order_apart(apart, 5, repeats.shuffled(12)) == repeats.shuffled(12)
    assert repeats.shared(apart, 5, sum(sizes), 0, 1) == ""


def test_early_stopping_says_that_it_goes_by_min_delta(model, tmp_path):
    callback = MIRCallback(probe_of(model, image=[0] * 10), patience=2)
    with pytest.warns(UserWarning, match="no standard error and only min_delta detects a plateau"):
        callback.measure(model, 0)
