"""Shards of .tar (WebDataset): members read in place, by their offset."""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath


@dataclass(frozen=True)
class Member:
    """A file in an uncompressed archive, `size` bytes from `offset`."""

    archive: Path
    inside: str
    offset: int
    size: int

    @property
    def name(self) -> str:
        """What to call it in messages."""
        return f"{self.archive.name}/{self.inside}"

    @property
    def suffix(self) -> str:
        """The last of its name, in lower case."""
        return PurePosixPath(self.inside).suffix.lower()

    def read_bytes(self) -> bytes:
        """The file as it was stored."""
        with self.archive.open("rb") as file:
            file.seek(self.offset)
            return file.read(self.size)


def members(archive: Path) -> Iterator[Member]:
    """The files in an archive in its order, hidden ones left out. ValueError for one that cannot be read in place."""
    try:
        with tarfile.open(archive, "r:") as tar:
            for member in tar:
                if member.isreg() and not member.issparse() and not PurePosixPath(member.name).name.startswith("."):
                    yield Member(archive, member.name, member.offset_data, member.size)
    except tarfile.TarError as error:
        raise ValueError(f"it is no uncompressed .tar ({error})") from error
