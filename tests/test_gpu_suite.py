"""The GPU suite goes through its stages on a CPU, and says so where one fails."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def suite(out, *arguments, code=0):
    """summary.json and what was printed."""
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu_suite.py"), "--out", str(out), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    logs = "\n".join(path.read_text()[-2000:] for path in out.glob("*.log"))
    assert done.returncode == code, done.stdout + done.stderr + logs
    return json.loads((out / "summary.json").read_text()), done.stdout


def test_quick_stages_pass_dry(tmp_path):
    found, printed = suite(tmp_path, "--dry", "--stages", "environment,sanitizer")
    assert {name: found[name]["state"] for name in ("environment", "sanitizer")} == {
        "environment": "passed",
        "sanitizer": "passed",
    }
    assert "64 results on cpu, 0 wrong" in (tmp_path / "sanitizer.log").read_text()
    assert "racecheck" in (tmp_path / "sanitizer.log").read_text()
    assert len(printed.splitlines()) < 100


def test_a_stage_that_fails_hides_no_other_and_shows_in_the_exit_code(tmp_path):
    # Without --dry a machine without a GPU cannot pass the first two.
    import torch

    if torch.cuda.is_available():
        pytest.skip("needs a machine without a GPU")
    found, printed = suite(tmp_path, "--stages", "environment,ceilings", code=1)
    assert found["environment"]["state"] == found["ceilings"]["state"] == "failed"
    assert "torch sees no CUDA device" in printed
    assert "see ceilings.log" in printed


def test_a_candidate_row_compiles_and_is_printed_as_it_would_be_committed(tmp_path):
    command = [sys.executable, str(ROOT / "benchmarks" / "tune.py"), "--out", str(tmp_path / "t.json"), "--dry"]
    pytest.importorskip("triton")
    done = subprocess.run([*command, "--only", "float32"], capture_output=True, text=True, timeout=300, check=True)
    assert '"sm_90": Blocks(tile=' in done.stdout
    (one,) = json.loads((tmp_path / "t.json").read_text())
    assert len(one["compiled"]) == 2
    assert all("0 B spills" in text for row in one["compiled"] for name, text in row.items() if name != "change")


def test_a_command_past_its_limit_may_still_write_what_it_has(tmp_path, capfd):
    import gpu_suite

    code = "import time\ntry: time.sleep(60)\nexcept KeyboardInterrupt: print('written')"
    assert gpu_suite.run([sys.executable, "-c", code], limit=2) == 124
    assert "written" in capfd.readouterr().out
    assert gpu_suite.run([sys.executable, "-c", "raise SystemExit(3)"], limit=30) == 3


def test_what_a_test_file_imports_and_is_not_here_is_named(tmp_path):
    import gpu_suite

    path = tmp_path / "test_some.py"
    path.write_text("import json\nimport no_such_package\nfrom kernels.jobs import every_job\nimport torch\n")
    assert gpu_suite.missing_imports(path) == ["no_such_package"]


@pytest.mark.slow
def test_every_stage_passes_dry(tmp_path):
    found, _ = suite(tmp_path, "--dry")
    assert {r["state"] for r in found.values() if isinstance(r, dict)} == {"passed"}
    assert (tmp_path / "summary.csv").exists()
