"""What every command shows: progress, a result, and notes."""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

from modality_integration.metric.comparison import Comparisons
from modality_integration.metric.result import MIRResult
from modality_integration.metric.standard_error import arithmetic, missing_error, with_error


def progress_bar(console: Console) -> Progress:
    """A bar with a count and the time that remains."""
    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
    )


class WithoutNotes(Console):
    """For results alone (mir --quiet): notes are in their files, and are not shown."""


def show_notes(notes: Iterable[str], console: Console) -> None:
    """A line each."""
    if isinstance(console, WithoutNotes):
        return
    for note in notes:
        console.print(f"[yellow]note[/] {escape(note)}", highlight=False)


def show_comparison(several: Comparisons, console: Console) -> None:
    """The layers of all, what is not alike in them, and which differ."""
    console.print(several.table())
    show_notes(several.notes, console)
    for line in several.lines():
        console.print(escape(line), highlight=False)


def show_result(result: MIRResult, console: Console) -> None:
    """The layers, the notes, and the value with what is known of it."""
    console.print(result.table())
    show_notes(result.notes, console)
    of_what = f"({missing_error(result)})" if missing_error(result) else "  (standard error over the choice of samples)"
    console.print(f"[bold]MIR {with_error(result.value, result.error)}[/] {escape(of_what)}", highlight=False)
    if accuracy := arithmetic(result):
        console.print(f"{accuracy}   (of these features; not of the choice of samples)", highlight=False)
