"""What gpu_suite.py leaves and prints when its stages are done: summary.json, summary.csv and one table."""

from __future__ import annotations

import csv
import json
from pathlib import Path

from gpu_suite_processes import Result

LINES = 90  # of the table printed last, at most


def summary(results: dict[str, Result], out: Path, dry: bool) -> None:
    """summary.json, summary.csv and the table."""
    (out / "summary.json").write_text(json.dumps({"dry": dry, **results}, indent=1) + "\n")
    rows = []
    for path in results.get("bench", {}).get("files", []):
        with open(path, newline="") as file:
            rows += list(csv.DictReader(file))
    if rows:
        with (out / "summary.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    lines = [f"{'stage':<12}{'state':<9}{'s':>6}  note{'  (dry run on a CPU: no figure counts)' * dry}"]
    lines += [f"{name:<12}{r['state']:<9}{r['seconds']:>6}  {r['note'][:150]}" for name, r in results.items()]
    lines += [f"  failed: {text}" for text in results.get("tests", {}).get("failures", [])[:12]]
    lines += [f"  offer: {text}" for text in results.get("tune", {}).get("offers", [])]
    if rows:
        lines.append(f"{'operation':<28}{'rival':<36}{'p50 ms':>10}{'of floor':>9}{'error':>9}  case")
    for r in rows:
        ms = f"{float(r['p50_ms']):10.4g}" if r["p50_ms"] else f"{'raised' if r['failure'] else 'red':>10}"
        floor = f"{float(r['of_floor']):9.2f}" if r["of_floor"] else " " * 9
        error = f"{float(r['error']):9.0e}" if r["error"] else " " * 9
        lines.append(f"{r['operation']:<28}{r['rival'][:35]:<36}{ms}{floor}{error}  {r['case'][:40]}")
    if len(lines) > LINES:
        lines = [*lines[:LINES], f"... {len(lines) - LINES} more rows in {out / 'summary.csv'}"]
    print("\n".join(lines), flush=True)
