"""The GPU claims: each has a benchmark that measures it, and only a correct, timed row makes it hold."""

import json
import math
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import claims
import figures
import harness

ROOT = Path(__file__).parent.parent
FOLDERS = [str(ROOT), str(ROOT / "python"), str(ROOT / "benchmarks")]
BY_NAME = {claim.name: claim for claim in claims.CLAIMS}


# One process for all benchmarks, so that torch is loaded once.
RUN = """
import harness, json, runpy, subprocess, sys
harness.MATRIX["cpu"], harness.COPIED["cpu"] = 64, 1 << 16  # the machine's rates do not matter here
run, alone = subprocess.run, []
def once(command, **options):  # each rival's memory is measured in a separate process; no claim needs it: one is enough
    if "--only" not in command:
        return run(command, **options)
    alone.append(alone[0] if alone else run(command, **options))
    return alone[0]
subprocess.run = once
for script, arguments in json.loads(sys.stdin.read()):
    sys.argv = [script, *arguments]
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as ended:
        assert not ended.code, (script, ended.code)
"""


@pytest.fixture(scope="module")
def dry(tmp_path_factory):
    """The rows of every benchmark at its tiny size on a CPU."""
    paths = {name: tmp_path_factory.mktemp("claims") / f"{name}.csv" for name in claims.BENCHES}
    calls = []
    for name, one in claims.BENCHES.items():
        arguments = ["--device", "cpu", "--out", str(paths[name]), "--seconds", "0.01", *shlex.split(one.tiny)]
        calls.append((str(ROOT / "benchmarks" / f"bench_{one.script}.py"), arguments))
    environ = os.environ | {"PYTHONPATH": os.pathsep.join(FOLDERS), "TORCH_COMPILE_DISABLE": "1"}
    command = [sys.executable, "-c", RUN]
    done = subprocess.run(command, input=json.dumps(calls), env=environ, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return [row for path in paths.values() for row in harness.read_csv(path)]


@pytest.mark.parametrize("name", BY_NAME)
def test_every_claim_finds_its_rows_in_what_its_benchmark_writes(name, dry):
    found = {verdict.claim.name: verdict for verdict in claims.verdicts(dry, cuda=False)}[name]
    if name == "covariance":  # only CUDA has a bf16 product with a float32 result
        assert (found.state, found.value) == ("not yet measured", None)
        return
    assert found.state in ("holds", "fails")
    assert found.value > 0
    assert found.error <= found.claim.error


def test_rows_of_a_cpu_and_of_another_size_are_no_measurement(dry):
    assert {verdict.state for verdict in claims.verdicts(dry)} == {"not yet measured"}
    on_card = [row | {"versions": "driver 1, CUDA 13"} for row in dry]
    assert {verdict.state for verdict in claims.verdicts(on_card)} == {"not yet measured"}


def row(claim, case, rival, ms, error=0.0, of_floor=0.95):
    text = case.replace("\\", "")
    return {
        "operation": claim.operation, "case": text, "rival": rival, "p50_ms": ms, "error": error, "of_floor": of_floor,
        "versions": "driver 1", "device": "a card",
    }  # fmt: skip


def rival(pattern):
    """A name that a claim's pattern matches."""
    name = pattern.replace("\\w+", "triton").replace("\\", "").split("|")[-1]
    assert re.match(pattern, name)
    return name


def measured(claim, ours, other=1.0, **changes):
    rows = [row(claim, case, rival(claim.ours), ours, **changes) for case in claim.cases]
    return rows + [row(claim, case, rival(claim.other), other) for case in claim.cases if claim.other]


def state(claim, rows):
    return {verdict.claim.name: verdict for verdict in claims.verdicts(rows)}[claim.name]


@pytest.mark.parametrize("claim", claims.CLAIMS, ids=lambda claim: claim.name)
def test_the_target_decides_and_an_error_or_a_missing_row_never_holds(claim):
    # Milliseconds at which the target is just met if the other rival takes 1 ms.
    just = {"times as fast": 1 / claim.target, "as long": claim.target, "seconds": 1e3 * claim.target}
    if claim.figure == "of the bandwidth":
        good, bad = ({"ours": 1.0, "of_floor": claim.target + e} for e in (1e-3, -1e-3))
    else:
        good, bad = ({"ours": just[claim.figure] * factor} for factor in (0.999, 1.001))
    assert state(claim, measured(claim, **good)).state == "holds"
    assert state(claim, measured(claim, **bad)).state == "fails"
    assert state(claim, measured(claim, **good, error=2 * claim.error)).state == "wrong"
    assert state(claim, measured(claim, **good, error=math.nan)).state == "wrong"
    assert state(claim, measured(claim, **good, error=None)).state == "wrong"
    raised = [one | ({"p50_ms": None} if re.match(claim.ours, one["rival"]) else {}) for one in measured(claim, **good)]
    assert state(claim, raised).state == "wrong"
    assert state(claim, []).state == "not yet measured"
    lacking = measured(claim, **good)[1:]  # ours, of the first case
    assert state(claim, lacking).state == "not yet measured"
    if claim.other:
        alone = [one for one in measured(claim, **good) if re.match(claim.ours, one["rival"])]
        assert state(claim, alone).state == "not yet measured"
        elsewhere = [one | ({} if one in alone else {"device": "another card"}) for one in measured(claim, **good)]
        assert state(claim, elsewhere).state == "not yet measured"


def test_the_worst_case_and_the_fastest_of_our_backends_count():
    claim = BY_NAME["small roots"]
    rows = measured(claim, ours=0.1)
    rows[0]["p50_ms"] = 0.5
    assert state(claim, rows).value == pytest.approx(2.0)
    rows.append(row(claim, claim.cases[0], "ours (another)", 0.125))
    assert state(claim, rows).value == pytest.approx(8.0)
    rows.append(row(claim, claim.cases[0], "ours (a wrong one)", 0.01, error=1.0))
    assert state(claim, rows).value == pytest.approx(8.0)


def test_each_card_is_judged_by_its_own_rows_and_the_worst_is_shown():
    claim = BY_NAME["small roots"]
    rows = measured(claim, ours=0.1)
    slower = [one | {"device": "another", "p50_ms": 4 * one["p50_ms"]} for one in rows if one["rival"] != claim.other]
    rows += slower + [one | {"device": "another"} for one in rows if one["rival"] == claim.other]
    found = state(claim, rows)
    assert (found.state, found.device) == ("fails", "another")
    assert found.value == pytest.approx(2.5)
    broken = row(claim, claim.cases[0], "ours (triton)", None) | {"device": "a third"}
    assert (state(claim, [*rows, broken]).state, state(claim, [*rows, broken]).device) == ("wrong", "a third")


def test_only_the_files_of_the_claims_own_benchmarks_are_read(tmp_path):
    claim = BY_NAME["MIR of a 7B model"]
    for name in ("claim_mir_cuda_h100.csv", "mir_cuda_h100.csv", "claim_mir_cpu.csv", "claim_mirror_cuda_h100.csv"):
        one = dict.fromkeys(harness.COLUMNS, "") | row(claim, name, "mir_kernels, streamed", 1.0)
        harness.write_csv([one], tmp_path / name)
    assert [one["case"] for one in claims.rows_of(tmp_path.iterdir())] == ["claim_mir_cuda_h100.csv"]


INTERPRETED = """
import torch
from add_rms_norm import add_rms_norm
for n, d, dtype in ((5, 40, torch.bfloat16), (2, 4096, torch.bfloat16), (7, 33, torch.float32)):
    torch.manual_seed(0)
    x, residual = torch.randn(2, n, d).to(dtype)
    weight = (1 + 0.1 * torch.randn(d)).to(dtype)
    out, h = add_rms_norm(x, residual, weight)
    assert torch.equal(h, x + residual)
    exact = torch.nn.functional.rms_norm(x.double() + residual.double(), (d,), weight.double(), 1e-6)
    error = ((out - exact).norm() / exact.norm()).item()
    assert error <= (1e-6 if dtype == torch.float32 else 4e-3), (n, d, dtype, error)
"""


def test_the_plain_add_rms_norm_is_right():
    pytest.importorskip("triton")
    environ = os.environ | {"PYTHONPATH": os.pathsep.join(FOLDERS), "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-c", INTERPRETED]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


def test_liger_counts_where_it_has_a_row():
    claim = BY_NAME["fused norm"]
    rows = measured(claim, ours=1.0)
    assert state(claim, rows).value == pytest.approx(1.0)
    rows.append(row(claim, claim.cases[0], "Liger, no MoCa", 0.8))
    assert state(claim, rows).value == pytest.approx(1.25)


def test_the_table_writes_what_is_needed_and_what_was_found():
    claim = BY_NAME["covariance"]
    lines = claims.table(claims.verdicts(measured(claim, ours=0.5, error=3e-6))).splitlines()
    assert len(lines) == 2 + len(claims.CLAIMS)
    assert lines[2].endswith("| at least 1.50 times as fast | 2.00 times as fast, holds | 3e-06 | a card |")
    assert lines[3].endswith("| at least 90% of the bandwidth | not yet measured |  |  |")


def test_the_page_shows_the_table():
    shown = figures.table(harness.DATA / "claims.csv", "benchmarks/data")
    assert shown in (ROOT / "docs" / "gpu.md").read_text()
    assert shown.count("\n") == 2 + len(claims.CLAIMS)


def test_a_file_that_is_not_there_or_not_a_claims_own_is_refused(tmp_path):
    (tmp_path / "moca_cuda_h100.csv").touch()
    for name in ("moca_cuda_h100.csv", "claim_moca_cuda_h100.csv"):
        command = [sys.executable, "benchmarks/claims.py", str(tmp_path / name)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 2
        assert f"got {tmp_path / name}" in done.stderr
