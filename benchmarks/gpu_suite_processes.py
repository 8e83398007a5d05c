"""How a stage of gpu_suite.py runs other programs, and the result it returns."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
BENCH = ROOT / "benchmarks"
GRACE = 3  # seconds that a command interrupted at its limit has to write its results
PATIENCE = 3  # factor on time limits in a dry run: a laptop's two busy cores are slower than a GPU machine
# "state": "passed", "failed", "skipped", "cut" (correct so far) or "not reached"; "note": one line; other keys depend
# on the stage.
Result = dict[str, Any]


def state(passed: bool, note: str) -> Result:
    return {"state": "passed" if passed else "failed", "note": note}


def earlier(out: Path, pattern: str) -> list[Path]:
    """Files of earlier parts that match a pattern, the latest part's file last."""
    return sorted((out / "earlier").glob(f"*/{pattern}"))


def before(out: Path, name: str) -> Result:
    """The previous part's result of this stage, or {}."""
    files = earlier(out, "summary.json")
    return json.loads(files[-1].read_text()).get(name, {}) if files else {}


def words(*command: str) -> str:
    """The output of a command; empty if it is missing or fails."""
    if shutil.which(command[0]) is None:
        return ""
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()


def cuda_tool(name: str) -> str | None:
    """The path of a program of the CUDA toolkit, looked up in CUDA_HOME first."""
    home = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin"
    return shutil.which(name, path=str(home)) or shutil.which(name)


def run(command: list[str], *, limit: float | None = None, folder: Path = ROOT, **environ: str) -> int:
    """Exit code of a command run in the repository, with output in the stage's log; 124 if it was stopped."""
    return run_together([command], limit, [environ], folder)[0]


def run_together(
    commands: list[list[str]], limit: float | None, environs: list[dict[str, str]], folder: Path = ROOT
) -> list[int]:
    """Exit codes of commands that run at the same time.

    At the limit each is interrupted, as by Ctrl-C, and has GRACE seconds to write its results, such as pytest's report.
    """
    children = []
    for command, environ in zip(commands, environs, strict=True):
        print("+", *(f"{k}={v}" for k, v in environ.items()), *command, flush=True)
        children.append(subprocess.Popen(command, cwd=folder, env=os.environ | environ))
    end = None if limit is None else time.monotonic() + limit
    codes = []
    for child in children:
        try:
            codes.append(child.wait(None if end is None else max(0.0, end - time.monotonic())))
        except subprocess.TimeoutExpired:
            codes.append(124)
    stopped = [child for child in children if child.poll() is None]
    if stopped:
        print(f"stopped after {limit} s", flush=True)
    for child in stopped:
        child.send_signal(signal.SIGINT)
    end = time.monotonic() + GRACE
    for child in stopped:
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(max(0.0, end - time.monotonic()))
        child.kill()
        child.wait()
    return codes
