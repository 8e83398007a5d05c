"""What every command shows: progress, a result, and notes."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

from modality_integration.metric.result import MIRResult
from modality_integration.metric.standard_error import with_error


def progress_bar(console: Console) -> Progress:
    """A bar with a count and the time that remains."""
    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
    )


def show_notes(notes: Iterable[str], console: Console) -> None:
    """A line each."""
    for note in notes:
        console.print(f"[yellow]note[/] {note}", highlight=False)


def proved(result: MIRResult) -> str:
    """The proved interval of a result that has one."""
    return f"proved: {result.lower:.6f} to {result.upper:.6f}"


def show_result(result: MIRResult, out: Path, console: Console) -> None:
    """The layers, the notes, and the value with what is known of it."""
    console.print(result.table())
    show_notes(result.notes, console)
    of_what = "" if result.error is None else "   (standard error over the choice of samples)"
    console.print(f"[bold]MIR {with_error(result.value, result.error)}[/]{of_what}", highlight=False)
    if result.lower is not None:
        console.print(f"{proved(result)}   (of the arithmetic, not of the choice of samples)", highlight=False)
    console.print(f"wrote mir.json and layers.png in {out}", highlight=False)
