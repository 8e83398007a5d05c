"""`mir compute` in several processes, as started by torchrun."""

import re

import pytest
import torch

from integration.app.compute_runs import in_process, quiet_run
from modality_integration import MIRResult
from modality_integration.app import devices, processes
from modality_integration.app.checkpoint import Passage
from modality_integration.app.errors import InputError


def test_two_processes_give_what_one_does(options, tmp_path):
    one = quiet_run(options, out=tmp_path / "alone")
    both = in_process(
        options, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", "-m", "modality_integration"
    )
    assert both.returncode == 0, both.stderr
    assert both.stdout.count("wrote mir.json") == 1
    two = MIRResult.from_json(options.out / "mir.json")
    assert two.value == pytest.approx(one.value, rel=1e-9)
    assert two.per_layer == pytest.approx(one.per_layer, rel=1e-9)
    assert two.kept == one.kept
    assert not (options.out / "checkpoint").exists()


@pytest.mark.parametrize(
    ("wanted", "gpus", "device", "backend"),
    [
        ("auto", 4, "cuda:3", "cpu:gloo,cuda:nccl"),
        ("cuda", 2, "cuda:1", "cpu:gloo,cuda:nccl"),
        ("cpu", 4, "cpu", "gloo"),
        ("auto", 0, "cpu", "gloo"),
    ],
)
def test_a_process_takes_its_own_gpu_before_it_joins_and_objects_travel_over_gloo(
    monkeypatch, wanted, gpus, device, backend
):
    done = []
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: done.append(str(device)))
    monkeypatch.setattr(processes.dist, "init_process_group", done.append)
    monkeypatch.setattr(processes.dist, "get_rank", lambda: 3)
    monkeypatch.setattr(processes.dist, "destroy_process_group", lambda: done.append("left"))
    picked = devices.pick_device(wanted)
    assert str(picked) == device
    with processes.processes(picked) as place:
        assert place == (3, 4)
    assert done == [*([device] if device != "cpu" else []), backend, "left"]


def raise_if(error):
    if error is not None:
        raise error


@pytest.mark.parametrize(("other", "expected"), [(Passage(2, 3), Passage(2, 5)), (Passage(1, 9), Passage())])
def test_processes_that_were_killed_in_different_passes_begin_anew_together(monkeypatch, other, expected):
    def gather(passages, own):
        passages[:] = [own, other]

    monkeypatch.setattr(processes.dist, "all_gather_object", gather)
    assert processes.agreed(Passage(2, 5), world=2) == expected


@pytest.mark.parametrize(
    "mine", [None, InputError("out: it is full"), OSError(28, "No space left", "mir.json")], ids=repr
)
@pytest.mark.parametrize(
    "other", [None, ("InputError", "images: nowhere does not exist"), ("MemoryError", "")], ids=str
)
def test_what_one_process_refuses_stops_all_and_each_says_why(monkeypatch, mine, other):
    def gather(failures, own):
        failures[:] = [own, other]

    monkeypatch.setattr(processes.dist, "all_gather_object", gather)
    if mine is other is None:
        with processes.all_or_none(world=2):
            pass
        return
    why = str(mine) if mine else f"process 1: {other[1] or other[0]}"
    refused = pytest.raises(type(mine) if mine else InputError, match=f"^{re.escape(why)}$")
    with refused, processes.all_or_none(world=2):
        raise_if(mine)


def test_one_process_alone_gathers_nothing(monkeypatch):
    monkeypatch.setattr(processes.dist, "all_gather_object", lambda *a: pytest.fail("gathered"))
    with processes.all_or_none(world=1):
        pass
    with pytest.raises(ValueError, match="a bug"), processes.all_or_none(world=1):
        raise ValueError("a bug")


@pytest.mark.slow
def test_a_folder_with_results_stops_every_process(options):
    options.out.mkdir()
    (options.out / "mir.json").write_text("of another run")
    both = in_process(
        options, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", "-m", "modality_integration"
    )
    assert both.returncode == 1
    assert both.stderr.count("already holds results (mir.json)") == 2
    assert (options.out / "mir.json").read_text() == "of another run"
