"""Reports of tests that are written while the tests run: a file of JSON lines, a line when a test starts and ends."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

LOST = 77  # the exit code of a process that ends because a test lost its CUDA context
WORST = ("failed", "skipped", "passed", "started")  # of several lines about a test the first of these counts


def write(path: str | Path, line: dict) -> None:
    """One line more, on the disk when this returns."""
    with open(path, "a") as file:
        file.write(json.dumps(line) + "\n")


def read(paths: Iterable[Path]) -> dict[str, dict]:
    """{test: its line}; a later file overrides an earlier one. One that never ended is "started"."""
    found: dict[str, dict] = {}
    for path in paths:
        here: dict[str, dict] = {}
        for line in lines(path):
            if "test" in line:
                here[line["test"]] = min(here.get(line["test"], line), line, key=rank)
        found |= here
    return found


def rank(line: dict) -> int:
    return WORST.index(line["outcome"])


def lines(path: Path) -> list[dict]:
    """The lines of a report; one that a killed process left half written is no line."""
    found = []
    for text in path.read_text().splitlines() if path.exists() else []:
        try:
            found.append(json.loads(text))
        except ValueError:
            continue
    return found


def ended_in_a_test(path: Path, code: int) -> bool:
    """Whether a process that ended with this code ended for one test, which its report now says has failed."""
    unfinished = [test for test, line in read([path]).items() if line["outcome"] == "started"]
    for test in unfinished:
        write(path, {"test": test, "outcome": "failed", "message": f"the process ended in it, with exit code {code}"})
    return code == LOST or bool(unfinished)


def counts(paths: Sequence[Path], earlier: Sequence[Path] = ()) -> dict[str, int]:
    """How many tests passed, failed, were skipped, and were collected but not reached or not finished.

    earlier: reports whose tests count too where `paths` have no word of them.
    """
    new, number = read(paths), Counter(line["outcome"] for line in read([*earlier, *paths]).values())
    collected = sum(line.get("collected", 0) for path in paths for line in lines(path))
    ended = sum(line["outcome"] != "started" for line in new.values())
    counted = {outcome: number[outcome] for outcome in ("passed", "failed", "skipped")}
    return counted | {"not finished": max(0, collected - ended)}


def failures(found: dict[str, dict]) -> list[str]:
    """A line for each test that failed: its name and the first line of what it said."""
    return [
        f"{test.rpartition('::')[2] or test}: {((line.get('message') or '').strip().splitlines() or ['no message'])[0]}"
        for test, line in found.items()
        if line["outcome"] == "failed"
    ]


def lost_context() -> str:
    """What CUDA says to everything from now on, or nothing: after an illegal access its context is of no more use."""
    import torch

    if torch.cuda.is_initialized():
        try:
            torch.cuda.synchronize()
        except Exception as problem:
            return str(problem).partition("\n")[0]
    return ""
