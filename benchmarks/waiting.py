"""How long this process waited for a core while it was timed: on a busy machine a time tells of the other processes.

Two threads on two cores beside one more busy process take turns of the scheduler's slices, 4 ms or so: a call of 2 ms
then takes 8 or 12. Linux counts what each thread waited for a core, in /proc/self/task/*/schedstat.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

TASKS = Path("/proc/self/task")
BEARABLE = 0.02  # share of a call's time that its threads may have waited, all together


def waited_ms() -> float | None:
    """What all threads of this process have waited for a core so far, or None where the kernel does not say."""
    found = []
    for task in TASKS.glob("*/schedstat"):
        try:
            found.append(int(task.read_text().split()[1]))
        except OSError:  # the thread has ended
            continue
    return sum(found) / 1e6 if found else None


def undisturbed(calls: Sequence[tuple[float, float | None]], fewest: int) -> tuple[list[float], float | None]:
    """Of calls as (ms, ms waited): the sorted times of those that hardly waited, of all if these are under `fewest`;
    and the median share of the time that the chosen ones waited, None where it is not known.
    """
    quiet = [(ms, waited) for ms, waited in calls if waited is not None and waited <= BEARABLE * ms]
    chosen = quiet if len(quiet) >= fewest else list(calls)
    shares = sorted(waited / ms for ms, waited in chosen if waited is not None and ms > 0)
    return sorted(ms for ms, _ in chosen), shares[len(shares) // 2] if shares else None
