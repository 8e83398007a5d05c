"""A sample: an image, wherever it is stored, with a piece of prose."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from PIL import Image


class Stored(Protocol):
    """A file's bytes wherever they lie: a member of an archive, a cell of a table; small until it is read."""

    @property
    def name(self) -> str:
        """What to call it in messages."""

    def read_bytes(self) -> bytes:
        """The file as it was stored."""


# A file, a picture in memory, or a picture stored in something larger.
ImageSource = Path | Image.Image | Stored


@dataclass(frozen=True)
class Text:
    """A piece of prose and where it came from."""

    name: str
    content: str


@dataclass(frozen=True)
class Sample:
    """One image with one piece of unrelated prose."""

    image: ImageSource
    text: Text

    @property
    def name(self) -> str:
        """What to call it in messages."""
        image = "a picture in memory" if isinstance(self.image, Image.Image) else self.image.name
        return f"{image} with {self.text.name}"


def content_digest(item: ImageSource | Text) -> bytes:
    """SHA-256 of an image's file (in memory: its pixels) or of prose: the same content under two names is one."""
    if isinstance(item, Text):
        return hashlib.sha256(item.content.encode()).digest()
    if isinstance(item, Image.Image):
        pixels = item.convert("RGBA")  # a palette's bytes are no colours, and bytes alone have no shape
        return hashlib.sha256(repr(pixels.size).encode() + pixels.tobytes()).digest()
    if not isinstance(item, Path):
        return hashlib.sha256(item.read_bytes()).digest()
    hashed = hashlib.sha256()
    with item.open("rb") as file:
        while block := file.read(1 << 20):
            hashed.update(block)
    return hashed.digest()
