"""`mir states`: MIR of hidden states saved to files, from any model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from modality_integration.app.console import progress_bar, show_result
from modality_integration.app.devices import pick_device
from modality_integration.app.errors import InputError, refusals, require_folder
from modality_integration.app.options import StatesOptions
from modality_integration.app.report import write_result
from modality_integration.metric.result import MIRResult
from modality_integration.metric.saved_states import mir_of_states


def run(files: Sequence[Path], options: StatesOptions, console: Console) -> MIRResult:
    """MIR of saved hidden states (see `saved_states`), a folder meaning its .safetensors files.

    Written and shown as `mir compute` does it.
    """
    paths: list[Path] = []
    for path in files:
        found = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
        if not found or not found[0].exists():
            raise InputError(f"{path} holds no .safetensors file" if path.is_dir() else f"{path} does not exist")
        paths += found
    require_folder(options.out)
    with progress_bar(console) as bar, refusals(""):
        task = bar.add_task(f"MIR of {len(paths)} file{'s' * (len(paths) > 1)}, layer by layer", total=None)
        result = mir_of_states(
            paths,
            outliers=options.outliers,
            normalize=options.normalize,
            bounds=options.bounds,
            groups=options.groups,
            sinks=options.sinks,
            device=pick_device(options.device),
            progress=lambda layer, layers: bar.update(task, completed=layer - 1, total=layers),
        )
        bar.update(task, completed=len(result.terms))
    write_result(result, options.out)
    show_result(result, options.out, console)
    return result
