"""Choosing among candidates by seed; each is read and checked once, and broken ones are skipped with the reason."""

from __future__ import annotations

import bisect
import itertools
import os
import random
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar, overload

from PIL import Image

from modality_integration.app.errors import InputError
from modality_integration.app.samples.sample import ImageSource, Text, content_digest

T = TypeVar("T")
Item = TypeVar("Item", bound="ImageSource | Text")

# Suffixes of files that hold many images or texts.
COLLECTIONS = (".tar", ".parquet", ".arrow")


@dataclass
class Chosen(Generic[T]):
    """The chosen items, the SHA-256 of each item's content, and the skipped ones as (name, reason).

    copies: number of candidates skipped because the same content had been chosen under another name.
    unread: a note on archives and tables that were ignored because plain files are next to them; else empty.
    """

    items: list[T] = field(default_factory=list)
    digests: list[bytes] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)
    copies: int = 0
    unread: str = ""


@dataclass(frozen=True)
class Broken:
    """A candidate for a file that could not be listed; it is reported when its turn comes."""

    path: Path
    reason: str


class Chain(Sequence[Any]):
    """Concatenated sequences, without copying them."""

    def __init__(self, parts: Sequence[Sequence[Any]]) -> None:
        self._parts = [part for part in parts if len(part)]
        self._ends = list(itertools.accumulate(map(len, self._parts)))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    @overload
    def __getitem__(self, at: int) -> Any: ...
    @overload
    def __getitem__(self, at: slice) -> list[Any]: ...
    def __getitem__(self, at: int | slice) -> Any:
        if isinstance(at, slice):
            return [self[index] for index in range(*at.indices(len(self)))]
        if not 0 <= at < len(self):
            raise IndexError(at)
        part = bisect.bisect_right(self._ends, at)
        return self._parts[part][at - (self._ends[part - 1] if part else 0)]


def choose_among(
    candidates: Sequence[Any],
    count: int,
    seed: str | None,
    read: Callable[[Any], Item],
    check: Callable[[Item], object],
    name: Callable[[Any], str],
    distinct: bool = False,
) -> Chosen[Item]:
    """Choose at most `count` candidates in an order set by `seed`, or in the given order if that is None.

    read: makes the item of a candidate, cheaply. check: raises if an item is broken; called only for content that has
    not been chosen yet. distinct: choose at most one of the candidates with the same content.
    """
    chosen: Chosen[Item] = Chosen()
    seen: set[bytes] = set()
    order = array("q", range(len(candidates)))
    if seed is not None:
        random.Random(seed).shuffle(order)
    for index in order:
        if len(chosen.items) == count:
            break
        candidate = candidates[index]
        try:
            if isinstance(candidate, Broken):
                raise ValueError(candidate.reason)
            item = read(candidate)
            digest = content_digest(item)
            if digest in seen and distinct:
                chosen.copies += 1
                continue
            if digest not in seen:
                check(item)
        except InputError:
            raise
        except Exception as error:  # what a broken file raises depends on its format; the reason is kept and shown
            chosen.skipped.append((name(candidate), reason_of(error)))
            continue
        seen.add(digest)
        chosen.items.append(item)
        chosen.digests.append(digest)
    return chosen


def seed_of(seed: int | None, what: str) -> str | None:
    """The seed of one of several random choices; None without a seed."""
    return None if seed is None else f"{seed}/{what}"


def walk(path: Path, what: str) -> list[Path]:
    """Every file below `path` in sorted order, except hidden ones; linked folders are followed once.

    A folder saved by `datasets` counts as one file.
    """
    if not path.exists():
        raise InputError(f"{what}: {path} does not exist")
    found, seen = [], set()
    for folder, folders, names in os.walk(path, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        if is_saved_dataset(Path(folder)):
            folders.clear()
            found.append(Path(folder))
            continue
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        found += [Path(folder, name) for name in names if not name.startswith(".")]
    return sorted(p for p in found if p.is_file() or is_saved_dataset(p))


def is_saved_dataset(folder: Path) -> bool:
    """Whether `datasets.save_to_disk` wrote this folder, with one split or several."""
    one = (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file()
    return one or (folder / "dataset_dict.json").is_file()


def is_collection(path: Path) -> bool:
    """Whether `path` holds many items: an archive, a table or a saved data set."""
    return path.is_dir() or path.suffix.lower() in COLLECTIONS


def unread_beside(files: Sequence[Path], root: Path) -> str:
    """A note on collections that were ignored because plain files are next to them."""
    beside = [path for path in files if is_collection(path)]
    if not beside:
        return ""
    more = f" and {len(beside) - 1} more" if len(beside) > 1 else ""
    return f"not read because {root} also has plain files: {name_below(beside[0], root)}{more}; pass its path to use it"


def listed(files: Sequence[Path], candidates: Callable[[Path], Sequence[Any]]) -> Chain:
    """The candidates of all files; a file that cannot be listed becomes a `Broken` candidate."""

    def of_each() -> Iterator[Sequence[Any]]:
        for file in files:
            try:
                yield candidates(file)
            except InputError:
                raise
            except Exception as error:  # depends on the format
                yield [Broken(file, reason_of(error))]

    return Chain(list(of_each()))


def reason_of(error: Exception) -> str:
    """Why something could not be read, in one line."""
    if isinstance(error, UnicodeDecodeError):
        return f"it is not UTF-8 (byte {error.start})"
    if isinstance(error, Image.UnidentifiedImageError):
        return "it is not an image that Pillow recognises"
    if isinstance(error, FileNotFoundError):
        return "the file does not exist"
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def why_none(chosen: Chosen, nothing_found: str) -> str:
    """Why nothing is usable."""
    if not chosen.skipped:
        return nothing_found
    name, reason = chosen.skipped[0]
    return f"all {len(chosen.skipped)} that were tried are broken; the first, {name}, because {reason}"


def name_below(path: Path, root: Path) -> str:
    """The name in messages of a file found in `root`."""
    if path == root:
        return path.name
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else path.as_posix()
