"""The public names: each is what it says, whatever was imported before, and costs nothing until used."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import modality_integration

HOMES = modality_integration._HOMES


@pytest.mark.parametrize("name", modality_integration.__all__)
def test_public_name_is_documented_and_no_bare_module(name):
    value = getattr(modality_integration, name)
    assert value.__doc__
    assert name == "official" or callable(value)


def test_type_checkers_are_told_the_names_that_there_are():
    source = Path(modality_integration.__file__).read_text()
    told = {
        alias.asname: node.module.removeprefix("modality_integration.")
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("modality_integration")
        for alias in node.names
    }
    assert told == {**HOMES, "official": "modality_integration"}


def test_names_are_functions_after_their_modules_were_imported():
    code = "from modality_integration.models import capture, moca; "
    code += "from modality_integration import capture, mir, add_moca; "
    code += "print([callable(f) for f in (capture, mir, add_moca)])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[True, True, True]"


def test_import_loads_neither_torch_nor_transformers():
    code = "import sys, modality_integration; print({'torch', 'transformers', 'matplotlib'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = modality_integration.nothing
