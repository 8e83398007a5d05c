"""Measure how long this process waited for a core while it was timed: on a busy machine, times depend on other load.

Two threads on two cores with one more busy process share the scheduler's slices of about 4 ms: a call of 2 ms then
takes 8 or 12. Linux counts how long each thread waited for a core in /proc/self/task/*/schedstat.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

TASKS = Path("/proc/self/task")
BEARABLE = 0.02  # accepted total waiting time of a call's threads, as a share of its time


def waited_ms() -> float | None:
    """Total time that the threads of this process have waited for a core so far, or None if the kernel has no data."""
    found = []
    for task in TASKS.glob("*/schedstat"):
        try:
            found.append(int(task.read_text().split()[1]))
        except OSError:  # the thread has ended
            continue
    return sum(found) / 1e6 if found else None


def undisturbed(calls: Sequence[tuple[float, float | None]], fewest: int) -> tuple[list[float], float | None]:
    """The sorted times of calls (ms, ms waited) that hardly waited, or of all calls if those are fewer than `fewest`;
    and the median share of their time spent waiting, None if unknown.
    """
    quiet = [(ms, waited) for ms, waited in calls if waited is not None and waited <= BEARABLE * ms]
    chosen = quiet if len(quiet) >= fewest else list(calls)
    shares = sorted(waited / ms for ms, waited in chosen if waited is not None and ms > 0)
    return sorted(ms for ms, _ in chosen), shares[len(shares) // 2] if shares else None
