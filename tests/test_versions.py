"""The script behind `make test-versions`: its sets, its copy of the checkout, and its parsing of logs."""

import re
import sys
from pathlib import Path

import pytest

import versions

ROOT = Path(__file__).resolve().parents[1]
HERE = f"{sys.version_info[0]}.{sys.version_info[1]}"
SUMMARY = """..F.
E   AssertionError: 7 passed, 9 failed in 3.00s
FAILED tests/a.py::test_b - no
FAILED tests/c.py::test_d
=========== 2 failed, 41 passed, 3 skipped, 5 deselected, 1 warning in 12.34s (0:00:12) ===========
1 passed, 2 errors in 0.10s
"""


@pytest.fixture
def place(tmp_path):
    return versions.Place(tmp_path, versions.GPU, sys.executable, 2)


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Call the script's main() with arguments, in a folder."""

    def main(*arguments):
        monkeypatch.setattr(sys, "argv", ["versions.py", str(tmp_path), *arguments])
        return versions.main()

    return main


def promised():
    """The lower version bounds in pyproject.toml: dependencies, extras that tests need, and build requirements."""
    text = (ROOT / "pyproject.toml").read_text()
    sections = [
        re.search(rf"^{name} = \[(.*?)\]$", text, flags=re.MULTILINE | re.DOTALL)[1]
        for name in ("requires", "dependencies", "mir", "data", "demo", "test")
    ]
    return dict(re.findall(r'"([\w-]+)>=([\w.]+)[",;]', "\n".join(sections)))


def test_the_oldest_set_is_what_pyproject_promises():
    wanted = promised()
    assert len(wanted) >= 25
    pins = {name: re.sub(r"(\.0)+$", "", version) for name, version in versions.OLDEST.pins.items()}
    assert pins == {name: re.sub(r"(\.0)+$", "", version) for name, version in wanted.items()}
    assert f'requires-python = ">={versions.OLDEST.python}"' in (ROOT / "pyproject.toml").read_text()


def test_the_copy_has_what_git_knows_and_nothing_that_was_built(place):
    versions.copy_tree(place.tree)
    names = {str(path.relative_to(place.tree)) for path in place.tree.rglob("*") if path.is_file()}
    assert {"setup.py", "benchmarks/gpu_suite.py", "tests/kernels/jobs.py", "csrc/moca/moca_cuda.cu"} <= names
    assert not [name for name in names if name.endswith((".so", ".pyc")) or name.startswith((".git/", ".venv"))]
    (place.tree / "left_from_before").touch()
    versions.copy_tree(place.tree)
    assert not (place.tree / "left_from_before").exists()


def test_a_step_stops_at_the_command_that_fails(place, monkeypatch):
    place.tree.mkdir()
    say = [sys.executable, "-c"]
    commands = [[*say, "print('3 passed in 1.0s')"], [*say, "raise SystemExit(3)"], [*say, "print('9 passed in 1.0s')"]]
    monkeypatch.setitem(versions.STEPS, "suite", lambda place: commands)
    code, text = versions.run_step("suite", place)
    assert (code, versions.tally(text)) == (3, {"passed": 3, "failed": 0, "skipped": 0})


def test_what_passed_failed_and_was_skipped_is_counted_by_pytests_own_lines():
    assert versions.tally(SUMMARY) == {"passed": 42, "failed": 4, "skipped": 3}
    assert versions.tally("5 tests collected in 0.33s") == {"passed": 0, "failed": 0, "skipped": 0}


def test_what_failed_is_named():
    log = "FAILED tests/a.py::test_b - no\nbench       failed        14.9  stopped\nall well\n  2x small polar: off\n"
    assert versions.failures(log) == [line for line in log.splitlines() if line != "all well"]


@pytest.mark.parametrize("name", versions.SETS)
def test_every_step_has_commands_that_run_in_the_environment(tmp_path, name):
    place = versions.Place(tmp_path, versions.SETS[name], sys.executable, 2)
    for step in set(versions.STEPS) - {"packages"}:
        commands = versions.STEPS[step](place)
        assert commands
        assert {command[0] for command in commands} == {place.python}
    assert versions.packages(place)[0][0] == place.base
    pinned = (place.folder / "requirements.txt").read_text().split()
    assert {f"torch=={place.versions.pins['torch']}", f"triton=={place.versions.pins['triton']}"} <= {*pinned}
    assert all("==" in line for line in pinned)


def test_the_table_counts_what_ran_in_each_set_and_failures_make_the_exit_code(run, monkeypatch, tmp_path, capsys):
    """With a fake for every step: the second set's packages cannot be installed, the first's kernels fail."""
    for name in versions.SETS:
        python = tmp_path / name / "venv" / "bin" / "python"
        python.parent.mkdir(parents=True)
        python.touch()
    said = {"kernels": (1, SUMMARY), "packages": (0, "Python 3.10.1, torch 2.8.0")}
    monkeypatch.setattr(versions, "copy_tree", lambda place: None)
    monkeypatch.setattr(
        versions,
        "run_step",
        lambda step, place: (1, "ERROR: none") if place.folder.name == "gpu" else said.get(step, (0, "")),
    )
    assert run("--only", "packages,kernels") == 1
    out = capsys.readouterr().out
    assert "\nPython 3.10.1, torch 2.8.0\n" in out
    assert "\n  FAILED tests/c.py::test_d\n" in out
    table = [re.sub(r" +\d+ s", "", line).split() for line in out[out.index("\nset ") :].strip().splitlines()]
    assert table == [
        ["set", "step", "state", "time", "passed", "failed", "skipped"],
        ["oldest", "packages", "passed", "0", "0", "0"],
        ["oldest", "build", "passed", "0", "0", "0"],
        ["oldest", "kernels", "failed", "(1)", "42", "4", "3"],
        ["gpu", "packages", "failed", "(1)", "0", "0", "0"],
    ]
    monkeypatch.setattr(versions, "run_step", lambda step, place: (0, ""))
    assert run() == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "aot,tea"], "--only: expected packages,build,collect,aot,kernels,metric,suite, got tea"),
        (["--sets", "newest"], "--sets: expected oldest,gpu, got newest"),
        (["--python", "new=python3"], "--python: expected oldest,gpu, got new"),
        (["--sets", "gpu", "--only", "aot"], "--only: expected packages among the steps, because "),
    ],
)
def test_a_name_that_it_does_not_know_is_refused(run, capsys, tmp_path, arguments, message):
    with pytest.raises(SystemExit):
        run(*arguments)
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["missing", "a shim that runs nothing", "another version"])
def test_an_interpreter_that_will_not_do_is_named_before_anything_is_made(run, tmp_path, capsys, monkeypatch, kind):
    path, why = "no-such-python", "found no no-such-python"
    if kind == "another version":
        monkeypatch.setitem(versions.SETS, "gpu", versions.GPU._replace(python="3.99"))
        path, why = sys.executable, f"{sys.executable} is Python {HERE}"
    elif kind == "a shim that runs nothing":
        shim = tmp_path / "shim"
        shim.write_text("#!/bin/sh\necho 'no version of it is installed' >&2\nexit 127\n")
        shim.chmod(0o755)
        path, why = str(shim), f"{shim} does not run (no version of it is installed)"
    with pytest.raises(SystemExit):
        run("--sets", "gpu", "--python", f"gpu={path}")
    version = versions.SETS["gpu"].python
    wanted = f"--python: expected gpu=PATH, an interpreter of Python {version}; {why}"
    assert wanted in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "gpu").exists()
