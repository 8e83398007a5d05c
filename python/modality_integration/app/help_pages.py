"""The pages of `mir --help`: options under headings, never split across lines, at any terminal width."""

from __future__ import annotations

import inspect
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from typer.core import TyperCommand, TyperGroup

from modality_integration.app.flat_options import source, variable_of

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text


class CommandPage(TyperCommand):
    """A command with such a help page, whose errors name the environment variable that holds an invalid value."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """As `TyperCommand`."""
        try:
            return super().parse_args(ctx, args)
        except typer.BadParameter as error:
            if error.param is not None and source(ctx, str(error.param.name)) == "ENVIRONMENT":
                error.param_hint = variable_of(ctx, str(error.param.name))
            raise

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        """The words after the command's name in `Usage:`."""
        return ["[OPTIONS]", *(_argument(p) for p in self.get_params(ctx) if p.param_type_name == "argument")]

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Print the page."""
        _show(self, ctx)


class FrontPage(TyperGroup):
    """The top-level command, with such a help page."""

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        """The words after its name in `Usage:`."""
        return ["[OPTIONS]", "COMMAND ..."]

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Print the page."""
        _show(self, ctx)


def _show(command: TyperCommand | TyperGroup, ctx: Any) -> None:
    from rich.console import Console
    from rich.padding import Padding
    from rich.text import Text

    console, usage = Console(highlight=False), " ".join([ctx.command_path, *command.collect_usage_pieces(ctx)])
    console.print()
    console.print(Padding(Text.assemble(("Usage: ", "yellow"), (usage, "bold")), (0, 1, 1, 1)))
    console.print(Padding(Text.from_markup(inspect.cleandoc(command.help or "")), (0, 1, 1, 1)))
    rows: dict[str, list[tuple[Text, Text]]] = defaultdict(list)
    parameters: list[Any] = list(command.get_params(ctx))
    for parameter in parameters:
        if not parameter.hidden:
            rows[_heading(parameter)].append((_name(parameter), _help(parameter)))
    last = rows.pop("Terminal", [])
    if isinstance(command, TyperGroup):
        for name in command.list_commands(ctx):
            said = (command.get_command(ctx, name).help or "").split("\n\n")[0]  # type: ignore[union-attr]
            rows["Commands"].append((Text(name, "bold cyan"), Text(said)))
    for heading, entries in {**rows, "Terminal": last}.items():
        _panel(heading, entries, console)
    if command.epilog:
        console.print(Padding(Text(command.epilog), (1, 1, 1, 1)))


def _panel(heading: str, entries: list[tuple[Text, Text]], console: Console) -> None:
    """A frame with one or more lines per entry; names keep their width, and the help text takes the rest."""
    from rich.panel import Panel
    from rich.table import Table

    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True, overflow="fold", min_width=max(name.cell_len for name, _ in entries))
    table.add_column(overflow="fold", ratio=1)
    for entry in entries:
        table.add_row(*entry)
    console.print(Panel(table, title=heading, title_align="left", border_style="dim"))


def _heading(parameter: Any) -> str:
    if "--help" in parameter.opts:
        return "Terminal"
    default = "Arguments" if parameter.param_type_name == "argument" else "Options"
    return getattr(parameter, "rich_help_panel", None) or default


def _name(parameter: Any) -> Text:
    """An option as typed, with its metavar; for a flag, a second line shows how to turn it off."""
    from rich.text import Text

    if parameter.param_type_name == "argument":
        return Text(_argument(parameter), "bold cyan")
    name = Text(", ".join(sorted(parameter.opts, key=len)), "bold cyan")
    if parameter.metavar and not parameter.is_flag:
        name.append(f" {parameter.metavar}", "not bold yellow")
    if parameter.secondary_opts:
        name.append("\n" + ", ".join(parameter.secondary_opts), "bold magenta")
    return name


def _argument(parameter: Any) -> str:
    return parameter.name.upper() + "..." * (parameter.nargs != 1)


def _help(parameter: Any) -> Text:
    """The help text of an option, then its default or "required"."""
    from rich.text import Text

    text, default = Text(parameter.help or ""), parameter.default
    if parameter.required:
        text.append(" [required]", "red")
    elif parameter.param_type_name == "option" and parameter.secondary_opts:
        text.append(f" [default: {(parameter.opts if default else parameter.secondary_opts)[0].lstrip('-')}]", "dim")
    elif isinstance(default, (str, int, Path)) and not isinstance(default, bool):
        text.append(f" [default: {default}]", "dim")
    return text
