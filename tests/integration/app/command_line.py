"""Run `mir` in this process."""

from typer.testing import CliRunner

from modality_integration.app.cli import main

COMMANDS = [command.callback.__name__ for command in main.registered_commands]


def mir(*words, columns=120, **environment):
    """The outcome of `mir` with these words; keyword arguments are environment variables."""
    variables = {"COLUMNS": str(columns), **{name: str(value) for name, value in environment.items()}}
    return CliRunner().invoke(main, [str(word) for word in words], env=variables)
