"""The CUDA kernels of csrc/, built for the CPU and run on the emulated device of emulated_cuda/, called by ctypes.

The environment variable MIR_EMULATED_FLAGS, for example with -fsanitize=address, replaces the device's own checks.
"""

from __future__ import annotations

import ctypes
import os
import shlex
import shutil
import subprocess
import sys
from ctypes import c_char_p, c_int, c_int64, c_uint, c_void_p
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent / "emulated_cuda"
CSRC = HERE.parents[2] / "csrc"
FLAGS = ["-std=c++17", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-DMIR_WITH_CUDA"]
CUDA_FLAGS = ["-x", "c++", "-O1"]
CHECKED = ["-fsanitize=thread,alignment"]  # inserts a call before every access; memory.cpp defines the functions
READ, WRITE, DEFINED = 1, 2, 4
CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}
ELEMENT = (4, 2, 2, 8)  # bytes, by dtype code
SUM = (4, 4, 4, 8)


def missing() -> str | None:
    """Why the library cannot be built here, or None."""
    if not CSRC.exists():
        return "needs the sources"
    if not sys.platform.startswith("linux"):
        return "the emulated CUDA device is built only on Linux"
    return None if shutil.which("g++") else "expected g++, found none"


def build(folder: Path) -> Path:
    """Compile the library in `folder`. If the compiler fails, its message is the error."""
    sanitizers = shlex.split(os.environ.get("MIR_EMULATED_FLAGS", ""))
    common = ["g++", *FLAGS, f"-I{HERE / 'include'}", *sanitizers, f"-DEMULATED_CHECKS={int(not sanitizers)}"]
    cuda = [*CUDA_FLAGS, *([] if sanitizers else CHECKED)]
    sources = [*sorted(CSRC.rglob("*.cu")), *sorted(HERE.glob("*.cu")), *sorted(HERE.glob("*.cpp"))]
    objects = [folder / f"{source.name}.o" for source in sources]
    env = {**os.environ, "LD_PRELOAD": ""}  # the compiler must not load a sanitizer's runtime
    running = []
    for source, target in zip(sources, objects, strict=True):
        flags = cuda if source.suffix == ".cu" else ["-O2"]
        command = [*common, *flags, "-c", str(source), "-o", str(target)]
        running.append(subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=env))
    for process in running:
        _, message = process.communicate()
        if process.returncode:
            raise RuntimeError(message)
    library = folder / "emulated.so"
    subprocess.run([*common, "-shared", "-Wl,-z,defs", *map(str, objects), "-o", str(library)], check=True, env=env)
    return library


class Device:
    """The compiled module's CPU functions on the emulated device; replaces `C` in native.py.

    Before each call, every byte that the kernels may read or write is declared, and all outputs are filled with NaN.
    Errors are RuntimeErrors with the message of the launch, followed by the device's report.
    """

    def __init__(self, library: Path, count: int = 2):
        lib = ctypes.CDLL(str(library))
        address, size, row = c_void_p, c_int64, (c_void_p, c_int64)
        end = (size, size, c_int, c_int, c_void_p)  # rows, cols, dtype, device, stream
        self.raw_forward = function(lib.emulated_moca_forward, c_char_p, *row, address, address, address, *row, *end)
        self.raw_backward = function(
            lib.emulated_moca_backward, c_char_p, *row, *row, address, address, address, *row, *[address] * 3, *end
        )
        triple = c_uint * 3
        self.raw_planted = function(lib.emulated_planted, c_char_p, c_char_p, address, address, size, triple, triple)
        self._declare = function(lib.emulated_declare, None, address, size, size, size, address, c_int)
        self._launches = function(lib.emulated_launches, c_char_p)
        self._use_device = function(lib.emulated_use_device, None, c_int)
        self.set_backwards = function(lib.emulated_set_backwards, None, c_int)
        self.last_error = function(lib.emulated_last_error, c_int)
        self.current_device = function(lib.emulated_device, c_int)
        self.moca_partial_rows = function(lib.emulated_moca_partial_rows, size, size)
        self.convert = {
            name: function(getattr(lib, f"emulated_{name}"), None, address, address, size)
            for name in ("to_bfloat16", "to_float16", "from_bfloat16", "from_float16")
        }
        self.checks = bool(function(lib.emulated_checks, c_int)())
        self.count, self.device, self.stream = count, 0, 0
        self.launched = ""  # launches of the last call, one per line

    def moca_forward(self, *arguments: int) -> None:
        x, x_stride, scale, shift, mask, out, out_stride, rows, cols, code, _ = arguments
        element, in_place = ELEMENT[code], x == out
        self._use_device(self.count)
        self.declare(mask, 1, rows, use=READ | DEFINED)
        for vector in (scale, shift):
            self.declare(vector, 1, cols * SUM[code], use=READ | DEFINED)
        row = (rows, cols * element, x_stride * element)
        self.declare(x, *row, mask if in_place else 0, use=READ | DEFINED | (WRITE if in_place else 0))
        if not in_place:
            self.declare(out, rows, cols * element, out_stride * element, use=WRITE)
            self.poison(out, rows, cols * element, out_stride * element)
        self.called(self.raw_forward(*arguments[:-1], self.device, self.stream))

    def moca_backward(self, *arguments: int) -> None:
        grad, grad_stride, x, x_stride, x_rows, scale, mask, dx, dx_stride, *results, rows, cols, code, _ = arguments
        partial, dscale, dshift = results
        element, total, in_place = ELEMENT[code], SUM[code] * cols, grad == dx
        self._use_device(self.count)
        self.declare(mask, 1, rows, use=READ | DEFINED)
        self.declare(scale, 1, total, use=READ | DEFINED)
        row = (rows, cols * element, grad_stride * element)
        self.declare(grad, *row, mask if in_place else 0, use=READ | DEFINED | (WRITE if in_place else 0))
        if not in_place:
            self.declare(dx, rows, cols * element, dx_stride * element, use=WRITE)
            self.poison(dx, rows, cols * element, dx_stride * element)
        if x_rows:
            self.declare(x_rows, rows, 8, 8, mask, use=READ | DEFINED)
            places, used = (c_int64 * rows).from_address(x_rows), (ctypes.c_uint8 * rows).from_address(mask)
            inside = [places[row] for row in range(rows) if used[row]]
            chosen = (ctypes.c_uint8 * (max(inside, default=-1) + 1))()
            for row in inside:
                chosen[row] = 1
            self.declare(x, len(chosen), cols * element, x_stride * element, ctypes.addressof(chosen), READ | DEFINED)
        else:
            self.declare(x, rows, cols * element, x_stride * element, mask, READ | DEFINED)
        partial_rows = 2 * self.moca_partial_rows(rows)
        for array, count, use in ((partial, partial_rows, READ | WRITE), (dscale, 1, WRITE), (dshift, 1, WRITE)):
            self.declare(array, count, total, total, use=use)
            self.poison(array, count, total, total)
        self.called(self.raw_backward(*arguments[:-1], self.device, self.stream))

    def planted(self, name: str, a: torch.Tensor, out: torch.Tensor, n: int, grid: tuple, block: tuple) -> None:
        """Run a kernel of planted.cu on the memory declared since `start`."""
        sizes = ((c_uint * 3)(*grid), (c_uint * 3)(*block))
        self.called(self.raw_planted(name.encode(), a.data_ptr(), out.data_ptr(), n, *sizes))

    def start(self) -> None:
        """Forget all declarations and launches."""
        self._use_device(self.count)

    def declare(self, address: int, rows: int, width: int, stride: int = 0, chosen: int = 0, use: int = READ) -> None:
        """Let kernels use `rows` rows of `width` bytes, `stride` bytes apart; if given, only those in `chosen`."""
        self._declare(address, rows, width, stride, chosen, use)

    def poison(self, address: int, rows: int, width: int, stride: int) -> None:
        for row in range(rows):
            ctypes.memset(address + row * stride, 0xFF, width)

    def called(self, outcome: bytes) -> None:
        self.launched = self._launches().decode()
        if outcome:
            raise RuntimeError(outcome.decode())


def function(found, result, *arguments):
    found.restype, found.argtypes = result, arguments
    return found
