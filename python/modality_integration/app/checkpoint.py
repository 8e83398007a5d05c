"""Run checkpoints of `mir compute`, so that a killed run can resume and end with a bit-identical result."""

from __future__ import annotations

import contextlib
import json
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modality_integration.app.errors import InputError, in_words
from modality_integration.metric.files import read_json, write_json

logger = logging.getLogger(__name__)

FIRST = 10.0  # seconds before the first checkpoint


@dataclass(frozen=True)
class Passage:
    """The current pass over the samples (a second one makes the outlier rule exact) and how many are counted."""

    number: int = 1
    done: int = 0


class Checkpoint:
    """The metric's state after a number of samples, and the arguments it belongs to; one per process.

    `<folder>/rank<r>.json` names the current state file, `<folder>/rank<r>-pass<n>-<samples>.safetensors`. The state is
    complete on disk before the JSON that names it is replaced, so a kill at any moment leaves a valid pair.
    """

    def __init__(self, folder: Path, arguments: dict[str, Any], rank: int = 0) -> None:
        self.folder = folder
        self.arguments = json.loads(json.dumps(arguments))  # as read back from JSON: tuples become lists
        self.rank = rank
        self.kept: Passage | None = None  # the passage on disk
        self.command = "the same command"  # the command that resumes from it
        self._progress = folder / f"rank{rank}.json"

    def passage(self) -> Passage:
        """The passage this process had reached; the start if there is no checkpoint.

        Raises InputError if the checkpoint has other arguments, naming each, or cannot be read.
        """
        if not self._progress.exists():
            return Passage()
        saved = self._read()
        differing = [
            f"{key.replace('_', '-')} was {saved['arguments'].get(key)}, now {self.arguments.get(key)}"
            for key in sorted({*saved["arguments"], *self.arguments})
            if saved["arguments"].get(key) != self.arguments.get(key)
        ]
        if differing:
            raise InputError(
                f"{self.folder} holds an unfinished run with other arguments or versions ({'; '.join(differing)}); "
                "finish it with those, choose another --out, or add --restart to discard it"
            )
        self.kept = Passage(saved["pass"], saved["done"])
        return self.kept

    def load(self, metric: Any) -> None:
        """Load the checkpoint's state into `metric`."""
        state = self.folder / self._read()["state"]
        try:
            metric.load(state)
        except (OSError, ValueError, RuntimeError) as error:
            raise InputError(f"the checkpoint {state} cannot be read ({error}); add --restart to start over") from error
        logger.info("read the checkpoint %s", state)

    def save(self, metric: Any, passage: Passage) -> None:
        """Write `metric`'s state at `passage`, then delete the previous one.

        Raises OSError naming the file that cannot be written; the previous checkpoint stays.
        """
        state, began = self.folder / state_name(self.rank, passage.number, passage.done), time.monotonic()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            metric.save(state)
            write_json(
                self._progress,
                {"pass": passage.number, "done": passage.done, "state": state.name, "arguments": self.arguments},
            )
        except OSError:
            if passage != self.kept:
                state.unlink(missing_ok=True)
            self._drop_empty_folder()
            raise
        self.kept = passage
        size, seconds = state.stat().st_size / 1e6, time.monotonic() - began
        logger.info(
            "checkpoint after %d samples of pass %d: %s, %.1f MB in %.2f s",
            *(passage.done, passage.number, state, size, seconds),
        )
        for old in self._files(self.rank):
            if old != state:
                old.unlink()

    def try_to_save(self, metric: Any, passage: Passage) -> str:
        """`save`; return the reason if it fails, "" if it succeeds."""
        try:
            self.save(metric, passage)
        except OSError as error:
            return f"the checkpoint after {passage.done} samples could not be written ({in_words(error)})"
        return ""

    def way_on(self) -> str:
        """What rerunning the same command would do now."""
        if self.kept is None:
            return "there is no checkpoint; the same command starts over"
        return f"{self.command} resumes after {self.kept.done} samples" + " of pass 2" * (self.kept.number == 2)

    def clear(self, *, of_all: bool = False) -> None:
        """Remove this process's checkpoint, or those of all processes, when a run is finished or starts over."""
        self.kept = None
        rank = "*" if of_all else self.rank
        # The JSON goes first: a kill in between leaves no checkpoint rather than half of one.
        for file in [*self.folder.glob(f"rank{rank}.json"), *self._files(rank)]:
            file.unlink(missing_ok=True)  # another process may be deleting it too
        self._drop_empty_folder()

    def _files(self, rank: int | str) -> list[Path]:
        """The state files of a process, including files left half written by a kill."""
        patterns = ("rank{}-*.safetensors", ".rank{}-*.partial", ".rank{}.json.partial")
        return [path for pattern in patterns for path in self.folder.glob(pattern.format(rank))]

    def _drop_empty_folder(self) -> None:
        with contextlib.suppress(OSError):  # already gone, or it still holds a checkpoint, perhaps of another process
            self.folder.rmdir()

    def _read(self) -> dict[str, Any]:
        try:
            saved = read_json(self._progress)
            _check(saved, self.rank)
        except (OSError, ValueError) as error:
            raise InputError(
                f"the checkpoint {self._progress} is damaged ({error}); add --restart to start over"
            ) from error
        return saved


class Due:
    """When to write a checkpoint: every `every` samples; if None, by elapsed time, so that writing takes at most a
    twentieth of it. The state of a 7B model is 20 GB and more.
    """

    def __init__(self, every: int | None, clock: Callable[[], float] = time.monotonic) -> None:
        self._every, self._clock = every, clock
        self._next = clock() + FIRST

    def __call__(self, count: int, latest: int = 1) -> bool:
        """Whether a checkpoint is due after `count` samples, the last `latest` of which arrived in one batch."""
        if self._every:
            return count // self._every > (count - latest) // self._every
        return self._clock() >= self._next

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """Time a write, even one that fails, to schedule the next."""
        began = self._clock()
        try:
            yield
        finally:
            ended = self._clock()
            self._next = ended + max(FIRST, 20 * (ended - began))


def _check(saved: Any, rank: int) -> None:
    """ValueError unless `saved` has the form that `Checkpoint.save` writes."""
    if not isinstance(saved, dict) or not isinstance(saved.get("arguments"), dict):
        raise ValueError("expected an object with arguments")
    number: Any
    done: Any
    number, done, state = saved.get("pass"), saved.get("done"), saved.get("state")
    if not all(isinstance(count, int) and not isinstance(count, bool) for count in (number, done)):
        raise ValueError(f"pass, done: expected integers, got {number!r} and {done!r}")
    if number not in (1, 2) or done < 0:
        raise ValueError(f"pass, done: expected 1 or 2 and a count, got {number} and {done}")
    if state != state_name(rank, number, done):
        raise ValueError(f"state: expected {state_name(rank, number, done)}, got {state!r}")


def state_name(rank: int, number: int, done: int) -> str:
    """Name of the state file of a process in pass `number` after `done` samples."""
    return f"rank{rank}-pass{number}-{done:06d}.safetensors"
