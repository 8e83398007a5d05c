"""What `mir compute` leaves on disk while it streams, so that a killed run goes on and ends with the same bits."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modality_integration.app.errors import InputError
from modality_integration.metric.files import write_json

FIRST = 10.0  # seconds before the first checkpoint


@dataclass(frozen=True)
class Passage:
    """Which pass over the samples (a second one makes the outlier rule exact) and how many of them it has counted."""

    number: int = 1
    done: int = 0


class Checkpoint:
    """The metric's state after so many samples, and the arguments it belongs to; one per process.

    `<folder>/rank<r>.json` names the state file that counts, `<folder>/rank<r>-pass<n>-<samples>.safetensors`. The
    state is complete on disk before the JSON that names it takes its place: a kill at any moment leaves a valid pair.
    """

    def __init__(self, folder: Path, arguments: dict[str, Any], rank: int = 0) -> None:
        self.folder = folder
        self.arguments = json.loads(json.dumps(arguments))  # as they will read back: tuples become lists
        self.rank = rank
        self._progress = folder / f"rank{rank}.json"

    def passage(self) -> Passage:
        """How far this process had come, the start without a checkpoint.

        Raises InputError if it was written with other arguments, naming each, or cannot be read.
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
                f"{self.folder} holds an unfinished run with other arguments ({'; '.join(differing)}): finish it with "
                "those, choose another --out, or add --restart to drop it"
            )
        return Passage(saved["pass"], saved["done"])

    def load(self, metric: Any) -> None:
        """Put the checkpoint's state into `metric`."""
        state = self.folder / self._read()["state"]
        try:
            metric.load(state)
        except (OSError, ValueError, RuntimeError) as error:
            raise InputError(f"the checkpoint {state} cannot be read ({error}): add --restart to begin anew") from error

    def save(self, metric: Any, passage: Passage) -> None:
        """Write `metric`'s state at `passage`, then drop the state before it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        state = self.folder / state_name(self.rank, passage.number, passage.done)
        metric.save(state)
        write_json(
            self._progress,
            {"pass": passage.number, "done": passage.done, "state": state.name, "arguments": self.arguments},
        )
        for old in self._files():
            if old != state:
                old.unlink()

    def clear(self) -> None:
        """Remove this process's checkpoint: the run is finished, or begins anew."""
        self._progress.unlink(missing_ok=True)
        for file in self._files():
            file.unlink()
        with contextlib.suppress(OSError):  # gone already, or another process still has its checkpoint there
            self.folder.rmdir()

    def _files(self) -> list[Path]:
        """This process's states, and what a killed one left half written."""
        patterns = ("rank{}-*.safetensors", ".rank{}-*.partial", ".rank{}.json.partial")
        return [path for pattern in patterns for path in self.folder.glob(pattern.format(self.rank))]

    def _read(self) -> dict[str, Any]:
        try:
            saved = json.loads(self._progress.read_text())
            _check(saved, self.rank)
        except (OSError, RecursionError, ValueError) as error:
            raise InputError(
                f"the checkpoint {self._progress} is damaged ({error}): add --restart to begin anew"
            ) from error
        return saved


class Due:
    """When a checkpoint is written: every `every` samples; or, with None, by the clock, so that writing takes no more
    than a twentieth of the time. At 7B a state is 20 GB and more.
    """

    def __init__(self, every: int | None, clock: Callable[[], float] = time.monotonic) -> None:
        self._every, self._clock = every, clock
        self._next = clock() + FIRST

    def __call__(self, count: int) -> bool:
        return count % self._every == 0 if self._every else self._clock() >= self._next

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """Around a write, whose time tells when the next is due."""
        began = self._clock()
        yield
        ended = self._clock()
        self._next = ended + max(FIRST, 20 * (ended - began))


def _check(saved: Any, rank: int) -> None:
    """ValueError unless `saved` is what `Checkpoint.save` writes."""
    if not isinstance(saved, dict) or not isinstance(saved.get("arguments"), dict):
        raise ValueError("takes an object with arguments")
    number: Any
    done: Any
    number, done, state = saved.get("pass"), saved.get("done"), saved.get("state")
    if not all(isinstance(count, int) and not isinstance(count, bool) for count in (number, done)):
        raise ValueError(f"pass, done: take integers, got {number!r} and {done!r}")
    if number not in (1, 2) or done < 0:
        raise ValueError(f"pass, done: take 1 or 2 and a count, got {number} and {done}")
    if state != state_name(rank, number, done):
        raise ValueError(f"state: takes {state_name(rank, number, done)}, got {state!r}")


def state_name(rank: int, number: int, done: int) -> str:
    """The file of a process's state in pass `number` after `done` samples."""
    return f"rank{rank}-pass{number}-{done:06d}.safetensors"
