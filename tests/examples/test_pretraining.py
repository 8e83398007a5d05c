"""examples/pretraining.sh: from nothing to a report, with a tiny language model."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from integration.saved_models import save_tiny_llama
from modality_integration import MIRResult

SCRIPT = Path(__file__).parents[2] / "examples" / "pretraining.sh"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pretraining")
    save_tiny_llama(folder / "llama")
    options = {"LANGUAGE_MODEL": folder / "llama", "STEPS": 4, "SAMPLES": 10}
    environment = {f"MIR_DEMO_{name}": str(value) for name, value in options.items()}
    environment |= {"STEPS": "4", "EVERY": "2", "SAMPLES": "10", "HF_HUB_OFFLINE": "1"}
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    done = subprocess.run(
        ["bash", SCRIPT, folder / "out"],
        capture_output=True, text=True, env={**os.environ, **environment, "PATH": path}, cwd=folder, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return folder / "out", done.stdout


def test_every_step_leaves_what_it_says(made):
    out, _ = made
    for name in ("demo/mir.json", "demo/training.png", "model/prose.jsonl", "layers.pdf", "report.html"):
        assert (out / name).stat().st_size > 0
    with Image.open(out / "training" / "training.png") as image:
        assert len(image.convert("RGB").getcolors(1 << 20)) > 10


def test_checkpoints_are_measured_as_the_trainer_measured_them(made):
    out, _ = made
    state = json.loads((out / "training" / "checkpoint-4" / "trainer_state.json").read_text())
    logged = {row["step"]: row for row in state["log_history"] if "mir" in row}
    assert list(logged) == [0, 2, 4]
    for step in (2, 4):
        result = MIRResult.from_json(out / "mir" / f"step-{step}" / "mir.json")
        assert result.value == pytest.approx(logged[step]["mir"], rel=1e-5)
        assert result.error == pytest.approx(logged[step]["mir_error"], rel=0.5)
    assert logged[2]["mir"] != logged[4]["mir"]


def test_the_comparison_and_the_report_name_both(made):
    out, printed = made
    assert "step-2" in printed
    assert "standard error" in printed
    page = (out / "report.html").read_text()
    assert all(f"step-{step}" in page for step in (2, 4))
    assert "<svg" in page
