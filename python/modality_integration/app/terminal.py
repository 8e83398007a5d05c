"""How a command talks: where its results and progress go, and how much is said."""

from __future__ import annotations

import contextlib
import logging
import os
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TextIO

import typer

from modality_integration.app.config import use_file

if TYPE_CHECKING:
    from rich.console import Console

LOGGERS = ("modality_integration", "mir_kernels")
of_terminal = partial(typer.Option, rich_help_panel="Terminal")


@dataclass(frozen=True, kw_only=True)
class Terminal:
    """A result on stdout; progress, notes on the way, warnings and errors on stderr."""

    config: Annotated[
        Path | None,
        of_terminal(
            metavar="FILE",
            is_eager=True,
            callback=use_file,
            help="Options from a YAML file, `text-tokens: 100` a line. What is typed counts first, then variables "
            "(MIR_COMPUTE_SEED for a command, MIR_SEED for all), then the file.",
        ),
    ] = None
    json: Annotated[bool, of_terminal("--json", help="The result as JSON, and nothing else, on stdout.")] = False
    quiet: Annotated[bool, of_terminal("--quiet", "-q", help="No progress, no notes; errors and the result stay.")] = (
        False
    )
    verbose: Annotated[
        bool, of_terminal("--verbose", "-v", help="Also what is loaded, where it runs and how long it takes.")
    ] = False

    def results(self) -> Console:
        """Where results go: stdout, unless they go there as JSON."""
        from rich.console import Console

        from modality_integration.app.console import WithoutNotes

        return _console(WithoutNotes if self.quiet else Console, stderr=False, quiet=self.json)

    def progress(self) -> Console:
        """Where progress and notes on the way go: stderr, so that results can be piped."""
        from rich.console import Console

        return _console(Console, stderr=True, quiet=self.quiet)

    def note(self, notes: Sequence[str]) -> None:
        """Notes on the way, a line each."""
        for note in notes:
            self.progress().print(f"[yellow]note[/] {_plain(note)}", highlight=False, soft_wrap=True)

    def write_json(self, result: Any) -> None:
        """The result on stdout, where --json asks for it; of several processes the first one writes.

        result: JSON as text, or what becomes some; a number that is not finite is a string there, as in mir.json.
        """
        if self.json and os.environ.get("RANK", "0") == "0":
            from modality_integration.metric.files import json_text

            text = result.to_json() if hasattr(result, "to_json") else result
            text = text if isinstance(text, str) else json_text(text)
            typer.echo(text.rstrip("\n"))

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Inside, Python's warnings are a line each on stderr, and with --verbose so is what this package logs."""
        shown = warnings.showwarning
        warnings.showwarning = self._show_warning
        with contextlib.ExitStack() as stack:
            stack.callback(setattr, warnings, "showwarning", shown)
            if self.verbose:
                stack.enter_context(self._logged())
            yield

    @contextlib.contextmanager
    def _logged(self) -> Iterator[None]:
        from rich.logging import RichHandler

        handler = RichHandler(
            console=self.progress(), show_path=False, omit_repeated_times=False, log_time_format="[%X]"
        )
        before = {name: logging.getLogger(name).level for name in LOGGERS}
        for name in LOGGERS:
            logging.getLogger(name).addHandler(handler)
            logging.getLogger(name).setLevel(logging.DEBUG)
        try:
            yield
        finally:
            for name, level in before.items():
                logging.getLogger(name).removeHandler(handler)
                logging.getLogger(name).setLevel(level)

    def _show_warning(
        self,
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        """A warning's first line, and what gave it: of another library the rest is for whoever writes that."""
        first = next(iter(str(message).strip().splitlines()), category.__name__)
        where = f"   ({category.__name__}, {Path(filename).name}:{lineno})" if self.verbose else ""
        self.progress().print(f"[yellow]warning[/] {_plain(first + where)}", highlight=False, soft_wrap=True)


def _console(kind: type[Console], *, stderr: bool, quiet: bool) -> Console:
    # A pipe or a log has no width: tables there get one that fits them, and never a terminal's guess of 80.
    width = None if kind(stderr=stderr).is_terminal or "COLUMNS" in os.environ else 120
    return kind(stderr=stderr, width=width, quiet=quiet)


def _plain(text: str) -> str:
    from rich.markup import escape

    return escape(text)
