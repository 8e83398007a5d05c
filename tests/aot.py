"""Ahead-of-time compilation of Triton kernels, without a GPU: registers, spills, shared memory and access widths."""

from __future__ import annotations

import contextlib
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch
import triton
from triton.backends import backends
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from mir_kernels import _triton

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
ACTIVE = "_active" if hasattr(driver, "_active") else "active"  # where Triton keeps the driver; a property since 3.5
# Bytes that a thread may spill: Triton 3.4 spills 16 to 184 in three rows of the products, tuned for later versions.
SPILLS = 0 if tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 6) else 192

# Bytes that a thread moves in one instruction: PTX names vector length and element, AMD the number of words.
PTX_ACCESS = re.compile(r"\b(ld|st)\.global(?:\.(?!v\d|[bufs]\d)[\w:]+)*(?:\.v(\d))?\.[bufs](\d+)\b")
AMD_ACCESS = re.compile(r"\b(?:global|buffer)_(load|store)_(?:[us](?=short|byte))?(dwordx\d|dword|short|byte)(?=[_\s])")
AMD_BYTES = {"dwordx4": 16, "dwordx3": 12, "dwordx2": 8, "dword": 4, "short": 2, "byte": 1}


@dataclass(frozen=True)
class Binary:
    """One kernel compiled for one target. `asm` is its PTX or AMD assembly, `ttir` the target-independent IR.

    spills: bytes of stack and local memory a thread uses (NVIDIA), or spilled registers plus private bytes (AMD).
    shared: bytes of shared memory a program uses.
    loads, stores: for each global access in `asm`, the bytes one thread moves.
    """

    target: str
    asm: str
    ttir: str
    registers: int
    spills: int
    shared: int
    loads: tuple[int, ...]
    stores: tuple[int, ...]


@dataclass(frozen=True)
class Launch:
    """One recorded launch: the kernel, the grid, its arguments in order, constexprs and options."""

    kernel: triton.JITFunction
    grid: tuple[int, ...]
    arguments: tuple
    keywords: dict


def record(launcher: Callable, *arguments: object, target: str) -> list[Launch]:
    """The launches of `launcher(*arguments)` on `target`, recorded without running: all kernels of mir_kernels are
    replaced.

    Pass tensors on the device "meta", which have shapes and strides but no memory.
    """
    modules = [module for name, module in sorted(sys.modules.items()) if name.startswith("mir_kernels.")]
    launches: list[Launch] = []
    with contextlib.ExitStack() as stack:
        for module in modules:
            for name, kernel in list(vars(module).items()):
                if isinstance(kernel, triton.JITFunction):
                    stack.enter_context(mock.patch.object(module, name, _Recorder(kernel, launches)))
        stack.enter_context(mock.patch.object(_triton, "architecture", return_value=target))
        launcher(*arguments)
    return launches


def compile_launch(target: str, launch: Launch, **constexprs: object) -> Binary:
    """Compile a recorded launch just as Triton would on its first run on `target`: same types, constants and options.

    constexprs: values that replace recorded ones.
    """
    _skip_without_linker(target)
    given = [a.dtype if isinstance(a, torch.Tensor) else a for a in launch.arguments]
    with mock.patch.object(driver, ACTIVE, _Device(target)):
        built = launch.kernel.warmup(*given, grid=launch.grid, **(launch.keywords | constexprs))
    if TARGETS[target].backend == "cuda":
        asm = built.asm["ptx"]
        registers, spills = _cubin_usage(built.asm["cubin"])
        accesses = [(m[1] == "ld", int(m[2] or 1) * int(m[3]) // 8) for m in PTX_ACCESS.finditer(asm)]
    else:
        asm = built.asm["amdgcn"]
        registers = _amd_field(asm, "vgpr_count")
        fields = ("vgpr_spill_count", "sgpr_spill_count", "private_segment_fixed_size")
        spills = sum(_amd_field(asm, field) for field in fields)
        accesses = [(m[1] == "load", AMD_BYTES[m[2]]) for m in AMD_ACCESS.finditer(asm)]
    return Binary(
        target=target,
        asm=asm,
        ttir=str(built.asm["ttir"]),
        registers=registers,
        spills=spills,
        shared=built.metadata.shared,
        loads=tuple(size for is_load, size in accesses if is_load),
        stores=tuple(size for is_load, size in accesses if not is_load),
    )


class _Device:
    """Replaces Triton's driver with that of a machine with a `target` GPU. Nothing runs on it."""

    def __init__(self, target: str) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return TARGETS[self.target]

    def get_current_device(self) -> str:
        return self.target  # the key under which Triton caches compiled kernels

    def get_current_stream(self, device: str) -> int:
        return 0


class _Recorder:
    """Replaces a kernel: kernel[grid](...) is recorded instead of run."""

    def __init__(self, kernel: triton.JITFunction, launches: list[Launch]) -> None:
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid: tuple[int, ...]) -> Callable:
        return lambda *a, **kw: self.launches.append(Launch(self.kernel, tuple(grid), a, kw))


def _skip_without_linker(target: str) -> None:
    """Triton 3.4 links AMD binaries with ROCm's linker, which few machines have; later versions include one."""
    find = getattr(backends["amd"].compiler, "path_to_rocm_lld", None) if TARGETS[target].backend == "hip" else None
    if find is not None:
        try:
            find()
        except Exception as error:
            import pytest  # here, because benchmarks that use this module run without pytest

            pytest.skip(f"{target}: Triton {triton.__version__} has no linker for it: {error}")


def _cubin_usage(cubin: bytes) -> tuple[int, int]:
    """Registers, and bytes of stack and local memory, per thread, from the cuobjdump in the triton wheel."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], check=True, capture_output=True, text=True).stdout
    usage = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    return usage["REG"], usage["STACK"] + usage["LOCAL"]


def _amd_field(asm: str, name: str) -> int:
    found = re.search(rf"\.{name}:\s*(\d+)", asm)
    assert found, f"no {name} in the assembly's metadata"
    return int(found[1])
