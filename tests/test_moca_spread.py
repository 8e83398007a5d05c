"""The spread of MoCa in place over processes: the contents of a row, and the cleanup after each condition."""

import subprocess
import sys

import pytest

import bench_moca
import figures
import harness
import moca_spread

ENVIRONMENT = dict(zip(harness.ENVIRONMENT, ("a CPU", 2, "2", "3", "abc"), strict=True))
TIMES = {moca_spread.PLAIN: 4.0, bench_moca.PAST_CACHES: 2.0}


def rows_of(ours, waited=0.0):
    times = TIMES | {moca_spread.OURS: ours}
    return [
        dict.fromkeys(harness.COLUMNS)
        | ENVIRONMENT
        | {"operation": moca_spread.CASE, "rival": rival, "p50_ms": ms, "waited": waited}
        for rival, ms in times.items()
    ]


@pytest.fixture
def started(monkeypatch):
    """Fake benchmark processes with given times; returns those started, as (command, environment)."""
    found, times = [], iter([3.0, 1.0, 2.0, 9.0, 4.0] * 9)

    def run(command, env, **_):
        found.append((command, env))
        harness.write_csv(rows_of(next(times)), moca_spread.Path(command[command.index("--out") + 1]))
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(moca_spread.subprocess, "run", run)
    return found


def test_a_row_has_the_quartiles_of_the_processes_and_of_their_own_ratios():
    runs = [{row["rival"]: row for row in rows_of(ms, waited)} for ms, waited in ((3.0, 0.0), (1.0, 0.5), (2.0, 0.1))]
    runs[0][moca_spread.PLAIN]["p50_ms"] = 1.0
    row = moca_spread.summary("one", runs)
    assert set(row) == set(moca_spread.COLUMNS)
    assert [float(row[f"ms_p{q}"]) for q in (25, 50, 75)] == [2.0, 2.0, 3.0]
    assert [float(row[f"of_copy_p{q}"]) for q in (25, 50, 75)] == [0.5, 0.5, 3.0]
    assert (float(row["of_past_caches_p50"]), row["waited"], row["processes"]) == (1.0, 0.5, 3)


def test_every_condition_runs_in_turn_with_its_own_environment_and_the_page_shows_it(started, monkeypatch, tmp_path):
    pytest.importorskip("mir_kernels._C")
    monkeypatch.setattr(moca_spread.torch, "get_num_threads", lambda: 2)
    out = tmp_path / "moca_spread.csv"
    monkeypatch.setattr(sys, "argv", ["moca_spread.py", "--processes", "2", "--out", str(out)])
    assert moca_spread.main() == 0
    names = moca_spread.runnable()
    assert {"as in the benchmark", "one thread", moca_spread.BUSY} <= set(names)
    assert len(started) == 2 * len(names)
    for (_, environment), name in zip(started, 2 * names, strict=True):
        assert moca_spread.CONDITIONS[name].items() <= environment.items()
    lines = figures.table(out, "data").splitlines()
    assert [line.split(" | ")[0].removeprefix("| ") for line in lines[2 : 2 + len(names)]] == names
    assert lines[2].startswith("| as in the benchmark | 2 | ")


def test_the_busy_process_ends_with_the_benchmark_even_if_that_fails(monkeypatch):
    others = []
    start = subprocess.Popen

    def started(*arguments, **options):
        others.append(start(*arguments, **options))
        return others[-1]

    monkeypatch.setattr(moca_spread.subprocess, "Popen", started)
    failed = subprocess.CompletedProcess([], 1, "", "a story\nout of memory\n")
    monkeypatch.setattr(moca_spread.subprocess, "run", lambda *_, **__: failed)
    flags = type("Flags", (), {"tokens": 8, "hidden": 8, "seconds": 0.0})
    with pytest.raises(RuntimeError, match="beside a busy process: out of memory"):
        moca_spread.process(moca_spread.BUSY, flags)
    assert [other.poll() is not None for other in others] == [True]
