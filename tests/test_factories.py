"""Every tensor that the packages create names its device and dtype, so that process-wide defaults have no effect."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCES = [p for folder in ("mir_kernels", "python") for p in sorted((ROOT / folder).rglob("*.py"))]
FACTORIES = {
    *(
        "empty",
        "zeros",
        "ones",
        "full",
        "tensor",
        "as_tensor",
        "arange",
        "linspace",
        "logspace",
        "eye",
        "empty_strided",
    ),
    *("rand", "randn", "randint", "randperm", "scalar_tensor", "tril_indices", "triu_indices", "asarray"),
}


def unnamed(tree: ast.AST) -> list[str]:
    """The arguments that calls of torch's factories omit."""
    found = []
    for node in ast.walk(tree):
        # Called, or passed to functools.partial, whose keywords count.
        for made in (node.func, *node.args[:1]) if isinstance(node, ast.Call) else ():
            if not (isinstance(made, ast.Attribute) and isinstance(made.value, ast.Name) and made.value.id == "torch"):
                continue
            given = {keyword.arg for keyword in node.keywords}
            if made.attr in FACTORIES and not {"device", "dtype"} <= given:
                found.append(f"line {node.lineno}: torch.{made.attr} without {sorted({'device', 'dtype'} - given)}")
            if made.attr == "Generator" and made is node.func and not node.args and "device" not in given:
                found.append(f"line {node.lineno}: torch.Generator without a device")
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_tensor_is_of_the_process_default(path):
    assert not unnamed(ast.parse(path.read_text()))


def test_what_is_left_open_is_found():
    assert len(unnamed(ast.parse("torch.empty(3, dtype=d); partial(torch.zeros, 2); torch.Generator()"))) == 3
    assert not unnamed(ast.parse("torch.empty(3, dtype=d, device=x); torch.empty_like(x); torch.Generator('cpu')"))
