"""Terminal output of a command: where results and progress go, and how verbose it is."""

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
    """Results go to stdout; progress, notes, warnings and errors go to stderr."""

    config: Annotated[
        Path | None,
        of_terminal(
            metavar="FILE",
            is_eager=True,
            callback=use_file,
            help="Read options from a YAML file, one per line (`text-tokens: 100`). The command line takes precedence, "
            "then environment variables (MIR_COMPUTE_SEED for one command, MIR_SEED for all), then the file.",
        ),
    ] = None
    json: Annotated[bool, of_terminal("--json", help="Print only the result on stdout, as JSON.")] = False
    quiet: Annotated[
        bool, of_terminal("--quiet", "-q", help="Hide progress and notes; keep errors and the result.")
    ] = False
    verbose: Annotated[
        bool, of_terminal("--verbose", "-v", help="Also show what is loaded, where it runs and how long it takes.")
    ] = False

    def results(self) -> Console:
        """Console for results: stdout, silent when they are printed there as JSON."""
        from rich.console import Console

        from modality_integration.app.console import WithoutNotes

        return _console(WithoutNotes if self.quiet else Console, stderr=False, quiet=self.json)

    def progress(self) -> Console:
        """Console for progress and notes: stderr, so that results can be piped."""
        from rich.console import Console

        return _console(Console, stderr=True, quiet=self.quiet)

    def note(self, notes: Sequence[str]) -> None:
        """Print each note on its own line."""
        for note in notes:
            self.progress().print(f"[yellow]note[/] {_plain(note)}", highlight=False, soft_wrap=True)

    def write_json(self, result: Any) -> None:
        """With --json, print the result on stdout, from the first process only.

        result: JSON text, or an object to encode. Non-finite numbers become strings, as in mir.json.
        """
        if self.json and os.environ.get("RANK", "0") == "0":
            from modality_integration.metric.files import json_text

            text = result.to_json() if hasattr(result, "to_json") else result
            text = text if isinstance(text, str) else json_text(text)
            typer.echo(text.rstrip("\n"))

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Inside, print each Python warning, and with --verbose this package's log, one line each on stderr."""
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
        """Print the first line of a warning, with --verbose also its origin; the rest rarely concerns a user."""
        first = next(iter(str(message).strip().splitlines()), category.__name__)
        where = f"   ({category.__name__}, {Path(filename).name}:{lineno})" if self.verbose else ""
        self.progress().print(f"[yellow]warning[/] {_plain(first + where)}", highlight=False, soft_wrap=True)


def _console(kind: type[Console], *, stderr: bool, quiet: bool) -> Console:
    # A pipe or a log has no width. Use one that fits the tables, not rich's default of 80.
    width = None if kind(stderr=stderr).is_terminal or "COLUMNS" in os.environ else 120
    return kind(stderr=stderr, width=width, quiet=quiet)


def _plain(text: str) -> str:
    from rich.markup import escape

    return escape(text)
