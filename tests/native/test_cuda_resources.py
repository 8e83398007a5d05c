"""Every .cu compiles for every listed architecture without spills, within its registers, with 16-byte memory accesses.

Needs nvcc, no GPU. `python tests/native/test_cuda_resources.py` rewrites the golden table cuda_resources.json.
"""

import json
import re
import shutil
import subprocess
from functools import cache
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
CSRC = HERE.parents[1] / "csrc"
GOLDEN = HERE / "cuda_resources.json"
ARCHS = ("80", "86", "89", "90", "100", "120")
NVCC = shutil.which("nvcc")
TYPES = {"f": "float", "d": "double", "6__half": "half", "13__nv_bfloat16": "bfloat16"}

pytestmark = [
    pytest.mark.skipif(NVCC is None, reason="nvcc is not on PATH: the CUDA kernels are not compiled in this run"),
    pytest.mark.skipif(not CSRC.exists(), reason="needs the sources"),
]


def sources():
    return sorted(CSRC.rglob("*.cu"))


def kernel_name(mangled):
    """backward_kernel<bfloat16, 8> out of a mangled name of a kernel template over element type, A and vector size."""
    name, arguments = re.search(r"\d([a-z_]+_kernel)I(.+?)EEv", mangled).groups()
    element = re.match("|".join(sorted(TYPES, key=len, reverse=True)), arguments).group()
    size = re.search(r"Li(\d+)", arguments + "E")
    return f"{name}<{TYPES[element]}{f', {size[1]}' if size else ''}>"


@cache
def nvcc_release():
    text = subprocess.run([NVCC, "--version"], capture_output=True, text=True, check=True).stdout
    return re.search(r"release ([\d.]+)", text)[1]


def compile_for(arch, source, folder):
    """The cubin, and per kernel its registers, spilled bytes and stack bytes."""
    cubin = folder / f"{source.stem}.{arch}.cubin"
    target = f"-gencode=arch=compute_{arch},code=sm_{arch}"
    command = [NVCC, "-std=c++17", "-O3", "-Xptxas", "-v", target, "-cubin", "-o", str(cubin), str(source)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    report = re.findall(
        r"Compiling entry function '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
        r".*?Used (\d+) registers",
        done.stderr,
        re.DOTALL,
    )
    kernels = {
        kernel_name(name): {"registers": int(registers), "spilled": int(stores) + int(loads), "stack": int(stack)}
        for name, stack, stores, loads, registers in report
    }
    return cubin, kernels


def known_archs():
    text = subprocess.run([NVCC, "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout
    return re.findall(r"compute_(\d+)", text)


def disassembler():
    """cuobjdump from the toolkit or out of triton's wheel."""
    if found := shutil.which("cuobjdump"):
        return found
    try:
        import triton
    except ImportError:
        return None
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return str(path) if path.exists() else None


@pytest.mark.parametrize("arch", ARCHS)
def test_kernels_stay_within_registers_and_move_16_bytes_at_a_time(arch, tmp_path):
    if arch not in known_archs():
        pytest.skip(f"nvcc {nvcc_release()} does not compile for {arch}")
    golden = json.loads(GOLDEN.read_text())
    tool = disassembler()
    for source in sources():
        cubin, kernels = compile_for(arch, source, tmp_path)
        assert kernels
        assert {name: k for name, k in kernels.items() if k["spilled"] or k["stack"]} == {}
        if golden["nvcc"] == nvcc_release():
            allowed = golden["registers"][f"sm_{arch}"]
            assert kernels.keys() <= allowed.keys()
            assert {n: k["registers"] for n, k in kernels.items() if k["registers"] > allowed[n]} == {}
        if tool is not None:
            sass = subprocess.run([tool, "-sass", str(cubin)], capture_output=True, text=True, check=True).stdout
            functions = dict(re.findall(r"Function : (\w+)(.*?)(?=Function : |\Z)", sass, re.DOTALL))
            vectors = {kernel_name(n): text for n, text in functions.items() if re.search(r"Li[248]E", n)}
            assert len(vectors) >= 8
            for name, text in vectors.items():
                assert re.search(r"LDG\.E\S*\.(128|256)", text), f"{name} has no 16-byte load"
                assert re.search(r"STG\.E\S*\.(128|256)", text), f"{name} has no 16-byte store"


def rewrite_golden():
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        registers = {
            f"sm_{arch}": {
                name: kernel["registers"]
                for source in sources()
                for name, kernel in sorted(compile_for(arch, source, Path(folder))[1].items())
            }
            for arch in ARCHS
        }
    GOLDEN.write_text(json.dumps({"nvcc": nvcc_release(), "registers": registers}, indent=1) + "\n")


if __name__ == "__main__":
    rewrite_golden()
