"""Layering: which parts of the code may import which others, checked on every import and include."""

import ast
import graphlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = {"mir_kernels": ROOT / "mir_kernels", "modality_integration": ROOT / "python" / "modality_integration"}
OPERATIONS = ("moca", "moments", "sqrtm", "frechet")
# Which operations an operation may build on.
BELOW = {"moca": set(), "moments": set(), "sqrtm": set(), "frechet": {"sqrtm"}}
# What each part of modality_integration may import from, itself included; "__init__" is the package's own file.
ROOMS = {
    "metric": {"metric"},
    "models": {"metric", "models"},
    "training": {"metric", "models", "training"},
    "app": {"metric", "models", "training", "app", "official"},
    "official": {"metric"},
    "__main__": {"app"},
    "__init__": {"metric", "models", "training", "app", "official"},
}
COMPILED = "mir_kernels._C"
LINES = 400
FOLDERS = ("mir_kernels", "python", "csrc", "tests", "benchmarks")
SUFFIXES = (".py", ".cpp", ".cu", ".h", ".cuh")


def modules(package: Path) -> dict[str, Path]:
    """{dotted name: file} of a package; a folder's name stands for its `__init__.py`."""
    found = {}
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(source: str) -> set[str]:
    """All imported names, also in functions and for type checkers: a.b for `import a.b` or `from a import b`."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: a relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def used(source: str, known: dict[str, Path]) -> set[str]:
    """The modules of `known` that a source imports: for "a.b.c" the longest prefix that is one."""
    found = set()
    for name in imports(source) - {COMPILED}:
        while name and name not in known:
            name = name.rpartition(".")[0]
        found |= {name} - {""}
    return found


def room(module: str) -> str:
    """The part of modality_integration that a module belongs to."""
    return module.split(".")[1] if "." in module else "__init__"


def files(folder: str, *suffixes: str) -> list[Path]:
    found = sorted(p for p in (ROOT / folder).rglob("*") if p.suffix in suffixes)
    assert found, f"nothing in {folder}"
    return found


def short(path: Path) -> str:
    return str(path.relative_to(ROOT))


KERNELS, UPPER = (modules(package) for package in PACKAGES.values())
OF_OPERATIONS = {name: path for name, path in KERNELS.items() if name.startswith("mir_kernels.ops.")}
SOURCES = [path for folder in FOLDERS for path in files(folder, *SUFFIXES)]


@pytest.mark.parametrize("path", KERNELS.values(), ids=short)
def test_kernel_package_knows_nothing_of_models_or_plots(path):
    forbidden = {"modality_integration", "transformers", "torchmetrics", "matplotlib", "rich", "typer", "safetensors"}
    assert not {name.split(".")[0] for name in imports(path.read_text())} & forbidden


def test_operations_are_the_folders_of_ops():
    folders = {path.parent.name for path in (PACKAGES["mir_kernels"] / "ops").glob("*/__init__.py")}
    assert folders == set(OPERATIONS) == set(BELOW)


@pytest.mark.parametrize("path", OF_OPERATIONS.values(), ids=short)
def test_operations_import_from_one_another_what_they_may_and_no_kernels(path):
    operation = path.parent.name
    for name in used(path.read_text(), OF_OPERATIONS):
        _, _, other, *module = name.split(".")
        if other != operation:
            assert other in BELOW[operation], f"{short(path)} imports {name}"
            assert module[:1] not in (["triton"], ["native"], ["eager"]), f"{short(path)} imports {name}"


@pytest.mark.parametrize("operation", OPERATIONS)
def test_every_operation_has_the_same_files(operation):
    folder = PACKAGES["mir_kernels"] / "ops" / operation
    wanted = {"__init__.py", "functional.py", "autograd.py", "launch.py", "reference.py", "README.md"}
    assert wanted <= {path.name for path in folder.iterdir()}


@pytest.mark.parametrize("path", UPPER.values(), ids=short)
def test_rooms_of_the_upper_package_import_downward_only(path):
    name = next(name for name, other in UPPER.items() if other == path)
    for other in used(path.read_text(), UPPER):
        assert room(other) in ROOMS[room(name)], f"{name} imports {other}"


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_form_no_circle(package):
    known = modules(PACKAGES[package])
    graphlib.TopologicalSorter({name: used(path.read_text(), known) for name, path in known.items()}).prepare()


def test_imports_are_found_wherever_they_stand():
    source = """
import a.b
from typing import TYPE_CHECKING
if TYPE_CHECKING:
    from a import c
def f():
    from a.d import name
    from a import other
"""
    known = dict.fromkeys(("a", "a.b", "a.c", "a.d", "b"), ROOT)
    assert used(source, known) == {"a", "a.b", "a.c", "a.d"}
    assert room("modality_integration") == "__init__"
    assert room("modality_integration.metric.sync") == "metric"
    with pytest.raises(AssertionError, match="line 1: a relative import"):
        imports("from . import sync")


@pytest.mark.parametrize("path", [*SOURCES, ROOT / "setup.py"], ids=short)
def test_no_source_file_is_long(path):
    lines = len(path.read_text().splitlines())
    assert lines <= LINES


@pytest.mark.parametrize("path", files("csrc", ".h", ".cpp", ".cu", ".cuh"), ids=short)
def test_native_sources_name_python_only_in_the_bindings(path):
    includes = re.findall(r'#\s*include\s*[<"]([^>"]+)[>"]', path.read_text())
    foreign = [name for name in includes if re.match(r"(torch|ATen|c10|Python|pybind11)", name)]
    assert not foreign or (path.name == "bindings.cpp" and all(name.startswith("pybind11") for name in foreign))


@pytest.mark.parametrize("missing", ["triton", "mir_kernels._C", "transformers", "matplotlib"])
def test_import_works_without_optional_parts_and_says_what_is_missing(missing):
    code = f"import sys; sys.modules[{missing!r}] = None; import mir_kernels; print(mir_kernels.backends())"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT).stdout
    assert "eager" in out
    if missing == "mir_kernels._C":
        assert "the compiled module" in out
    if missing == "triton":
        assert "triton is not installed" in out or "torch sees no CUDA device" in out
