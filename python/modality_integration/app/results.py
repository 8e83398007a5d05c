"""The outputs of a run: the result is printed first, then written to files, then plotted."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from modality_integration.app.console import show_notes
from modality_integration.app.errors import InputError, in_words
from modality_integration.app.out_folder import MEASUREMENT
from modality_integration.metric.files import named_errors
from modality_integration.metric.result import MIRResult


class NotWritten(InputError):
    """A result was measured and printed but could not be written; `result` is what `run` would have returned."""

    def __init__(self, message: str, result: object) -> None:
        super().__init__(message)
        self.result = result


@contextlib.contextmanager
def printed_first(show: Callable[[], None]) -> Iterator[None]:
    """Print, then run the block that writes, even if printing failed; a printing error is raised at the end."""
    failure: BaseException | None = None
    try:
        with named_errors("the standard output"):
            show()
    except (OSError, SystemExit, KeyboardInterrupt) as error:  # rich raises SystemExit if a pipe has no reader
        failure = error
    yield
    if failure is not None:
        raise failure


def write_result(result: MIRResult, out: Path) -> None:
    """Write mir.json to the folder `out`, created if missing, and remove stale results of earlier runs."""
    out.mkdir(parents=True, exist_ok=True)
    result.to_json(out / "mir.json")
    remove_stale(out, ["mir.json"])


def remove_stale(out: Path, written: Sequence[str]) -> None:
    """Remove files of an earlier measurement from `out`, except those just `written`."""
    for name in MEASUREMENT:
        if name not in written:
            (out / name).unlink(missing_ok=True)


def draw(plot: Callable[[Path], object], file: Path, console: Console) -> list[str]:
    """The name of the picture that `plot` wrote to `file`; an empty list and a note if that failed.

    The numbers are already on disk, so neither a full disk nor an error in matplotlib can lose them.
    """
    try:
        with named_errors(file):
            plot(file)
    except Exception as error:
        words = in_words(error) if isinstance(error, OSError) else f"{file}: {type(error).__name__}: {error}"
        show_notes([f"the picture could not be drawn: {words.splitlines()[0]}"], console)
        return []
    return [file.name]


def say_written(files: Sequence[str], out: Path, console: Console, more: str = "") -> None:
    """Print one line naming the files written to `out`."""
    names = " and ".join([", ".join(files[:-1]), files[-1]] if len(files) > 1 else files)
    console.print(f"wrote {names} in {escape(str(out))}{more}", highlight=False, soft_wrap=True)
