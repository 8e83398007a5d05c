"""`mir` in this process, as it is typed."""

from typer.testing import CliRunner

from modality_integration.app.cli import main

COMMANDS = [command.callback.__name__ for command in main.registered_commands]


def mir(*words, columns=120, **environment):
    """The outcome of `mir`, its words as typed; other arguments are variables of the environment."""
    variables = {"COLUMNS": str(columns), **{name: str(value) for name, value in environment.items()}}
    return CliRunner().invoke(main, [str(word) for word in words], env=variables)
