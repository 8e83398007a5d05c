"""The final output of gpu_suite.py: summary.json, summary.csv, and decide.txt with the decisions to make."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path

from gpu_suite_processes import Result

LINES = 90  # most lines printed at the end
DECIDE = 58  # of these, lines that need a decision
KERNELS, CLAIMS, OFFERS = 16, 16, 12  # lines of each section
WIDTH = 160


def summary(results: dict[str, Result], out: Path, dry: bool, rows_too: bool) -> None:
    """Write summary.json, summary.csv and decide.txt; print the last and, with rows_too, a line per benchmark row."""
    (out / "summary.json").write_text(json.dumps({"dry": dry, **results}, indent=1) + "\n")
    rows = []
    for path in dict.fromkeys(path for r in results.values() for path in r.get("files", [])):
        if (out / path).exists():
            with (out / path).open(newline="") as file:
                rows += list(csv.DictReader(file))
    if rows:
        with (out / "summary.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, list(dict.fromkeys(name for row in rows for name in row)), restval="")
            writer.writeheader()
            writer.writerows(rows)
    lines = decide(results, dry)
    (out / "decide.txt").write_text("\n".join(lines) + "\n")
    lines += times(rows) if rows_too else []
    if len(lines) > LINES:
        lines = [*lines[:LINES], f"... {len(lines) - LINES} more rows in {out / 'summary.csv'}"]
    print("\n".join(lines), flush=True)


def decide(results: dict[str, Result], dry: bool) -> list[str]:
    """Stages, wrong kernels, claims that hold, and rows to commit: under 60 lines."""
    lines = [f"{'stage':<12}{'state':<12}{'s':>6}  note{'  (dry run on a CPU: figures are meaningless)' * dry}"]
    lines += [f"{name:<12}{r['state']:<12}{r['seconds']:>6}  {r['note']}" for name, r in results.items()]
    failed = dict.fromkeys(text for r in results.values() for text in r.get("failures", []))
    tested = [r["counts"]["passed"] for r in results.values() if "counts" in r]
    if failed or tested:
        groups: dict[str, list[str]] = {}
        for text in failed:
            groups.setdefault(kernel_of(text), []).append(text)
        lines.append(f"WRONG: {len(failed)} failures in {len(groups)} kernels or tests" if failed else "WRONG: nothing")
        lines += short([f"  {len(texts)}x {name}: {texts[0]}" for name, texts in groups.items()], KERNELS)
    claims = [line for r in results.values() for line in r.get("claims", [])]
    if claims:
        lines += ["CLAIMS", *short([f"  {line}" for line in claims], CLAIMS)]
    offers = [text for r in results.values() for text in r.get("offers", [])]
    if "tune" in results and results["tune"]["state"] != "not reached":
        lines.append("ROWS TO COMMIT (in full in tuned.txt)" if offers else "ROWS TO COMMIT: none")
        lines += short([f"  {text}" for text in offers], OFFERS)
    return [line[:WIDTH] for line in lines[:DECIDE]]


def short(lines: list[str], most: int) -> list[str]:
    """At most `most` lines; the last one counts those omitted."""
    return lines if len(lines) <= most else [*lines[: most - 1], f"  ... and {len(lines) - most + 1} more"]


def kernel_of(failure: str) -> str:
    """The kernel in the name of a failed test, `test[moca forward, triton-float32-129-577]`, else the test's name."""
    found = re.match(r"(?:\w+\[)?([^\[\]:]+?)-(?:b?float\d+)\b", failure)
    return found[1] if found else re.split(r"[\[:]", failure)[0]


def times(rows: list[dict]) -> list[str]:
    """One line for each row of the benchmarks."""
    lines = [f"{'operation':<28}{'rival':<36}{'p50 ms':>10}{'of floor':>9}{'error':>9}  case"] if rows else []
    for r in rows:
        ms = f"{float(r['p50_ms']):10.4g}" if r["p50_ms"] else f"{'raised' if r['failure'] else 'red':>10}"
        floor = f"{float(r['of_floor']):9.2f}" if r["of_floor"] else " " * 9
        error = f"{float(r['error']):9.0e}" if r["error"] else " " * 9
        lines.append(f"{r['operation']:<28}{r['rival'][:35]:<36}{ms}{floor}{error}  {r['case'][:40]}")
    return lines
