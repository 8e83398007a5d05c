"""`mir states`: MIR of hidden states saved to files, from any model."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from modality_integration.app.console import progress_bar, show_result
from modality_integration.app.devices import pick_device
from modality_integration.app.errors import InputError, in_words, refusals
from modality_integration.app.options import StatesOptions
from modality_integration.app.out_folder import MEASUREMENT, require_free, require_no_checkpoint, taken
from modality_integration.app.processes import require_one_process
from modality_integration.app.results import NotWritten, draw, printed_first, say_written, write_result
from modality_integration.app.settings import versions
from modality_integration.metric.result import MIRResult
from modality_integration.metric.saved_states import mir_of_states

logger = logging.getLogger(__name__)


def run(files: Sequence[Path], options: StatesOptions, console: Console, results: Console | None = None) -> MIRResult:
    """MIR of saved hidden states (see `saved_states`); a folder stands for its .safetensors files.

    Prints, writes, plots and raises like `mir compute`.
    """
    require_one_process("states")
    paths: list[Path] = []
    for path in files:
        found = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
        if not found or not found[0].exists():
            raise InputError(f"{path} holds no .safetensors file" if path.is_dir() else f"{path} does not exist")
        paths += found
    # The medians of groups do not determine the median of all.
    groups = 0 if options.outliers == "median" else options.groups
    device, began = pick_device(options.device), time.monotonic()
    with taken(options.out, console):
        require_no_checkpoint(options.out)
        require_free(options.out, MEASUREMENT, options.overwrite)
        with progress_bar(console) as bar, refusals(""):
            task = bar.add_task(f"MIR of {len(paths)} file{'s' * (len(paths) > 1)}, layer by layer", total=None)
            result = mir_of_states(
                paths,
                outliers=options.outliers,
                normalize=options.normalize,
                bounds=options.bounds,
                groups=groups,
                sinks=options.sinks,
                device=device,
                progress=lambda layer, layers: bar.update(task, completed=layer - 1, total=layers),
            )
            bar.update(task, completed=len(result.terms))
        seconds = time.monotonic() - began
        logger.info("%d layers of %d files, on %s, in %.1f s", len(result.terms), len(paths), device, seconds)
        result.settings = versions()
        result.notes.extend(_notes_on_groups(options.groups, groups, result))
        shown = results or console
        with printed_first(lambda: show_result(result, shown)):
            try:
                write_result(result, options.out)
            except OSError as error:
                raise NotWritten(f"the result could not be written: {in_words(error)}", result) from error
            drawn = draw(result.plot, options.out / f"layers.{options.plots}", console)
        say_written(["mir.json", *drawn], options.out, shown)
        return result


def _notes_on_groups(asked: int, used: int, result: MIRResult) -> list[str]:
    """Why there is no standard error, or fewer groups than requested, unless the result already states it."""
    if asked and not used:
        return ["no standard error: not available with --outliers median"]
    got = result.groups
    return [f"the standard error uses {got} groups because there are only {got} samples"] if 0 < got < used else []
