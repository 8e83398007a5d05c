"""The benchmark of the root: its default rivals, LAPACK in a separate process, and the printed ratios."""

import argparse
import json
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

import bench_sqrtm
import counts
import harness
import lapack_root

CASE = "1 x 8^2, i^-1 and i^-1.5"


def flags(**given):
    return argparse.Namespace(**({"device": "cpu", "d": None, "batch": None} | given))


@pytest.fixture
def lapack():
    with lapack_root.LapackRoot(1) as process:
        yield process


@pytest.fixture
def covariances():
    return bench_sqrtm.covariances(20, (1.0, 1.5), 3, "cpu")


@pytest.mark.parametrize(
    ("given", "operation", "expected"),
    [
        ({}, "polar", [(512, 1), (1024, 1), (2048, 1)]),
        ({"device": "cuda"}, "trace", [(512, 1), (1024, 1), (2048, 1)]),
        ({"d": [64, 4096]}, "trace", [(64, 1), (64, 64), (4096, 1)]),
        ({"d": [7]}, "trace", [(7, 1)]),
        ({"d": [64], "batch": 3}, "trace", [(64, 3)]),
        ({"d": [64], "batch": 3}, "polar", [(64, 3)]),
    ],
)
def test_sizes_and_batches_are_those_given_or_the_defaults(given, operation, expected):
    assert bench_sqrtm.shapes(flags(**given), operation) == expected


def test_the_default_on_a_cpu_goes_from_small_batches_to_the_width_of_a_7b_model():
    found = bench_sqrtm.shapes(flags(), "trace")
    assert {(64, 1), (64, 64), (128, 1), (128, 64), (1024, 1), (2048, 1), (4096, 1)} <= set(found)


def test_lapack_finds_every_trace_of_a_batch_and_of_the_next_one(lapack, covariances):
    a, b, truth = covariances
    errors = []
    for part in (slice(0, 3), slice(1, 2)):
        rival = lapack.rival(a[part], b[part], lambda found, part=part: bench_sqrtm.worst(found, truth[part]), 1e-8)
        errors.append(rival.found_error())
        rival.call(0)
        assert len(rival.visits) == 2
        assert all(ms > 0 for ms, _ in rival.visits)
    assert max(errors) < 1e-12
    assert lapack.solver in ("scipy's syevd", "torch.linalg.eigvalsh")


@pytest.mark.parametrize("solver", ["scipy's syevd", "torch.linalg.eigvalsh"])
def test_both_solvers_find_the_eigenvalues_of_the_triangle_that_the_standard_form_fills(solver, covariances, tmp_path):
    a, b, truth = covariances
    path = tmp_path / "pair.npy"
    np.save(path, torch.stack([a, b]).numpy())
    job = lapack_root.Job(path)
    job.solver = solver
    found = job.visit()
    torch.testing.assert_close(torch.tensor(found["values"], dtype=torch.float64), truth, rtol=1e-12, atol=0)
    assert json.loads(json.dumps(found)) == found


def test_where_lapack_fails_its_row_says_how_and_the_process_goes_on(lapack, covariances):
    a, b, truth = covariances
    error = lambda found: bench_sqrtm.worst(found, truth)  # noqa: E731
    bad = lapack.rival(a, -b, error, 1e-8)
    (row,) = harness.compare("job", "case", [bad], seconds=0.0, rounds=(1, 1))
    assert row["failure"].endswith("LinAlgError: potrf: info 1")
    assert bad.retimed(row, 1) == row
    assert lapack.rival(a, b, error, 1e-8).found_error() < 1e-12


def test_times_are_those_of_the_last_rounds_that_the_rival_took_itself():
    row = dict.fromkeys(harness.COLUMNS) | {"rounds": 3, "floor_ms": 1.0, "p50_ms": 900.0, "rival": "LAPACK"}
    visits = [(50.0, 0.0), (4.0, 0.0), (2.0, 0.0), (3.0, 0.0)]
    rival = lapack_root.SelfTimed("LAPACK", lambda i: None, visits=visits)
    found = rival.retimed(row, 2)
    assert [found[name] for name in ("p20_ms", "p50_ms", "p80_ms", "rounds")] == [2.0, 3.0, 4.0, 3]
    assert (found["of_floor"], found["waited"]) == (pytest.approx(1 / 3), 0.0)
    # Calls that waited for a core count only if there are too few others.
    busy = replace(rival, visits=[*visits, (8.0, 4.0)]).retimed(row, 2)
    assert (busy["p50_ms"], busy["p80_ms"]) == (3.0, 3.0)


def test_a_rival_that_rests_takes_its_time_without_the_rest(monkeypatch):
    slept = []
    monkeypatch.setattr(lapack_root.time, "sleep", slept.append)
    called = []
    rival = lapack_root.rested(harness.Rival("scipy", called.append, 0.5, 1.0))
    rival.call(7)
    assert (called, slept, len(rival.visits)) == ([7], [lapack_root.PAUSE], 1)
    assert (rival.name, rival.found_error(), rival.limit) == ("scipy", 0.5, 1.0)


def test_ratios_are_of_medians_of_one_case_and_leave_out_what_has_no_time():
    ms = {bench_sqrtm.OURS: 2.0, bench_sqrtm.PROVED: 5.0, lapack_root.NAME: 4.0, bench_sqrtm.TORCHMETRICS: None}
    rows = [{"case": CASE, "rival": name, "p50_ms": value} for name, value in ms.items()]
    rows.append({"case": "1 x 9^2, one", "rival": bench_sqrtm.YARDSTICK, "p50_ms": 1.0})
    assert bench_sqrtm.ratio_lines(rows) == [f"{CASE}: ours / LAPACK 0.50, with bounds / ours 2.50"]


def test_the_root_of_a_definite_pair_counts_as_its_three_stages():
    d = 12
    assert counts.trace_sqrt_cpu(d) == (2 * 8 * d * d, d**3 // 3 + d**3 + 4 * d**3 // 3)
    assert counts.trace_sqrt_cpu(d).flops < counts.trace_sqrt(d).flops


def test_one_run_writes_ours_beside_lapack_and_a_yardstick_without_error(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(harness, "rate", lambda device, unit: 50.0)
    out = tmp_path / "sqrtm.csv"
    words = ["--device", "cpu", "--seconds", "0", "--d", "16", "--spectra", "i^-1 and i^-1.5", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["bench_sqrtm.py", *words, "--skip", "eager", "16 bits", "published"])
    grad = torch.is_grad_enabled()
    try:
        assert bench_sqrtm.main() == 0
    finally:
        torch.set_grad_enabled(grad)
    rows = {row["rival"]: row for row in harness.read_csv(out)}
    first = [bench_sqrtm.OURS, bench_sqrtm.PROVED, lapack_root.NAME, bench_sqrtm.YARDSTICK]
    assert [*rows][:4] == first
    assert all(row["p50_ms"] > 0 and not row["failure"] for row in rows.values())
    assert [rows[name]["error"] is None for name in first] == [False, False, False, True]
    assert max(rows[name]["error"] for name in first[:3]) < 1e-8
    printed = capsys.readouterr().out
    assert "ours by cholesky+eigvalsh, eigenvalues of LAPACK by " in printed
    assert all(f"{name} " in printed.splitlines()[-1] for name in bench_sqrtm.RATIOS)
