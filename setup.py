"""Builds the extension mir_kernels._C out of csrc/ with ninja; all other packaging data stands in pyproject.toml.

Environment variables, read at build time:
  CXX             C++ compiler (default: the first of c++, g++, clang++ on PATH)
  MIR_NATIVE      0: Python only; 1: the lack of a compiler is an error; unset: built where a compiler is found
  MIR_CUDA        0: no CUDA; 1: the lack of nvcc is an error; unset: built where nvcc is found (CUDA_HOME, then PATH)
  MIR_CUDA_ARCHS  compute capabilities, PTX for the last (default 80;86;89;90;100;120)

Nothing is downloaded and no GPU is asked for. A compiler that is found and fails is an install error.
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
# Exactly the arithmetic that the sources spell out: no fast-math, and fused multiply-adds only where written.
CXX_FLAGS = [
    *("-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off"),
    *("-Wall", "-Wextra", "-Wno-psabi"),
]
# *_cpu.cpp is compiled once per entry, each into the namespace of that name (csrc/common/isa.h).
V3_FLAGS = ["-mavx2", "-mfma", "-mf16c", "-mbmi", "-mbmi2", "-mlzcnt"]
V4_FLAGS = [*V3_FLAGS, "-mavx512f", "-mavx512bw", "-mavx512cd", "-mavx512dq", "-mavx512vl", "-mavx512vnni"]
X86_64_LEVELS = {"baseline": [], "x86_64_v3": V3_FLAGS, "x86_64_v4_vnni": V4_FLAGS}


def say(text: str) -> None:
    print(f"mir-kernels: {text}", file=sys.stderr, flush=True)


def wanted(variable: str) -> bool | None:
    """True, False or, where unset, None."""
    value = os.environ.get(variable, "")
    if value not in ("", "0", "1"):
        raise SystemExit(f"mir-kernels: {variable} takes 0 or 1, got {value!r}")
    return None if value == "" else value == "1"


def find_compiler() -> list[str] | None:
    """The C++ compiler's command, or None where there is none or MIR_NATIVE=0."""
    native = wanted("MIR_NATIVE")
    if native is False:
        say("MIR_NATIVE=0: installing the Python part without compiled kernels")
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
    """nvcc's path, or None where there is none or MIR_CUDA=0."""
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
    """The listed compute capabilities that this nvcc compiles for."""
    listed = [arch for arch in re.split(r"[;,\s]+", os.environ.get("MIR_CUDA_ARCHS", DEFAULT_ARCHS)) if arch]
    if wrong := [arch for arch in listed if not arch.isdecimal()]:
        raise SystemExit(f"mir-kernels: MIR_CUDA_ARCHS takes compute capabilities such as 80;90, got {wrong}")
    listing = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout
    known = re.findall(r"compute_(\d+)", listing)
    if skipped := [arch for arch in listed if arch not in known]:
        say(f"{nvcc} does not compile for {', '.join(skipped)}: left out")
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
    """Every compilation and the link of `output` as a ninja file at `path`."""
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
            # nvcc links its runtime statically, so that the module loads where there is no driver.
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
    """build_ext that hands its one extension to ninja."""

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
                "mir-kernels: the compiler failed, its message stands above (MIR_NATIVE=0 installs without it)"
            ) from None

    def copy_extensions_to_source(self) -> None:
        """In place: as a new file, since a process may be running the old one."""
        build_py = self.get_finalized_command("build_py")
        for ext in self.extensions:
            beside_sources, built = self._get_inplace_equivalent(build_py, ext)
            arriving = Path(f"{beside_sources}.{os.getpid()}")
            shutil.copy2(built, arriving)
            os.replace(arriving, beside_sources)


COMPILER = find_compiler()
sources = sorted(str(path.relative_to(ROOT)) for path in CSRC.rglob("*.c*"))
setup(
    ext_modules=[Extension("mir_kernels._C", sources)] if COMPILER else [],
    cmdclass={"build_ext": NinjaBuildExt},
)
