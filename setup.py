"""Builds the extension mir_kernels._C from csrc/ with ninja; all other packaging data is in pyproject.toml.

Environment variables, read at build time:
  CXX             C++ compiler (default: the first of c++, g++, clang++ on PATH)
  MIR_NATIVE      0: Python only; 1: a missing compiler is an error; unset: build if a compiler is found
  MIR_CUDA        0: no CUDA; 1: a missing nvcc is an error; unset: build if nvcc is found (CUDA_HOME, then PATH)
  MIR_CUDA_ARCHS  compute capabilities to compile for, plus PTX for the last (default 80;86;89;90;100;120)

Nothing is downloaded and no GPU is needed. If a compiler is found but fails, the install fails.
"""

from __future__ import annotations

import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"
DEFAULT_ARCHS = "80;86;89;90;100;120"
# Exactly the arithmetic written in the sources: no fast-math, and fused multiply-adds only where they are explicit.
CXX_FLAGS = [
    *("-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off"),
    *("-Wall", "-Wextra", "-Wno-psabi"),
]
# Each *_cpu.cpp is compiled once per entry, into the namespace of that name (csrc/common/isa.h).
V3_FLAGS = ["-mavx2", "-mfma", "-mf16c", "-mbmi", "-mbmi2", "-mlzcnt"]
V4_FLAGS = [*V3_FLAGS, "-mavx512f", "-mavx512bw", "-mavx512cd", "-mavx512dq", "-mavx512vl", "-mavx512vnni"]
X86_64_LEVELS = {"baseline": [], "x86_64_v3": V3_FLAGS, "x86_64_v4_vnni": V4_FLAGS}


def say(text: str) -> None:
    print(f"mir-kernels: {text}", file=sys.stderr, flush=True)


def wanted(variable: str) -> bool | None:
    """True, False or, if unset, None."""
    value = os.environ.get(variable, "")
    if value not in ("", "0", "1"):
        raise SystemExit(f"mir-kernels: {variable}: expected 0 or 1, got {value!r}")
    return None if value == "" else value == "1"


def find_compiler() -> list[str] | None:
    """The C++ compiler's command, or None if there is none or MIR_NATIVE=0."""
    native = wanted("MIR_NATIVE")
    if native is False:
        say("MIR_NATIVE=0: installing the Python code without compiled kernels")
        return None
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    for name in names:
        command = shlex.split(name)
        if shutil.which(command[0]):
            return command
    missing = f"no C++ compiler (looked for {', '.join(names)})"
    if native:
        raise SystemExit(f"mir-kernels: MIR_NATIVE=1, but {missing}")
    say(f"{missing}: INSTALLING WITHOUT COMPILED KERNELS, everything runs on plain torch; install g++ and reinstall")
    return None


def find_nvcc() -> str | None:
    """nvcc's path, or None if there is none or MIR_CUDA=0."""
    cuda = wanted("MIR_CUDA")
    if cuda is False:
        return None
    home = os.environ.get("CUDA_HOME")
    nvcc = shutil.which("nvcc", path=str(Path(home) / "bin")) if home else shutil.which("nvcc")
    if nvcc is None:
        missing = f"no nvcc in {home}/bin (CUDA_HOME)" if home else "no nvcc on PATH and CUDA_HOME is not set"
        if cuda:
            raise SystemExit(f"mir-kernels: MIR_CUDA=1, but {missing}")
        say(f"{missing}: building without CUDA")
    return nvcc


def cuda_archs(nvcc: str) -> list[str]:
    """The compute capabilities of MIR_CUDA_ARCHS that this nvcc supports."""
    listed = [arch for arch in re.split(r"[;,\s]+", os.environ.get("MIR_CUDA_ARCHS", DEFAULT_ARCHS)) if arch]
    if wrong := [arch for arch in listed if not arch.isdecimal()]:
        raise SystemExit(f"mir-kernels: MIR_CUDA_ARCHS: expected compute capabilities such as 80;90, got {wrong}")
    listing = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout
    known = re.findall(r"compute_(\d+)", listing)
    if skipped := [arch for arch in listed if arch not in known]:
        say(f"{nvcc} does not support compute capability {', '.join(skipped)}: skipped")
    archs = [arch for arch in listed if arch in known]
    if not archs:
        raise SystemExit(f"mir-kernels: none of MIR_CUDA_ARCHS={';'.join(listed)} is among nvcc's {', '.join(known)}")
    return archs


def is_clang(cxx: list[str]) -> bool:
    return "clang" in subprocess.run([*cxx, "--version"], capture_output=True, text=True).stdout


def has_openmp(cxx: list[str]) -> bool:
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "openmp.cpp"
        source.write_text("#include <omp.h>\nint main() { return omp_get_max_threads() > 0 ? 0 : 1; }\n")
        command = [*cxx, "-fopenmp", str(source), "-o", str(Path(folder) / "openmp")]
        found = subprocess.run(command, capture_output=True).returncode == 0
    if not found:
        say(f"{cxx[0]} has no OpenMP: the CPU kernels will use one thread")
    return found


def write_ninja(path: Path, output: Path, cxx: list[str], nvcc: str | None, version: str) -> None:
    """Write a ninja file to `path` with every compile step and the link step of `output`."""
    import pybind11
    from ninja.ninja_syntax import Writer

    archs = cuda_archs(nvcc) if nvcc else []
    defines = [f'-DMIR_VERSION="{version}"', f'-DMIR_CUDA_ARCHS="{";".join(archs)}"']
    if nvcc:
        defines.append("-DMIR_WITH_CUDA")
    openmp = ["-fopenmp"] if has_openmp(cxx) else []
    includes = [f"-I{sysconfig.get_paths()['include']}", f"-I{pybind11.get_include()}"]
    # GCC's own AVX-512 headers trip -Wmaybe-uninitialized.
    quiet = [] if is_clang(cxx) else ["-Wno-maybe-uninitialized"]
    x86_64 = platform.machine() in ("x86_64", "AMD64")
    levels = X86_64_LEVELS if x86_64 else {"baseline": []}
    gencode = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    gencode += [f"-gencode=arch=compute_{arch},code=compute_{arch}" for arch in archs[-1:]]

    with path.open("w") as file:
        ninja = Writer(file, width=120)
        ninja.variable("builddir", str(path.parent))
        compiled = {"depfile": "$out.d", "deps": "gcc", "description": "compile $out"}
        common = shlex.join([*cxx, *CXX_FLAGS, *quiet, *openmp, *defines])
        ninja.rule("cxx", f"{common} $flags -MMD -MF $out.d -c $in -o $out", **compiled)
        link = [*cxx, "-shared", *openmp]
        if sys.platform == "darwin":
            link += ["-undefined", "dynamic_lookup"]
        if nvcc:
            host = ["-ccbin", cxx[0]]
            flags = ["-std=c++17", "-O3", "-Xcompiler", "-fPIC,-fvisibility=hidden,-Wall", "--threads", "0"]
            compile_cuda = shlex.join([nvcc, *host, *flags, *defines, *gencode])
            ninja.rule("nvcc", f"{compile_cuda} -MMD -MF $out.d -c $in -o $out", **compiled)
            # The CUDA runtime is linked statically, so that the module loads on machines without a driver.
            link = [nvcc, *host, "-shared", "-cudart", "static", *(f"-Xcompiler={flag}" for flag in openmp)]
        ninja.rule("link", f"{shlex.join(link)} $in -o $out", description="link $out")

        objects = []

        def add(rule: str, source: Path, name: str, flags: list[str] = ()) -> None:
            objects.append(str(path.parent / f"{name}.o"))
            ninja.build(objects[-1], rule, str(source), variables={"flags": shlex.join(flags)})

        for source in sorted(CSRC.rglob("*.cu")) if nvcc else []:
            add("nvcc", source, source.stem)
        for source in sorted(CSRC.rglob("*.cpp")):
            if source.stem.endswith("_cpu"):
                for namespace, flags in levels.items():
                    add("cxx", source, f"{source.stem}.{namespace}", [f"-DMIR_ISA={namespace}", *flags])
            else:
                add("cxx", source, source.stem, includes if source.stem == "bindings" else [])
        ninja.build(str(output), "link", objects)


class NinjaBuildExt(build_ext):
    """A build_ext that builds its one extension with ninja."""

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(self.build_temp).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        write_ninja(folder / "build.ninja", target, COMPILER, find_nvcc(), self.distribution.get_version())
        try:
            subprocess.run([sys.executable, "-m", "ninja", "-f", str(folder / "build.ninja")], check=True)
        except subprocess.CalledProcessError:
            raise SystemExit(
                "mir-kernels: the compiler failed, see its output above (MIR_NATIVE=0 installs without these kernels)"
            ) from None

    def copy_extensions_to_source(self) -> None:
        """For in-place builds. Replaces the old file atomically, because a running process may have it loaded."""
        build_py = self.get_finalized_command("build_py")
        for ext in self.extensions:
            installed, built = self._get_inplace_equivalent(build_py, ext)
            temporary = Path(f"{installed}.{os.getpid()}")
            shutil.copy2(built, temporary)
            os.replace(temporary, installed)


COMPILER = find_compiler()
sources = sorted(str(path.relative_to(ROOT)) for path in CSRC.rglob("*.c*"))
setup(
    ext_modules=[Extension("mir_kernels._C", sources)] if COMPILER else [],
    cmdclass={"build_ext": NinjaBuildExt},
)
