"""JSON records: their places in a file, their prose (the assistant's turns of a conversation) and their image keys."""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

# Keys of the prose: the first that holds a string, else a conversation.
TEXT_KEYS = ("text", "article", "content", "story", "document", "caption")
CONVERSATION_KEYS = ("conversations", "conversation", "messages")
ASSISTANTS = ("gpt", "assistant", "model", "bot", "chatgpt")
# Keys of the image: a path or a list of paths.
IMAGE_KEYS = ("image", "images", "img", "picture", "photo", "image_path", "img_path", "file_name", "filename", "path")
# Keys under which an object that is not itself a record keeps its list of records (COCO: "images", "annotations").
LISTS = {
    "text": ("data", "annotations", "rows", "samples", "items", "train"),
    "images": ("data", "images", "annotations", "rows", "samples", "items", "train"),
}
_BLANK = " \t\r\n"


@dataclass(frozen=True)
class Record:
    """A record not yet read: `length` bytes at `offset`, None for a line. number: its line or its index in the list."""

    path: Path
    offset: int
    length: int | None
    number: int

    @property
    def mark(self) -> str:
        """Its position within the file, for messages."""
        return f":{self.number}" if self.length is None else f"[{self.number}]"

    def value(self) -> Any:
        """The JSON value. ValueError if it is not valid."""
        with self.path.open("rb") as file:
            file.seek(self.offset)
            raw = file.readline() if self.length is None else file.read(self.length)
        return parsed(raw.decode("utf-8-sig"))


class Records(Sequence[Record]):
    """The records of one file; only their positions are kept, since such files can exceed memory."""

    def __init__(self, path: Path, lines: bool, what: str) -> None:
        self._path, self._lines = path, lines
        self._offsets, self._lengths = array("q"), array("q")
        for offset, extent in _lines(path) if lines else _values(path, what):
            self._offsets.append(offset)
            self._lengths.append(extent)  # for a line, its number

    def __len__(self) -> int:
        return len(self._offsets)

    @overload
    def __getitem__(self, at: int) -> Record: ...
    @overload
    def __getitem__(self, at: slice) -> list[Record]: ...
    def __getitem__(self, at: int | slice) -> Record | list[Record]:
        if isinstance(at, slice):
            return [self[index] for index in range(*at.indices(len(self)))]
        offset, extent = self._offsets[at], self._lengths[at]
        return Record(self._path, offset, None, extent) if self._lines else Record(self._path, offset, extent, at)


def parsed(text: str) -> Any:
    """Parse JSON; ValueError with the reason if it is invalid."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"it is not JSON ({error.msg})") from error
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def prose_of(value: Any) -> str:
    """The prose of a record: the record itself, the first string under TEXT_KEYS, or the assistant's turns."""
    if isinstance(value, str):
        return value
    if not isinstance(value, Mapping):
        raise ValueError(f"it is a {type(value).__name__}, not a string or an object")
    found = next((value[key] for key in TEXT_KEYS if isinstance(value.get(key), str)), None)
    if found is not None:
        return found
    turns = next((value[key] for key in CONVERSATION_KEYS if isinstance(value.get(key), Sequence | Mapping)), None)
    if turns is None:
        keys = ", ".join((*TEXT_KEYS, CONVERSATION_KEYS[0]))
        raise ValueError(f"it has no string under {keys}; its keys are {sorted(value)}")
    return conversation_prose(turns)


def conversation_prose(turns: Any) -> str:
    """The assistant's turns of a conversation, one per line, without image markers.

    turns: LLaVA's ({"from": "gpt", "value": ...}) or chat messages ({"role": "assistant", "content": ...}, where the
    content may be a list of parts), as a list or as an object of lists. ValueError if no turn is the assistant's.
    """
    if isinstance(turns, Mapping):  # an object of lists, the form in which data sets store a list of objects
        columns = {key: list(values) for key, values in turns.items()}
        turns = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    said = []
    for turn in turns:
        if isinstance(turn, Mapping) and str(turn.get("from", turn.get("role"))).lower() in ASSISTANTS:
            content = turn.get("value", turn.get("content"))
            if isinstance(content, list):
                content = " ".join(str(part.get("text") or "") for part in content if isinstance(part, Mapping))
            said.append(str(content or "").replace("<image>", "").strip())
    if not said:
        raise ValueError(f"its conversation has no assistant turn ({', '.join(ASSISTANTS[:2])})")
    return "\n".join(said)


def _lines(path: Path) -> Iterator[tuple[int, int]]:
    """(offset, line number) of every line that is not blank."""
    offset = 0
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield offset, number
            offset += len(line)


def _values(path: Path, what: str) -> Iterator[tuple[int, int]]:
    """(offset, length) in bytes of the records in a JSON file: a list, a list in an object, or consecutive values."""
    raw = path.read_bytes()
    text = raw.decode("utf-8-sig")
    begin = len(raw) - len(text.encode())  # a byte order mark
    at = 0
    for first, end in _extents(text, what):
        begin += len(text[at:first].encode())
        length = len(text[first:end].encode())
        yield begin, length
        begin, at = begin + length, end


def _extents(text: str, what: str) -> Iterator[tuple[int, int]]:
    """(begin, end) of the records in characters."""
    decoder = json.JSONDecoder()

    def after(at: int) -> int:
        try:
            return decoder.raw_decode(text, at)[1]
        except json.JSONDecodeError as error:
            raise ValueError(f"it is not JSON ({error.msg}, line {error.lineno})") from error

    at = _skip(text, 0)
    if text[at : at + 1] == "{":
        whole = after(at)
        inner = _list_inside(text, at, after, what) if _skip(text, whole) == len(text) else None
        if inner is not None:
            at = inner
    if text[at : at + 1] != "[":
        while at < len(text):  # one value, or JSON lines with another suffix
            end = after(at)
            yield at, end
            at = _skip(text, end)
        return
    at = _skip(text, at + 1)
    while text[at : at + 1] != "]":
        end = after(at)
        yield at, end
        at = _skip(text, end)
        if text[at : at + 1] == ",":
            at = _skip(text, at + 1)
        elif text[at : at + 1] != "]":
            raise ValueError("it is not JSON (its list does not end)")


def _list_inside(text: str, at: int, after: Any, what: str) -> int | None:
    """Where the list of records in an object begins; None if the object is itself a record."""
    own = {"text": (*TEXT_KEYS, *CONVERSATION_KEYS), "images": IMAGE_KEYS}[what]
    value = json.loads(text[at : after(at)])
    name = next((key for key in LISTS[what] if isinstance(value.get(key), list)), None)
    if name is None or any(isinstance(value.get(key), str) for key in own):
        return None
    at = _skip(text, at + 1)
    while True:
        end = after(at)
        key, at = json.loads(text[at:end]), _skip(text, _skip(text, end) + 1)
        if key == name:
            return at
        at = _skip(text, _skip(text, after(at)) + 1)


def _skip(text: str, at: int) -> int:
    while at < len(text) and text[at] in _BLANK:
        at += 1
    return at
