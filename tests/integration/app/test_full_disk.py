"""Full disks, missing folders, failing plots: the value is printed, and files already on disk stay."""

import io
import json
import os
import shutil
import signal
import sys

import pytest
import torch
from rich.console import Console

from integration.app.compute_runs import in_process, quiet_run
from integration.full_disk import full_disk
from integration.results import result
from modality_integration import MIRResult, ModalityIntegrationRate, save_states
from modality_integration.app import compute, results, states, study
from modality_integration.app.checkpoint import Checkpoint, Passage
from modality_integration.app.errors import InputError, Interrupted
from modality_integration.app.options import ComputeOptions, StatesOptions
from modality_integration.app.results import NotWritten, draw, printed_first
from modality_integration.metric import streaming
from modality_integration.metric.files import named_errors, write_json, written_whole

REFUSED = "File too large"  # the system's message
MASK = torch.arange(50) < 20


def sample(seed=0, layers=2):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(50, 8, generator=generator) for _ in range(layers)], MASK, ~MASK


def metric():
    counted = ModalityIntegrationRate()
    counted.update(*sample())
    return counted


def recording():
    return Console(record=True, file=io.StringIO(), width=300)


WRITERS = {
    "json": lambda path: write_json(path, list(range(99))),
    "result": lambda path: result().to_json(path),
    "state of a metric": lambda path: metric().save(path),
    "hidden states": lambda path: save_states(path, *sample()),
    "rows of a study": lambda path: study.write_rows(path, [{"layer": i, "distance": 0.5} for i in range(99)]),
}


@pytest.mark.parametrize("writer", WRITERS)
def test_what_a_full_disk_does_not_take_is_named_and_the_file_before_it_stays(tmp_path, writer):
    path = tmp_path / "file"
    path.write_text("before")
    with full_disk(), pytest.raises(OSError, match=REFUSED) as refused:
        WRITERS[writer](path)
    assert refused.value.filename == str(path)
    assert os.listdir(tmp_path) == ["file"]
    assert path.read_text() == "before"


def test_an_error_about_another_file_keeps_its_name(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"other\.txt"), written_whole(tmp_path / "file"):
        (tmp_path / "other.txt").read_text()
    with pytest.raises(OSError, match=r"^the output: no number$"), named_errors("the output"):
        raise OSError("no number")
    with pytest.raises(ValueError, match=r"^no file's$"), named_errors("the output"):
        raise ValueError("no file's")


@pytest.fixture
def saved(tmp_path):
    save_states(tmp_path / "states.safetensors", *sample())
    return tmp_path / "states.safetensors"


def run_of(options, saved, console, shown):
    return {
        "compute": lambda: compute.run(options, console, shown),
        "states": lambda: states.run([saved], StatesOptions(out=options.out, groups=0), console, shown),
        "study": lambda: study.run("layers", options, console, results=shown),
    }


@pytest.mark.parametrize("command", ["compute", "states", "study"])
def test_the_value_is_printed_before_the_disk_refuses_it(options, saved, command):
    console, shown = recording(), recording()
    with full_disk(), pytest.raises(NotWritten, match=f"could not be written: .*{REFUSED}") as refused:
        run_of(options, saved, console, shown)[command]()
    printed, file = shown.export_text(), "study_layers.csv" if command == "study" else "mir.json"
    assert str(options.out / file) in str(refused.value)
    if command == "study":
        assert f"{refused.value.result[-1]['distance']:.4g}" in printed
    else:
        assert f"MIR {refused.value.result.value:.4f}" in printed
    assert "wrote" not in printed
    assert not options.out.exists()


@pytest.mark.parametrize("file", ["mir.json", "run.json"])
def test_a_result_that_was_not_written_is_finished_by_the_same_command(options, monkeypatch, file):
    blocked = options.out / f".{file}.partial"
    blocked.mkdir(parents=True)
    with pytest.raises(NotWritten, match=rf"{file}: .*; the same command resumes after 12 samples$") as refused:
        quiet_run(options)
    blocked.rmdir()
    monkeypatch.setattr(streaming.ModalityIntegrationRate, "update", lambda *a: pytest.fail("measured again"))
    assert quiet_run(options).to_json() == refused.value.result.to_json()
    assert {path.name for path in options.out.iterdir()} == {"mir.json", "run.json", "layers.png"}


def test_a_result_without_its_record_and_without_a_checkpoint_says_how_to_begin_anew(options, monkeypatch):
    blocked = options.out / ".run.json.partial"
    blocked.mkdir(parents=True)
    with monkeypatch.context() as patch:
        patch.setattr(Checkpoint, "save", lambda *a: (_ for _ in ()).throw(OSError(28, "No space left", "state")))
        with pytest.raises(NotWritten, match=r"run\.json: .*the same command starts over with --overwrite$"):
            quiet_run(options, checkpoint_every=None)
    blocked.rmdir()
    with pytest.raises(InputError, match="already holds results"):
        quiet_run(options)
    assert quiet_run(options, overwrite=True).value


@pytest.fixture
def at_sample(monkeypatch):
    """at_sample(7, act) calls `act` when the seventh sample arrives."""
    counted, update = 0, streaming.ModalityIntegrationRate.update

    def at(number, act):
        def counting(self, *args):
            nonlocal counted
            counted += 1
            if counted == number:
                act()
            return update(self, *args)

        monkeypatch.setattr(streaming.ModalityIntegrationRate, "update", counting)

    return at


def test_a_checkpoint_that_fails_is_a_note_and_the_one_before_it_stays(options, at_sample, tmp_path, monkeypatch):
    whole = quiet_run(options, out=tmp_path / "whole")
    blocked = options.out / "checkpoint" / ".rank0-pass1-000010.safetensors.partial"

    def crash():
        raise MemoryError

    at_sample(7, lambda: blocked.mkdir())
    console = recording()
    monkeypatch.setattr(compute, "finish", lambda metric: crash())
    with pytest.raises(MemoryError):
        compute.run(options, console)
    (note,) = [line for line in console.export_text().splitlines() if "checkpoint after" in line]
    assert "the checkpoint after 10 samples could not be written" in note
    assert "resumes after 5 samples" in note
    assert json.loads((options.out / "checkpoint" / "rank0.json").read_text())["done"] == 5
    monkeypatch.undo()
    blocked.rmdir()
    assert quiet_run(options).to_json() == whole.to_json()


@pytest.mark.parametrize(("number", "way_on"), [(3, "starts over"), (7, "resumes after 5 samples")])
def test_ctrl_c_on_a_full_disk_says_what_is_kept(options, at_sample, number, way_on):
    def interrupt():
        os.kill(os.getpid(), signal.SIGINT)
        (options.out / "checkpoint" / f".rank0-pass1-{number:06d}.safetensors.partial").mkdir(parents=True)

    at_sample(number, interrupt)
    with pytest.raises(Interrupted, match=f"after {number} of 12 samples; the checkpoint .* could not .*{way_on}$"):
        quiet_run(options)


def test_ctrl_c_before_the_result_says_what_is_kept(options, monkeypatch):
    def interrupted(metric):
        raise KeyboardInterrupt

    monkeypatch.setattr(compute, "finish", interrupted)
    with pytest.raises(Interrupted, match=r"after all 12 samples, before their result; .* resumes after 10 samples"):
        quiet_run(options)


def test_a_checkpoint_leaves_nothing_half_written(tmp_path):
    checkpoint = Checkpoint(tmp_path / "checkpoint", {"seed": 0})
    with full_disk():
        assert REFUSED in checkpoint.try_to_save(metric(), Passage(1, 5))
    assert os.listdir(tmp_path) == []
    assert checkpoint.try_to_save(metric(), Passage(1, 5)) == ""
    kept = sorted(os.listdir(tmp_path / "checkpoint"))
    state = (tmp_path / "checkpoint" / kept[0]).stat().st_size
    with full_disk(state):  # the state fits on the disk, the JSON that names it does not
        (tmp_path / "checkpoint" / ".rank0.json.partial").mkdir()
        assert "rank0.json" in checkpoint.try_to_save(metric(), Passage(1, 6))
    (tmp_path / "checkpoint" / ".rank0.json.partial").rmdir()
    assert sorted(os.listdir(tmp_path / "checkpoint")) == kept
    assert Checkpoint(tmp_path / "checkpoint", {"seed": 0}).passage() == Passage(1, 5)


FAULTS = [OSError(28, "No space left on device"), RuntimeError("no fonts\nat all"), ModuleNotFoundError("matplotlib")]


@pytest.mark.parametrize("fault", FAULTS, ids=repr)
def test_a_picture_that_cannot_be_drawn_costs_no_result(options, monkeypatch, fault):
    def failing(self, path=None, ax=None):
        raise fault

    monkeypatch.setattr(MIRResult, "plot", failing)
    console, shown = recording(), recording()
    found = compute.run(ComputeOptions(**{**vars(options), "samples": 4}), console, shown)
    assert MIRResult.from_json(options.out / "mir.json").value == found.value
    assert f"note the picture could not be drawn: {options.out / 'layers.png'}" in console.export_text()
    assert f"wrote mir.json and run.json in {options.out}" in shown.export_text()


class Broken(io.StringIO):
    """A pipe without a reader, or a file on a full disk."""

    def __init__(self, error):
        super().__init__()
        self.error = error

    def write(self, text):
        raise self.error


BROKEN = [OSError(28, "No space left on device"), BrokenPipeError(32, "Broken pipe")]


@pytest.mark.parametrize("error", BROKEN, ids=str)
def test_what_cannot_be_printed_is_written_all_the_same(options, error, monkeypatch):
    shown = Console(file=Broken(error))
    monkeypatch.setattr(shown, "on_broken_pipe", sys.exit, raising=False)  # rich's would close the tests' stdout
    with pytest.raises((OSError, SystemExit)) as failed:
        compute.run(ComputeOptions(**{**vars(options), "samples": 4}), Console(quiet=True), shown)
    if failed.type is not SystemExit:
        assert failed.value.filename == "the standard output"
    assert MIRResult.from_json(options.out / "mir.json").value
    assert not (options.out / "checkpoint").exists()


def test_printing_comes_first_and_its_failure_last():
    done = []

    def show():
        done.append("printed")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), printed_first(show):
        done.append("written")
    assert done == ["printed", "written"]
    with pytest.raises(ValueError, match="a bug"), printed_first(lambda: int("a bug")):
        pytest.fail("a bug is none of these")


def test_a_folder_that_was_deleted_meanwhile_is_made_again(options, at_sample):
    at_sample(7, lambda: shutil.rmtree(options.out))
    found = quiet_run(options)
    assert MIRResult.from_json(options.out / "mir.json") == found


def test_a_checkpoint_that_cannot_be_removed_is_a_note(options, monkeypatch):
    def refused(self, **which):
        raise OSError(30, "Read-only file system", "rank0.json")

    monkeypatch.setattr(Checkpoint, "clear", refused)
    console = recording()
    compute.run(ComputeOptions(**{**vars(options), "samples": 4}), console)
    assert "its checkpoint could not be removed: rank0.json: Read-only file system" in console.export_text()


def test_a_picture_is_named_once_it_is_there(tmp_path):
    console = recording()
    assert draw(lambda file: file.touch(), tmp_path / "layers.png", console) == ["layers.png"]
    assert draw(lambda file: results.missing, tmp_path / "layers.png", console) == []
    assert "AttributeError" in console.export_text()


ON_A_FULL_DISK = """
import resource, sys
from modality_integration.app import cli
resource.setrlimit(resource.RLIMIT_FSIZE, (200, 200))
cli.main(sys.argv[1:])
"""


def test_the_command_prints_the_value_and_ends_in_one_line_that_names_the_file(options):
    refused = in_process(options, "-c", ON_A_FULL_DISK)
    assert refused.returncode == 1
    assert "MIR " in refused.stdout
    last = refused.stderr.strip().splitlines()[-1]
    assert last.startswith(f"the result could not be written: {options.out / 'mir.json'}: {REFUSED}; ")
    assert "Traceback" not in refused.stderr
