"""An unfinished run, killed or interrupted, resumes bit-identically and refuses other arguments."""

import io
import json
import os
import re
import signal

import pytest
from rich.console import Console

from integration.app.compute_runs import in_process, quiet_run
from integration.saved_models import write_images
from modality_integration.app import settings
from modality_integration.app.checkpoint import FIRST, Due
from modality_integration.app.compute import run
from modality_integration.app.errors import InputError, Interrupted
from modality_integration.metric import streaming

# The command in a separate process that dies, as in a power cut, once 7 samples are counted.
KILLED_AFTER_7 = """
import os, signal, sys
from modality_integration import ModalityIntegrationRate
from modality_integration.app import cli
update, counted = ModalityIntegrationRate.update, 0
def dying(self, *args):
    global counted
    if counted == 7:
        os.kill(os.getpid(), signal.SIGKILL)
    counted += 1
    return update(self, *args)
ModalityIntegrationRate.update = dying
cli.main(sys.argv[1:])
"""


def test_a_killed_run_goes_on_from_its_checkpoint_and_ends_with_the_same_bits(options, tmp_path):
    whole = quiet_run(options, out=tmp_path / "whole")
    killed = in_process(options, "-c", KILLED_AFTER_7)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert json.loads((options.out / "checkpoint" / "rank0.json").read_text())["done"] == 5

    console = Console(record=True, file=io.StringIO())
    assert run(options, console).to_json() == whole.to_json()
    assert "resuming after 5 of 12" in console.export_text()
    assert not (options.out / "checkpoint").exists()


def test_ctrl_c_finishes_the_sample_saves_and_resumes_to_the_same_bits(options, tmp_path, monkeypatch):
    whole = quiet_run(options, out=tmp_path / "whole")

    counted = 0
    update = streaming.ModalityIntegrationRate.update

    def interrupted(self, *args):
        nonlocal counted
        counted += 1
        if counted == 7:
            os.kill(os.getpid(), signal.SIGINT)
        return update(self, *args)

    monkeypatch.setattr(streaming.ModalityIntegrationRate, "update", interrupted)
    with pytest.raises(Interrupted, match="after 7 of 12 samples; the same command resumes") as stopped:
        quiet_run(options)
    assert stopped.value.code == 130
    monkeypatch.undo()
    assert json.loads((options.out / "checkpoint" / "rank0.json").read_text())["done"] == 7
    assert quiet_run(options).to_json() == whole.to_json()


@pytest.fixture
def unfinished(options, monkeypatch):
    """The options of a run that was interrupted and left its checkpoint."""
    update = streaming.ModalityIntegrationRate.update

    def interrupted(self, *args):
        os.kill(os.getpid(), signal.SIGTERM)
        return update(self, *args)

    monkeypatch.setattr(streaming.ModalityIntegrationRate, "update", interrupted)
    with pytest.raises(Interrupted):
        quiet_run(options)
    monkeypatch.undo()
    return options


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"samples": 11}, r"samples was 12, now 11"),
        ({"seed": 3}, r"seed was 0, now 3"),
        ({"text_tokens": 9, "last": "raw"}, r"last was normed, now raw; text-tokens was 20, now 9"),
        ({"dtype": "float64"}, r"dtype was auto, now float64"),
    ],
)
def test_other_arguments_are_refused_by_name_while_a_run_is_unfinished(unfinished, change, message):
    with pytest.raises(InputError, match=message):
        quiet_run(unfinished, **change)


def test_other_data_under_the_same_name_are_refused(unfinished, tmp_path):
    write_images(tmp_path / "images", 7, seed=99)
    with pytest.raises(InputError, match="chosen-samples was"):
        quiet_run(unfinished, images=tmp_path / "images")


@pytest.mark.parametrize("package", ["torch", "transformers", "torchvision", "pillow", "mir-kernels"])
def test_another_version_of_what_the_value_depends_on_is_refused_by_name(unfinished, monkeypatch, package):
    installed = settings.installed
    monkeypatch.setattr(settings, "installed", lambda name: "99.9" if name == package else installed(name))
    with pytest.raises(InputError, match=re.escape(f"{package}-version was {installed(package)}, now 99.9")):
        quiet_run(unfinished)


def test_another_processor_is_refused(unfinished, folders):
    with pytest.raises(InputError, match=r"processor was None, now .*; processor-files was None, now"):
        quiet_run(unfinished, processor=str(folders / "model"))


def test_restart_drops_the_checkpoints_of_all_processes_and_says_how_to_go_on(unfinished, monkeypatch):
    other = unfinished.out / "checkpoint" / "rank1.json"
    other.touch()
    update = streaming.ModalityIntegrationRate.update

    def interrupted(self, *args):
        os.kill(os.getpid(), signal.SIGINT)
        return update(self, *args)

    monkeypatch.setattr(streaming.ModalityIntegrationRate, "update", interrupted)
    with pytest.raises(Interrupted, match="the same command without --restart resumes from there"):
        quiet_run(unfinished, restart=True)
    assert not other.exists()


def test_restart_drops_the_checkpoint(unfinished):
    assert quiet_run(unfinished, seed=3, restart=True).value == pytest.approx(
        quiet_run(unfinished, seed=3, out=unfinished.out / "fresh").value
    )


def test_a_damaged_checkpoint_is_an_error_that_says_how_to_begin_anew(unfinished):
    (state,) = (unfinished.out / "checkpoint").glob("*.safetensors")
    state.write_bytes(state.read_bytes()[:100])
    with pytest.raises(InputError, match="--restart"):
        quiet_run(unfinished)


def test_checkpoints_by_the_clock_take_a_twentieth_of_the_time_at_most():
    now = [0.0]
    due = Due(None, clock=lambda: now[0])
    assert not due(10)
    now[0] = FIRST
    assert due(11)
    with due.writing():
        now[0] += 50.0
    ended = now[0]
    now[0] = ended + 999.0
    assert not due(20)
    now[0] = ended + 1000.0
    assert due(21)
    with due.writing():
        now[0] += 0.001
    assert not due(22)
    now[0] += FIRST
    assert due(23)
    assert [count for count in range(1, 12) if Due(5)(count)] == [5, 10]
