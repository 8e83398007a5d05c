"""How a command ends when it fails: with one line and an exit code."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import typer

from modality_integration.app.errors import InputError, Interrupted, in_words
from modality_integration.app.packages import not_installed


def say(message: str, color: str) -> None:
    """Print a line on stderr."""
    from rich.console import Console

    rank = os.environ.get("RANK", "0")
    text = ("" if rank == "0" else f"[rank {rank}] ") + message
    Console(stderr=True).print(text, style=color, markup=False, highlight=False, soft_wrap=True)


@contextlib.contextmanager
def one_line_endings() -> Iterator[None]:
    """Errors in the input end with one line and exit code 1, Ctrl-C with one line and exit code 130."""
    try:
        yield
    except KeyboardInterrupt as interrupt:
        say(str(interrupt) or "interrupted", "yellow")
        raise typer.Exit(interrupt.code if isinstance(interrupt, Interrupted) else 130) from None
    except ModuleNotFoundError as error:
        if (error.name or "").startswith(("modality_integration", "mir_kernels")):
            raise
        say(not_installed(error.name or ""), "red")
        raise typer.Exit(1) from None
    except (InputError, OSError) as error:  # any other error is a bug and keeps its traceback
        say(in_words(error) if isinstance(error, OSError) else str(error), "red")
        raise typer.Exit(1) from None
