"""The script that makes a GPU machine's environment: its copy of the checkout, and what it reads out of its logs."""

import sys

import pytest

import gpu_environment as environment


@pytest.fixture
def place(tmp_path):
    return environment.Place(tmp_path, sys.executable)


def test_the_copy_has_what_git_knows_and_nothing_that_was_built(place):
    environment.copy_tree(place)
    names = {str(path.relative_to(place.tree)) for path in place.tree.rglob("*") if path.is_file()}
    assert {"setup.py", "benchmarks/gpu_suite.py", "tests/kernels/jobs.py", "csrc/moca/moca_cuda.cu"} <= names
    assert not [name for name in names if name.endswith((".so", ".pyc")) or name.startswith((".git/", ".venv"))]
    (place.tree / "left_from_before").touch()
    environment.copy_tree(place)
    assert not (place.tree / "left_from_before").exists()


def test_a_step_stops_at_the_command_that_fails_and_its_counts_are_read(place, monkeypatch):
    place.tree.mkdir()
    say = [sys.executable, "-c"]
    commands = [[*say, "print('3 passed, 1 skipped')"], [*say, "raise SystemExit(3)"], [*say, "print('9 passed')"]]
    monkeypatch.setitem(environment.STEPS, "suite", lambda place: commands)
    assert environment.run_step("suite", place) == (3, "3 passed, 1 skipped")


def test_what_failed_is_named():
    log = "FAILED tests/a.py::test_b - no\nbench       failed        14.9  stopped\nall well\n  2x small polar: off\n"
    assert environment.failures(log) == [line for line in log.splitlines() if line != "all well"]


def test_every_step_has_commands_that_run_in_the_environment(place):
    for name in set(environment.STEPS) - {"packages"}:
        commands = environment.STEPS[name](place)
        assert commands
        assert {command[0] for command in commands} == {place.python}
    assert environment.packages(place)[0][0] == place.base
    pinned = (place.folder / "requirements.txt").read_text().split()
    assert {"triton==3.6.0", "numpy==2.5.2"} <= {*pinned}
    assert all("==" in line for line in pinned)


def test_an_unknown_step_is_refused(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(sys, "argv", ["gpu_environment.py", str(tmp_path), "--only", "aot,tea"])
    with pytest.raises(SystemExit):
        environment.main()
    assert "--only: takes packages,build,collect,aot,kernels,suite, got tea" in capsys.readouterr().err


def test_an_interpreter_that_is_missing_is_named(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(sys, "argv", ["gpu_environment.py", str(tmp_path), "--python", "no-such-python"])
    with pytest.raises(SystemExit):
        environment.main()
    assert "--python: takes an interpreter of Python 3.12, found no no-such-python" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
