"""A sample: an image, wherever it is stored, paired with prose."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from PIL import Image


class Stored(Protocol):
    """A file stored in an archive or a table; only its location is kept until it is read."""

    @property
    def name(self) -> str:
        """Its name in messages."""

    def read_bytes(self) -> bytes:
        """The file as it was stored."""


# A file, a picture in memory, or a picture stored in an archive or a table.
ImageSource = Path | Image.Image | Stored


@dataclass(frozen=True)
class Text:
    """A text and the name of its source."""

    name: str
    content: str


@dataclass(frozen=True)
class Sample:
    """One image paired with one unrelated text."""

    image: ImageSource
    text: Text

    @property
    def name(self) -> str:
        """Its name in messages."""
        image = "a picture in memory" if isinstance(self.image, Image.Image) else self.image.name
        return f"{image} with {self.text.name}"


def content_digest(item: ImageSource | Text) -> bytes:
    """SHA-256 of an image file (in memory: of its pixels) or of prose, so that equal content is recognised."""
    if isinstance(item, Text):
        return hashlib.sha256(item.content.encode()).digest()
    if isinstance(item, Image.Image):
        pixels = item.convert("RGBA")  # palette indices are not colours; bytes alone have no shape
        return hashlib.sha256(repr(pixels.size).encode() + pixels.tobytes()).digest()
    if not isinstance(item, Path):
        return hashlib.sha256(item.read_bytes()).digest()
    hashed = hashlib.sha256()
    with item.open("rb") as file:
        while block := file.read(1 << 20):
            hashed.update(block)
    return hashed.digest()
