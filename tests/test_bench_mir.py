"""The end-to-end benchmark: all rivals compute the same value, and one that raises does not affect the others' rows."""

import subprocess
import sys

import pytest
import torch

import bench_mir
import harness
import recipes

SHAPE = {"layers": 2, "hidden": 12, "samples": 3, "vision": 30, "text": 20}


@pytest.fixture(scope="module")
def data():
    return bench_mir.samples(**SHAPE, device="cpu")


def test_states_are_bfloat16_of_every_layer_with_masks_that_leave_out_the_first_token(data):
    assert len(data) == 3
    layers, vision, text = data[0]
    assert [(layer.shape, layer.dtype) for layer in layers] == [((51, 12), torch.bfloat16)] * 2
    assert (int(vision.sum()), int(text.sum()), int((vision & text).sum())) == (30, 20, 0)
    assert not vision[0]
    assert not text[0]
    assert not torch.equal(layers[0], data[1][0][0])


def test_every_rival_computes_the_same_number_but_the_published_fast_mode(data):
    values = {name: run(data) for name, run in bench_mir.RIVALS.items()}
    reference = values["torch float64, eigh"]
    wrong = [name for name, value in values.items() if not abs(value - reference) < 1e-5]
    assert wrong == ["published, fast"]


def test_recipes_take_one_matrix_or_a_batch():
    factors = torch.randn(2, 3, 4, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    a, b = factors @ factors.mT
    truth = torch.linalg.eigvals(a @ b).sqrt().real.sum(-1)
    for trace in (recipes.eigh_trace, recipes.torchmetrics_trace, recipes.published_accurate_trace):
        torch.testing.assert_close(trace(a, b).double(), truth, rtol=1e-4, atol=0)
        torch.testing.assert_close(trace(a[0], b[0]).double(), truth[0], rtol=1e-4, atol=0)
    coupled = recipes.coupled_newton_schulz_trace(a, b, iterations=30).double()
    torch.testing.assert_close(coupled, truth, rtol=1e-2, atol=0)
    assert recipes.published_fast_trace(a, b).shape == truth.shape


def test_a_rival_that_raises_has_no_peak_and_the_others_have_rows(monkeypatch, tmp_path, capsys):
    def singular(data):
        raise torch.linalg.LinAlgError("The diagonal element 3 is zero")

    def ended(command, **_):
        assert command[command.index("--device") + 1] == "cpu"
        failed = command[-1] == "published, fast"
        return subprocess.CompletedProcess(command, int(failed), '{"peak_mb": 2.5}\n', "LinAlgError: singular\n")

    monkeypatch.setitem(bench_mir.RIVALS, "published, fast", singular)
    monkeypatch.setattr(bench_mir.subprocess, "run", ended)
    monkeypatch.setattr(harness, "environment", lambda device: ("a CPU", 1, "2", "3", "abc"))
    words = [word for name, value in SHAPE.items() for word in (f"--{name}", str(value))]
    out = tmp_path / "mir.csv"
    monkeypatch.setattr(sys, "argv", ["bench_mir.py", "--device", "cpu", "--seconds", "0", "--out", str(out), *words])
    assert bench_mir.main() == 0  # none of ours
    rows = {row["rival"]: row for row in harness.read_csv(out)}
    assert set(rows) == set(bench_mir.RIVALS)
    assert rows["published, fast"]["failure"].endswith("The diagonal element 3 is zero")
    assert (rows["published, fast"]["p50_ms"], rows["published, fast"]["peak_mb"]) == (None, None)
    assert all(row["p50_ms"] > 0 and row["peak_mb"] == 2.5 for name, row in rows.items() if name != "published, fast")
    assert "published, fast: no peak memory: LinAlgError: singular" in capsys.readouterr().out
