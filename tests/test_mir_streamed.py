"""The benchmark with generated hidden states: correct values, times scaled as stated, the stages that ran."""

import contextlib
import sys
import time

import pytest
import torch

import bench_mir
import harness
import mir_streamed
import stages

SHAPE = mir_streamed.Shape(layers=6, hidden=12, samples=10, vision=30, text=20, measured=2)
CEILINGS = {"copy_gbs": 10.0, "matmul_gflops": 100.0, "float64_gflops": 50.0}
OPEN = contextlib.nullcontext()


@pytest.fixture(autouse=True)
def known_machine(monkeypatch):
    monkeypatch.setattr(harness, "ceilings", lambda device: CEILINGS)


def test_the_reference_of_a_stored_layer_is_the_other_benchmarks():
    data = SHAPE.stored()
    assert len(data) == 10
    assert mir_streamed.reference(data) == pytest.approx(bench_mir.RIVALS[bench_mir.REFERENCE](data), abs=1e-12)


@pytest.mark.parametrize("name", mir_streamed.RUNS)
def test_a_run_gives_the_value_of_its_layers_and_counts_time_apart_from_generation(name):
    one = mir_streamed.Shape(**{**vars(SHAPE), "measured": 1})
    run = mir_streamed.streamed(one, mir_streamed.RUNS[name], OPEN)
    assert run.value == pytest.approx(mir_streamed.reference(one.stored()), abs=1e-4)
    assert run.ms > 0
    assert run.generating_ms > 0
    assert mir_streamed.streamed(SHAPE, mir_streamed.RUNS[name], OPEN).value > run.value  # of two layers


@pytest.mark.parametrize("measured", [0, 7])
def test_layers_that_are_not_there_are_not_measured(measured):
    with pytest.raises(ValueError, match=f"measured-layers: expected 1 to 6, the number of layers, got {measured}"):
        mir_streamed.Shape(**{**vars(SHAPE), "measured": measured})


def test_times_are_those_of_all_layers_and_the_names_say_so(monkeypatch):
    run = mir_streamed.Streamed(1.0, ms=50.0, generating_ms=1.0, waited_ms=5.0)
    monkeypatch.setattr(mir_streamed, "streamed", lambda *_: run)
    clock = iter(range(10**6))
    monkeypatch.setattr(mir_streamed, "_now", lambda device: 20.0 * next(clock))
    monkeypatch.setitem(bench_mir.RIVALS, bench_mir.FAST, lambda data: torch.linalg.inv(torch.zeros(2, 2)))
    rows, by_stage = mir_streamed.measure(SHAPE, ["with bounds"], False, False)
    assert by_stage == []
    assert {row["case"] for row in rows} == {
        "6 layers, d 12, 10 x (30 vision + 20 text), generated; 2 measured, time x 3"
    }
    found = {row["rival"]: row for row in rows}
    assert [(name, row["p50_ms"], row["waited"]) for name, row in found.items()] == [
        ("mir_kernels, value only", 150.0, 0.1),
        ("mir_kernels, value and error", 150.0, 0.1),
        ("published, accurate (scipy); 1 layer, time x 6", 120.0, None),
        ("published, fast; 1 layer, time x 6", None, None),
    ]
    assert "singular" in found["published, fast; 1 layer, time x 6"]["failure"]
    assert all(row["floor_ms"] == rows[0]["floor_ms"] > 0 for row in rows)


def test_a_value_that_is_wrong_has_no_time_and_fails_the_command(monkeypatch):
    run = mir_streamed.Streamed(1.0, ms=50.0, generating_ms=1.0, waited_ms=None)
    monkeypatch.setattr(mir_streamed, "streamed", lambda *_: run)
    monkeypatch.setattr(mir_streamed, "reference", lambda data: 1.1)
    rows, _ = mir_streamed.measure(SHAPE, ["published, accurate", "error"], True, False)
    assert [(row["rival"], row["p50_ms"]) for row in rows[:2]] == [
        ("mir_kernels, value only", None),
        ("mir_kernels, with bounds", None),
    ]
    assert rows[0]["error"] == pytest.approx(0.1)
    assert rows[2]["p50_ms"] > 0  # the published fast mode is timed despite its error
    assert harness.exit_code(rows) == 1


def test_the_command_writes_the_rows_and_the_stages(monkeypatch, tmp_path, capsys):
    words = [f"--{name}={getattr(SHAPE, name)}" for name in bench_mir.SMALL]
    out = tmp_path / "mir_streamed_x.csv"
    flags = ["--streamed", "--stages", "--measured-layers", "2", "--device", "cpu", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["bench_mir.py", *flags, *words])
    assert bench_mir.main() == 0
    rows = {row["rival"]: row for row in harness.read_csv(out)}
    assert [name for name in rows if name.startswith("mir_kernels")] == [f"mir_kernels, {n}" for n in mir_streamed.RUNS]
    assert all(row["error"] < 1e-4 for name, row in rows.items() if "fast" not in name)
    found = harness.read_csv(tmp_path / "mir_stages_x.csv")
    for name in mir_streamed.RUNS:
        mine = {row["stage"]: row for row in found if row["run"] == name}
        assert {"token norms", "gather of rows", "rows held back", "covariance update", "roots"} <= set(mine)
        assert sum(float(row["share"]) for row in mine.values()) == pytest.approx(1.0, abs=0.01)
        assert int(mine["roots"]["calls"]) == 2
        assert ("proofs" in mine) == (name == "with bounds")
        assert any(stage.startswith("standard error: ") for stage in mine) == (name == "value and error")
    assert "| value only | " in capsys.readouterr().out


def test_stages_go_with_streamed_alone(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bench_mir.py", "--stages"])
    with pytest.raises(SystemExit):
        bench_mir.main()
    assert "--stages and --measured-layers require --streamed" in capsys.readouterr().err


def inner(seconds):
    time.sleep(seconds)
    if seconds > 0.03:
        raise ArithmeticError


def outer(seconds):
    time.sleep(0.01)
    inner(seconds)


@pytest.fixture
def two_stages(monkeypatch):
    names = {"outside": ("outer",), "inside": ("inner",)}
    made = {n: stages.Stage(tuple(f"{__name__}:{f}" for f in fs), lambda t: stages.counts.Count(0, 0), "none")
            for n, fs in names.items()}  # fmt: skip
    monkeypatch.setattr(stages, "STAGES", made)
    monkeypatch.setattr(stages, "SECTIONS", {})


@pytest.mark.usefixtures("two_stages")
def test_time_goes_to_the_innermost_stage_whatever_is_raised():
    watch = stages.Watch()
    with watch:
        outer(0.02)
        time.sleep(0.005)
    with pytest.raises(ArithmeticError), watch:
        outer(0.04)
    with watch:
        time.sleep(0.005)
    assert watch.calls == {"outside": 2, "inside": 2}
    assert watch.seconds["inside"] >= 0.06
    assert 0.02 <= watch.seconds["outside"] < watch.seconds["inside"]
    assert watch.seconds[stages.REST] >= 0.01
    assert sys.getprofile() is None


@pytest.mark.usefixtures("two_stages")
def test_within_a_section_a_stage_has_the_sections_name(monkeypatch):
    monkeypatch.setattr(stages, "SECTIONS", {"error": (f"{__name__}:outer",)})
    monkeypatch.setitem(stages.STAGES, "outside", stages.STAGES["inside"])
    with stages.Watch() as watch:
        inner(0.0)
        outer(0.0)
    assert set(watch.seconds) == {stages.REST, "inside", "error: inside", f"error: {stages.REST}"}


def test_a_function_that_has_gone_is_an_error_and_not_a_stage_without_time():
    with pytest.raises(AttributeError):
        stages.code_of("modality_integration.metric.layer:no_such_function")


def test_the_least_is_bytes_or_operations_at_the_measured_rates_and_small_stages_are_added_up():
    watch = stages.Watch()
    watch.seconds.update({"token norms": 0.9, "roots": 1.0, "rank check": 0.05, "gather of rows": 0.05})
    watch.calls.update({"roots": 4})
    tokens = stages.Tokens(n=1000, text=10, d=100, layers=2)
    found = {row["stage"]: row for row in stages.rows("a case", "value", watch, tokens, CEILINGS)}
    assert found["token norms"]["least_seconds"] == pytest.approx(2 * (2 * 1000 * 100 + 4 * 1000) / 10e9)
    assert found["roots"]["least_seconds"] == pytest.approx(4 * (8 * 100**3 // 3) / 50e9)
    lines = stages.lines(list(found.values()))
    assert lines[0].startswith("| a case | stage | calls |")
    assert lines[2].startswith("| value | roots | 4 | 1 | 50% |")
    assert lines[-1].startswith("|  | 2 more, below 5% each |  | 0.1 | 5% |")
    assert len(lines) == 5
