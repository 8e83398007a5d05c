"""Images from files, folders, lists, archives and tables, converted to RGB."""

from __future__ import annotations

import functools
import io
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from modality_integration.app.errors import InputError
from modality_integration.app.samples import tables
from modality_integration.app.samples.archives import members
from modality_integration.app.samples.choosing import (
    COLLECTIONS,
    Broken,
    Chain,
    Chosen,
    choose_among,
    is_collection,
    is_saved_dataset,
    listed,
    name_below,
    seed_of,
    unread_beside,
    walk,
    why_none,
)
from modality_integration.app.samples.records import IMAGE_KEYS, Records
from modality_integration.app.samples.sample import ImageSource

LISTS = (".json", ".jsonl")
TAKEN = (
    "an image of any type that Pillow opens, a folder of images, a list of their paths "
    f'({", ".join(LISTS)}, including LLaVA\'s conversations; relative to its folder or to "images" in it), '
    f"{', '.join(COLLECTIONS)}, or a folder written by datasets.save_to_disk"
)


def choose_images(path: Path | str, count: int, seed: int | None, *, distinct: bool = False) -> Chosen[Any]:
    """Choose at most `count` readable images in an order set by `seed`, or in file order if that is None.

    distinct: choose at most one of the images with the same bytes.

    `path` is a folder, searched recursively; one file; a list of paths (.json or .jsonl, relative to its folder or to
    "images" in it); or a collection: .tar, .parquet or .arrow files, a saved data set. The collections in a folder are
    read only if it has no plain images. Every image is decoded once; one that cannot be decoded is skipped with the
    reason. Raises InputError if `path` does not exist, holds no readable image, or has no clear image column.
    """
    path = Path(path)
    files = _files(path)
    candidates = listed(files, lambda file: _candidates(file, path))
    chosen = choose_among(
        candidates, count, seed_of(seed, "images"), lambda c: c, open_image, lambda c: _name(c, path), distinct
    )
    if not chosen.items:
        reason = why_none(chosen, "there is no file of an image type that Pillow opens")
        raise InputError(f"no usable image in {path}: {reason}; --images accepts {TAKEN}")
    if path.is_dir() and not is_collection(files[0]):
        chosen.unread = unread_beside(walk(path, "images"), path)
    return chosen


def image_files(path: Path) -> list[Path]:
    """Sorted image files below `path`, by extension or, without one, by content; hidden files are skipped."""
    if path.is_file():
        return [path]
    return [p for p in walk(path, "images") if p.is_file() and _is_image_file(p)]


def open_image(source: ImageSource) -> Image.Image:
    """The image as RGB: first frame, EXIF orientation, transparency on white, 16-bit and float grey scaled to 8."""
    if isinstance(source, Image.Image):
        return source.convert("RGB")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns of odd metadata; here only the pixels matter
        with Image.open(source if isinstance(source, Path) else io.BytesIO(source.read_bytes())) as opened:
            opened.load()
            image = ImageOps.exif_transpose(opened)
            if image.mode.startswith("I") or image.mode == "F":
                image = _grey_to_8_bit(image)
            if image.has_transparency_data:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            return image.convert("RGB")


def _files(path: Path) -> list[Path]:
    """The files of `path` to read images from: plain images, or the collections of a folder that has none."""
    if path.is_file() or is_saved_dataset(path):
        return [path]
    return image_files(path) or [p for p in walk(path, "images") if is_collection(p)]


def _candidates(file: Path, root: Path) -> Sequence[Any]:
    """The images of one file, not yet read."""
    suffix = file.suffix.lower()
    if suffix == ".tar":
        return [member for member in members(file) if member.suffix in _suffixes()]
    if is_collection(file):
        return Chain(list(tables.columns(file, "images", name_below(file, root))))
    return list(_paths_of(file)) if suffix in LISTS else [file]


def _paths_of(file: Path) -> Iterator[Path | Broken]:
    """The images that a list names, in its order, each path once; records without an image are skipped."""
    paths: dict[Path, None] = {}
    keys: set[str] = set()
    for record in Records(file, file.suffix.lower() == ".jsonl", "images"):
        try:
            value = record.value()
        except ValueError as error:
            yield Broken(Path(f"{file}{record.mark}"), str(error))
            continue
        if isinstance(value, dict):
            keys |= set(value)
            value = next((value[key] for key in IMAGE_KEYS if isinstance(value.get(key), str | list | dict)), [])
        for one in value if isinstance(value, list) else [value]:
            path = one.get("path") if isinstance(one, dict) else one
            if isinstance(path, str):
                paths[_found(path, file.parent)] = None
    if not paths:
        wanted = ", ".join(IMAGE_KEYS[:6])
        raise ValueError(f"no record names an image: expected a path under one of {wanted}, got keys {sorted(keys)}")
    yield from paths


def _found(name: str, folder: Path) -> Path:
    """The path of an image in a list: below the list's folder, or below "images" in it."""
    beside = folder / "images" / name
    return beside if not (folder / name).exists() and beside.exists() else folder / name


def _name(candidate: Any, root: Path) -> str:
    if isinstance(candidate, Path | Broken):
        path = candidate if isinstance(candidate, Path) else candidate.path
        return name_below(path, root if root.is_dir() else root.parent)
    return candidate.name


def _is_image_file(path: Path) -> bool:
    return path.suffix.lower() in _suffixes() or (not path.suffix and _is_image(path))


@functools.cache
def _suffixes() -> frozenset[str]:
    """Extensions of the image types that Pillow reads."""
    Image.init()
    return frozenset(suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.OPEN)


def _is_image(path: Path) -> bool:
    try:
        with Image.open(path):
            return True
    except Exception:  # a file without an extension that Pillow cannot open is not an image
        return False


def _grey_to_8_bit(image: Image.Image) -> Image.Image:
    values = np.asarray(image, dtype=np.float64)
    low, high = (0.0, 65535.0) if image.mode.startswith("I") else (values.min(), values.max())
    scaled = (values - low) / max(high - low, 1e-12)
    return Image.fromarray((scaled.clip(0.0, 1.0) * 255.0).round().astype(np.uint8))
