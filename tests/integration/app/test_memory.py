"""Memory is checked once a sample has shown how much it needs; runs that will not fit are refused with advice."""

import io
import math
import re
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from integration.app.compute_runs import quiet_run
from integration.metric.streams import fed, sample
from modality_integration.app import compute, devices
from modality_integration.app.errors import InputError
from modality_integration.metric.host_memory import HostMemory

CPU = torch.device("cpu")
SAMPLES = 100


def metric_after(count=1, **options):
    """A metric with a small `hold`, so that accumulators are created."""
    return fed([sample(seed, batch=1) for seed in range(count)], **{"hold": 60, "samples": SAMPLES, **options})


@pytest.fixture
def free(monkeypatch):
    """Set the number of free bytes."""
    return lambda count: monkeypatch.setattr(devices, "free_memory", lambda: count)


def gb(count):
    return f"{count / 1e9:.1f} GB"


def test_what_just_fits_is_let_pass_and_a_byte_less_is_refused(free):
    metric = metric_after(groups=5)
    needed = metric.memory_to_come(SAMPLES).devices[CPU]
    free(needed)
    assert devices.check_memory(metric, SAMPLES) == []
    free(needed - 1)
    with pytest.raises(InputError, match=r"memory: .* 0\.0 GB more on cpu, but only 0\.0 GB is free"):
        devices.check_memory(metric, SAMPLES)


def test_the_refusal_names_what_is_needed_and_what_is_there(free, monkeypatch):
    metric = metric_after()
    monkeypatch.setattr(
        metric, "memory_to_come", lambda samples, groups=None: SimpleNamespace(devices={CPU: 12.3e9}, host=0)
    )
    free(4.5e9)
    with pytest.raises(InputError) as refused:
        devices.check_memory(metric, SAMPLES)
    said = str(refused.value)
    assert "need 12.3 GB more on cpu, but only 4.5 GB is free" in said
    assert "no smaller setting fits: load smaller weights with --dtype bfloat16" in said


def test_the_options_it_names_do_fit(free):
    metric = metric_after(groups=5)
    without = metric.memory_to_come(SAMPLES, groups=0).devices[CPU]
    free(without)
    with pytest.raises(InputError, match=r"--groups 0 \(no standard error\) needs"):
        devices.check_memory(metric, SAMPLES)
    free(without - 1)
    with pytest.raises(InputError) as refused:
        devices.check_memory(metric, SAMPLES)
    assert "--groups 0" not in str(refused.value)
    fewer = int(re.search(r"--samples (\d+) fits", str(refused.value))[1])
    assert 1 < fewer < SAMPLES
    assert devices.check_memory(metric, fewer) == []


def test_nothing_is_said_where_the_free_memory_is_not_known(free):
    free(None)
    assert devices.check_memory(metric_after(groups=5), SAMPLES) == []
    assert devices.free_bytes(torch.device("mps")) is None


def test_where_only_the_hosts_part_is_short_a_note_says_so(free, monkeypatch):
    metric = metric_after(0, groups=5)
    metric._host = HostMemory(of=("cpu",))
    metric.update(*sample(0, batch=1))
    to_come = metric.memory_to_come(SAMPLES)
    assert to_come.host > 0
    monkeypatch.setattr(devices, "free_bytes", lambda device: math.inf)
    free(to_come.host)
    assert devices.check_memory(metric, SAMPLES) == []
    free(to_come.host - 1)
    (note,) = devices.check_memory(metric, SAMPLES)
    assert note.startswith(
        "the covariances of finished groups of samples may need 0.0 GB of main memory, but only 0.0 GB"
    )
    assert "--groups 0 needs none (no standard error)" in note


def test_a_gpu_has_what_torch_keeps_free_too_but_for_what_a_pass_takes(monkeypatch):
    device = torch.device("cuda", 0)
    for name, value in (("memory_reserved", 50), ("max_memory_allocated", 30), ("mem_get_info", (1000, 4000))):
        monkeypatch.setattr(torch.cuda, name, lambda asked, value=value: value)
    assert devices.free_bytes(device) == 1020


def test_compute_stops_after_the_first_sample_and_a_resumed_run_after_its_first(options, monkeypatch):
    asked = []

    def check(metric, samples):
        asked.append((metric._samples, samples))
        return ["of memory"]

    monkeypatch.setattr(compute, "check_memory", check)
    console = Console(record=True, file=io.StringIO())
    compute.run(options, console)
    assert asked == [(1, options.samples)]
    assert "note of memory" in console.export_text()
    monkeypatch.undo()
    monkeypatch.setattr(devices, "free_memory", lambda: 10)
    with pytest.raises(InputError, match="memory: judging from the samples so far"):
        quiet_run(options, overwrite=True)
