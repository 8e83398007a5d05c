"""Who may know whom: the rooms of the house, held by a test that reads every import and include."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
OPERATIONS = ("moca", "moments", "sqrtm")


def imports(path: Path) -> set[str]:
    """Every module a file names in an import, at any depth of the file."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def files(folder: str, *suffixes: str) -> list[Path]:
    found = sorted(p for p in (ROOT / folder).rglob("*") if p.suffix in suffixes)
    assert found, f"nothing in {folder}"
    return found


@pytest.mark.parametrize("path", files("mir_kernels", ".py"), ids=lambda p: str(p.relative_to(ROOT)))
def test_kernel_package_knows_nothing_of_models_or_plots(path):
    forbidden = {"modality_integration", "transformers", "torchmetrics", "matplotlib", "rich", "typer", "safetensors"}
    assert not {name.split(".")[0] for name in imports(path)} & forbidden


@pytest.mark.parametrize("operation", OPERATIONS)
def test_operations_do_not_import_one_anothers_kernels(operation):
    for path in files(f"mir_kernels/{operation}", ".py"):
        for other in set(OPERATIONS) - {operation}:
            used = {name for name in imports(path) if re.match(rf"mir_kernels\.{other}\.(triton|native|eager)", name)}
            assert not used, f"{path.relative_to(ROOT)} imports {used}"


@pytest.mark.parametrize("path", files("csrc", ".h", ".cpp", ".cu"), ids=lambda p: str(p.relative_to(ROOT)))
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
