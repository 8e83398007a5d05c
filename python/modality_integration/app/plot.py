"""`mir plot`: plot several results together, or a training history again, in any figure format."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from modality_integration.app import plots
from modality_integration.app.errors import InputError, refusals, require_unused
from modality_integration.app.out_folder import HISTORY
from modality_integration.app.report.runs import History, read
from modality_integration.app.saved_results import named_results
from modality_integration.metric import figures


class ValueWithError(float):
    """MIR with its standard error, as `plots.plot_training` expects it."""

    error: float | None = None


def run(paths: Sequence[Path], out: Path, labels: Sequence[str], results: Console, overwrite: bool = False) -> Path:
    """Plot the layers of the results in `paths`, or the training of a history.json, to `out`, and print its path.

    The suffix of `out` sets the format, .png by default. Raises InputError for anything a user can fix.
    """
    with refusals("out"):
        out = figures.check_suffix(out)
    require_unused([out], overwrite)
    trainings = [path for path in paths if path.name == HISTORY]
    if trainings and len(paths) > 1:
        raise InputError(
            f"results: {trainings[0]} is a training history, which is plotted alone; got {len(paths)} paths"
        )
    if trainings and labels:
        raise InputError(f"label: a training history ({trainings[0]}) has no curves to label")
    with refusals(""):
        curves = {} if trainings else named_results(paths, labels)
        out.parent.mkdir(parents=True, exist_ok=True)
        written = _draw_training(trainings[0], out) if trainings else plots.plot_layers(curves, out)
    results.print(f"wrote {written}", highlight=False, markup=False, soft_wrap=True)
    return written


def _draw_training(path: Path, out: Path) -> Path:
    if not path.exists():
        raise InputError(f"{path} does not exist")
    history = read(path.parent, path.parent.name).history
    if history is None:
        raise InputError(f"{path} contains no measurement yet")
    return plots.plot_training(_results(history), dict(history.loss), out, _held_out(history))


def _results(history: History) -> dict[int, ValueWithError]:
    found = {}
    for step, value, error in zip(history.steps, history.mir, history.error, strict=True):
        found[step] = ValueWithError(value)
        found[step].error = error
    return found


def _held_out(history: History) -> dict[int, float]:
    return dict(zip(history.steps, history.held_out_loss, strict=False))
