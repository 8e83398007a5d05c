"""The GPU suite runs all its stages on a CPU, and reports failures."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import gpu_suite
import gpu_suite_build
import gpu_suite_checks
import gpu_suite_processes
import gpu_suite_reports
import gpu_suite_times
import harness

ROOT = Path(__file__).parent.parent


def suite(out, *arguments, code=0):
    """summary.json and the printed output."""
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu_suite.py"), "--out", str(out), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    logs = "\n".join(path.read_text()[-2000:] for path in out.glob("*.log"))
    assert done.returncode == code, done.stdout + done.stderr + logs
    return json.loads((out / "summary.json").read_text()), done.stdout


def test_quick_stages_pass_dry(tmp_path):
    found, printed = suite(tmp_path, "--dry", "--stages", "environment,sanitizer")
    assert {name: found[name]["state"] for name in ("environment", "sanitizer")} == {
        "environment": "passed",
        "sanitizer": "passed",
    }
    assert "176 results on cpu, 0 wrong" in (tmp_path / "sanitizer.log").read_text()
    assert "racecheck" in (tmp_path / "sanitizer.log").read_text()
    assert len(printed.splitlines()) < 100


def test_a_stage_that_fails_hides_no_other_and_shows_in_the_exit_code(tmp_path):
    # Without --dry these stages fail on a machine without a GPU.
    import torch

    if torch.cuda.is_available():
        pytest.skip("needs a machine without a GPU")
    found, printed = suite(tmp_path, "--stages", "environment,ceilings", code=1)
    assert found["environment"]["state"] == found["ceilings"]["state"] == "failed"
    assert "torch sees no CUDA device" in printed
    assert "see ceilings.log" in printed


@pytest.mark.parametrize(("flag", "part"), [("--resume", "second"), ("--cache", "first")])
def test_an_archive_that_is_not_there_is_named(tmp_path, flag, part):
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu_suite.py"), "--out", str(tmp_path / "out"), "--dry"]
    command += ["--part", part, flag, str(tmp_path / "none.tgz")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert f"{flag}: expected an archive, but {tmp_path / 'none.tgz'} does not exist" in done.stderr
    assert not (tmp_path / "out").exists()


def tuned(path, *arguments):
    command = [sys.executable, str(ROOT / "benchmarks" / "tune.py"), "--out", str(path), "--dry", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    return json.loads(path.read_text()), done.stdout


def test_a_candidate_row_compiles_and_is_printed_as_it_would_be_committed(tmp_path):
    pytest.importorskip("triton")
    found, printed = tuned(tmp_path / "t.json", "--only", "moca")
    assert '"sm_90": Blocks(tile_bytes=' in printed
    assert found["of"] == len(found["tables"]) == 2
    for one in found["tables"]:
        assert len(one["compiled"]) == 2
        assert " 0 B spills" in one["compiled"]["shipped"]
    assert (tmp_path / "t.txt").read_text() == ""  # nothing was timed, so there is nothing to commit


def test_a_candidate_that_spills_or_outgrows_shared_memory_is_refused_before_it_is_timed():
    pytest.importorskip("triton")
    import tune

    number = next(i for i, job in enumerate(tune.JOBS) if getattr(job.calls, "args", ())[1:] == (64,))
    why, used = tune.needs(number, '{"small": {"16": 1, "32": 1, "64": 1}}', "sm_90", 227 << 10)
    assert why.startswith("spills")
    assert used in why
    before = tune.JOBS[number].table["sm_90"]
    assert tune.needs(number, "shipped", "sm_90", 227 << 10)[0] == ""
    assert tune.needs(number, "shipped", "sm_90", 1 << 10)[0].startswith("too much shared memory")
    assert tune.needs(number, "no such row", "sm_90", 1 << 10)[0].startswith("KeyError")
    assert tune.JOBS[number].table["sm_90"] is before


def test_a_row_is_offered_where_it_is_worth_it_and_as_lines_to_commit():
    pytest.importorskip("triton")
    import tune

    assert tune.fastest({"shipped": 1.0, "other": 0.98}) == "shipped"
    assert tune.fastest({"shipped": 1.0, "other": 0.9, "third": 0.95}) == "other"
    assert tune.fastest({"other": 0.9}) == "other"  # the shipped row was wrong or too large
    assert tune.fastest({}) == "shipped"
    tables = [job.name.partition("[")[0] for job in tune.JOBS]
    assert all(getattr(sys.modules["mir_kernels.ops." + n.rpartition(".")[0]], n.rpartition(".")[2]) for n in tables)
    found = [
        {"table": "moments.triton.TABLE", "architecture": "sm_90", "offer": offer}
        for offer in ("Blocks(1)", "Blocks(2)")
    ]
    assert tune.lines_to_commit(found, {"moments.triton.TABLE": "Blocks(0)"}).splitlines() == [
        "mir_kernels/ops/moments/triton.py, TABLE",
        '-    "sm_90": Blocks(0),',
        '+    "sm_90": Blocks(2),',
    ]
    assert tune.lines_to_commit(found, {"moments.triton.TABLE": "Blocks(2)"}) == ""


def test_limits_add_up_to_those_of_the_run():
    limits = {name: limit for name, (_, limit) in gpu_suite.STAGES.items()}
    assert sum(limits[name] for name in gpu_suite.WHOLE) <= gpu_suite.TOTAL <= 9 * 60
    own = gpu_suite_processes.GRACE + 2  # seconds that a stage reserves from its limit
    waits = gpu_suite_processes.GRACE * len(gpu_suite_times.BENCHMARKS)
    assert sum(one.limit for one in gpu_suite_times.BENCHMARKS.values()) + waits <= limits["bench"] - own


def test_a_command_past_its_limit_may_still_write_what_it_has(capfd):
    code = "import time\ntry: time.sleep(60)\nexcept KeyboardInterrupt: print('written')"
    assert gpu_suite_processes.run([sys.executable, "-c", code], limit=2) == 124
    assert "written" in capfd.readouterr().out
    assert gpu_suite_processes.run([sys.executable, "-c", "raise SystemExit(3)"], limit=30) == 3


def test_what_is_left_from_an_earlier_run_does_not_pass_as_new(tmp_path, monkeypatch):
    (tmp_path / "tests0.jsonl").write_text('{"test": "old", "outcome": "passed"}\n')
    (tmp_path / "tuned.json").write_text('{"of": 1, "tables": [{"changed": false}]}')
    (tmp_path / "moca_cpu.csv").write_text("operation,case,rival,p50_ms\nold,old,ours,1\n")
    for module in (gpu_suite_checks, gpu_suite_processes):
        monkeypatch.setattr(module, "run_together", lambda commands, *_: [4] * len(commands))
    stages = (gpu_suite_checks.tests, gpu_suite_times.tune, gpu_suite_times.bench)
    found = [stage(tmp_path, True, 60) for stage in stages]
    assert [one["state"] for one in found] == ["failed"] * 3
    assert found[0]["counts"]["passed"] == 0
    assert found[2]["files"] == []
    assert not list(tmp_path.iterdir())


def test_a_benchmark_that_is_cut_short_keeps_its_rows_and_one_of_ours_without_a_time_fails(tmp_path, monkeypatch):
    row = dict.fromkeys(harness.COLUMNS) | {"operation": "job", "case": "c", "failure": ""}

    def run(command, **_):
        path = Path(command[command.index("--out") + 1])
        mine = None if path.name == "moments_cpu.csv" else 1.0
        harness.write_csv([row | {"rival": "ours, triton", "p50_ms": mine}], path)
        return 124 if path.name == "moca_cpu.csv" else 0

    monkeypatch.setattr(gpu_suite_times, "run", run)
    found = gpu_suite_times.bench(tmp_path, True, 900)
    assert found["state"] == "failed"
    assert found["note"] == "moca: stopped after 123 s with 1 rows; moments: no time for ours, triton"
    assert len(found["files"]) == len(gpu_suite_times.BENCHMARKS)


def test_tuning_that_is_cut_short_says_how_far_it_came(tmp_path, monkeypatch):
    def run(command, **_):
        (tmp_path / "tuned.json").write_text('{"of": 6, "tables": [{"changed": false}, {"changed": false}]}')
        return 124

    monkeypatch.setattr(gpu_suite_times, "run", run)
    found = gpu_suite_times.tune(tmp_path, False, 60)
    assert (found["state"], found["note"]) == ("cut", "2 of 6 tables, 0 with a faster row (stopped at its limit)")


def test_every_file_with_gpu_tests_is_run_and_no_other():
    found = {path.name for path in gpu_suite_checks.gpu_files()}
    assert {"test_guarded.py", "test_moca_cuda.py", "test_metric_cuda.py", "test_moca.py"} <= found
    assert not found & {"test_cli.py", "test_report.py", "test_fuzz_smoke.py", "test_readme.py"}
    for path in (ROOT / "tests").rglob("test_*.py"):
        assert path.name in found or "mark.gpu" not in path.read_text() or path == Path(__file__)


def test_what_a_test_file_needs_through_others_and_is_not_here_is_named(tmp_path, monkeypatch):
    path = tmp_path / "test_some.py"
    path.write_text("import json\nimport no_such_package.part\nfrom kernels.jobs import every_job\nimport fuzz.run\n")
    assert gpu_suite_checks.missing_imports(path) == ["no_such_package"]
    (tmp_path / "beside.py").write_text("import another_that_is_missing\n")
    path = tmp_path / "test_other.py"
    path.write_text("import beside\nimport torch\ndef later():\n    import not_looked_at\n")
    assert gpu_suite_checks.missing_imports(path) == ["another_that_is_missing"]
    here = importlib.util.find_spec
    bare = ("torchmetrics", "safetensors", "hypothesis", "transformers")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in bare else here(name))
    lacking = {path.name: gpu_suite_checks.missing_imports(path) for path in gpu_suite_checks.gpu_files()}
    assert "torchmetrics" in lacking["test_metric_cuda.py"]  # modality_integration imports it
    assert lacking["test_guarded.py"] == lacking["test_moca_cuda.py"] == lacking["test_sqrtm_triton.py"] == []


def test_without_pytest_every_kernel_job_is_checked_by_a_script(tmp_path):
    pytest.importorskip("triton")
    report, command = tmp_path / "t.jsonl", [sys.executable, "tests/kernels/check_jobs.py", "--sizes", "1-1,13-37"]
    paths = os.pathsep.join(str(ROOT / folder) for folder in ("", "tests", "benchmarks"))
    env = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": paths}
    command += ["--report", str(report), "--shard", "1/15"]
    for written in (4, 0):  # the second run finds everything done
        before = len(gpu_suite_reports.lines(report))
        done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        assert len(gpu_suite_reports.lines(report)) - before >= written
        assert written or len(gpu_suite_reports.lines(report)) == before
    counts = gpu_suite_reports.counts([report])
    assert counts["passed"] >= 4
    assert counts["failed"] == counts["not finished"] == 0


@pytest.mark.parametrize("nvcc", [None, "/opt/cuda/bin/nvcc"])
def test_without_nvcc_the_cpu_part_is_built_and_the_note_says_so(tmp_path, monkeypatch, nvcc):
    seen = {}

    def run(command, **environ):
        seen.update(environ)
        (tmp_path / "built").mkdir()
        (tmp_path / "built" / "_C.so").touch()
        return 0

    monkeypatch.setattr(gpu_suite_build, "run", run)
    monkeypatch.setattr(gpu_suite_build.shutil, "which", lambda name, path=None: nvcc)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(gpu_suite_build, "ROOT", tmp_path)
    (tmp_path / "mir_kernels").mkdir()
    found = gpu_suite_build.build(tmp_path, False, 60)
    assert (found["state"], found["cuda"], seen["MIR_CUDA"]) == ("passed", nvcc is not None, str(int(nvcc is not None)))
    assert ("CUDA C++ WAS NOT BUILT: there is no nvcc" in found["note"]) == (nvcc is None)
    assert (seen.get("CUDA_HOME"), seen.get("MIR_CUDA_ARCHS")) == (("/opt/cuda", "90") if nvcc else (None, None))
    assert [path.name for path in (tmp_path / "mir_kernels").iterdir()] == ["_C.so"]


def test_an_older_setuptools_gets_a_pyproject_without_the_license_that_it_refuses(tmp_path, monkeypatch):
    tomllib = pytest.importorskip("tomllib")
    monkeypatch.setattr(gpu_suite_build.importlib.metadata, "version", lambda name: "70.2.0")
    assert gpu_suite_build.old_setuptools() == "70.2.0"
    project = tomllib.loads((gpu_suite_build.source_tree(tmp_path) / "pyproject.toml").read_text())["project"]
    assert {"license", "license-files"} & project.keys() == set()
    assert project["version"]
    monkeypatch.setattr(gpu_suite_build.importlib.metadata, "version", lambda name: "77.0.1")
    assert gpu_suite_build.old_setuptools() == ""


@pytest.mark.slow
def test_every_stage_passes_dry(tmp_path):
    found, _ = suite(tmp_path, "--dry")
    assert {r["state"] for r in found.values() if isinstance(r, dict)} == {"passed"}
    assert (tmp_path / "summary.csv").exists()
