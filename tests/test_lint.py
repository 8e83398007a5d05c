"""The settings of linters, hooks and hosted CI: valid, and the same versions and commands everywhere."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
HOOKS = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
WORKFLOW = ROOT / ".github" / "workflows" / "ci.yml"


def test_hooks_use_the_versions_of_the_constraints():
    pinned = {line.partition(";")[0].strip() for line in (ROOT / "constraints.txt").read_text().splitlines()}
    used = {pin for repo in HOOKS for hook in repo["hooks"] for pin in hook["additional_dependencies"]}
    assert used
    assert used <= pinned


@pytest.mark.parametrize("change", [None, ("runs-on: ubuntu-latest", "runs-no: ubuntu-latest")])
def test_the_schema_check_passes_the_workflow_and_finds_a_typo(change, tmp_path):
    text = WORKFLOW.read_text()
    file = tmp_path / "ci.yml"
    file.write_text(text.replace(*change) if change else text)
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.github-workflows", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode == 0) == (change is None), done.stdout + done.stderr


def test_the_workflow_runs_what_ci_runs():
    steps = [step.get("run", "") for step in yaml.safe_load(WORKFLOW.read_text())["jobs"]["test"]["steps"]]
    assert "bash .ci/run" in steps
    assert (ROOT / ".ci" / "run").is_file()


def test_wheels_are_built_for_every_python_that_is_promised():
    text = (ROOT / "pyproject.toml").read_text()
    promised = re.findall(r'"Programming Language :: Python :: 3\.(\d+)"', text)
    built = re.findall(r"cp3(\d+)-\*", re.search(r'^build = "(.*)"$', text, re.MULTILINE)[1])
    assert built == promised
