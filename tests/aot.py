"""Ahead-of-time compilation of Triton kernels, without a GPU: registers, spills, shared memory and access widths."""

from __future__ import annotations

import contextlib
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from mir_kernels import _triton

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}

OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion")
POINTERS = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.bool: "u1",
    torch.uint8: "u8",
    torch.int32: "i32",
    torch.int64: "i64",
}

# Bytes a thread moves in one instruction: PTX spells a vector length and an element, AMD the words.
PTX_ACCESS = re.compile(r"\b(ld|st)\.global(?:\.(?!v\d|[bufs]\d)[\w:]+)*(?:\.v(\d))?\.[bufs](\d+)\b")
AMD_ACCESS = re.compile(r"\b(?:global|buffer)_(load|store)_(?:[us](?=short|byte))?(dwordx\d|dword|short|byte)(?=[_\s])")
AMD_BYTES = {"dwordx4": 16, "dwordx3": 12, "dwordx2": 8, "dword": 4, "short": 2, "byte": 1}


@dataclass(frozen=True)
class Binary:
    """One kernel compiled for one target. `asm` is its PTX or AMD assembly, `ttir` the IR before any target is known.

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
    """One launch as a launcher asked for it: the kernel, the grid, its arguments in order, constexprs and options."""

    kernel: triton.JITFunction
    grid: tuple[int, ...]
    arguments: tuple
    keywords: dict


def record(launcher: Callable, *arguments: object, target: str) -> list[Launch]:
    """What `launcher(*arguments)` launches on `target`, with nothing run: every kernel of its module is replaced.

    Give tensors on the device "meta", which have shapes and strides but no memory.
    """
    module = sys.modules[launcher.__module__]
    kernels = {name: value for name, value in vars(module).items() if isinstance(value, triton.JITFunction)}
    launches: list[Launch] = []
    with contextlib.ExitStack() as stack:
        for name, kernel in kernels.items():
            stack.enter_context(mock.patch.object(module, name, _Recorder(kernel, launches)))
        stack.enter_context(mock.patch.object(_triton, "architecture", return_value=target))
        launcher(*arguments)
    return launches


def compile_launch(target: str, launch: Launch, **constexprs: object) -> Binary:
    """Compile a recorded launch as Triton would on first use: integers of 1 and multiples of 16 are specialised.

    constexprs: values to use in place of the recorded ones.
    """
    kernel = launch.kernel
    options = {name: launch.keywords[name] for name in OPTIONS if name in launch.keywords}
    values = {name: value for name, value in launch.keywords.items() if name not in OPTIONS} | constexprs
    fixed = {p.name for p in kernel.params if p.do_not_specialize}
    signature, divisible = {}, set()
    for name, value in zip(kernel.arg_names, launch.arguments, strict=False):
        if isinstance(value, torch.Tensor):
            signature[name] = "*" + POINTERS[value.dtype]
        elif isinstance(value, float):
            signature[name] = "fp32"
        elif value == 1 and name not in fixed:
            values[name] = 1
        else:
            signature[name] = "i32" if abs(value) < 2**31 else "i64"
            divisible |= {name} if value % 16 == 0 and name not in fixed else set()
    return compile_for(target, kernel, signature, values, divisible=divisible, **options)


def compile_for(
    target: str,
    kernel: triton.JITFunction,
    signature: Mapping[str, str],
    constexprs: Mapping[str, object],
    *,
    divisible: Iterable[str] = (),
    aligned: bool = True,
    num_warps: int = 4,
    num_stages: int = 3,
    enable_fp_fusion: bool = False,
) -> Binary:
    """Compile `kernel` for one of TARGETS.

    signature: every runtime argument in Triton's spelling, e.g. {"x": "*bf16", "rows": "i32"}; all the kernel's other
    arguments must stand in `constexprs`. `divisible`: integer arguments known to be multiples of 16, as a launch would
    find out. aligned: pointers are 16-byte aligned, as torch allocates them.
    """
    missing = set(kernel.arg_names) - set(signature) - set(constexprs)
    assert not missing, f"{kernel.__name__}: no type or value for {sorted(missing)}"
    typed = {name: signature.get(name, "constexpr") for name in kernel.arg_names}
    fixed = {p.name for p in kernel.params if p.do_not_specialize}
    known = {n for n, t in typed.items() if n in set(divisible) or (aligned and t.startswith("*"))}
    attrs = {
        (i,): [["tt.divisibility", 16]] if name in known else []
        for i, name in enumerate(kernel.arg_names)
        if name not in fixed and typed[name] not in ("fp32", "fp64")  # of these a launch says nothing
    }
    constants = {(kernel.arg_names.index(name),): value for name, value in constexprs.items()}
    options = {"num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": enable_fp_fusion}
    source = ASTSource(fn=kernel, signature=typed, constexprs=constants, attrs=attrs)
    built = triton.compile(source, target=TARGETS[target], options=options)
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


class _Recorder:
    """Stands in for a kernel: kernel[grid](...) is written down instead of run."""

    def __init__(self, kernel: triton.JITFunction, launches: list[Launch]) -> None:
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid: tuple[int, ...]) -> Callable:
        return lambda *a, **kw: self.launches.append(Launch(self.kernel, tuple(grid), a, kw))


def _cubin_usage(cubin: bytes) -> tuple[int, int]:
    """Registers a thread, and bytes of stack and local memory a thread, from the cuobjdump inside the triton wheel."""
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
