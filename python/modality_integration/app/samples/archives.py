"""Tar shards (WebDataset) whose members are read in place by offset."""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath


@dataclass(frozen=True)
class Member:
    """A file in an uncompressed archive: `size` bytes at `offset`."""

    archive: Path
    inside: str
    offset: int
    size: int

    @property
    def name(self) -> str:
        """Its name in messages."""
        return f"{self.archive.name}/{self.inside}"

    @property
    def suffix(self) -> str:
        """The last suffix of its name, in lower case."""
        return PurePosixPath(self.inside).suffix.lower()

    def read_bytes(self) -> bytes:
        """The file as it was stored."""
        with self.archive.open("rb") as file:
            file.seek(self.offset)
            return file.read(self.size)


def members(archive: Path) -> Iterator[Member]:
    """The files of an archive in its order, except hidden ones. ValueError if it is not an uncompressed .tar."""
    try:
        with tarfile.open(archive, "r:") as tar:
            for member in tar:
                if member.isreg() and not member.issparse() and not PurePosixPath(member.name).name.startswith("."):
                    yield Member(archive, member.name, member.offset_data, member.size)
    except tarfile.TarError as error:
        raise ValueError(f"it is not an uncompressed .tar ({error})") from error
