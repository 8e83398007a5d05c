"""Ahead-of-time compilation of Triton kernels, without a GPU: registers, spills, shared memory and access widths."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
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
    known = {n for n, t in typed.items() if n in set(divisible) or (aligned and t.startswith("*"))}
    attrs = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(kernel.arg_names) if name in known}
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
