"""Advice on what to install, by package-index names, even if the command's own packages are missing."""

import importlib.util
import re
import sys
from pathlib import Path

import pytest

from modality_integration.app import entry, packages

ROOT = Path(__file__).parents[3]
SPOKEN = [*(ROOT / "python").rglob("*.py"), *(ROOT / "mir_kernels").rglob("*.py"), *ROOT.glob("*.md")]
SPOKEN += [*(ROOT / "docs").rglob("*.md"), *(ROOT / "benchmarks").rglob("*.py")]


@pytest.fixture
def without(monkeypatch):
    """Make modules appear not installed and the command line not yet imported."""

    def hide(*modules):
        for name in modules:
            monkeypatch.setitem(sys.modules, name, None)
        monkeypatch.delitem(sys.modules, "modality_integration.app.cli", raising=False)
        monkeypatch.delattr("modality_integration.app.cli", raising=False)

    return hide


def test_no_advice_names_a_package_that_no_index_has():
    assert len(SPOKEN) > 50
    wrong = [
        (path, line)
        for path in SPOKEN
        for line in re.findall(r"pip install [^\n]*mir-kernels\\*\[.*", path.read_text())
    ]
    assert not wrong


@pytest.mark.parametrize("module", ["typer", "rich"])
def test_the_command_without_its_packages_is_one_line_that_names_them_all(capsys, without, module):
    without(module, "typer", "torchmetrics")
    with pytest.raises(SystemExit) as left:
        entry.main()
    assert left.value.code == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert re.match(r"typer is not installed: pip install typer torchmetrics \w*", said)
    assert 'or pip install ".[mir]" in the source folder of mir-kernels' in said


def test_a_part_of_this_package_that_is_missing_keeps_its_traceback(without):
    without("modality_integration.app.errors")
    with pytest.raises(ModuleNotFoundError):
        entry.main()


def test_the_command_starts_where_no_package_is_needed():
    assert 'mir = "modality_integration.app.entry:main"' in (ROOT / "pyproject.toml").read_text()


@pytest.mark.parametrize(("module", "package"), [("PIL", "pillow"), ("skimage", "scikit-image"), ("odd", "odd")])
def test_a_module_goes_by_the_name_of_its_package(module, package):
    said = packages.not_installed(f"{module}.part")
    assert said.startswith(f"{package} is not installed: pip install {package} (or")


@pytest.mark.parametrize(
    ("torch", "wanted", "line"),
    [
        ("2.13.0", ("torchvision",), "pip install torchvision"),
        ("2.13.0+cu128", ("rich",), "pip install rich"),
        (
            "2.13.0+cu128",
            ("torchvision", "num2words"),
            "pip install torchvision num2words --extra-index-url https://download.pytorch.org/whl/cu128",
        ),
        (None, ("torchvision",), "pip install torchvision"),
    ],
)
def test_a_torchvision_comes_from_where_the_torch_did(monkeypatch, torch, wanted, line):
    monkeypatch.setattr(packages, "installed", {"torch": torch}.get)
    assert packages.pip_install(*wanted) == line


def test_extras_are_those_of_the_project():
    """Each extra's packages by their names in pyproject.toml, if this Python can read TOML."""
    tomllib = pytest.importorskip("tomllib")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for extra, ours in packages.EXTRAS.items():
        theirs = {re.split("[>=< ;]", line)[0] for line in project[extra] if not line.startswith("mir-kernels")}
        assert set(ours) <= theirs
        assert all(importlib.util.find_spec(module) for module in ours.values()) or extra != "mir"
