"""Type checkers on the public names: right calls pass, and each wrong call is an error on its line."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
PACKAGES = (ROOT, ROOT / "python")
RIGHT, WRONG = HERE / "right_calls.py", HERE / "wrong_calls.py"


def mypy(_):
    """Errors by (file, line). Uses the settings and cache of `make lint`, because reading torch takes a minute."""
    pytest.importorskip("mypy")
    command = [sys.executable, "-m", "mypy", "--config-file", "pyproject.toml", RIGHT, WRONG]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, cwd=ROOT, check=False)
    assert not done.stderr, done.stderr
    return {(file, int(line)): told for file, line, told in re.findall(r"(\w+\.py):(\d+): error: (.*)", done.stdout)}


def pyright(folder):
    """The same from basedpyright (pyright in a self-contained wheel), with pyright's standard rules."""
    program = shutil.which("basedpyright", path=str(Path(sys.executable).parent)) or shutil.which("basedpyright")
    if program is None:
        pytest.skip("basedpyright is not installed")
    settings = {"typeCheckingMode": "standard", "extraPaths": [str(path) for path in PACKAGES]}
    (folder / "pyrightconfig.json").write_text(json.dumps(settings))
    for script in (RIGHT, WRONG):
        shutil.copy(script, folder)
    command = [program, "--outputjson", "--pythonpath", sys.executable, "--project", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, check=False)
    found = [one for one in json.loads(done.stdout)["generalDiagnostics"] if one["severity"] == "error"]
    return {(Path(one["file"]).name, one["range"]["start"]["line"] + 1): one["message"] for one in found}


@pytest.mark.parametrize("checker", [mypy, pyright])
def test_right_calls_are_accepted_and_every_wrong_one_is_refused(checker, tmp_path):
    lines = WRONG.read_text().splitlines()
    wrong = {(WRONG.name, number) for number, line in enumerate(lines, 1) if line.endswith("# wrong")}
    assert len(wrong) > 20
    found = checker(tmp_path)
    assert set(found) == wrong, {place: found.get(place, "no error") for place in set(found) ^ wrong}
