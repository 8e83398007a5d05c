"""Output shared by the commands: progress, results and notes."""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

from modality_integration.metric.comparison import Comparisons
from modality_integration.metric.result import MIRResult
from modality_integration.metric.standard_error import arithmetic, missing_error, with_error


def progress_bar(console: Console) -> Progress:
    """A progress bar with a count and the remaining time."""
    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
    )


class WithoutNotes(Console):
    """A console for results without notes (mir --quiet); notes remain in the result files."""


def show_notes(notes: Iterable[str], console: Console) -> None:
    """Print each note on its own line."""
    if isinstance(console, WithoutNotes):
        return
    for note in notes:
        console.print(f"[yellow]note[/] {escape(note)}", highlight=False)


def show_comparison(several: Comparisons, console: Console) -> None:
    """Print the layers of all results, the notes on their differences, and the verdicts."""
    console.print(several.table())
    show_notes(several.notes, console)
    for line in several.lines():
        console.print(escape(line), highlight=False)


def show_result(result: MIRResult, console: Console) -> None:
    """Print the layers, the notes, and MIR with its standard error and bounds."""
    console.print(result.table())
    show_notes(result.notes, console)
    of_what = f"({missing_error(result)})" if missing_error(result) else "  (standard error over the choice of samples)"
    console.print(f"[bold]MIR {with_error(result.value, result.error)}[/] {escape(of_what)}", highlight=False)
    if accuracy := arithmetic(result):
        console.print(f"{accuracy}   (for these features; excludes the choice of samples)", highlight=False)
