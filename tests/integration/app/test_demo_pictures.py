"""The demo's pictures: exact captions, nested training sets, and a held-out set that training never touches."""

from itertools import pairwise

import numpy as np
import pytest
from PIL import Image

from integration.demo_packages import needs
from modality_integration.app.demo import pictures as module
from modality_integration.app.demo.pictures import COLOURS, KINDS, PHOTOGRAPHS, Pictures

pytestmark = needs()


@pytest.fixture(scope="module")
def pictures():
    return Pictures(0)


def same(a, b):
    return (a.caption, a.kind, a.image.tobytes()) == (b.caption, b.kind, b.image.tobytes())


@pytest.mark.parametrize("split", ["training", "held_out"])
def test_smaller_counts_are_prefixes_with_the_kinds_mixed_evenly(pictures, split):
    draw = getattr(pictures, split)
    large, small = draw(24)[:], draw(10)[:]
    assert len(small) == 10
    assert all(same(a, b) for a, b in zip(small, large[:10], strict=True))
    assert [sum(item.kind == kind for item in large) for kind in KINDS] == [6, 6, 6, 6]
    assert all({item.kind for item in large[i : i + 4]} == set(KINDS) for i in range(0, 24, 4))
    assert len({tuple(item.kind for item in large[i : i + 4]) for i in range(0, 24, 4)}) > 1
    assert {(item.image.size, item.image.mode) for item in large} == {((224, 224), "RGB")}


def test_no_picture_comes_twice_in_training_nor_is_one_held_out(pictures):
    trained = {item.image.tobytes() for item in pictures.training(240)}
    held_out = {item.image.tobytes() for item in pictures.held_out(60)}
    assert len(trained) == 240
    assert len(held_out) == 60
    assert not trained & held_out


def test_held_out_emoji_digits_and_scenes_are_others_than_those_of_training(pictures):
    for train, held in (pictures._emoji, pictures._scenes):
        assert not {str(item) for item in train} & {str(item) for item in held}
        assert len(held) == (len(train) + len(held)) // 6
    train, held = ({pixels.tobytes() for pixels, _ in part} for part in pictures._digits)
    assert not train & held
    captions = {item.caption for item in pictures.held_out(300, ["scenes", "emoji"])}
    assert not captions & {item.caption for item in pictures.training(600)}


def test_held_out_crops_of_a_photograph_share_no_pixel_with_those_of_training():
    pixels = np.zeros((300, 200, 3), np.uint8)
    pixels[200:] = 255
    image, rng = Image.fromarray(pixels), np.random.default_rng(0)
    for _ in range(20):
        assert np.asarray(module._crop(image, False, rng)).max() == 0
        assert np.asarray(module._crop(image, True, rng)).min() == 255


def test_they_are_the_same_for_a_seed_in_whatever_order_they_are_drawn(pictures):
    again, other = Pictures(0), Pictures(1)
    item = again.held_out(40)[29]
    again.training(8)[:]
    assert same(item, pictures.held_out(60)[29])
    assert same(again.training(20)[17], pictures.training(100)[17])
    assert not all(same(a, b) for a, b in zip(pictures.training(8), other.training(8), strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_one_kind_alone_can_be_held_out(pictures, kind):
    alone = pictures.held_out(3, [kind])[:]
    assert [item.kind for item in alone] == [kind] * 3
    mixed = [item for item in pictures.held_out(12) if item.kind == kind]
    assert all(same(a, b) for a, b in zip(alone, mixed, strict=True))


@pytest.mark.parametrize(("kinds", "got"), [(["paintings"], "paintings"), ([], "none")])
def test_unknown_kinds_are_refused(pictures, kinds, got):
    with pytest.raises(ValueError, match=f"kinds: expected some of photographs, emoji, scenes, digits, got {got}"):
        pictures.held_out(4, kinds)


def test_when_the_emoji_are_used_up_they_come_again_in_another_size_and_place(pictures):
    count = len(pictures._emoji[0])
    first, second = (pictures._draw("emoji", index, held_out=False) for index in (3, 3 + count))
    assert first.caption == second.caption
    assert first.image.tobytes() != second.image.tobytes()


def test_every_photograph_is_there(pictures):
    captions = {item.caption for item in pictures.training(4 * len(PHOTOGRAPHS)) if item.kind == "photographs"}
    assert captions == set(PHOTOGRAPHS.values())


def test_emoji_have_plain_names_and_stand_on_varying_backgrounds(pictures):
    drawn = [item for item in pictures.training(160) if item.kind == "emoji"]
    for item in drawn:
        words = item.caption.removeprefix("the ").removesuffix(" emoji").replace("-", " ").split()
        assert 1 <= len(words) <= 3
        assert not {"black", "symbol", "sign"} & set(words)
    corners = {item.image.getpixel((0, 0)) for item in drawn}
    assert len(corners) > len(drawn) // 2


def test_a_scenes_caption_says_where_each_colour_is(pictures):
    for item in pictures.held_out(40, ["scenes"]):
        words = item.caption.split()
        colours = [word for word in words if word in COLOURS]
        pixels = np.asarray(item.image)
        (y, x), (other_y, other_x) = (np.argwhere((pixels == COLOURS[colour]).all(-1)).mean(0) for colour in colours)
        relation = " ".join(words[3:-3])
        offsets = {
            "above": other_y - y,
            "below": y - other_y,
            "to the left of": other_x - x,
            "to the right of": x - other_x,
        }
        assert offsets[relation] > 60, item.caption
        assert words[0] == ("an" if colours[0][0] in "aeiou" else "a")


def test_the_shapes_of_a_scene_do_not_touch_its_edge_or_each_other(pictures):
    for scene in pictures.held_out(24, ["scenes"]):
        pixels = np.asarray(scene.image)
        ground = pixels[0, 0]
        border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
        assert (border == ground).all()
        # Empty rows or columns separate the two shapes.
        empty = [(pixels == ground).all((axis, 2)) for axis in (0, 1)]
        assert any(sum(a and not b for a, b in pairwise(lines)) >= 2 for lines in empty)
