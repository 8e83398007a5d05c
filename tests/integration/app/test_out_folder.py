"""`--out`: results there are replaced only on request, and by one run at a time."""

import errno
import io
import json
import os
import signal
import socket
import subprocess
import sys

import pytest
import torch
from rich.console import Console

from integration.app.compute_runs import in_process, quiet_run
from integration.saved_models import write_images
from modality_integration import MIRResult, save_states
from modality_integration.app import compute, demo, out_folder, states, study
from modality_integration.app.errors import InputError, Interrupted, require_unused
from modality_integration.app.options import ComputeOptions, DemoOptions, StatesOptions
from modality_integration.app.out_folder import LOCK, MEASUREMENT, require_empty, taken
from modality_integration.metric import streaming

QUIET = Console(quiet=True)


@pytest.fixture
def nothing_is_read(monkeypatch):
    """Fail on anything that a run would read or load first."""
    for module, name in ((compute, "choose"), (study, "choose"), (states, "mir_of_states"), (demo, "build")):
        monkeypatch.setattr(module, name, lambda *a, **k: pytest.fail("read before it was refused"))
    monkeypatch.setattr(demo, "check_installed", lambda options: None)


@pytest.fixture
def saved(tmp_path):
    """A file of hidden states."""
    mask = torch.arange(50) < 20
    save_states(tmp_path / "states.safetensors", [torch.randn(50, 8, generator=torch.manual_seed(0))], mask, ~mask)
    return tmp_path / "states.safetensors"


def runs(options, saved):
    """Every command that fills a folder, on the folder of `options`: name to a function of changed options."""
    return {
        "compute": lambda **changes: quiet_run(options, **changes),
        "study": lambda **changes: study.run("layers", ComputeOptions(**{**vars(options), **changes}), QUIET),
        "states": lambda **changes: states.run([saved], StatesOptions(out=options.out, **changes), QUIET),
        "demo": lambda **changes: demo.run(DemoOptions(out=options.out, **changes), QUIET),
    }


HELD = [(command, name) for command in ("compute", "states", "demo") for name in MEASUREMENT]
HELD += [("study", f"study_layers.{suffix}") for suffix in ("csv", "png", "svg", "pdf")]


@pytest.mark.usefixtures("nothing_is_read")
@pytest.mark.parametrize(("command", "name"), HELD)
def test_a_folder_that_holds_results_is_refused_before_anything_is_read(options, saved, command, name):
    options.out.mkdir()
    (options.out / name).write_text("of another run")
    with pytest.raises(InputError, match=rf"out: .* already holds results \({name}\); .*--out.*--overwrite"):
        runs(options, saved)[command]()
    assert [path.name for path in options.out.iterdir()] == [name]
    assert (options.out / name).read_text() == "of another run"


@pytest.mark.parametrize("command", ["compute", "states"])
def test_overwriting_leaves_the_new_result_alone_in_the_folder_and_what_is_no_result(options, saved, command):
    options.out.mkdir()
    for name in (*MEASUREMENT, "study_layers.csv", "notes.txt"):
        (options.out / name).write_text("of another run")
    result = runs(options, saved)[command](overwrite=True)
    assert MIRResult.from_json(options.out / "mir.json") == result
    fresh = {"mir.json", "layers.png"} | ({"run.json"} if command == "compute" else set())
    assert {path.name for path in options.out.iterdir()} == fresh | {"study_layers.csv", "notes.txt"}
    for name in fresh:
        assert b"of another run" not in (options.out / name).read_bytes()
    assert (options.out / "notes.txt").read_text() == "of another run"


def test_a_study_goes_beside_a_result_and_another_study(options, saved):
    quiet_run(options)
    before = (options.out / "mir.json").read_text()
    runs(options, saved)["study"]()
    study.run("normalization", options, QUIET)
    assert {"mir.json", "study_layers.csv", "study_normalization.csv"} <= {p.name for p in options.out.iterdir()}
    assert (options.out / "mir.json").read_text() == before


@pytest.mark.parametrize("changes", [{}, {"checkpoint_every": 3}, {"plots": "svg"}], ids=str)
def test_the_same_command_again_is_told_that_it_is_done(options, changes):
    result = quiet_run(options)
    with pytest.raises(InputError, match="already holds the result of exactly these options"):
        quiet_run(options, **changes)
    assert quiet_run(options, overwrite=True).to_json() == result.to_json()


@pytest.mark.parametrize("record", ["{", "[]", "{}", None])
def test_a_record_that_says_nothing_is_no_reason_to_take_it_for_the_same_command(options, record):
    quiet_run(options)
    (options.out / "run.json").unlink()
    if record is not None:
        (options.out / "run.json").write_text(record)
    with pytest.raises(InputError, match="already holds results"):
        quiet_run(options)


@pytest.fixture
def interrupted(options, monkeypatch):
    """A function that runs `options` and is interrupted after three samples."""
    counted, update = 0, streaming.ModalityIntegrationRate.update

    def interrupting(self, *args):
        nonlocal counted
        counted += 1
        if counted == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return update(self, *args)

    def run(**changes):
        with monkeypatch.context() as patch:
            patch.setattr(streaming.ModalityIntegrationRate, "update", interrupting)
            with pytest.raises(Interrupted):
                quiet_run(options, **changes)

    return run


@pytest.mark.parametrize("again", [{}, {"overwrite": True}], ids=["without --overwrite", "with it"])
def test_an_unfinished_run_goes_on_beside_the_result_that_it_may_overwrite(options, interrupted, tmp_path, again):
    whole = quiet_run(options, out=tmp_path / "whole")
    quiet_run(options, seed=5)
    older = (options.out / "mir.json").read_text()
    interrupted(overwrite=True)
    assert (options.out / "mir.json").read_text() == older
    console = Console(record=True, file=io.StringIO())
    assert compute.run(ComputeOptions(**{**vars(options), **again}), console).to_json() == whole.to_json()
    assert "resuming after 3 of 12 samples" in console.export_text()
    assert MIRResult.from_json(options.out / "mir.json") == whole


def test_restart_drops_the_checkpoint_and_no_result(options, interrupted):
    quiet_run(options, seed=5)
    interrupted(overwrite=True)
    with pytest.raises(InputError, match="already holds results"):
        quiet_run(options, restart=True)
    assert (options.out / "checkpoint").exists()


@pytest.mark.usefixtures("nothing_is_read")
@pytest.mark.parametrize("command", ["states", "demo"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_no_other_command_writes_where_an_unfinished_run_would_go_on(options, saved, monkeypatch, command, overwrite):
    checkpoint = options.out / "checkpoint"
    checkpoint.mkdir(parents=True)
    (checkpoint / "rank1.json").touch()
    with pytest.raises(InputError, match=r"holds an unfinished run of mir compute; .*checkpoint"):
        runs(options, saved)[command](overwrite=overwrite)
    assert (checkpoint / "rank1.json").exists()


HOLDER = """
import sys
from pathlib import Path
from rich.console import Console
from modality_integration.app.out_folder import taken
with taken(Path(sys.argv[1]), Console(stderr=True)):
    print("taken", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holder(options):
    """Another process that holds the folder's lock."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, options.out], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "taken\n"
    yield process
    process.kill()
    process.wait()


@pytest.mark.usefixtures("nothing_is_read")
@pytest.mark.parametrize("command", ["compute", "study", "states", "demo"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_that_another_run_is_writing_into_is_refused_with_that_run(options, saved, holder, command, overwrite):
    with pytest.raises(InputError, match=rf"another run .* \(process {holder.pid} on {socket.gethostname()}\); wait"):
        runs(options, saved)[command](overwrite=overwrite)


def test_a_killed_run_leaves_the_folder_free_and_a_run_leaves_no_lock(options, holder):
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert (options.out / LOCK).exists()
    with taken(options.out, QUIET):
        assert (options.out / LOCK).read_text() == f"process {os.getpid()} on {socket.gethostname()}"
        with pytest.raises(InputError, match="another run is writing"), taken(options.out, QUIET):
            pass
    assert not options.out.exists() or LOCK not in os.listdir(options.out)
    with taken(options.out, QUIET):
        pass


def test_a_second_command_in_the_same_folder_is_one_line_and_exit_code_1(options, holder):
    refused = in_process(options, "-m", "modality_integration")
    assert refused.returncode == 1
    assert len(refused.stderr.strip().splitlines()) == 1
    assert os.listdir(options.out) == [LOCK]


def test_the_lock_that_was_removed_while_this_run_waited_for_it_is_no_lock(options, monkeypatch):
    flock, removed = out_folder.fcntl.flock, []

    def after_the_run_before(descriptor, how):
        flock(descriptor, how)
        if not removed:  # the previous run had the same file open and has just ended
            removed.append((options.out / LOCK).unlink())

    monkeypatch.setattr(out_folder.fcntl, "flock", after_the_run_before)
    with taken(options.out, QUIET):
        assert removed
        with pytest.raises(InputError, match="another run is writing"), taken(options.out, QUIET):
            pass


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_without_locks_a_run_goes_on_with_a_note(options, monkeypatch, number):
    def none(descriptor, how):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(out_folder.fcntl, "flock", none)
    console = Console(record=True, file=io.StringIO(), width=300)
    with taken(options.out, console):
        assert os.listdir(options.out) == []
    assert "cannot be locked" in console.export_text()


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_disk_that_is_full_from_the_start_is_a_note(options, monkeypatch, number):
    opened = os.open

    def full(path, *args, **kwargs):
        if str(path).endswith(LOCK):
            raise OSError(number, os.strerror(number), str(path))
        return opened(path, *args, **kwargs)

    monkeypatch.setattr(out_folder.os, "open", full)
    console = Console(record=True, file=io.StringIO(), width=300)
    with taken(options.out, console):
        pass
    assert f"{options.out / LOCK}: {os.strerror(number)}" in console.export_text()


def test_a_refused_run_leaves_no_folder_behind(options, tmp_path):
    with pytest.raises(InputError, match="no usable image"):
        quiet_run(options, images=options.text, out=tmp_path / "a" / "b")
    assert not (tmp_path / "a").exists()
    (tmp_path / "mine").mkdir()
    with pytest.raises(InputError, match="no usable image"):
        quiet_run(options, images=options.text, out=tmp_path / "mine")
    assert os.listdir(tmp_path / "mine") == []


@pytest.mark.parametrize(
    ("names", "said"), [(["a.png"], "a.png already exists"), (["a.png", "b.html"], "b.html already exist")]
)
def test_files_of_a_person_are_not_replaced_unasked(tmp_path, names, said):
    files = [tmp_path / name for name in names]
    require_unused(files, overwrite=False)
    for file in files:
        file.touch()
    with pytest.raises(InputError, match=rf"^out: .*{said}; choose another --out, or add --overwrite"):
        require_unused(files, overwrite=False)
    require_unused(files, overwrite=True)


@pytest.mark.usefixtures("nothing_is_read")
def test_a_demo_saves_its_model_into_an_empty_folder_alone(tmp_path):
    save = tmp_path / "model"
    write_images(save, 1)
    with pytest.raises(InputError, match=r"save: .*model already holds files; choose another --save"):
        demo.run(DemoOptions(out=tmp_path / "out", save=save), QUIET)
    assert not (tmp_path / "out").exists()
    (tmp_path / "decoder").mkdir()
    again = DemoOptions(out=tmp_path / "out", save=tmp_path / "decoder", language_model=tmp_path / "decoder")
    with pytest.raises(InputError, match=r"save: .*decoder is the --language-model"):
        demo.run(again, QUIET)
    require_empty(save, overwrite=True, option="save")
    require_empty(tmp_path / "nowhere", overwrite=False, option="save")


@pytest.mark.parametrize("command", ["states", "demo", "study"])
def test_commands_of_one_process_refuse_several(options, saved, monkeypatch, command):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match=f"{command}: runs in one process only; start it without torchrun"):
        runs(options, saved)[command]()


def test_the_record_says_what_was_asked_and_how_many_groups_the_error_is_of(options):
    quiet_run(options, groups=4)
    record = json.loads((options.out / "run.json").read_text())
    assert record["groups"] == 4
    assert record["options"]["text"] == str(options.text)
    assert record["options"]["groups"] == 4
    assert [set(card) for card in record["samples"]] == [{"name", "text", "jpeg"}] * 12
