"""Test reports written while the tests run: a file of JSON lines, one when a test starts and one when it ends."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

LOST = 77  # exit code of a process that ends because a test lost its CUDA context
WORST = ("failed", "skipped", "passed", "started")  # if a test has several lines, the first of these counts


def write(path: str | Path, line: dict) -> None:
    """Append one line; it is in the file when this returns."""
    with open(path, "a") as file:
        file.write(json.dumps(line) + "\n")


def read(paths: Iterable[Path]) -> dict[str, dict]:
    """{test: its line}; later files override earlier ones. A test that never ended is "started"."""
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
    """The lines of a report, without lines left incomplete by a killed process."""
    found = []
    for text in path.read_text().splitlines() if path.exists() else []:
        try:
            found.append(json.loads(text))
        except ValueError:
            continue
    return found


def ended_in_a_test(path: Path, code: int) -> bool:
    """Whether a test ended the process with this exit code; the test is then reported as failed."""
    unfinished = [test for test, line in read([path]).items() if line["outcome"] == "started"]
    for test in unfinished:
        write(path, {"test": test, "outcome": "failed", "message": f"it ended its process with exit code {code}"})
    return code == LOST or bool(unfinished)


def counts(paths: Sequence[Path], earlier: Sequence[Path] = ()) -> dict[str, int]:
    """How many tests passed, failed, were skipped, and were collected but not finished.

    earlier: reports whose tests also count unless they are in `paths`.
    """
    new, number = read(paths), Counter(line["outcome"] for line in read([*earlier, *paths]).values())
    collected = sum(line.get("collected", 0) for path in paths for line in lines(path))
    ended = sum(line["outcome"] != "started" for line in new.values())
    counted = {outcome: number[outcome] for outcome in ("passed", "failed", "skipped")}
    return counted | {"not finished": max(0, collected - ended)}


def failures(found: dict[str, dict]) -> list[str]:
    """One line for each failed test: its name and the first line of its message."""
    return [
        f"{test.rpartition('::')[2] or test}: {((line.get('message') or '').strip().splitlines() or ['no message'])[0]}"
        for test, line in found.items()
        if line["outcome"] == "failed"
    ]


def lost_context() -> str:
    """CUDA's error message if the context is lost, as after an illegal access, else ""."""
    import torch

    if torch.cuda.is_initialized():
        try:
            torch.cuda.synchronize()
        except Exception as problem:
            return str(problem).partition("\n")[0]
    return ""
