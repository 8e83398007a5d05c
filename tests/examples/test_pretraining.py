"""examples/pretraining.sh: from scratch to a report, with a tiny language model."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from safetensors.torch import load_file

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


@pytest.mark.parametrize("name", ["checkpoint_mir", "train_with_moca"])
def test_the_examples_in_python_run_on_the_model_and_leave_what_they_say(made, name, tmp_path):
    model = made[0] / "model"
    options = {"checkpoint_mir": [], "train_with_moca": ["--steps", "2"]}[name]
    out = tmp_path / {"checkpoint_mir": "mir", "train_with_moca": "moca.safetensors"}[name]
    command = [sys.executable, SCRIPT.with_name(f"{name}.py"), model, "--out", out, "--samples", "10", *options]
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"}, cwd=tmp_path, check=False
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    if name == "checkpoint_mir":
        assert f"MIR {MIRResult.from_json(out / 'mir.json').value:.4f}" in done.stdout
        assert (out / "layers.png").stat().st_size > 0
    else:
        values = load_file(out)
        assert len(values) == 6  # scale and shift of three layers
        assert any((value != value.mean()).any() for value in values.values())  # no longer the initial values
        assert "step 2: loss" in done.stdout
        assert "after: MIR" in done.stdout
