"""Prose from files, folders, lists, archives and tables."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from modality_integration.app.errors import InputError
from modality_integration.app.samples import tables
from modality_integration.app.samples.archives import Member, members
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
from modality_integration.app.samples.records import Record, Records, parsed, prose_of
from modality_integration.app.samples.sample import Text

PLAIN = (".txt", ".story", ".jsonl", ".md", ".json")
TEXT_SUFFIXES = (*PLAIN, *COLLECTIONS)
TAKEN = f"{', '.join(TEXT_SUFFIXES)} files, a folder of them, or a folder written by datasets.save_to_disk"


def choose_texts(path: Path | str, count: int, seed: int | None, *, distinct: bool = False) -> Chosen[Text]:
    """Choose at most `count` texts in an order set by `seed`, or in file order if that is None.

    distinct: choose no text twice.

    A .txt or .md file is one text; a .story file (CNN / Daily Mail) is one up to its first @highlight; a .jsonl file
    has one per line, a .json file one per record. A record is a string, an object with a key "text", "article",
    "content", "story", "document", "caption", or one with "conversations", whose prose is the assistant's turns. A
    collection (.tar, .parquet or .arrow file, a saved data set) has one text per member or row; the collections in a
    folder are read only if it has no .txt, .story or .jsonl file. A text that is empty, not UTF-8 or not JSON is
    skipped with the reason. Raises InputError if `path` does not exist, holds no text, or has no clear text column.
    """
    path = Path(path)
    files = _files(path)
    candidates = listed(files, lambda file: _candidates(file, path))
    chosen = choose_among(
        candidates,
        count,
        seed_of(seed, "texts"),
        lambda c: _read(c, path),
        lambda text: None,
        lambda c: _name(c, path),
        distinct,
    )
    if not chosen.items:
        reason = why_none(chosen, "there is no " + ", ".join(TEXT_SUFFIXES) + " file")
        raise InputError(f"no usable text in {path}: {reason}")
    if path.is_dir() and not is_collection(files[0]):
        chosen.unread = unread_beside(walk(path, "text"), path)
    return chosen


def _files(path: Path) -> list[Path]:
    """The files of `path` to read prose from: plain ones, or the collections of a folder without prose files.

    The README.md and .json metadata of a data set are not prose.
    """
    if path.is_file():
        if path.suffix.lower() not in TEXT_SUFFIXES:
            raise InputError(f"text: expected {TAKEN}, got {path}")
        return [path]
    if is_saved_dataset(path):
        return [path]
    files = walk(path, "text")
    plain = [p for p in files if p.is_file() and p.suffix.lower() in PLAIN]
    collections = [p for p in files if is_collection(p)]
    prose = any(p.suffix.lower() in (".txt", ".story", ".jsonl") for p in plain)
    return plain if prose or not collections else collections


def _candidates(file: Path, root: Path) -> Sequence[Any]:
    """The texts of one file, not yet read."""
    suffix = file.suffix.lower()
    if suffix == ".tar":
        inside = list(members(file))
        texts = [member for member in inside if member.suffix == ".txt"]
        return texts or [member for member in inside if member.suffix == ".json"]
    if is_collection(file):
        return Chain(list(tables.columns(file, "text", name_below(file, root))))
    return Records(file, suffix == ".jsonl", "text") if suffix in (".jsonl", ".json") else [file]


def _read(piece: Any, root: Path) -> Text:
    if isinstance(piece, Record):
        content = prose_of(piece.value())
    elif isinstance(piece, Member):
        raw = piece.read_bytes().decode("utf-8-sig")
        content = prose_of(parsed(raw)) if piece.suffix == ".json" else raw
    elif isinstance(piece, tables.Cell):
        content = piece.prose()
    else:
        content = piece.read_bytes().decode("utf-8-sig")
        if piece.suffix.lower() == ".story":
            content = content.split("@highlight")[0]
    content = content.strip()
    if not content:
        raise ValueError("it is empty")
    return Text(_name(piece, root), content)


def _name(piece: Any, root: Path) -> str:
    if isinstance(piece, Record):
        return name_below(piece.path, root) + piece.mark
    if isinstance(piece, Path | Broken):
        return name_below(piece if isinstance(piece, Path) else piece.path, root)
    return piece.name
