"""The README's promises: every Python block runs as it stands, every command exists, every table is its CSV's.

The page of the reproduction keeps the last of them too.
"""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import figures
import harness

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("number", range(len(blocks("python"))))
def test_python_block_runs_as_it_stands(number, tmp_path):
    code = blocks("python")[number]
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=300, check=False)
    assert done.returncode == 0, f"{code}\n{done.stderr}"


@pytest.mark.parametrize("target", sorted(set(re.findall(r"\bmake ([a-z][a-z-]*)", README))))
def test_make_target_exists(target):
    done = subprocess.run(["make", "-n", target], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("command", sorted(set(re.findall(r"^mir ([a-z]+)", "\n".join(blocks("bash")), re.MULTILINE))))
def test_mir_command_exists(command):
    done = subprocess.run(
        [sys.executable, "-m", "modality_integration", command, "--help"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_local_links_lead_somewhere():
    links = re.findall(r"\]\(([^)#]+)[^)]*\)", README)
    missing = [link for link in links if "://" not in link and not (ROOT / link).exists()]
    assert links
    assert not missing


def test_tables_say_what_their_csvs_say():
    done = subprocess.run(
        [sys.executable, "benchmarks/figures.py", "--check"], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("page", figures.PAGES)
def test_every_table_that_must_stand_there_does_and_no_other(page):
    named = re.findall(r"<!-- table ([\w-]+) -->", (ROOT / page).read_text())
    assert set(named) == figures.PAGES[page][1]
    assert len(named) == len(set(named))


def test_no_benchmark_is_left_out():
    benchmarks = {path.stem.removeprefix("bench_") for path in (ROOT / "benchmarks").glob("bench_*.py")}
    assert {f"{name}_cpu" for name in benchmarks} <= figures.PAGES["README.md"][1]


def test_a_table_whose_marker_is_gone_fails_the_check(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(figures, "ROOT", tmp_path)
    monkeypatch.setattr(sys, "argv", ["figures.py", "--check"])
    (tmp_path / "docs").mkdir()
    for page in figures.PAGES:
        (tmp_path / page).write_text((ROOT / page).read_text())
    assert figures.main() == 0
    (tmp_path / "README.md").write_text(README.replace("<!-- table moca_cpu -->\n", ""))
    assert figures.main() == 1
    assert "README.md: no `<!-- table NAME -->` of moca_cpu" in capsys.readouterr().out


def test_every_csv_that_a_page_names_exists_and_every_csv_has_a_page():
    pages = [ROOT / "README.md", *ROOT.glob("docs/*.md"), *ROOT.glob("mir_kernels/**/README.md")]
    text = "\n".join(path.read_text() for path in pages)
    named = set(re.findall(r"\b([a-z0-9_]+\.(?:csv|png))\b", text)) - {"mir.png"}
    here = {path.name for path in (ROOT / "benchmarks" / "data").iterdir()}
    assert {name for name in named if name.rpartition("_")[0] and name not in here} == set()
    shown = named | {name.replace(".png", ".csv") for name in named}  # a plot lies beside its CSV
    assert {name for name in here if name.endswith(".csv")} <= shown


def test_figures_of_the_demo_in_the_text_are_in_its_file():
    history = json.loads((ROOT / "benchmarks" / "data" / "demo_history.json").read_text())
    assert [value for value in history["mir"] if f"{value:.3f}" not in README] == []


def test_a_benchmark_row_shows_its_floor_and_its_peak_and_an_older_file_neither():
    row = {"operation": "mir", "case": "c", "rival": "ours", "p50_ms": 2.0, "error": 0.0}
    (head, _, line) = figures.benchmark_lines([row | {"of_floor": 0.5, "peak_mb": 114.2}])
    assert head == "| case | rival | p50 ms | x first | of floor | peak MB | error |"
    assert line == "| mir: c | ours | 2 | 1.00 | 0.50 | 114 | 0 |"
    assert (
        figures.benchmark_lines([row | {"of_floor": None, "peak_mb": None}])[2] == "| mir: c | ours | 2 | 1.00 |  | 0 |"
    )
    old = figures.benchmark_lines([row | {"case": "c; peak 114 MB", "of_floor": 1.4}])
    assert old[2] == "| mir: c | ours (peak 114 MB) | 2 | 1.00 | 0 |"


def test_a_table_says_how_many_of_its_rows_were_measured_on_a_busy_machine(tmp_path):
    row = dict.fromkeys(harness.COLUMNS) | {"operation": "mir", "case": "c", "p50_ms": 2.0, "error": 0.0}
    rows = [row | {"rival": str(i), "waited": waited} for i, waited in enumerate((None, 0.01, 0.5, 1.2))]
    harness.write_csv(rows, tmp_path / "x.csv")
    assert figures.table(tmp_path / "x.csv", "data").endswith(
        "In 2 of 4 rows the process waited for a core that another one had.\n"
    )
    harness.write_csv(rows[:2], tmp_path / "x.csv")
    assert "waited" not in figures.table(tmp_path / "x.csv", "data")
