"""`mir compute`: MIR of a saved model on images and prose, a sample at a time, resumable, over several processes.

`run` is the whole way: samples and model are chosen and loaded, `_stream_passes` feeds the metric and leaves
checkpoints, and what came of it is written and shown.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console

from modality_integration.app.checkpoint import Checkpoint, Due, Passage
from modality_integration.app.console import progress_bar, show_notes, show_result
from modality_integration.app.devices import check_memory, count_peaks_anew, pick_device
from modality_integration.app.errors import Interrupted, require_folder
from modality_integration.app.interrupts import DeferredSignals
from modality_integration.app.loading import Loaded, load_chosen
from modality_integration.app.options import ComputeOptions
from modality_integration.app.processes import agreed, processes
from modality_integration.app.report import write_result
from modality_integration.app.samples import Sample, choose, in_random_order
from modality_integration.app.settings import deciding_arguments, settings_of
from modality_integration.app.stream import finish, stream
from modality_integration.metric.files import write_json
from modality_integration.metric.result import MIRResult
from modality_integration.metric.sink_notes import image_first
from modality_integration.metric.streaming import ModalityIntegrationRate


def run(options: ComputeOptions, console: Console) -> MIRResult:
    """MIR of `options.model`; writes mir.json, layers.png and run.json below `options.out` and prints a table.

    Raises InputError for what a person can mend, Interrupted after Ctrl-C or SIGTERM with the state saved.
    """
    device = pick_device(options.device)
    with processes(device) as (rank, world):
        console.quiet = console.quiet or rank > 0
        require_folder(options.out)
        options.metric()  # refuses before anything is read
        chosen = choose(options, console)
        samples = in_random_order(chosen.samples) if options.in_order else chosen.samples
        metric = options.metric(len(samples)).to(device)
        arguments = deciding_arguments(options, samples, device, world)
        checkpoint = Checkpoint(options.out / "checkpoint", arguments, rank)
        if options.restart:
            checkpoint.clear()
        passage = agreed(checkpoint.passage(), world)

        began = time.monotonic()
        loaded = load_chosen(options, options.prompt, device, console)
        count_peaks_anew()
        options.out.mkdir(parents=True, exist_ok=True)
        mine = samples[rank::world]
        if passage.done:
            checkpoint.load(metric)
            console.print(f"going on after {passage.done} of {len(mine)} samples", highlight=False)

        result = _stream_passes(loaded, mine, metric, passage, checkpoint, options, console)
        result.notes.extend(loaded.notes + chosen.notes)
        result.settings = settings_of(arguments, loaded.model)
        if rank == 0:
            write_result(result, options.out)
            _write_run(result, options, arguments, chosen.skipped, time.monotonic() - began)
            show_result(result, options.out, console)
        checkpoint.clear()
        return result


def _stream_passes(
    loaded: Loaded,
    samples: Sequence[Sample],
    metric: ModalityIntegrationRate,
    passage: Passage,
    checkpoint: Checkpoint,
    options: ComputeOptions,
    console: Console,
) -> MIRResult:
    """The result of one pass over the samples, or of a second one where the first missed outliers and it is wanted."""
    while True:
        _stream_pass(loaded, samples, metric, passage, checkpoint, options, console)
        with console.status("square roots, layer by layer"):
            result = finish(metric)
        if passage.number == 2 or not options.second_pass or not result.total_missed:
            return result
        with metric.sync_context():  # the limits are those of all processes' tokens
            metric = metric.second_pass()
        passage = Passage(2, 0)


def _stream_pass(
    loaded: Loaded,
    samples: Sequence[Sample],
    metric: ModalityIntegrationRate,
    passage: Passage,
    checkpoint: Checkpoint,
    options: ComputeOptions,
    console: Console,
) -> None:
    """Stream the samples that `passage` has not counted yet, with a bar, checkpoints, and a clean way out."""
    with DeferredSignals() as stop, progress_bar(console) as bar:
        task = bar.add_task(
            f"{Path(options.model).name}, pass {passage.number}", total=len(samples), completed=passage.done
        )
        due = Due(options.checkpoint_every)

        def after_sample(count: int) -> None:
            bar.update(task, completed=count)
            if passage.number == 1 and count == passage.done + 1:  # by now it is known what a sample takes
                show_notes(check_memory(metric, len(samples)), console)
            if stop.signal or due(count):
                with due.writing():
                    checkpoint.save(metric, Passage(passage.number, count))
            if stop.signal:
                raise Interrupted(
                    f"interrupted after {count} of {len(samples)} samples; the same command goes on from there",
                    128 + stop.signal,
                )

        model, processor, _ = loaded
        first = stream(model, processor, samples, metric, options, start=passage.done, after_sample=after_sample)
    if first and passage.number == 1 and options.sinks == "report":
        show_notes([image_first(first, len(samples) - passage.done)], console)


def _write_run(
    result: MIRResult,
    options: ComputeOptions,
    arguments: dict[str, Any],
    skipped: Sequence[tuple[str, str]],
    seconds: float,
) -> None:
    write_json(
        options.out / "run.json",
        {
            "mir": result.value,
            "error": result.error,
            "images": str(options.images),
            "text": str(options.text),
            "arguments": arguments,
            "skipped": [{"name": name, "reason": reason} for name, reason in skipped],
            "seconds": round(seconds, 3),
            "versions": {
                "python": platform.python_version(),
                **{name: version(name) for name in ("torch", "transformers", "torchmetrics")},
            },
        },
    )
