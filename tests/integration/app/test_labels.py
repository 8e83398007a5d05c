"""Labels for several results."""

from pathlib import Path

import pytest

from modality_integration.app.errors import InputError
from modality_integration.app.labels import labels_of


@pytest.mark.parametrize(
    ("paths", "labels"),
    [
        (["runs/llava/mir.json"], ["llava"]),
        (["runs/llava"], ["llava"]),
        (["runs/llava/"], ["llava"]),
        (["./a/"], ["a"]),
        (["../a"], ["a"]),
        (["runs/x/../a"], ["a"]),
        (["runs/a/mir.json", "runs/b"], ["a", "b"]),
        (["before/mir.json", "after/mir.json"], ["before", "after"]),
        (["a/out", "b/out"], ["a", "b"]),
        (["a/mir-out/mir.json", "b/mir-out"], ["a", "b"]),
        (["one/a", "two/a", "two/b"], ["one/a", "two/a", "b"]),
        (["a/out", "b/out", "c"], ["a/out", "b/out", "c"]),
        (["a", "b/a"], [Path.cwd().name, "b"]),
        (["/a", "/b/a"], ["/a", "b/a"]),
        (["a/mir.json", "a/before.json"], ["mir", "before"]),
        (["a", "a/before.json"], ["mir", "before"]),
        (["a/before.json"], ["before"]),
        (["a/before.json", "b/before.json"], ["a", "b"]),
        (["a/before.json", "a/mir.json", "b"], ["before", "mir", "b"]),
        (["a/before.json", "a/after.json", "b/before.json"], ["a/before", "after", "b/before"]),
        (["a", "a"], ["a (1)", "a (2)"]),
        (["a", "./a/mir.json", "b"], ["a (1)", "a (2)", "b"]),
        (["a", "a", "a (1)"], ["a (2)", "a (3)", "a (1)"]),
        (["run-v1.5", "run-v1.6"], ["run-v1.5", "run-v1.6"]),
        (["модель", "a b$c_d"], ["модель", "a b$c_d"]),
        (["/"], ["/"]),
        ([], []),
    ],
)
def test_a_result_is_called_by_the_shortest_name_that_tells_it_from_the_others(paths, labels):
    assert labels_of([Path(path) for path in paths]) == labels


def test_here_is_called_by_its_folder(tmp_path, monkeypatch):
    (tmp_path / "run").mkdir()
    monkeypatch.chdir(tmp_path / "run")
    assert labels_of([Path()]) == ["run"]
    assert labels_of([Path("mir.json")]) == ["run"]


def test_folders_and_files_go_by_what_they_are_on_disk(tmp_path):
    (tmp_path / "run.json").mkdir()
    (tmp_path / "result.txt").touch()
    assert labels_of([tmp_path / "run.json", tmp_path / "result.txt"]) == ["run.json", "result"]


def test_links_keep_their_names(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "best").symlink_to(tmp_path / "run")
    assert labels_of([tmp_path / "best", tmp_path / "run"]) == ["best", "run"]


def test_given_labels_stand_as_they_are():
    assert labels_of([Path("a"), Path("b")], ["LLaVA 1.5", "$x_1$"]) == ["LLaVA 1.5", "$x_1$"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["one"], "label: expected one label per result (2), got 1"),
        (["one", "two", "three"], "label: expected one label per result (2), got 3"),
        (["one", "one"], "label: expected a different label for each result, got 'one' 2 times"),
        (["one", " "], "label: expected a non-empty label, got ' '"),
    ],
)
def test_labels_that_do_not_fit_are_refused(given, message):
    with pytest.raises(InputError) as refused:
        labels_of([Path("a"), Path("b")], given)
    assert str(refused.value) == message
