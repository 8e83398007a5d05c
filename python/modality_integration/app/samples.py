"""Images and prose from files, chosen by seed, and paired at random as the paper pairs them."""

from __future__ import annotations

import json
import os
import random
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
from PIL import Image, ImageOps
from rich.console import Console

from modality_integration.app.console import show_notes
from modality_integration.app.errors import InputError
from modality_integration.app.options import SampleOptions

T = TypeVar("T")

TEXT_SUFFIXES = (".txt", ".story", ".jsonl")
# Where a line of a .jsonl file keeps its prose: the first of these keys that holds a string.
TEXT_KEYS = ("text", "article", "content", "story", "document", "caption")


@dataclass(frozen=True)
class Text:
    """A piece of prose and where it came from."""

    name: str
    content: str


@dataclass(frozen=True)
class Sample:
    """One image (a file, or a picture in memory) with one piece of unrelated prose."""

    image: Path | Image.Image
    text: Text

    @property
    def name(self) -> str:
        """What to call it in messages."""
        image = self.image.name if isinstance(self.image, Path) else "a picture in memory"
        return f"{image} with {self.text.name}"


@dataclass
class Chosen(Generic[T]):
    """What was chosen, and what had to be skipped as (name, reason)."""

    items: list[T] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)


class ChosenSamples(NamedTuple):
    """Pairs, notes on them for the result, and what is broken as (name, reason)."""

    samples: list[Sample]
    notes: list[str]
    skipped: list[tuple[str, str]]


def choose(options: SampleOptions, console: Console) -> ChosenSamples:
    """The pairs that `options` ask for; what is broken is printed and left out."""
    seed = None if options.in_order else options.seed
    images = choose_images(options.images, options.samples, seed)
    texts = choose_texts(options.text, options.samples, seed)
    show_notes([*_skipped(images.skipped, "image"), *_skipped(texts.skipped, "text")], console)
    samples = pair(images.items, texts.items, options.samples, seed)
    return ChosenSamples(samples, _notes(images, texts, options.samples), images.skipped + texts.skipped)


def choose_images(path: Path | str, count: int, seed: int | None) -> Chosen[Path]:
    """At most `count` readable images in an order set by `seed`, by name with None.

    `path` is a folder, searched recursively, or one file. Every image is decoded once; one that cannot be is skipped
    with the reason. Raises InputError if `path` is not there or holds no readable image.
    """
    path = Path(path)
    candidates = image_files(path)
    chosen = _choose(
        candidates, count, _seed(seed, "images"), lambda p: (open_image(p), p)[1], lambda p: _name(p, path)
    )
    if not chosen.items:
        raise InputError(
            f"no usable image in {path}: {_why_none(chosen, 'no file there is of an image type that Pillow opens')}"
        )
    return chosen


def choose_texts(path: Path | str, count: int, seed: int | None) -> Chosen[Text]:
    """At most `count` pieces of prose in an order set by `seed`, as they come with None.

    `path` is a .txt, .story or .jsonl file or a folder.

    A .txt file is one piece; a .story (CNN / Daily Mail) one, up to its first @highlight; a .jsonl one a line, a string
    or an object with one of the keys "text", "article", "content", "story", "document", "caption". A piece that is
    empty, not UTF-8 or not JSON is skipped with the reason. Raises InputError if `path` is missing or has none.
    """
    path = Path(path)
    candidates = list(_text_pieces(path))
    chosen = _choose(candidates, count, _seed(seed, "texts"), lambda p: p.read(path), lambda p: p.name(path))
    if not chosen.items:
        raise InputError(
            f"no usable text in {path}: {_why_none(chosen, 'there is no ' + ', '.join(TEXT_SUFFIXES) + ' file')}"
        )
    return chosen


def pair(images: Sequence[Path | Image.Image], texts: Sequence[Text], count: int, seed: int | None) -> list[Sample]:
    """`count` pairs of a random image with unrelated prose; what is too few comes again, in a new order each round.

    seed None: in order, round after round.
    """
    left = _rounds(images, count, _seed(seed, "image rounds"))
    right = _rounds(texts, count, _seed(seed, "text rounds"))
    return [Sample(image, text) for image, text in zip(left, right, strict=True)]


def in_random_order(samples: Sequence[Sample]) -> list[Sample]:
    """The same samples in an order that is random, and the same every time.

    Groups of samples for the standard error are blocks of them, and files in order may be sorted by what is in them.
    """
    return random.Random("order of the pass").sample(list(samples), len(samples))


def image_files(path: Path) -> list[Path]:
    """Files below `path` that look like images, sorted: an extension that Pillow reads, or none; hidden ones not."""
    if path.is_file():
        return [path]
    Image.init()
    readable = {suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    return [p for p in _files(path, "images") if p.suffix.lower() in readable or (not p.suffix and _is_image(p))]


def open_image(source: Path | Image.Image) -> Image.Image:
    """The image as RGB: first frame, turned as EXIF says, transparency on white, 16-bit and float grey scaled to 8."""
    if isinstance(source, Image.Image):
        return source.convert("RGB")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns of odd metadata; what matters here is whether pixels come out
        with Image.open(source) as opened:
            opened.load()
            image = ImageOps.exif_transpose(opened)
            if image.mode.startswith("I") or image.mode == "F":
                image = _grey_to_8_bit(image)
            if image.has_transparency_data:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            return image.convert("RGB")


@dataclass(frozen=True)
class _Piece:
    """One piece of prose not yet read: a whole file, or the line of a .jsonl file that starts at byte `offset`."""

    path: Path
    offset: int | None = None
    line: int | None = None

    def name(self, root: Path) -> str:
        return _name(self.path, root) + ("" if self.line is None else f":{self.line}")

    def read(self, root: Path) -> Text:
        with self.path.open("rb") as file:
            if self.offset is None:
                content = file.read().decode("utf-8-sig")
            else:
                file.seek(self.offset)
                content = _json_prose(file.readline().decode("utf-8-sig"))
        if self.path.suffix.lower() == ".story":
            content = content.split("@highlight")[0]
        content = content.strip()
        if not content:
            raise ValueError("it is empty")
        return Text(self.name(root), content)


def _text_pieces(path: Path) -> Iterator[_Piece]:
    if path.is_file():
        if path.suffix.lower() not in TEXT_SUFFIXES:
            raise InputError(f"text: takes {', '.join(TEXT_SUFFIXES)} files or a folder of them, got {path}")
        files = [path]
    else:
        files = [p for p in _files(path, "text") if p.suffix.lower() in TEXT_SUFFIXES]
    for file in files:
        if file.suffix.lower() != ".jsonl":
            yield _Piece(file)
            continue
        offset = 0
        with file.open("rb") as lines:  # only offsets are kept: such files outgrow memory
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield _Piece(file, offset, number)
                offset += len(line)


def _json_prose(line: str) -> str:
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"it is not JSON ({error.msg})") from error
    if isinstance(value, dict):
        found = next((value[key] for key in TEXT_KEYS if isinstance(value.get(key), str)), None)
        if found is None:
            raise ValueError(f"none of its keys {sorted(value)} is one of {', '.join(TEXT_KEYS)} with a string")
        return found
    if not isinstance(value, str):
        raise ValueError(f"it is a {type(value).__name__}, not a string or an object")
    return value


def _files(path: Path, what: str) -> list[Path]:
    """Every file below `path` in sorted order, hidden ones left out, linked folders followed once."""
    if not path.exists():
        raise InputError(f"{what}: {path} does not exist")
    found, seen = [], set()
    for folder, folders, names in os.walk(path, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        found += [Path(folder, name) for name in names if not name.startswith(".")]
    return sorted(p for p in found if p.is_file())


def _choose(
    candidates: Sequence[Any], count: int, seed: str | None, read: Callable[[Any], T], name: Callable[[Any], str]
) -> Chosen[T]:
    chosen: Chosen[T] = Chosen()
    order = list(range(len(candidates)))
    if seed is not None:
        random.Random(seed).shuffle(order)
    for index in order:
        if len(chosen.items) == count:
            break
        try:
            chosen.items.append(read(candidates[index]))
        except Exception as error:  # a broken file raises nearly anything, by format; the reason is kept and shown
            chosen.skipped.append((name(candidates[index]), _reason(error)))
    return chosen


def _seed(seed: int | None, what: str) -> str | None:
    return None if seed is None else f"{seed}/{what}"


def _rounds(items: Sequence[T], count: int, seed: str | None) -> list[T]:
    if seed is None:
        return [items[index % len(items)] for index in range(count)]
    shuffler, out = random.Random(seed), list(items[:count])
    while len(out) < count:
        out += shuffler.sample(items, min(len(items), count - len(out)))
    return out


def _reason(error: Exception) -> str:
    if isinstance(error, UnicodeDecodeError):
        return f"it is not UTF-8 (byte {error.start})"
    if isinstance(error, Image.UnidentifiedImageError):
        return "it is no image that Pillow knows"
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def _why_none(chosen: Chosen, nothing_found: str) -> str:
    if not chosen.skipped:
        return nothing_found
    name, reason = chosen.skipped[0]
    return f"all {len(chosen.skipped)} tried are broken, the first, {name}, because {reason}"


def _name(path: Path, root: Path) -> str:
    return path.name if path == root else path.relative_to(root).as_posix()


def _is_image(path: Path) -> bool:
    try:
        with Image.open(path):
            return True
    except Exception:  # without an extension to claim otherwise, a file that Pillow does not know is no image
        return False


def _grey_to_8_bit(image: Image.Image) -> Image.Image:
    values = np.asarray(image, dtype=np.float64)
    low, high = (0.0, 65535.0) if image.mode.startswith("I") else (values.min(), values.max())
    scaled = (values - low) / max(high - low, 1e-12)
    return Image.fromarray((scaled.clip(0.0, 1.0) * 255.0).round().astype(np.uint8))


def _notes(images: Chosen, texts: Chosen, samples: int) -> list[str]:
    notes = []
    for chosen, what in ((images, "image"), (texts, "text")):
        if chosen.skipped:
            notes.append(f"skipped {len(chosen.skipped)} broken {what}{'s' * (len(chosen.skipped) > 1)}")
        if len(chosen.items) < samples:
            notes.append(f"{len(chosen.items)} usable {what}s for {samples} samples: some are used more than once")
    return notes


def _skipped(skipped: Sequence[tuple[str, str]], what: str, most: int = 5) -> list[str]:
    lines = [f"broken {what} {name}: {reason}" for name, reason in skipped[:most]]
    return lines + ([f"and {len(skipped) - most} more broken {what}s"] if len(skipped) > most else [])
