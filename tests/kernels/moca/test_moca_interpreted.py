"""Runs the two test files of MoCa's kernels on CPU tensors in Triton's interpreter.

The interpreter must be selected before triton is first imported, so the files run in a separate process.
"""

import os
import subprocess
import sys
import xml.etree.ElementTree as ET
from importlib.util import find_spec
from pathlib import Path

import pytest

pytest.importorskip("triton")

FILES = ("test_moca.py", "test_add_moca_rms_norm.py")
CPU_ONLY = {"test_sums_do_not_depend_on_the_number_of_threads"}
# Compared with transformers' own norm, if it is installed: the kernels need only torch.
OF_LLAMA = {
    "test_without_vision_rows_it_is_llamas_norm_on_any_input",
    "test_without_vision_rows_it_has_the_bits_of_llamas_norm_where_the_mean_is_exact",
}
SKIPPED = CPU_ONLY | (set() if find_spec("transformers") else OF_LLAMA)


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """{file: {test name with parameters: "passed", "skipped" or the text of the failure}} of the interpreted run."""
    report = tmp_path_factory.mktemp("interpreted") / "report.xml"
    here = Path(__file__).parent
    command = [sys.executable, "-m", "pytest", "-q", f"--junitxml={report}", *(str(here / f) for f in FILES)]
    done = subprocess.run(
        command,
        cwd=here.parents[2],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert report.exists(), done.stdout + done.stderr
    found = {f: {} for f in FILES}
    for case in ET.parse(report).getroot().iter("testcase"):
        file = case.get("classname").rsplit(".", 1)[-1] + ".py"
        bad = [child for child in case if child.tag in ("failure", "error")]
        skipped = any(child.tag == "skipped" for child in case)
        found[file][case.get("name")] = bad[0].text if bad else "skipped" if skipped else "passed"
    return found


@pytest.mark.parametrize("file", FILES)
def test_every_promise_holds_in_the_interpreter(outcomes, file):
    ran = outcomes[file]
    failed = {name: text for name, text in ran.items() if text not in ("passed", "skipped")}
    assert not failed, "\n\n".join(f"{name}\n{text}" for name, text in failed.items())
    names = {name.split("[")[0] for name in ran}
    assert {name.split("[")[0] for name, text in ran.items() if text == "skipped"} == SKIPPED & names
    assert all("[triton-cpu" in name for name in ran)


@pytest.mark.parametrize("file", FILES)
def test_every_promise_was_interpreted(outcomes, file):
    source = (Path(__file__).parent / file).read_text()
    names = {line.split("(")[0].removeprefix("def ") for line in source.splitlines() if line.startswith("def test_")}
    assert names - SKIPPED == {name.split("[")[0] for name, text in outcomes[file].items() if text == "passed"}
