"""examples/frechet_backend.py: both tools before and after the swap."""

import importlib
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
FILE = ROOT / "examples" / "frechet_backend.py"
STANDINS = Path(__file__).parent / "standins"


TOOLS = {"torchmetrics.image.fid": (), "pytorch_fid.fid_score": (str(STANDINS),)}


@pytest.fixture(scope="module")
def values():
    """{tool: (original value, value after the swap)}; pytorch-fid runs with a stand-in for torchvision."""
    found = {}
    for tool, folders in TOOLS.items():
        path = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), *folders]))
        command, env = [sys.executable, FILE], {**os.environ, "PYTHONPATH": path}
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=env)
        (line,) = re.findall(rf"^{tool}: (\S+) in \S+ s, after the swap (\S+) in \S+ s$", done.stdout, re.MULTILINE)
        found[tool] = tuple(map(float, line))
    return found


@pytest.mark.parametrize("tool", TOOLS)
def test_each_tool_gives_its_own_value_again(values, tool):
    own, ours = values[tool]
    assert own > 1
    assert ours == pytest.approx(own, rel=1e-5)


def test_both_tools_have_the_same_value(values):
    ours = [ours for _, ours in values.values()]
    assert ours[0] == pytest.approx(ours[1], rel=1e-5)


@pytest.fixture
def example(monkeypatch):
    spec = importlib.util.spec_from_file_location("frechet_backend", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_what_is_swapped_is_what_computes_and_a_reset_forgets(example, monkeypatch):
    fid = importlib.import_module("torchmetrics.image.fid")
    kind = fid.FrechetInceptionDistance
    for name in ("update", "compute", "reset"):
        monkeypatch.setattr(kind, name, getattr(kind, name))  # restored after the test
    monkeypatch.setattr(fid, "_compute_fid", None)  # torchmetrics' own computation would fail
    example.swap_torchmetrics(fid)
    metric = kind(feature=example.Features())
    sets = [example.pictures(seed) for seed in (1, 2, 3)]
    with torch.no_grad():
        metric.update(sets[0], real=True)
        metric.update(sets[1], real=False)
        first = metric.compute()
        metric.reset()
        metric.update(sets[0], real=True)
        metric.update(sets[2], real=False)
    other = metric.compute()
    assert other != first
    assert other == pytest.approx(example.by_torchmetrics(fid, [sets[0], sets[2]]), rel=1e-9)
