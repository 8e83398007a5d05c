"""Pack the results of a run of gpu_suite.py into one small archive, and resume from it."""

from __future__ import annotations

import io
import os
import shutil
import tarfile
from pathlib import Path

MOST = 16 << 20  # bytes of the archive
LEFT = ("build", "built", "source", "triton")  # faster to rebuild than to transfer


def pack(out: Path, file: Path, most: int = MOST) -> list[str]:
    """Write `out` to the archive `file` atomically and return the names of dropped files.

    The largest files are dropped until the archive has at most `most` bytes.
    """
    files = sorted(
        (path for path in out.rglob("*") if path.is_file() and path.relative_to(out).parts[0] not in LEFT),
        key=lambda path: path.stat().st_size,
    )
    dropped: list[str] = []
    while len(data := archive(out, files)) > most and files:
        dropped.append(str(files.pop().relative_to(out)))
    arriving = file.with_name(f"{file.name}.arriving")
    arriving.write_bytes(data)
    os.replace(arriving, file)
    return dropped


def archive(out: Path, files: list[Path]) -> bytes:
    """A gzipped tar of files below `out`, skipping files deleted in the meantime."""
    memory = io.BytesIO()
    with tarfile.open(fileobj=memory, mode="w:gz", compresslevel=3) as tar:
        for path in files:
            try:
                data, mode = path.read_bytes(), path.stat().st_mode & 0o777
            except FileNotFoundError:
                continue
            entry = tarfile.TarInfo(str(path.relative_to(out)))
            entry.size, entry.mode, entry.mtime = len(data), mode, 0
            tar.addfile(entry, io.BytesIO(data))
    return memory.getvalue()


def unpack(file: Path, out: Path) -> None:
    """Extract an archive below `out`."""
    with tarfile.open(file) as tar:
        tar.extractall(out, filter="data")


def go_on(out: Path) -> None:
    """Move the results of the previous part to earlier/1/, earlier/2/, ..., where this part resumes from them."""
    if (out / "summary.json").exists():
        folder = out / "earlier" / str(1 + len(list((out / "earlier").glob("*"))))
        folder.mkdir(parents=True)
        for pattern in ("*.json", "*.jsonl", "*.log", "decide.txt"):
            for path in out.glob(pattern):
                path.rename(folder / path.name)


def start_afresh(out: Path, stages: list[str]) -> None:
    """Delete an earlier run's results of these stages, and its summaries."""
    shutil.rmtree(out / "earlier", ignore_errors=True)
    for name in ("summary.json", "summary.csv", "decide.txt"):
        (out / name).unlink(missing_ok=True)
    for path in (path for stage in stages for path in out.glob(f"{stage}*.json*")):
        path.unlink()
