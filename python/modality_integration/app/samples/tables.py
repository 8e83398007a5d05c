"""Tables of images and prose: .parquet, .arrow and folders written by `datasets.save_to_disk`, read cell by cell.

They are read with the package `datasets` and its dependency pyarrow.
"""

from __future__ import annotations

import bisect
import functools
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, overload

from modality_integration.app.errors import InputError
from modality_integration.app.packages import pip_install
from modality_integration.app.samples.records import CONVERSATION_KEYS, IMAGE_KEYS, TEXT_KEYS, conversation_prose

BATCH = 32  # rows of a column that are decoded together
OPEN = 8  # .parquet files kept open

# Names of image columns in tables without `datasets` features.
IMAGE_COLUMNS = (*IMAGE_KEYS, "jpg", "jpeg", "png", "webp", "pixel_values", "image_bytes", "bytes")


class Table(Protocol):
    """Rows by number, and columns by name with their `datasets` features."""

    path: Path
    name: str
    features: Mapping[str, Any]

    def __len__(self) -> int: ...

    def cell(self, row: int, column: str) -> Any:
        """The stored value as a Python object."""


@dataclass(frozen=True)
class Cell:
    """An image or text in a table, not yet read."""

    table: Table
    row: int
    column: str

    @property
    def name(self) -> str:
        """Its name in messages."""
        return f"{self.table.name}[{self.row}]"

    def read_bytes(self) -> bytes:
        """The image file: the cell's bytes, or the file it names relative to the table's folder."""
        value = self.table.cell(self.row, self.column)
        value = value[0] if isinstance(value, list) and value else value
        if isinstance(value, Mapping):
            value = value.get("bytes") or value.get("path")
        if isinstance(value, bytes):
            return value
        if isinstance(value, str):
            folder = self.table.path if self.table.path.is_dir() else self.table.path.parent
            return (folder / value).read_bytes()
        raise ValueError(
            "it holds no image" if value in (None, []) else f"it is a {type(value).__name__}, not an image"
        )

    def prose(self) -> str:
        """The text, or the assistant's turns of a conversation."""
        value = self.table.cell(self.row, self.column)
        if isinstance(value, str):
            return value
        if not value:
            raise ValueError("it is empty")
        return conversation_prose(value)


class Column(Sequence[Cell]):
    """The cells of a column, made on demand."""

    def __init__(self, table: Table, column: str) -> None:
        self._table, self._column = table, column

    def __len__(self) -> int:
        return len(self._table)

    @overload
    def __getitem__(self, at: int) -> Cell: ...
    @overload
    def __getitem__(self, at: slice) -> list[Cell]: ...
    def __getitem__(self, at: int | slice) -> Cell | list[Cell]:
        if isinstance(at, slice):
            return [self[row] for row in range(*at.indices(len(self)))]
        if not 0 <= at < len(self):
            raise IndexError(at)
        return Cell(self._table, at, self._column)


def columns(path: Path, what: str, name: str) -> Iterator[Column]:
    """The column of images or prose (`what`: "images" or "text") of each table in `path`.

    InputError if `datasets` is not installed or if the column is ambiguous.
    """
    for table in _tables(path, what, name):
        yield Column(table, _image_column(table) if what == "images" else _text_column(table))


def _tables(path: Path, what: str, name: str) -> list[Table]:
    try:
        import datasets
        import pyarrow
    except ImportError as error:
        raise InputError(
            f"{what}: reading {path} requires the package datasets ({error}): {pip_install('datasets')}"
        ) from error
    if path.suffix.lower() == ".parquet":
        return [_Parquet(path, name)]
    if path.is_dir():
        loaded = datasets.load_from_disk(str(path))
        splits = loaded if isinstance(loaded, Mapping) else {"": loaded}
        return [_Dataset(path, f"{name}/{split}" if split else name, data) for split, data in splits.items()]
    with path.open("rb") as file:
        is_file = file.read(6) == b"ARROW1"  # Feather files; `datasets` writes streams
    if is_file:
        table = pyarrow.ipc.open_file(pyarrow.memory_map(str(path))).read_all()
        return [_Dataset(path, name, datasets.Dataset(datasets.table.InMemoryTable(table)))]
    return [_Dataset(path, name, datasets.Dataset.from_file(str(path)))]


class _Dataset:
    """A memory-mapped `datasets.Dataset`."""

    def __init__(self, path: Path, name: str, data: Any) -> None:
        self.path, self.name = path, name
        self.features = data.features
        self._data = data.with_format("arrow")  # leaves images undecoded

    def __len__(self) -> int:
        return len(self._data)

    def cell(self, row: int, column: str) -> Any:
        return self._data[row][column][0].as_py()


class _Parquet:
    """A .parquet file, read `BATCH` rows of a column at a time."""

    def __init__(self, path: Path, name: str) -> None:
        import datasets

        self.path, self.name = path, name
        self._written = path.stat().st_mtime_ns
        file = _cursor(path, self._written).file
        metadata = file.metadata
        self.features = datasets.Features.from_arrow_schema(file.schema_arrow)
        sizes = (metadata.row_group(group).num_rows for group in range(metadata.num_row_groups))
        self._ends = list(itertools.accumulate(sizes))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def cell(self, row: int, column: str) -> Any:
        group = bisect.bisect_right(self._ends, row)
        return _cursor(self.path, self._written).value(group, row - (self._ends[group - 1] if group else 0), column)


class _Cursor:
    """An open .parquet file and its read position, where reading later rows continues."""

    def __init__(self, path: Path) -> None:
        import pyarrow.parquet

        # Some writers make row groups of a million rows, so neither a group nor one of its columns is held whole.
        self.file = pyarrow.parquet.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False)
        self._place: tuple[int, str] | None = None
        self._batches: Iterator[Any] = iter(())
        self._first, self._batch = 0, None

    def value(self, group: int, row: int, column: str) -> Any:
        """The value in one row of a row group."""
        if self._place != (group, column) or row < self._first:
            self._place, self._first, self._batch = (group, column), 0, None
            self._batches = self.file.iter_batches(batch_size=BATCH, row_groups=[group], columns=[column])
        while self._batch is None or row >= self._first + len(self._batch):
            self._first += 0 if self._batch is None else len(self._batch)
            self._batch = next(self._batches)
        return self._batch[column][row - self._first].as_py()


@functools.lru_cache(maxsize=OPEN)
def _cursor(path: Path, written: int) -> _Cursor:
    """written: modification time, so that a replaced file is reopened."""
    return _Cursor(path)


def _image_column(table: Table) -> str:
    """The image column: by its feature (among several, the one with a usual name), else by name."""
    import datasets

    images = [name for name, feature in table.features.items() if isinstance(_inner(feature), datasets.Image)]
    if not images:
        files = [name for name, feature in table.features.items() if _may_be_file(_inner(feature))]
        images = [name for name in IMAGE_COLUMNS if name in files][:1]
    if len(images) > 1:
        images = [name for name in IMAGE_COLUMNS if name in images][:1] or images
    return _only(images, table, "images", "images")


def _text_column(table: Table) -> str:
    """The text column: one with a usual name, else a conversation, else the only string column."""
    strings = [name for name, feature in table.features.items() if _is_string(feature)]
    named = [name for name in TEXT_KEYS if name in strings]
    talks = [name for name in CONVERSATION_KEYS if name in table.features and not _is_string(table.features[name])]
    return _only((named or talks or strings)[: 1 if named or talks else None], table, "text", "prose")


def _only(found: Sequence[str], table: Table, argument: str, what: str) -> str:
    if len(found) == 1:
        return found[0]
    every = ", ".join(f"{name} ({_kind(feature)})" for name, feature in table.features.items())
    usual = ", ".join((IMAGE_KEYS if argument == "images" else (*TEXT_KEYS, CONVERSATION_KEYS[0]))[:7])
    wrong = f"{len(found)} columns that may hold {what}" if found else f"no column of {what}"
    raise InputError(f"{argument}: {table.name} has {wrong}; its columns are {every}. Rename one to any of {usual}")


def _inner(feature: Any) -> Any:
    """The feature of the elements of a list of images; the first image of a row is used."""
    if isinstance(feature, list):
        return feature[0]
    return getattr(feature, "feature", feature)


def _is_string(feature: Any) -> bool:
    return getattr(feature, "dtype", None) in ("string", "large_string", "string_view")


def _may_be_file(feature: Any) -> bool:
    """Whether a value may be an image file: its bytes, its path, or a struct with either."""
    if isinstance(feature, Mapping):
        return not {"bytes", "path"}.isdisjoint(feature)
    return _is_string(feature) or getattr(feature, "dtype", None) in ("binary", "large_binary")


def _kind(feature: Any) -> str:
    if isinstance(feature, Mapping | list):
        return "list" if isinstance(feature, list) else "struct"
    return str(getattr(feature, "dtype", None) or type(feature).__name__)
