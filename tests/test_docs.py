"""The docs, without mkdocs: the reference lists every public name, every block compiles, no link is broken."""

import ast
import importlib
import inspect
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import mir_kernels
import modality_integration
from modality_integration.app import config
from modality_integration.app.cli import main

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("*.md"))
READMES = [*sorted(ROOT.glob("mir_kernels/ops/**/README.md")), ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
SOURCES = [*PAGES, *READMES]
CODE = [
    pytest.param(code, id=f"{page.stem}-{number}")
    for page in SOURCES
    for number, code in enumerate(re.findall(r"^```python\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE))
]
LISTED = re.findall(r"^::: (\S+)$", (DOCS / "api.md").read_text(), re.MULTILINE)


def resolved(name):
    """The object behind a dotted name; a module takes precedence over a function of the same name."""
    module, _, rest = name.rpartition(".")
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError:
        return getattr(resolved(module), rest)


def anchors(page):
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[\s_]+", "-", re.sub(r"[^\w\s-]", "", h.lower()).strip()) for h in headings}


@pytest.mark.parametrize("package", [mir_kernels, modality_integration], ids=lambda p: p.__name__)
def test_reference_lists_every_public_name(package):
    listed = {id(resolved(name)) for name in LISTED}
    assert not [name for name in package.__all__ if id(getattr(package, name)) not in listed]
    assert set(package.__all__) <= set(dir(package))


@pytest.mark.parametrize("name", LISTED)
def test_reference_lists_what_exists_and_is_documented(name):
    found = resolved(name)
    assert found.__doc__
    if not inspect.ismodule(found):
        assert f"{found.__module__}.{found.__qualname__}" == name  # where mkdocstrings finds its source


@pytest.mark.parametrize("code", CODE)
def test_python_block_compiles_and_imports_what_exists(code):
    tree = ast.parse(code)
    compile(tree, "docs", "exec")
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module.startswith(("mir_kernels", "modality_integration")):
            module = importlib.import_module(node.module)
            assert not [alias.name for alias in node.names if not hasattr(module, alias.name)]


@pytest.mark.parametrize("page", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for target, _, anchor in (t.partition("#") for t in re.findall(r"\]\(([^)\s]+)\)", page.read_text())):
        if "://" not in target:
            found = page.parent / target if target else page
            assert found.exists(), target
            assert not anchor or anchor in anchors(found), f"{target}#{anchor}"


@pytest.mark.parametrize("page", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_angle_brackets_of_formulas_are_code(page):
    text = re.sub(r"^( {4}|```).*$", "", page.read_text(), flags=re.MULTILINE)
    text = re.sub(r"`[^`]*`|<!-- .*? -->", "", text)
    assert not re.findall(r"<[A-Za-z/][^>]*>", text)  # Markdown treats these as HTML and shows nothing


def test_every_page_is_in_the_contents():
    def names(entry):
        if isinstance(entry, str):
            return [entry]
        return [name for part in (entry.values() if isinstance(entry, dict) else entry) for name in names(part)]

    contents = names(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"])
    assert sorted(name for name in contents if (DOCS / name).exists()) == [page.name for page in PAGES]
    hooks = runpy.run_path(str(DOCS / "hooks.py"))
    assert set(contents) - {page.name for page in PAGES} == set(hooks["PAGES"].values())


READ = re.compile(
    r"""environ(?:\.get\(|\[)"(\w+)"|getenv\("(\w+)"|wanted\("(\w+)"|^VARIABLE = "(\w+)"|"(\w+)" in os\.environ""",
    re.MULTILINE,
)


def test_every_environment_variable_is_on_its_page():
    page = (DOCS / "environment.md").read_text()
    folders = ("mir_kernels", "python", "csrc", "benchmarks", "tests/fuzz", "tests/native")
    files = [path for folder in folders for suffix in ("py", "cpp") for path in (ROOT / folder).rglob(f"*.{suffix}")]
    text = "\n".join(path.read_text(encoding="utf-8") for path in [ROOT / "setup.py", *files])
    read = {next(filter(None, found)) for found in READ.findall(text)} - {"PATH", "PYTHONPATH", "TRITON_CACHE_DIR"}
    assert {"MIR_NATIVE", "MIR_CPU_ISA", "MIR_FLOAT64", "MIR_SHARD", "HF_HUB_ETAG_TIMEOUT"} <= read
    assert read <= set(re.findall(r"`(\w+)`", page))
    ours = {name for name in re.findall(r"`(MIR_\w+)`", page) if not name.endswith("_SAMPLES")}
    assert ours == set(config.OF_OTHERS)  # `mir` warns of any other variable that begins with MIR_


@pytest.mark.parametrize("command", sorted(set(re.findall(r"^\| `(mir [a-z]+|make [a-z-]+)", "\n".join(
    page.read_text() for page in PAGES), re.MULTILINE))))  # fmt: skip
def test_commands_of_the_tables_exist(command):
    program, word = command.split()
    run = ["make", "-n", word] if program == "make" else [sys.executable, "-m", "modality_integration", word, "--help"]
    done = subprocess.run(run, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr


def test_options_of_mir_in_the_docs_exist():
    named = set()
    for page in PAGES:
        text = page.read_text()
        named |= {w for block in re.findall(r"^mir .*$", text, re.MULTILINE) for w in re.findall(r"--[a-z-]+", block)}
        if page.stem == "mir-of-a-saved-model":
            named |= set(re.findall(r"`(--[a-z-]+)", text))
    there = {"--help", "--version"}
    for command in main.registered_commands:
        there |= {f"--{name.replace('_', '-')}" for name in inspect.signature(command.callback).parameters}
    assert named
    assert named <= there


def test_schema_page_knows_every_key_of_a_result():
    import json

    import torch

    torch.manual_seed(0)
    document = json.loads(modality_integration.mir([torch.randn(9, 3)], [torch.randn(9, 3)], bounds=True).to_json())
    page = (DOCS / "json.md").read_text()
    assert f"## Version {document['version']}" in page
    keys = {*document, *document["layers"][0]}
    assert keys == set(re.findall(r"`([a-z_]+)`", "".join(re.findall(r"^\| (`.*?) \|", page, re.MULTILINE))))


def test_table_of_differences_says_what_its_csv_says():
    done = subprocess.run(
        [sys.executable, "benchmarks/published_differences.py", "--check"],
        capture_output=True, text=True, cwd=ROOT, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
