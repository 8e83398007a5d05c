"""Building and packaging: the compilers that setup.py finds, its errors and messages, and wheels used elsewhere."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PARTS = ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "csrc", "mir_kernels", "python")
VERSION = re.search(r'^version = "(.+)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)[1]

pytestmark = pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="needs the source tree")


@pytest.fixture
def tree(tmp_path):
    """A copy of the sources without build outputs."""
    copy = tmp_path / "a folder with spaces"
    copy.mkdir()
    for part in PARTS:
        source = ROOT / part
        if source.is_dir():
            ignored = shutil.ignore_patterns("*.so", "__pycache__", "*.egg-info", "build")
            shutil.copytree(source, copy / part, ignore=ignored)
        else:
            shutil.copy2(source, copy / part)
    return copy


def python(arguments, folder, **environment):
    """Run python with `environment`, in which an empty value removes the variable."""
    env = {**os.environ, "PYTHONPATH": "", **environment}
    for name in ("CXX", "CUDA_HOME", "MIR_NATIVE", "MIR_CUDA", "MIR_CUDA_ARCHS"):
        if name not in environment:
            env.pop(name, None)
    return subprocess.run([sys.executable, *arguments], cwd=folder, env=env, capture_output=True, text=True)


def build(tree, **environment):
    return python(["setup.py", "build_ext", "--build-lib", "built", "--build-temp", "temp"], tree, **environment)


def extensions(folder):
    return sorted(folder.rglob("_C*.so"))


def failing_compiler(tmp_path):
    script = tmp_path / "broken-compiler"
    script.write_text("#!/bin/sh\necho 'broken-compiler: the message of the compiler' >&2\nexit 1\n")
    script.chmod(0o755)
    return str(script)


def test_without_a_compiler_the_python_part_is_built_and_the_reason_said(tree):
    done = build(tree, CXX="/nonexistent/c++")
    assert done.returncode == 0, done.stderr
    assert "no C++ compiler (looked for /nonexistent/c++)" in done.stderr
    assert "WITHOUT COMPILED KERNELS" in done.stderr
    assert extensions(tree) == []


def test_native_1_without_a_compiler_is_an_error(tree):
    done = build(tree, CXX="/nonexistent/c++", MIR_NATIVE="1")
    assert done.returncode != 0
    assert "MIR_NATIVE=1, but no C++ compiler" in done.stderr


def test_native_0_builds_nothing(tree):
    done = build(tree, MIR_NATIVE="0")
    assert done.returncode == 0, done.stderr
    assert "MIR_NATIVE=0" in done.stderr
    assert extensions(tree) == []


def test_other_values_of_a_switch_are_refused(tree):
    done = build(tree, MIR_NATIVE="yes")
    assert done.returncode != 0
    assert "MIR_NATIVE: expected 0 or 1, got 'yes'" in done.stderr


def test_cuda_1_without_nvcc_is_an_error(tree):
    done = build(tree, MIR_CUDA="1", CUDA_HOME="/nonexistent", CXX="true")
    assert done.returncode != 0
    assert "MIR_CUDA=1, but no nvcc in /nonexistent/bin" in done.stderr


def test_a_compiler_that_fails_is_an_error_with_its_message(tree, tmp_path):
    done = build(tree, CXX=failing_compiler(tmp_path), MIR_CUDA="0")
    assert done.returncode != 0
    assert "the message of the compiler" in done.stdout + done.stderr
    assert extensions(tree) == []


@pytest.mark.parametrize(
    ("archs", "message"),
    [("12", "none of MIR_CUDA_ARCHS=12"), ("sm_90", "MIR_CUDA_ARCHS: expected compute capabilities such as 80;90")],
)
def test_architectures_that_nvcc_lacks_are_refused(tree, archs, message):
    if shutil.which("nvcc") is None:
        pytest.skip("nvcc is not on PATH")
    done = build(tree, MIR_CUDA="1", MIR_CUDA_ARCHS=archs)
    assert done.returncode != 0
    assert message in done.stderr


# Imports the installed package from `folder` alone and runs a kernel if one was built. An editable install of the
# package would otherwise provide a missing module.
USE = """
import sys
sys.path.insert(0, sys.argv[1])
sys.meta_path = [finder for finder in sys.meta_path if not finder.__module__.startswith("__editable__")]
import torch
from mir_kernels import _native
assert _native.__file__.startswith(sys.argv[1]), _native.__file__
if _native.C is None:
    print("missing:", _native.MISSING)
else:
    from mir_kernels.ops.moments import native
    print(_native.C.VERSION, _native.C.CUDA_ARCHS, native.token_norms(torch.tensor([[3.0, 4.0]])).item())
"""


def install(source, folder, **environment):
    command = ["-m", "pip", "install", "--no-build-isolation", "--no-deps", "--no-index", "--target", str(folder)]
    return python([*command, str(source)], folder.parent, **environment)


def needs_compiler():
    if not any(shutil.which(name) for name in ("c++", "g++", "clang++")):
        pytest.skip("no C++ compiler")


@pytest.mark.slow
def test_a_wheel_built_from_the_sdist_in_another_folder_works(tree, tmp_path):
    needs_compiler()
    backend = "import sys, setuptools.build_meta as b; print(b.build_sdist(sys.argv[1]))"
    done = python(["-c", backend, str(tmp_path)], tree, MIR_NATIVE="0")
    assert done.returncode == 0, done.stderr
    (sdist,) = tmp_path.glob("*.tar.gz")
    shutil.rmtree(tree)
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    command = ["-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "--no-index", "-w", str(wheels), str(sdist)]
    done = python(command, tmp_path, MIR_NATIVE="1", MIR_CUDA="0")
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = wheels.glob("*.whl")
    installed = tmp_path / "installed"
    done = install(wheel, installed)
    assert done.returncode == 0, done.stdout + done.stderr
    used = python(["-c", USE, str(installed)], tmp_path)
    assert used.stdout.split() == [VERSION, "()", "5.0"], used.stdout + used.stderr


@pytest.mark.slow
def test_a_wheel_with_cuda_imports_without_a_driver(tree, tmp_path):
    needs_compiler()
    if shutil.which("nvcc") is None:
        pytest.skip("nvcc is not on PATH")
    installed = tmp_path / "installed"
    done = install(tree, installed, MIR_CUDA="1", MIR_CUDA_ARCHS="80;12;90")
    assert done.returncode == 0, done.stdout + done.stderr
    used = python(["-c", USE, str(installed)], tmp_path)
    assert used.stdout.strip() == f"{VERSION} (80, 90) 5.0", used.stdout + used.stderr


def test_python_started_in_the_source_folder_without_the_module_is_told_so(tree):
    no_editable_install = 'import sys; sys.meta_path[:] = [f for f in sys.meta_path if "ditable" not in repr(f)]'
    done = python(["-c", f"{no_editable_install}; import mir_kernels; print(mir_kernels.backends())"], tree)
    assert f"not built in the source folder {tree}: start Python in another folder" in done.stdout, done.stderr


@pytest.mark.slow
def test_an_install_without_a_compiler_imports_and_says_what_is_missing(tree, tmp_path):
    installed = tmp_path / "installed"
    done = install(tree, installed, CXX="/nonexistent/c++")
    assert done.returncode == 0, done.stdout + done.stderr
    used = python(["-c", USE, str(installed)], tmp_path)
    assert "missing:" in used.stdout, used.stdout + used.stderr
    assert "C++ compiler" in used.stdout


@pytest.mark.slow
def test_build_in_place_puts_the_module_beside_its_package(tree):
    needs_compiler()
    done = python(["setup.py", "build_ext", "--inplace"], tree, MIR_CUDA="0")
    assert done.returncode == 0, done.stdout + done.stderr
    assert [path.parent for path in extensions(tree / "mir_kernels")] == [tree / "mir_kernels"]
    used = python(["-c", USE, str(tree)], tree.parent)
    assert used.stdout.split() == [VERSION, "()", "5.0"], used.stdout + used.stderr
