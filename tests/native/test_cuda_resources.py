"""Every .cu compiles for every listed architecture without spills, with 16-byte accesses, and uses no more resources.

Needs nvcc, but no GPU. `python tests/native/test_cuda_resources.py` rewrites the golden table cuda_resources.json;
review the diff before committing. Registers and shared memory depend on the version of nvcc. With another version, the
comparison is skipped and reported, but limits that need no table are still checked.
"""

import json
import re
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
CSRC = HERE.parents[1] / "csrc"
GOLDEN = HERE / "cuda_resources.json"
ARCHS = ("80", "86", "89", "90", "100", "120")
NVCC = shutil.which("nvcc")
FOLDER = tempfile.TemporaryDirectory(prefix="cubin-")  # deleted at exit
SHARED = 48 << 10  # maximum bytes of static shared memory per block, on every architecture
COMMAND = "python tests/native/test_cuda_resources.py"
TYPES = {"f": "float", "d": "double", "6__half": "half", "13__nv_bfloat16": "bfloat16"}

pytestmark = [
    pytest.mark.skipif(NVCC is None, reason="nvcc is not on PATH, so the CUDA kernels are not compiled"),
    pytest.mark.skipif(not CSRC.exists(), reason="needs the sources"),
]


def sources():
    return sorted(CSRC.rglob("*.cu"))


def kernel_name(mangled):
    """A name like backward_kernel<bfloat16, 8> from the mangled name of a kernel template over element type, A, vector
    size and whether rows are gathered, which is added if true."""
    name, arguments = re.search(r"\d([a-z_]+_kernel)I(.+?)EEv", mangled).groups()
    element = re.match("|".join(sorted(TYPES, key=len, reverse=True)), arguments).group()
    size = re.search(r"Li(\d+)", arguments + "E")
    gathered = ", gathered" if "Lb1" in arguments + "E" else ""
    return f"{name}<{TYPES[element]}{f', {size[1]}' if size else ''}{gathered}>"


@cache
def nvcc_release():
    text = subprocess.run([NVCC, "--version"], capture_output=True, text=True, check=True).stdout
    return re.search(r", V([\d.]+)", text)[1]


@cache
def compile_for(arch, source):
    """The path of the cubin, and the registers and the shared, spilled and stack bytes of each kernel."""
    cubin = Path(FOLDER.name) / f"{source.stem}.{arch}.cubin"
    target = f"-gencode=arch=compute_{arch},code=sm_{arch}"
    command = [NVCC, "-std=c++17", "-O3", "-Xptxas", "-v", target, "-cubin", "-o", str(cubin), str(source)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return cubin, read_report(done.stderr)


def read_report(text):
    """{kernel: resources} from the output of ptxas -v, which omits shared memory for kernels without it."""
    report = re.findall(
        r"Compiling entry function '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
        r".*?Used (\d+) registers([^\n]*)",
        text,
        re.DOTALL,
    )
    return {
        kernel_name(name): {
            "registers": int(registers),
            "shared": int((re.search(r"(\d+) bytes smem", rest) or [0, 0])[1]),
            "spilled": int(stores) + int(loads),
            "stack": int(stack),
        }
        for name, stack, stores, loads, registers, rest in report
    }


def known_archs():
    text = subprocess.run([NVCC, "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout
    return re.findall(r"compute_(\d+)", text)


def disassembler():
    """cuobjdump from the toolkit or from triton's wheel."""
    if found := shutil.which("cuobjdump"):
        return found
    try:
        import triton
    except ImportError:
        return None
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return str(path) if path.exists() else None


def worse(now, golden):
    """Sentences on what became worse in one kernel."""
    return [f"{what} {before} -> {now[what]}" for what, before in golden.items() if now[what] > before]


def needed(arch):
    return {name: kernel for source in sources() for name, kernel in compile_for(arch, source)[1].items()}


def skip_unknown(arch):
    if arch not in known_archs():
        pytest.skip(f"nvcc {nvcc_release()} does not support {arch}")


@pytest.mark.parametrize("arch", ARCHS)
def test_no_kernel_spills_or_outgrows_shared_memory_and_rows_move_16_bytes_at_a_time(arch):
    skip_unknown(arch)
    tool = disassembler()
    for source in sources():
        cubin, kernels = compile_for(arch, source)
        assert kernels
        assert {name: k for name, k in kernels.items() if k["spilled"] or k["stack"] or k["shared"] > SHARED} == {}
        if tool is not None:
            sass = subprocess.run([tool, "-sass", str(cubin)], capture_output=True, text=True, check=True).stdout
            functions = dict(re.findall(r"Function : (\w+)(.*?)(?=Function : |\Z)", sass, re.DOTALL))
            vectors = {kernel_name(n): text for n, text in functions.items() if re.search(r"Li[248]E", n)}
            assert len(vectors) >= 8
            for name, text in vectors.items():
                assert re.search(r"LDG\.E\S*\.(128|256)", text), f"{name} has no 16-byte load"
                assert re.search(r"STG\.E\S*\.(128|256)", text), f"{name} has no 16-byte store"


@pytest.mark.parametrize("arch", ARCHS)
def test_no_kernel_needs_more_than_the_golden_table_says(arch):
    skip_unknown(arch)
    golden = json.loads(GOLDEN.read_text())
    if golden["nvcc"] != nvcc_release():
        pytest.skip(f"the table is from nvcc {golden['nvcc']}, this is {nvcc_release()}; to update it, run {COMMAND}")
    now, before = needed(arch), golden["kernels"][f"sm_{arch}"]
    assert now.keys() == before.keys(), f"kernels were added or removed: {COMMAND}"
    changes = {name: worse(now[name], before[name]) for name in now}
    changes = {name: change for name, change in changes.items() if change}
    assert not changes, f"worse on sm_{arch}: {json.dumps(changes, indent=1)}\nIf intended, run {COMMAND}"


def test_a_report_is_read_and_a_change_for_the_worse_is_named():
    text = """ptxas info    : Compiling entry function '_ZN3mir19column_sums_kernelIfEEvPKT_' for 'sm_90'
ptxas info    : Function properties for _ZN3mir19column_sums_kernelIfEEvPKT_
    0 bytes stack frame, 4 bytes spill stores, 8 bytes spill loads
ptxas info    : Used 32 registers, used 1 barriers, 2112 bytes smem
ptxas info    : Compiling entry function '_ZN3mir14forward_kernelIdLi2EEvPKT_' for 'sm_90'
ptxas info    : Function properties for _ZN3mir14forward_kernelIdLi2EEvPKT_
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 62 registers
"""
    found = read_report(text)
    assert found == {
        "column_sums_kernel<float>": {"registers": 32, "shared": 2112, "spilled": 12, "stack": 0},
        "forward_kernel<double, 2>": {"registers": 62, "shared": 0, "spilled": 0, "stack": 0},
    }
    kernel = found["forward_kernel<double, 2>"]
    assert worse(kernel, {"registers": 62, "shared": 0}) == []
    assert worse(kernel, {"registers": 60, "shared": 8}) == ["registers 60 -> 62"]


def rewrite_golden():
    kernels = {
        f"sm_{arch}": {
            name: {what: kernel[what] for what in ("registers", "shared")}
            for name, kernel in sorted(needed(arch).items())
        }
        for arch in ARCHS
    }
    text = json.dumps({"nvcc": nvcc_release(), "kernels": kernels}, indent=1)
    one_line = re.sub(r"\{\n\s+(\"registers\"[^}]*?)\n\s+\}", lambda m: "{" + " ".join(m[1].split()) + "}", text)
    GOLDEN.write_text(one_line + "\n")


if __name__ == "__main__":
    rewrite_golden()
