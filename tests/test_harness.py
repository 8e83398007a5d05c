"""The benchmarks' harness: the error check, the rounds, the floor, and rivals that raise."""

import math
import subprocess
import sys

import pytest
import torch

import harness

RATE = harness.rate.__wrapped__  # without its cache, and before any test replaces it


@pytest.fixture(autouse=True)
def measured_once(monkeypatch):
    """A machine with 100 GFLOP/s, half of that in float64, so that floors are known."""
    monkeypatch.setattr(harness, "rate", lambda device, unit: {"any": 100.0, "float64": 50.0}[unit])


def compared(*rivals, **options):
    found = harness.compare("job", "case", rivals, seconds=0.01, rounds=(2, 12), **options)
    return {row["rival"]: row for row in found}


def calls_of(times, name="ours"):
    return harness.Rival(name, lambda i: times.append(i))


def test_a_wrong_rival_is_never_called_and_gets_no_time():
    times = []
    for error in (0.2, math.nan, math.inf):
        row = compared(harness.Rival("ours", times.append, error, 0.1))["ours"]
        assert (row["p50_ms"], row["rounds"], row["of_floor"]) == (None, 0, None)
    assert times == []
    assert compared(harness.Rival("ours", times.append, 0.1, 0.1))["ours"]["p50_ms"] > 0


def test_one_that_raises_gets_a_row_with_its_first_line_and_the_others_their_times():
    def failing_late(i):
        late.append(i)
        if len(late) == 4:  # in the second round, after two calls to warm up
            raise RuntimeError("out of memory\nwith a long story")

    def raising():
        raise ValueError

    late = []
    rows = compared(
        harness.Rival("ours, late", failing_late),
        harness.Rival("no error", lambda i: i, raising, 0.1),
        harness.Rival("sound", lambda i: i, lambda: 0.05, 0.1),
    )
    assert rows["ours, late"]["failure"] == "RuntimeError: out of memory"
    assert rows["no error"]["failure"] == "ValueError"
    assert rows["ours, late"]["p50_ms"] is rows["no error"]["p50_ms"] is None
    assert rows["sound"]["p50_ms"] > 0
    assert (rows["sound"]["error"], rows["sound"]["failure"]) == (0.05, "")


def test_the_exit_code_tells_of_ours_and_not_of_rivals():
    row = {"rival": "ours, triton", "p50_ms": 1.0}
    assert harness.exit_code([row, {"rival": "published, fast", "p50_ms": None}]) == 0
    assert harness.exit_code([row, {"rival": "ours, native", "p50_ms": None}]) == 1
    assert harness.exit_code([row, {"rival": "mir_kernels, streamed", "p50_ms": None}]) == 1


def test_a_slow_rival_takes_no_rounds_from_a_fast_one(monkeypatch):
    order = []
    monkeypatch.setattr(harness, "_cpu_ms", lambda call, i: call(i))

    def taking(ms, name):
        return harness.Rival(name, lambda i: order.append(name) or ms)

    rows = compared(taking(100.0, "slow"), taking(0.5, "fast"))
    assert (rows["slow"]["rounds"], rows["fast"]["rounds"]) == (2, 12)
    timed = order[4:]  # after two calls each to warm up
    first, last = (i for i, name in enumerate(timed) if name == "slow")
    assert 3 <= first <= 8 <= last  # spread over the run, not all at one end


def test_calls_that_waited_for_a_core_count_only_where_there_are_too_few_others(monkeypatch):
    monkeypatch.setattr(harness, "_cpu_ms", lambda call, i: call(i))
    clock = {"waited": 0.0}
    monkeypatch.setattr(harness.waiting, "waited_ms", lambda: clock["waited"])

    def taking(name, waits):
        """2 ms, plus 8 ms of waiting in the turns that `waits` selects."""

        def call(i):
            clock["waited"] += 8.0 * waits(i)
            return 2.0 + 8.0 * waits(i)

        return harness.Rival(name, call)

    rivals = [taking("half", lambda i: i % 2), taking("always", lambda i: 1), taking("never", lambda i: 0)]
    rows = {row["rival"]: row for row in harness.compare("job", "case", rivals, seconds=1.0, rounds=(2, 12))}
    assert [rows[name]["p80_ms"] for name in ("half", "always", "never")] == [2.0, 10.0, 2.0]
    assert [rows[name]["waited"] for name in ("half", "always", "never")] == [0.0, 0.8, 0.0]
    assert {row["rounds"] for row in rows.values()} == {12}


def test_where_the_kernel_does_not_say_who_waited_every_call_counts(monkeypatch, tmp_path):
    monkeypatch.setattr(harness.waiting, "TASKS", tmp_path)
    assert harness.waiting.waited_ms() is None
    assert harness.waiting.undisturbed([(3.0, None), (1.0, None)], 5) == ([1.0, 3.0], None)
    (tmp_path / "7").mkdir()
    (tmp_path / "7" / "schedstat").write_text("100 2500000 3\n")
    assert harness.waiting.waited_ms() == 2.5


def test_a_busy_machine_shows_in_what_is_printed(capsys):
    row = dict.fromkeys(harness.COLUMNS) | {
        "operation": "job",
        "rival": "ours",
        "p20_ms": 1.0,
        "p50_ms": 1.0,
        "p80_ms": 1.0,
    }
    harness.print_rows([row | {"waited": 0.4}, row | {"waited": 0.01}, row])
    assert [line.endswith("waited 40% for a core") for line in capsys.readouterr().out.splitlines()[3:]] == [
        True,
        False,
        False,
    ]


def test_quantiles_are_times_that_were_taken():
    ordered = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]
    assert [harness.quantile(ordered, q) for q in (0.2, 0.5, 0.8)] == [2.0, 4.0, 5.0]
    assert harness.quantile([7.0], 0.8) == 7.0


def test_the_floor_is_the_longer_of_bytes_and_operations_each_at_its_own_rate(monkeypatch):
    def copying(moved, device):
        return [harness.Rival(name, lambda i, ms=ms: ms) for name, ms in (("(a)", 1.0), ("(b)", 0.5))], moved / 1e7

    monkeypatch.setattr(harness, "_cpu_ms", lambda call, i: call(i))
    monkeypatch.setattr(harness, "copies_of", copying)
    rival = harness.Rival("ours", lambda i: 4.0)
    row = compared(rival, bytes_moved=2 * 10**7)["ours"]
    assert (row["floor_ms"], row["of_floor"], row["copy_gbs"]) == pytest.approx((1.0, 0.25, 20.0))
    assert compared(rival, flops=10**9)["ours"]["floor_ms"] == pytest.approx(10.0)
    row = compared(rival, bytes_moved=2 * 10**7, flops=10**8, float64_flops=10**8)["ours"]
    assert row["floor_ms"] == pytest.approx(1.0 + 2.0)
    assert (row["flops"], row["float64_gflops"]) == (2 * 10**8, 50.0)
    assert set(compared(rival, bytes_moved=2 * 10**7)) == {"ours"}  # copies get no rows


def test_a_written_csv_reads_back_and_an_older_one_lacks_columns(tmp_path):
    rows = list(compared(calls_of([]), harness.Rival("red", print, 1.0, 0.1)).values())
    harness.write_csv(rows, tmp_path / "a" / "b.csv")
    read = harness.read_csv(tmp_path / "a" / "b.csv")
    assert list(read[0]) == list(harness.COLUMNS)
    assert read[0]["p50_ms"] == pytest.approx(rows[0]["p50_ms"], rel=1e-5)
    assert read[1]["p50_ms"] is None
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["b.csv"]
    (tmp_path / "old.csv").write_text("operation,p50_ms,device\njob,1.5,a CPU\n")
    assert harness.read_csv(tmp_path / "old.csv") == [{"operation": "job", "p50_ms": 1.5, "device": "a CPU"}]


def test_the_last_columns_are_the_environment():
    environment = harness.environment()
    assert len(environment) == len(harness.COLUMNS[-5:])
    assert environment[1:3] == (torch.get_num_threads(), torch.__version__)


def test_without_git_the_commit_is_unknown_and_changed_code_shows(monkeypatch, tmp_path):
    monkeypatch.setattr(harness.shutil, "which", lambda name: None)
    assert harness.commit.__wrapped__() == "unknown"
    monkeypatch.undo()
    monkeypatch.setattr(harness, "DATA", tmp_path / "benchmarks" / "data")
    (tmp_path / "benchmarks" / "data").mkdir(parents=True)
    assert harness.commit.__wrapped__() == "unknown"
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b"]
    for name in ("code.py", "benchmarks/data/x.csv"):
        (tmp_path / name).write_text("before\n")
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "x"]):
        subprocess.run([*git, *command], cwd=tmp_path, check=True)
    clean = harness.commit.__wrapped__()
    (tmp_path / "benchmarks/data/x.csv").write_text("after\n")
    assert harness.commit.__wrapped__() == clean != "unknown"
    (tmp_path / "code.py").write_text("after\n")
    assert harness.commit.__wrapped__() == clean + "+changes"


@pytest.mark.parametrize(
    ("device", "card"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA GeForce RTX 4090", "rtx_4090"),
        ("AMD Instinct MI300X", "instinct_mi300x"),
        ("Tesla T4", "t4"),
    ],
)
def test_files_of_two_cards_have_two_names(device, card):
    assert harness.card(device) == card


def test_the_file_follows_the_device_that_was_asked_for(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100 80GB HBM3")
    parser = harness.arguments("a benchmark", "moca")
    assert parser.parse_args([]).out == harness.DATA / "moca_cuda_h100.csv" == parser.get_default("out")
    assert parser.parse_args(["--device", "cpu"]).out == harness.DATA / "moca_cpu.csv"
    assert parser.parse_args(["--out", str(tmp_path)]).out == tmp_path


@pytest.mark.parametrize(("moved", "share"), [(8000, 1.0), (1 << 13, 1.0), (1 << 15, 4.0)])
def test_copies_move_the_bytes_and_are_extrapolated_only_beyond_the_largest(monkeypatch, moved, share):
    monkeypatch.setitem(harness.COPIED, "cpu", 1 << 12)
    torch.manual_seed(0)
    source = torch.randn(int(moved / share) // 8)
    torch.manual_seed(0)
    ways, found = harness.copies_of(moved, "cpu")
    assert found == share
    for way in ways:
        assert torch.equal(way.call(0), source)
    assert harness.copies_of(0, "cpu") == ([], 1.0)


@pytest.mark.parametrize(
    ("small", "tried"),
    [
        ({torch.bfloat16: 2.0, torch.float32: 60.0, torch.int8: 1.5}, {torch.float32}),
        ({torch.bfloat16: 30.0, torch.float32: 60.0, torch.int8: 0.0}, {torch.bfloat16, torch.float32}),
        ({torch.bfloat16: 0.1, torch.float32: 1.0, torch.int8: 0.1}, {torch.float32}),  # a slow machine has a rate too
    ],
)
def test_the_rate_is_the_fastest_dtypes_and_none_is_tried_that_takes_minutes(monkeypatch, small, tried):
    full = []

    def product(device, dtype, n):
        full.extend([dtype] * (n == harness.MATRIX[device]))
        return small[dtype]

    monkeypatch.setattr(harness, "_product_rate", product)
    assert RATE("cpu", "any") == max(small.values())
    assert set(full) == tried


def test_every_operation_has_a_benchmark_that_runs_and_is_right():
    pytest.importorskip("pytest_benchmark")
    root = harness.DATA.parents[1]
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "benchmarks", "--benchmark-disable"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "12 passed" in done.stdout
    operations = {"moca", "add_moca_rms_norm", "token_norms", "newton_schulz", "polar", "trace_sqrt_product"}
    text = (root / "benchmarks" / "test_operations.py").read_text()
    assert all(f"def test_{name}(benchmark" in text for name in operations | {"frechet_distance", "mir"})
