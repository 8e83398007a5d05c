"""JSON records: where each lies in its file, its prose (an assistant's turns of a conversation) and its image."""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

# Where a record keeps its prose: the first of these keys that holds a string, else a conversation.
TEXT_KEYS = ("text", "article", "content", "story", "document", "caption")
CONVERSATION_KEYS = ("conversations", "conversation", "messages")
ASSISTANTS = ("gpt", "assistant", "model", "bot", "chatgpt")
# Where a record keeps its image, a path or several.
IMAGE_KEYS = ("image", "images", "img", "picture", "photo", "image_path", "img_path", "file_name", "filename", "path")
# Where an object that is no record itself keeps the list of them (COCO: "images" and "annotations").
LISTS = {
    "text": ("data", "annotations", "rows", "samples", "items", "train"),
    "images": ("data", "images", "annotations", "rows", "samples", "items", "train"),
}
_BLANK = " \t\r\n"


@dataclass(frozen=True)
class Record:
    """A record not yet read: `length` bytes from `offset`, None for a line; number: of its line, or in its list."""

    path: Path
    offset: int
    length: int | None
    number: int

    @property
    def mark(self) -> str:
        """What tells it from others of its file in messages."""
        return f":{self.number}" if self.length is None else f"[{self.number}]"

    def value(self) -> Any:
        """The JSON value. ValueError if it is none."""
        with self.path.open("rb") as file:
            file.seek(self.offset)
            raw = file.readline() if self.length is None else file.read(self.length)
        return parsed(raw.decode("utf-8-sig"))


class Records(Sequence[Record]):
    """The records of one file, by their places alone: such files outgrow memory."""

    def __init__(self, path: Path, lines: bool, what: str) -> None:
        self._path, self._lines = path, lines
        self._offsets, self._lengths = array("q"), array("q")
        for offset, extent in _lines(path) if lines else _values(path, what):
            self._offsets.append(offset)
            self._lengths.append(extent)  # of a line its number

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
    """A JSON value. ValueError that says what is wrong."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"it is not JSON ({error.msg})") from error
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def prose_of(value: Any) -> str:
    """The prose of a record: a string, the first of TEXT_KEYS with a string, or the assistant's turns."""
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
        raise ValueError(f"none of its keys {sorted(value)} is one of {keys} with a string")
    return conversation_prose(turns)


def conversation_prose(turns: Any) -> str:
    """What the assistant says in a conversation, turn after turn, without the image's marker.

    turns: of LLaVA ({"from": "gpt", "value": ...}) or of chat templates ({"role": "assistant", "content": ...}, whose
    content may be a list of parts), a list of them or an object of lists. ValueError where no turn is an assistant's.
    """
    if isinstance(turns, Mapping):  # of lists, as data sets keep a list of objects
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
        raise ValueError(f"its conversation has no turn of an assistant ({', '.join(ASSISTANTS[:2])})")
    return "\n".join(said)


def _lines(path: Path) -> Iterator[tuple[int, int]]:
    """(offset, number) of every line that is not blank."""
    offset = 0
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield offset, number
            offset += len(line)


def _values(path: Path, what: str) -> Iterator[tuple[int, int]]:
    """(offset, length) in bytes of the records of a JSON file: of its list, of an object's, or value after value."""
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
    """(begin, end) in characters of the records."""
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
        while at < len(text):  # one value, or JSON lines by another name
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
            raise ValueError("it is not JSON (its list has no end)")


def _list_inside(text: str, at: int, after: Any, what: str) -> int | None:
    """Where the list of records of an object begins, which is no record itself; None for one that is."""
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
