"""The stub of the compiled module agrees with the module."""

import ast
import re
from pathlib import Path

from mir_kernels._native import C

STUB = ast.parse((Path(__file__).parents[2] / "mir_kernels" / "_C.pyi").read_text())
FUNCTIONS = {node.name: node for node in STUB.body if isinstance(node, ast.FunctionDef)}
NAMES = {node.target.id for node in STUB.body if isinstance(node, ast.AnnAssign)}


def signature(text):
    """The types of a function's arguments in pybind11's documentation (SupportsFloat since 3), and of its result."""
    arguments, result = re.fullmatch(r"\w+\((.*)\) -> (\w+)", text.strip()).groups()
    return ["float" if "float" in kind.lower() else "int" for kind in re.split(r", arg\d+", arguments)], result


def test_the_stub_has_every_name_of_the_module():
    there = {name for name in vars(C) if not name.startswith("__")}
    optional = {"moca_forward_cuda", "moca_backward_cuda"}
    assert there | optional == NAMES | set(FUNCTIONS)


def test_every_function_takes_and_returns_what_the_stub_says():
    for name, function in FUNCTIONS.items():
        if hasattr(C, name):
            kinds = [argument.annotation.id for argument in function.args.posonlyargs]
            result = function.returns.value if isinstance(function.returns, ast.Constant) else function.returns.id
            assert (kinds, str(result)) == signature(getattr(C, name).__doc__), name
