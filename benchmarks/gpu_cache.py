"""Compile Triton kernels ahead of time for another machine's GPU, into an archive for gpu_suite.py --cache.

    PYTHONPATH=.:tests:benchmarks python benchmarks/gpu_cache.py FILE    # compiles for sm_90 on every core

It compiles the candidates of tune.py and the kernels of the suite's first check, which would take the first minute on a
GPU machine. A launch finds them if its Triton is identical to this one, file by file, as with the same wheel; otherwise
it compiles as usual. For each kernel the archive contains the files that a launch and tune.py read, but no intermediate
stages.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import io
import json
import multiprocessing
import os
import tarfile
import tempfile
from pathlib import Path

TARGET = "sm_90"
GROUP = "__grp__"  # prefix of a file that lists the files of one kernel by absolute paths
KEPT = (".json", ".cubin", ".ptx", ".ttir")
SIZE = (129, 577)  # rows and columns of the suite's first check


def work() -> list[tuple[str, object]]:
    """Items to compile: ("row", (number of a tuning job, name of a row)) and ("job", (name of a kernel job, dtype))."""
    import tune
    from kernels.jobs import every_job

    rows = [("row", (i, name)) for i, job in enumerate(tune.JOBS) for name in job.rows(TARGET)]
    jobs = [job for job in every_job() if not job.module.endswith("native")]
    return [*rows, *(("job", (job.name, str(dtype)[6:])) for job in jobs for dtype in job.dtypes)]


def compile_one(what: tuple[str, tuple]) -> str:
    """Compile one item into Triton's cache. Returns an error message, or ""."""
    import torch

    import aot
    import tune
    from kernels.jobs import every_job

    kind, (first, second) = what
    try:
        if kind == "row":
            tune.needs(first, second, TARGET, 227 << 10)  # tune.py rejects a row that does not compile
        else:
            job = next(job for job in every_job() if job.name == first)
            given = {name: t.to("meta") for name, t in job.make(getattr(torch, second), *SIZE).items()}
            for launch in aot.record(job.run, given, target=TARGET):
                aot.compile_launch(TARGET, launch)
    except Exception as problem:  # triton raises several kinds
        return f"{what}: {type(problem).__name__}: {problem}"
    return ""


def save(cache: Path, file: Path) -> None:
    """Write a gzipped tar of a cache folder; paths in its file lists become relative to the folder."""
    with tarfile.open(file, "w:gz") as tar:
        for path in sorted(path for path in cache.rglob("*") if path.suffix in KEPT):
            data = path.read_bytes()
            if path.name.startswith(GROUP):
                data = moved(data, cache, Path()).encode()
            entry = tarfile.TarInfo(str(path.relative_to(cache)))
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))


def fill(file: Path, cache: Path) -> int:
    """Unpack an archive of `save` into a cache folder. Returns the number of kernels."""
    with tarfile.open(file) as tar:
        tar.extractall(cache, filter="data")
    groups = list(cache.rglob(f"{GROUP}*"))
    for path in groups:
        path.write_text(moved(path.read_bytes(), Path(), cache.resolve()))
    return len(groups)


def moved(group: bytes, old: Path, new: Path) -> str:
    """A file list with paths below `new` instead of `old`, restricted to KEPT."""
    paths = {name: Path(path) for name, path in json.loads(group)["child_paths"].items()}
    kept = {name: str(new / path.relative_to(old)) for name, path in paths.items() if path.suffix in KEPT}
    return json.dumps({"child_paths": kept})


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path, metavar="FILE", help="archive to write")
    parser.add_argument("--only", default="", help="compile only items whose description contains this")
    flags = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TRITON_CACHE_DIR"] = folder  # before anything imports triton
        chosen = [one for one in work() if flags.only in str(one)]
        context = multiprocessing.get_context("spawn")
        with concurrent.futures.ProcessPoolExecutor(max(1, min(len(chosen), os.cpu_count() or 1)), context) as pool:
            wrong = [text for text in pool.map(compile_one, chosen) if text]
        save(Path(folder), flags.file)
    size = flags.file.stat().st_size / 2**20
    print("\n".join([*wrong, f"{len(chosen)} compiled, {len(wrong)} of them failed, {size:.1f} MiB"]))
    return int(bool(wrong) or not chosen)


if __name__ == "__main__":
    raise SystemExit(main())
