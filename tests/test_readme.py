"""The README keeps its promises: Python blocks run, commands exist, every number comes from a committed CSV.

Tables of the pages in docs/ are also compared with their data.
"""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import figures
import harness
import headlines

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


def test_it_is_short():
    assert len(README.splitlines()) <= 150


def test_every_number_is_a_version_or_in_a_generated_table():
    prose = re.sub(r"^```.*?^```|<!-- table .*?<!-- end -->", "", README, flags=re.DOTALL | re.MULTILINE)
    prose = " ".join(re.sub(r"\]\([^)]*\)|`[^`]*`|arXiv:\S+", "", prose).split())
    pyproject = (ROOT / "pyproject.toml").read_text()
    floors = {f"{name} {version}" for name, version in re.findall(r'"(torch|numpy|triton)>=([\d.]+)', pyproject)}
    floors |= {"Python " + re.search(r'requires-python = ">=([\d.]+)"', pyproject)[1]}
    for floor in floors:
        prose, count = re.subn(rf"\b{re.escape(floor)}\b", "", prose, flags=re.IGNORECASE)
        assert count == 1, floor
    words = {"log10", "Ratios above 1", "2024", "Gemma 3", "Llama 4", "Qwen3", "Apache-2.0"}
    assert re.findall(r"\b\d[\d.,]*\b", re.sub("|".join(map(re.escape, words)), "", prose)) == []


def test_a_headline_is_the_ratio_of_two_rows():
    row = {"operation": "covariance", "case": "c", "p50_ms": 2.0, "error": 1e-6}
    spec = headlines.Headline("job", "x", "covariance", "c", "ours", "theirs")
    rows = [row | {"rival": "ours"}, row | {"rival": "theirs", "p50_ms": 9.0, "error": 0.0}]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(headlines, "HEADLINES", (spec,))
        assert headlines.lines(lambda _: rows)[2:] == ["| job | theirs | 4.5 | 1e-06 | 0 |"]
        with pytest.raises(KeyError, match="theirs"):
            headlines.lines(lambda _: rows[:1])


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
    assert {f"{name}_cpu" for name in benchmarks} <= figures.PAGES["docs/benchmarks.md"][1]


def test_a_table_whose_marker_is_gone_fails_the_check(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(figures, "ROOT", tmp_path)
    monkeypatch.setattr(sys, "argv", ["figures.py", "--check"])
    (tmp_path / "docs").mkdir()
    for page in figures.PAGES:
        (tmp_path / page).write_text((ROOT / page).read_text())
    assert figures.main() == 0
    (tmp_path / "README.md").write_text(README.replace("<!-- table headlines -->\n", ""))
    assert figures.main() == 1
    assert "README.md: no `<!-- table NAME -->` of headlines" in capsys.readouterr().out


def test_every_csv_that_a_page_names_exists_and_every_csv_has_a_page():
    pages = [ROOT / "README.md", *ROOT.glob("docs/*.md"), *ROOT.glob("mir_kernels/**/README.md")]
    text = "\n".join(path.read_text() for path in pages)
    named = set(re.findall(r"\b([a-z0-9_]+\.(?:csv|png))\b", text))
    here = {path.name for path in (ROOT / "benchmarks" / "data").iterdir()}
    assert {name for name in named if name.rpartition("_")[0] and name not in here} == set()
    shown = named | {name.replace(".png", ".csv") for name in named}  # a plot is next to its CSV
    assert {name for name in here if name.endswith(".csv")} <= shown


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
