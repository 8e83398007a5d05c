"""The `mir --help` pages at any width: nothing cut, no line too long, every option on one line."""

import inspect
import os
import re
import subprocess
import sys
from typing import Literal, get_args, get_origin

import pytest

from integration.app.command_line import COMMANDS, mir
from modality_integration.app import config
from modality_integration.app.cli import main


def parameters(command):
    (found,) = (c.callback for c in main.registered_commands if c.callback.__name__ == command)
    return [p for name, p in inspect.signature(found).parameters.items() if name != "ctx"]


def spelled(command, parameter):
    option = parameter.annotation.__metadata__[0]
    if type(option).__name__ == "ArgumentInfo":
        return [parameter.name.upper()]
    dashed = parameter.name.replace("_", "-")
    name = f"--{dashed}" + (f" {option.metavar}" if option.metavar else "")
    return [name, *([f"--no-{dashed}"] if config.KNOWN[command][parameter.name].negatable else [])]


@pytest.mark.parametrize("columns", [60, 80, 120, 200])
@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_a_page_fits_its_width_and_cuts_nothing(command, columns):
    outcome = mir(*command.split(), "--help", columns=columns)
    assert outcome.exit_code == 0, outcome.output
    assert "…" not in outcome.output
    assert max(map(len, outcome.output.splitlines())) <= columns


@pytest.mark.parametrize("columns", [60, 80, 120])
@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_stands_whole_at_the_start_of_its_line(command, columns):
    lines = [line.lstrip("│ ") for line in mir(command, "--help", columns=columns).output.splitlines()]
    for parameter in parameters(command):
        for name in spelled(command, parameter):
            named = re.compile(rf"(-\w, )?{re.escape(name)}( |\.\.\.|$)")
            assert any(named.match(line) for line in lines), name


@pytest.mark.parametrize("columns", [60, 80, 120])
def test_metavars_are_short_and_choices_are_in_the_help(columns):
    printed = re.sub(r"\s+", "", mir("compute", "--help", columns=columns).output.replace("│", ""))
    for parameter in parameters("compute"):
        option, kind = parameter.annotation.__metadata__[0], parameter.annotation.__origin__
        assert len(option.metavar or "") <= 6
        if get_origin(kind) is Literal:
            assert f"[{'|'.join(get_args(kind))}]".replace(" ", "") in printed


def test_options_stand_under_the_heading_of_what_they_are_about():
    printed = mir("compute", "--help").output
    panels = dict(re.findall(r"╭─ (\w+) ─*╮\n(.*?)╰", printed, re.DOTALL))
    assert list(panels) == ["Model", "Samples", "Tokens", "Measurement", "Output", "Study", "Terminal"]
    for heading, options in {
        "Model": ["--model", "--device", "--batch-size"],
        "Samples": ["--images", "--samples", "--seed", "--protocol"],
        "Tokens": ["--text-tokens", "--template", "--last", "--text-role"],
        "Measurement": ["--outliers", "--groups", "--sinks", "--second-pass"],
        "Output": ["--out", "--overwrite", "--restart", "--plots"],
        "Study": ["--study", "--repeat"],
        "Terminal": ["--config", "--json", "--quiet", "--verbose", "--help"],
    }.items():
        assert all(re.search(rf"│ (-\w, )?{option} ", panels[heading]) for option in options), heading


def test_what_must_be_given_and_what_is_taken_otherwise_are_in_the_help():
    printed = " ".join(mir("compute", "--help", columns=200).output.split())
    assert re.search(r"--model DIR [^│]*\[required\]", printed)
    assert re.search(r"--samples N [^│]*\[default: 100\]", printed)
    assert re.search(r"--normalize [^│]*\[default: normalize\]", printed)
    assert not re.search(r"--revision REV [^│]*\[default", printed)


@pytest.mark.parametrize("arguments", [["--help"], ["compute", "--help"], ["--version"], ["compute", "--config"]])
def test_nothing_heavy_is_waited_for(arguments):
    check = (
        "import sys\nfrom modality_integration.app.cli import main\n"
        f"try: main({arguments!r})\nexcept SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'matplotlib', 'torchmetrics', 'numpy', 'yaml'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    outcome = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, timeout=120)
    assert outcome.returncode == 0, outcome.stderr


def completed(typed):
    words = typed.split(" ")
    variables = {"_MIR_COMPLETE": "complete_bash", "COMP_WORDS": typed, "COMP_CWORD": str(len(words) - 1)}
    command = [sys.executable, "-m", "modality_integration"]
    done = subprocess.run(command, env=os.environ | variables, capture_output=True, text=True, timeout=120)
    assert done.stderr == ""
    return done.stdout.split()


@pytest.mark.parametrize(
    ("typed", "words"),
    [
        ("mir comp", ["compute", "compare"]),
        ("mir compute --text-", ["--text-tokens", "--text-role"]),
        ("mir compute --last ", ["normed", "raw"]),
        ("mir compute --model nowhere --config nowhere.yaml --study t", ["template"]),
        ("mir states --outliers ", ["remove", "median", "none"]),
    ],
)
def test_a_shell_completes_commands_options_and_choices(typed, words):
    assert completed(typed) == words


def test_the_completion_of_a_shell_can_be_shown(monkeypatch):
    monkeypatch.setattr("shellingham.detect_shell", lambda: ("bash", "/bin/bash"))  # whatever shell runs the tests
    outcome = mir("--show-completion", "bash")
    assert outcome.exit_code == 0, outcome.output
    assert "complete_bash" in outcome.output
