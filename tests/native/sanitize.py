"""Runs the native kernels under GCC's sanitizers: `make sanitize`. Exits with 1 if a sanitizer reports anything.

Builds csrc/ twice in a temporary folder, and with each build runs every test that uses a native kernel:

    memory  AddressSanitizer and UndefinedBehaviorSanitizer, once for each instruction set of this CPU, and once
            for the CUDA kernels on the emulated device of emulated_cuda/
    races   ThreadSanitizer with std::thread instead of OpenMP (see threads/parallel.h), always with three threads

Each build first has to catch planted errors, so that a check that detects nothing cannot pass.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PARTS = ("setup.py", "pyproject.toml", "README.md", "LICENSE", "csrc", "mir_kernels", "python", "tests")
FRECHET = ("band_reduction", "standard_form")
TESTS = (
    *("tests/native", "tests/kernels/moca", "tests/kernels/moments"),
    *(f"tests/kernels/frechet/test_{part}.py" for part in FRECHET),
    "tests/kernels/test_symmetry.py",
)
# Tests of builds and of other devices; two tests of test_isa check object files and the levels of the CPU.
LEFT_OUT = ("--ignore=tests/native/test_build.py", "--ignore-glob=*_aot.py", "--ignore-glob=*cuda*")
ONLY = f"(native or {' or '.join(FRECHET)} or symmetry) and not objects_share and not unavailable_level"

# Planted errors, each of which has to be reported: a row longer than its memory, an integer overflow, and rows with
# stride 0 written by several threads.
OVERRUN = "x = torch.ones(16); C.token_norms(x.data_ptr(), 4096, x.data_ptr(), 1, 4096, 0, 1)"
OVERFLOW = "C.moca_partial_rows(2**63 - 1)"
RACE = (
    "x, out = torch.ones(2, 512, 4096); v = torch.ones(4096); m = torch.ones(512, dtype=torch.uint8); "
    "C.moca_forward(x.data_ptr(), 4096, v.data_ptr(), v.data_ptr(), m.data_ptr(), out.data_ptr(), 0, 512, 4096, 0, 2)"
)
# Planted errors in CUDA kernels: one element too many, and 16-byte vectors that are misaligned by 4 bytes.
EMULATED = (
    "import pathlib, sys, tempfile; sys.path.insert(0, 'tests'); from native import emulated; "
    "x, out = torch.ones(2, 64); folder = tempfile.TemporaryDirectory(); "
    "device = emulated.Device(emulated.build(pathlib.Path(folder.name))); one = (1, 1, 1); "
)
EMULATED_OVERRUN = f"{EMULATED} device.planted('write', x, out, 1, one, (64, 1, 1))"
EMULATED_MISALIGNED = f"{EMULATED} device.planted('vectors', x, out, 1, one, (8, 1, 1))"


@dataclass
class Build:
    """A sanitizer build: compiler flags, runtimes to load first, and the planted errors with their reports."""

    flags: str
    runtimes: tuple[str, ...]
    planted: dict[str, str]
    threads: int = 1
    emulated: bool = False  # whether to run the CUDA kernels, compiled with the same flags
    replaced: dict[str, str] = field(default_factory=dict)  # files of csrc/ and their replacements in this folder


BUILDS = {
    "memory": Build(
        "-fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer -g1",
        ("libasan.so", "libubsan.so"),
        {
            OVERRUN: "AddressSanitizer",
            OVERFLOW: "signed integer overflow",
            EMULATED_OVERRUN: "heap-buffer-overflow",
            EMULATED_MISALIGNED: "misaligned address",
        },
        emulated=True,
    ),
    "races": Build(
        "-fsanitize=thread -fno-omit-frame-pointer -g1",
        ("libtsan.so",),
        {RACE: "data race"},
        threads=3,
        replaced={"csrc/common/parallel.h": "threads/parallel.h"},
    ),
}


def built(name: str, compiler: str, folder: Path) -> Path:
    """Copy the sources and build the module in place."""
    tree = folder / name
    tree.mkdir()
    for part in PARTS:
        source = ROOT / part
        if source.is_dir():
            shutil.copytree(source, tree / part, ignore=shutil.ignore_patterns("*.so", "__pycache__", "*.egg-info"))
        else:
            shutil.copy2(source, tree / part)
    for file, other in BUILDS[name].replaced.items():
        shutil.copy2(Path(__file__).parent / other, tree / file)
    env = {**os.environ, "CXX": f"{compiler} {BUILDS[name].flags}", "MIR_CUDA": "0", "MIR_NATIVE": "1"}
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    done = subprocess.run(command, cwd=tree, env=env, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"sanitize: the {name} build failed\n{done.stdout}{done.stderr}")
    return tree


def run(name: str, compiler: str, tree: Path, arguments: list[str], isa: str = "") -> tuple[int, str, str]:
    """Run Python under the build's sanitizers; returns the exit code, the output and the sanitizers' reports."""
    build, reports = BUILDS[name], tree / "reports"
    shutil.rmtree(reports, ignore_errors=True)
    reports.mkdir()
    runtimes = []
    for file in build.runtimes:
        command = [compiler, f"-print-file-name={file}"]
        runtimes.append(subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip())
    log = f"log_path={reports / 'report'}"
    env = {
        **os.environ,
        "LD_PRELOAD": " ".join(runtimes),
        "ASAN_OPTIONS": f"detect_leaks=0:{log}",  # ignore leaks of the interpreter at exit
        "UBSAN_OPTIONS": f"print_stacktrace=1:{log}",
        # Check only code compiled with it, not torch's own threads.
        "TSAN_OPTIONS": f"ignore_noninstrumented_modules=1:{log}",
        "MIR_CPU_ISA": isa,
        "MIR_EMULATED_FLAGS": build.flags,
        "OMP_NUM_THREADS": str(build.threads),
        "PYTHONPATH": f"{tree}{os.pathsep}{tree / 'python'}",
    }
    done = subprocess.run([sys.executable, *arguments], cwd=tree, env=env, capture_output=True, text=True)
    written = "".join(path.read_text(errors="replace") for path in sorted(reports.iterdir()))
    return done.returncode, done.stdout + done.stderr, written


def levels(compiler: str, tree: Path) -> list[str]:
    """The instruction sets that run here, from the error message for an unknown one."""
    code = "from mir_kernels import _native; print(_native.MISSING)"
    _, output, _ = run("memory", compiler, tree, ["-c", code], isa="none of them")
    found = re.search(r"expected one of (.+?) on this CPU", output)
    if not found:
        sys.exit(f"sanitize: the module did not list the instruction sets that run here\n{output}")
    return found[1].split(", ")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", default="1", help="number of test processes")
    parser.add_argument("--only", choices=tuple(BUILDS), help="run only one of the two builds")
    flags = parser.parse_args()
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        sys.exit("sanitize: expected g++ with its sanitizer runtimes, found none")
    passed = failed = 0
    with tempfile.TemporaryDirectory() as folder:
        for name in [flags.only] if flags.only else BUILDS:
            tree = built(name, compiler, Path(folder))
            for code, words in BUILDS[name].planted.items():
                code = f"import torch\nfrom mir_kernels._native import C\n{code}"
                status, output, report = run(name, compiler, tree, ["-c", code])
                if status == 0 or words not in report + output:
                    sys.exit(f"sanitize: {name}: a planted {words!r} was not reported\n{output}{report}")
            isas = levels(compiler, tree) if name == "memory" else [""]
            pytest = ["-m", "pytest", "-p", "no:cacheprovider", "-n", flags.jobs, *TESTS, *LEFT_OUT, "-k"]
            for isa in isas:
                # The emulated device is independent of instruction sets, and `make test` checks its kernels for races.
                only = ONLY if BUILDS[name].emulated and isa == isas[0] else f"{ONLY} and not emulated"
                status, output, report = run(name, compiler, tree, [*pytest, only], isa)
                counts = {word: int(count) for count, word in re.findall(r"(\d+) (passed|failed|error)", output)}
                clean = status == 0 and not report and counts.get("passed", 0) > 0
                passed += counts.get("passed", 0)
                failed += not clean
                last = output.strip().splitlines()[-1]
                print(f"{name}{isa and f' at {isa}'}: {'clean' if clean else 'FAILED'}, {last}", flush=True)
                if not clean:
                    print(output, report, sep="\n")
    print(f"{passed} passed, {failed} failed")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
