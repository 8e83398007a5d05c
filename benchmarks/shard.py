"""A pytest plugin that runs one shard of the tests and writes a report line by line.

MIR_SHARD    "I/N": run shard I of N of the collected tests, in runs of neighbours, which share kernels.
MIR_REPORT   a file that gets a JSON line when a test starts and when it ends, so that results survive a crash of the
             process. Tests already in it are skipped: a previous process stopped in one of them.
MIR_EARLIER  reports of an earlier run: its failures run first, its passed tests last.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

import gpu_suite_reports as reports

TOGETHER = 8  # tests per run of neighbours, which compile the same kernels
REPORT = os.environ.get("MIR_REPORT", "")
ENDED = {"failed": 0, None: 1, "skipped": 2, "passed": 2}  # order by earlier outcome


@pytest.hookimpl(trylast=True)  # after -m and -k
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    part, parts = map(int, os.environ.get("MIR_SHARD", "0/1").split("/"))
    earlier = reports.read([Path(path) for path in os.environ.get("MIR_EARLIER", "").split(os.pathsep) if path])
    items.sort(key=lambda item: ENDED.get(earlier.get(item.nodeid, {}).get("outcome"), 1))
    together = max(1, min(TOGETHER, len(items) // (4 * parts)))
    items[:] = [item for i, item in enumerate(items) if i // together % parts == part]
    if REPORT:
        known = reports.read([Path(REPORT)])
        if not known:
            reports.write(REPORT, {"collected": len(items)})
        items[:] = [item for item in items if item.nodeid not in known]


def pytest_runtest_logstart(nodeid: str) -> None:
    if REPORT:
        reports.write(REPORT, {"test": nodeid, "outcome": "started"})


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Report the end of a test. If its CUDA context is lost, end the process: every later test would fail."""
    if not REPORT or (report.when != "call" and report.passed):
        return
    reports.write(REPORT, ended(report))
    if report.failed and (why := reports.lost_context()):
        print(f"{report.nodeid} lost the CUDA context ({why}), exiting\n{report.longreprtext}", flush=True)
        sys.stderr.flush()
        os._exit(reports.LOST)


def pytest_collectreport(report: pytest.CollectReport) -> None:
    if REPORT and report.failed:
        reports.write(REPORT, ended(report))


def ended(report: pytest.TestReport | pytest.CollectReport) -> dict:
    """The report line of a test; for a failure with its message and the end of the traceback."""
    line = {"test": report.nodeid, "outcome": report.outcome, "seconds": round(getattr(report, "duration", 0.0), 2)}
    if report.failed:
        text = report.longreprtext
        crash = getattr(report.longrepr, "reprcrash", None)
        line |= {"message": crash.message if crash else text.strip().rpartition("\n")[2], "text": text[-2000:]}
    elif report.skipped and isinstance(report.longrepr, tuple):
        line["message"] = report.longrepr[2]
    return line
