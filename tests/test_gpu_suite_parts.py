"""The GPU suite in two short calls: an interrupted stage keeps its results, the second part resumes after the first."""

import json
import os
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

import check_native
import gpu_cache
import gpu_suite
import gpu_suite_build
import gpu_suite_checks
import gpu_suite_pack
import gpu_suite_processes
import gpu_suite_reports as reports
import gpu_suite_summary
import gpu_suite_times
import shard

ROOT = Path(__file__).parent.parent
MIXED = """
import os, pytest, shard
def test_right(): pass
def test_wrong(): assert 1 + 1 == 3, "sums"
def test_skipped(): pytest.skip("not here")
def test_crashes(): os._exit(9)
def test_after_the_crash(): pass
def test_loses_the_context(monkeypatch):
    shard.reports.lost_context = lambda: "an illegal memory access"
    assert False, "garbage"
def test_after_the_loss(): pass
"""


@pytest.fixture
def paths(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(str(ROOT / folder) for folder in ("", "tests", "benchmarks")))


def outcomes(path):
    return {name.rpartition("::")[2]: line["outcome"] for name, line in reports.read([path]).items()}


def test_a_test_that_ends_its_process_is_named_and_the_others_still_run(tmp_path, paths):
    (tmp_path / "test_mixed.py").write_text(MIXED)
    found = gpu_suite_checks.reported(tmp_path, "tests", [tmp_path / "test_mixed.py"], [], True, 90, [])
    assert outcomes(tmp_path / "tests0.jsonl") == {
        "test_right": "passed",
        "test_wrong": "failed",
        "test_skipped": "skipped",
        "test_crashes": "failed",
        "test_after_the_crash": "passed",
        "test_loses_the_context": "failed",
        "test_after_the_loss": "passed",
    }
    assert found["state"] == "failed"
    assert found["counts"] == {"passed": 3, "failed": 3, "skipped": 1, "not finished": 0}
    assert "2 times a test ended its process" in found["note"]
    assert "test_crashes: it ended its process with exit code 9" in found["failures"]
    assert any(text.startswith("test_wrong: AssertionError: sums") for text in found["failures"])


def test_tests_that_time_cuts_are_no_failures_and_what_was_found_stays(tmp_path, paths):
    (tmp_path / "test_slow.py").write_text(
        "import time\ndef test_a(): pass\ndef test_b(): time.sleep(90)\ndef test_c(): 1"
    )
    found = gpu_suite_checks.reported(tmp_path, "tests", [tmp_path / "test_slow.py"], [], True, 14, [])
    assert (found["state"], found["failures"]) == ("cut", [])
    assert found["counts"] == {"passed": 1, "failed": 0, "skipped": 0, "not finished": 2}


def test_a_file_that_cannot_be_collected_is_a_failure(tmp_path, paths):
    (tmp_path / "test_broken.py").write_text("raise ValueError('broken at import')")
    (tmp_path / "test_fine.py").write_text("def test_fine(): pass")
    files = [tmp_path / "test_broken.py", tmp_path / "test_fine.py"]
    found = gpu_suite_checks.reported(tmp_path, "tests", files, [], True, 60, [])
    assert (found["state"], found["counts"]["failed"], found["counts"]["passed"]) == ("failed", 1, 1)
    assert "broken at import" in found["failures"][0]


def test_a_line_that_is_half_written_is_none_and_the_worst_line_of_a_test_counts(tmp_path):
    path = tmp_path / "t.jsonl"
    for outcome in ("started", "passed", "failed"):  # it passed, then failed in its teardown
        reports.write(path, {"test": "a", "outcome": outcome, "message": ""})
    with path.open("a") as file:
        file.write('{"test": "b", "outc')
    assert [line["outcome"] for line in reports.read([path]).values()] == ["failed"]
    assert reports.failures(reports.read([path])) == ["a: no message"]
    later = tmp_path / "later.jsonl"
    reports.write(later, {"test": "a", "outcome": "passed"})
    assert reports.read([path, later])["a"]["outcome"] == "passed"
    assert reports.counts([later], [path])["failed"] == 0


def test_shards_share_the_tests_out_and_what_failed_before_comes_first(monkeypatch, tmp_path):
    parts = []
    for part in range(3):
        monkeypatch.setenv("MIR_SHARD", f"{part}/3")
        items = [SimpleNamespace(nodeid=f"t{i:02}") for i in range(50)]
        shard.pytest_collection_modifyitems(items)
        parts.append([item.nodeid for item in items])
    assert sorted(item for part in parts for item in part) == [f"t{i:02}" for i in range(50)]
    assert max(map(len, parts)) - min(map(len, parts)) <= shard.TOGETHER
    for test, outcome in (("t00", "passed"), ("t03", "failed"), ("t01", "started")):
        reports.write(tmp_path / "e.jsonl", {"test": test, "outcome": outcome})
    monkeypatch.setenv("MIR_SHARD", "0/1")
    monkeypatch.setenv("MIR_EARLIER", str(tmp_path / "e.jsonl"))
    items = [SimpleNamespace(nodeid=f"t{i:02}") for i in range(5)]
    shard.pytest_collection_modifyitems(items)
    assert [item.nodeid for item in items] == ["t03", "t01", "t02", "t04", "t00"]


def test_what_matters_most_fits_the_first_part():
    from claims import BENCHES

    limits = {name: limit for name, (_, limit) in gpu_suite.STAGES.items()}
    assert gpu_suite.PART_TOTAL <= 265
    assert gpu_suite.PART[:4] == ("environment", "build", "check", "claims")
    assert sum(limits[name] for name in gpu_suite.PART[:3]) <= gpu_suite.PART_TOTAL / 2  # the other half for claims
    assert sum(limits[name] for name in ("environment", "build", "tests", "tune")) <= gpu_suite.PART_TOTAL
    assert {*gpu_suite.PART, "ceilings"} == {*gpu_suite.STAGES}
    waits = gpu_suite_processes.GRACE * (len(BENCHES) + 1) + 2
    assert sum(one.limit for one in BENCHES.values()) + waits <= limits["claims"] <= gpu_suite.PART_TOTAL
    assert not {*BENCHES} & {*gpu_suite_times.BENCHMARKS}  # their CSVs share a folder


def test_each_claim_gets_a_line(tmp_path, monkeypatch):
    import claims
    import harness

    row = dict.fromkeys(harness.COLUMNS, "") | {"operation": "moca forward", "case": "tokens (32, 64)", "error": 1e-9}
    row |= {"rival": "ours, triton", "p50_ms": 1.0, "of_floor": 0.5}

    def run(command, **_):
        path = Path(command[command.index("--out") + 1])
        harness.write_csv([row] if path.name.startswith("claim_moca") else [], path)
        return 0

    monkeypatch.setattr(gpu_suite_times, "run", run)
    lines = gpu_suite_times.claims(tmp_path, True, 90)["claims"]
    assert len(lines) == len(claims.CLAIMS)
    assert {line[:17].strip() for line in lines} <= {"fails", "holds", "wrong", "not yet measured"}
    assert all("; needs at " in line for line in lines)


class Machine:
    """Replaces the stages: states is {stage: its final state}; `ran` lists the stages that were started."""

    def __init__(self, states):
        self.states, self.ran = states, []

    def isolated(self, name, out, dry, limit, packed):
        self.ran.append(name)
        if self.states.get(name) == "interrupted":
            raise KeyboardInterrupt
        state = self.states.get(name, "passed")
        reports.write(out / f"{name}0.jsonl", {"test": name, "outcome": "failed" if state == "failed" else "passed"})
        found = {"state": state, "note": f"{name} says", "seconds": 1.0}
        return found | ({"failures": [f"test_it[{name}, triton-float32-13-37]: off"]} if state == "failed" else {})

    def run(self, monkeypatch, *given):
        self.ran = []
        monkeypatch.setattr(gpu_suite, "isolated", self.isolated)
        monkeypatch.setattr(sys, "argv", ["gpu_suite.py", "--dry", *map(str, given)])
        return gpu_suite.main()


def test_the_second_part_goes_on_where_the_first_stopped(tmp_path, monkeypatch, capsys):
    machine, out, file = (
        Machine({"check": "failed", "tests": "cut", "tune": "interrupted"}),
        tmp_path / "o",
        tmp_path / "a",
    )
    assert machine.run(monkeypatch, "--out", out, "--part", "first", "--pack", file) == 1
    assert machine.ran == ["environment", "build", "check", "claims", "tests", "tune"]
    assert "1x check, triton: test_it[check, triton-float32-13-37]: off" in capsys.readouterr().out
    first = json.loads((out / "summary.json").read_text())
    assert (first["tune"]["state"], first["sanitizer"]["state"]) == ("cut", "not reached")

    machine.states, second = {}, tmp_path / "p"
    assert (
        machine.run(monkeypatch, "--out", second, "--part", "second", "--resume", file, "--pack", tmp_path / "b") == 0
    )
    assert machine.ran == ["environment", "build", "check", "tests", "tune", "sanitizer", "bench"]
    found = json.loads((second / "summary.json").read_text())
    assert found["claims"] == first["claims"] | {"note": "in the previous part: claims says", "seconds": 0}
    assert sorted(path.name for path in (second / "earlier" / "1").glob("*.jsonl"))[0] == "build0.jsonl"
    assert {one["state"] for one in found.values() if isinstance(one, dict)} == {"passed"}

    assert machine.run(monkeypatch, "--out", second, "--part", "second", "--seconds", "1") == 2
    assert machine.ran == []
    with tarfile.open(tmp_path / "b") as tar:
        assert {"summary.json", "decide.txt", "earlier/1/check0.jsonl"} <= {*tar.getnames()}


def test_a_first_part_starts_afresh(tmp_path, monkeypatch):
    machine = Machine({})
    machine.run(monkeypatch, "--out", tmp_path, "--part", "first")
    machine.run(monkeypatch, "--out", tmp_path, "--part", "second")
    assert machine.ran == ["environment", "build"]
    machine.run(monkeypatch, "--out", tmp_path, "--part", "first")
    assert machine.ran == list(gpu_suite.PART)
    assert not (tmp_path / "earlier").exists()
    assert len(reports.lines(tmp_path / "check0.jsonl")) == 1


def test_an_archive_is_small_and_whole(tmp_path):
    out, file = tmp_path / "o", tmp_path / "a.tgz"
    for name, size in (("a.csv", 10), ("noise.log", 60_000), ("built/_C.so", 10), ("module/_C.so", 20_000)):
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_bytes(os.urandom(size))
    assert gpu_suite_pack.pack(out, file) == []
    before = file.read_bytes()
    assert gpu_suite_pack.pack(out, file, most=30_000) == ["noise.log"]
    assert len(file.read_bytes()) <= 30_000 < len(before)
    gpu_suite_pack.unpack(file, tmp_path / "p")
    found = {str(path.relative_to(tmp_path / "p")) for path in (tmp_path / "p").rglob("*") if path.is_file()}
    assert found == {"a.csv", "module/_C.so"}
    assert (tmp_path / "p" / "module" / "_C.so").read_bytes() == (out / "module" / "_C.so").read_bytes()
    assert [path.name for path in tmp_path.iterdir() if "arriving" in path.name] == []


def test_what_is_to_decide_fits_a_screen():
    stage = {"state": "failed", "note": "n" * 500, "seconds": 1.0, "counts": {"passed": 7}}
    stage["failures"] = [f"test_some[kernel {i}, triton-bfloat16-129-577]: {'x' * 300}" for i in range(90)]
    stage |= {"claims": [f"claim {i}" for i in range(40)], "offers": [f"offer {i}" for i in range(40)]}
    others = {name: {"state": "passed", "note": "", "seconds": 1} for name in gpu_suite.PART}
    lines = gpu_suite_summary.decide({**others, "tune": stage}, False)
    assert len(lines) < 60
    assert max(map(len, lines)) <= gpu_suite_summary.WIDTH
    text = "\n".join(lines)
    assert "WRONG: 90 failures in 90 kernels" in text
    assert "1x kernel 0, triton" in text
    assert text.index("... and 75 more") < text.index("claim 0") < text.index("offer 0")


@pytest.mark.parametrize(
    ("failure", "name"),
    [
        ("test_right[moca forward, triton-float32-129-577]: off", "moca forward, triton"),
        ("small polar-bfloat16-1-1: off", "small polar"),
        ("test_other[x-y]: off", "test_other"),
        ("tests/a.py: no module", "tests/a.py"),
    ],
)
def test_failures_go_by_the_kernel_that_is_wrong(failure, name):
    assert gpu_suite_summary.kernel_of(failure) == name


def test_a_build_of_the_same_sources_is_taken_from_the_part_before(tmp_path, monkeypatch):
    built = []

    def run(command, **_):
        built.append(command)
        (tmp_path / "built" / "mir_kernels").mkdir(parents=True)
        (tmp_path / "built" / "mir_kernels" / "_C.so").write_text("compiled")
        return 0

    monkeypatch.setattr(gpu_suite_build, "run", run)
    for _ in range(2):
        assert gpu_suite_build.build(tmp_path, True, 60)["state"] == "passed"
        assert (tmp_path / "built" / "mir_kernels" / "_C.so").read_text() == "compiled"
    assert len(built) == 1
    monkeypatch.setattr(gpu_suite_build, "made_of", lambda env: "other sources")
    assert gpu_suite_build.build(tmp_path, True, 60)["state"] == "passed"
    assert len(built) == 2


def test_benchmarks_that_are_done_are_not_taken_again_and_those_without_time_are_named(tmp_path, monkeypatch):
    import harness

    ran = []

    def run(command, **_):
        path = Path(command[command.index("--out") + 1])
        ran.append(path.name)
        row = dict.fromkeys(harness.COLUMNS) | {"operation": "job", "rival": "ours", "case": "c", "p50_ms": 1.0}
        harness.write_csv([row], path)
        return 0

    monkeypatch.setattr(gpu_suite_times, "run", run)
    benches = {name: gpu_suite_times.Bench("moca", "", "", 9) for name in ("one", "two", "three")}
    (tmp_path / "earlier" / "1").mkdir(parents=True)
    (tmp_path / "earlier" / "1" / "summary.json").write_text('{"claims": {"done": ["one", "three"]}}')
    (tmp_path / "one_cpu.csv").write_text("kept")
    found = gpu_suite_times.measured("claims", benches, tmp_path, True, time.monotonic() + 60)
    assert ran == ["two_cpu.csv", "three_cpu.csv"]  # the CSV of three is missing
    assert (found["state"], found["done"]) == ("passed", ["one", "two", "three"])
    found = gpu_suite_times.measured("claims", benches, tmp_path, True, time.monotonic() + 6)
    assert (found["state"], found["note"]) == ("cut", "2 CSVs; no time was left for two")


def test_the_module_of_a_folder_is_checked_and_not_the_installed_one(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"--module: expected a folder with _C\."):
        check_native.kernels(tmp_path)
    (tmp_path / f"_C{check_native.importlib.machinery.EXTENSION_SUFFIXES[0]}").write_text("no module")
    command = [sys.executable, "benchmarks/check_native.py", "--device", "cpu", "--module", str(tmp_path)]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, check=False
    )
    assert done.returncode == 1
    assert b"ImportError" in done.stderr


LAUNCH = """
import json, sys, torch, aot
from kernels.jobs import every_job
from pathlib import Path
job = next(job for job in every_job() if job.name == "moca forward, triton")
given = {name: t.to("meta") for name, t in job.make(torch.float32, 129, 577).items()}
for launch in aot.record(job.run, given, target="sm_90"):
    print(aot.compile_launch("sm_90", launch).registers)
"""


def test_a_launch_finds_what_was_compiled_ahead_wherever_it_is_unpacked(tmp_path, paths):
    pytest.importorskip("triton")
    file = tmp_path / "kernels.tgz"
    command = [sys.executable, "benchmarks/gpu_cache.py", str(file), "--only", "('moca forward, triton', 'float32')"]
    made = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "1 compiled, 0 of them failed" in made.stdout
    assert gpu_cache.fill(file, tmp_path / "cache") == 1
    before = sorted(tmp_path.glob("cache/*/*"))
    assert {path.suffix for path in before} == {*gpu_cache.KEPT}
    for folder, new in (("cache", False), ("empty", True)):
        env = os.environ | {"TRITON_CACHE_DIR": str(tmp_path / folder)}
        subprocess.run([sys.executable, "-c", LAUNCH], cwd=ROOT, env=env, check=True)
        assert bool({*tmp_path.glob(f"{folder}/*/*")} - {*before}) == new
