"""`mir compute`: MIR of a saved model on images and prose, resumable, over several processes.

`run` does everything: it chooses samples, loads the model, feeds the metric and writes checkpoints (`_stream_passes`),
then prints, writes and plots the result, in that order.
"""

from __future__ import annotations

import contextlib
import json
import platform
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console

from modality_integration.app.checkpoint import Checkpoint, Due, Passage
from modality_integration.app.console import progress_bar, show_notes, show_result
from modality_integration.app.devices import check_memory, count_peaks_anew, pick_device
from modality_integration.app.errors import InputError, Interrupted, in_words
from modality_integration.app.interrupts import DeferredSignals
from modality_integration.app.loading import Loaded, load_chosen, processor_names
from modality_integration.app.options import ComputeOptions
from modality_integration.app.out_folder import CHECKPOINT, MEASUREMENT, require_free, taken, unfinished
from modality_integration.app.processes import agreed, all_or_none, processes
from modality_integration.app.results import NotWritten, draw, printed_first, say_written, write_result
from modality_integration.app.samples import Sample, choose
from modality_integration.app.settings import deciding_arguments, settings_of, versions
from modality_integration.app.stream import finish, stream
from modality_integration.app.thumbnails import sample_cards
from modality_integration.metric.files import read_json, write_json
from modality_integration.metric.result import MIRResult
from modality_integration.metric.sink_notes import image_first
from modality_integration.metric.streaming import ModalityIntegrationRate

# Options that change neither the result nor its files.
NOT_ASKED = ("overwrite", "restart", "checkpoint_every", "plots")


def run(options: ComputeOptions, console: Console, results: Console | None = None) -> MIRResult:
    """MIR of `options.model`: prints a table and the value, then writes mir.json, run.json and a plot to `options.out`.

    console: for progress and notes. results: for the result; None: `console`.

    Raises InputError for anything a user can fix, including an `options.out` that holds results or is in use by another
    run; NotWritten if the result was printed but could not be written; Interrupted after Ctrl-C or SIGTERM, with the
    state saved.
    """
    device = pick_device(options.device)
    with processes(device) as (rank, world), contextlib.ExitStack() as stack:
        console.quiet = console.quiet or rank > 0
        asked = options
        with all_or_none(world):
            options.metric()  # checks the options before anything is read
            if rank == 0:
                stack.enter_context(taken(options.out, console))
                _require_no_results(options)
        with all_or_none(world):
            chosen = choose(options, console)
            options = replace(options, groups=min(options.groups, chosen.groups))
            samples = chosen.samples
            metric = options.metric(len(samples)).to(device)
            arguments = deciding_arguments(options, samples, device, world)
            checkpoint = Checkpoint(options.out / CHECKPOINT, arguments, rank)
            if options.restart:
                checkpoint.clear(of_all=rank == 0)
                checkpoint.command += " without --restart"
        with all_or_none(world):
            passage = checkpoint.passage()
        passage = agreed(passage, world)

        began = time.monotonic()
        with all_or_none(world):
            loaded = load_chosen(options, options.prompt, device, console)
        count_peaks_anew()
        mine = samples[rank::world]
        if passage.done:
            checkpoint.load(metric)
            console.print(f"resuming after {passage.done} of {len(mine)} samples", highlight=False)

        result, metric, passage = _stream_passes(loaded, mine, metric, passage, checkpoint, options, console)
        result.notes.extend(loaded.notes + chosen.notes)
        result.settings = settings_of(arguments, loaded.model, loaded.processor)
        record = {**_record(asked, result, arguments, chosen.skipped), **processor_names(loaded.processor)}
        record["seconds"] = round(time.monotonic() - began, 3)
        shown = results or console
        with printed_first(lambda: show_result(result, shown) if rank == 0 else None):
            with _kept_unless_written(result, metric, passage, checkpoint, options.out), all_or_none(world):
                if rank == 0:
                    write_result(result, options.out)
                    write_json(options.out / "run.json", record | {"samples": sample_cards(samples)})
            _drop(checkpoint, console, rank)
            if rank == 0:
                drawn = draw(result.plot, options.out / f"layers.{options.plots}", console)
        if rank == 0:
            say_written(["mir.json", "run.json", *drawn], options.out, shown)
        return result


def _require_no_results(options: ComputeOptions) -> None:
    """InputError if the folder holds results, unless they may be overwritten or an unfinished run resumes there."""
    if options.overwrite or (unfinished(options.out) and not options.restart):
        return
    if (options.out / "mir.json").exists() and _asked_before(options) == _asked(options):
        raise InputError(
            f"out: {options.out} already holds the result of exactly these options (mir.json); to measure again, add "
            "--overwrite or choose another --out"
        )
    require_free(options.out, MEASUREMENT, options.overwrite)


def _asked(options: ComputeOptions) -> dict[str, Any]:
    """The options as read back from JSON."""
    values = {name: value for name, value in asdict(options).items() if name not in NOT_ASKED}
    return json.loads(json.dumps(values, default=str))


def _asked_before(options: ComputeOptions) -> Any:
    """The options of the finished run in the folder; None if its record has none."""
    try:
        record = read_json(options.out / "run.json")
    except (OSError, ValueError):
        return None
    return record.get("options") if isinstance(record, dict) else None


def _stream_passes(
    loaded: Loaded,
    samples: Sequence[Sample],
    metric: ModalityIntegrationRate,
    passage: Passage,
    checkpoint: Checkpoint,
    options: ComputeOptions,
    console: Console,
) -> tuple[MIRResult, ModalityIntegrationRate, Passage]:
    """The result of one pass over the samples, or of a second one if requested and the first pass missed outliers;
    with the metric that computed it and its passage.
    """
    while True:
        _stream_pass(loaded, samples, metric, passage, checkpoint, options, console)
        try:
            with console.status("computing square roots, layer by layer"):
                result = finish(metric)
        except KeyboardInterrupt as interrupt:  # during the arithmetic: the state may be half updated
            raise Interrupted(
                f"interrupted after all {len(samples)} samples, before their result; {checkpoint.way_on()}"
            ) from interrupt
        passage = Passage(passage.number, len(samples))
        if passage.number == 2 or not options.second_pass or not result.total_missed:
            return result, metric, passage
        with metric.sync_context():  # limits are computed from the tokens of all processes
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
    """Stream the samples after `passage`, with a progress bar, checkpoints and a clean exit on signals."""
    with DeferredSignals() as stop, progress_bar(console) as bar:
        task = bar.add_task(
            f"{Path(options.model).name}, pass {passage.number}", total=len(samples), completed=passage.done
        )
        due = Due(options.checkpoint_every)

        def after_sample(count: int) -> None:
            bar.update(task, completed=count)
            first_batch = count <= passage.done + options.batch_size
            if passage.number == 1 and first_batch:  # the memory per sample is now known
                show_notes(check_memory(metric, len(samples)), console)
            why_not = ""
            if stop.signal or due(count, options.batch_size):
                with due.writing():
                    why_not = checkpoint.try_to_save(metric, Passage(passage.number, count))
            if stop.signal:
                way_on = f"{why_not}; {checkpoint.way_on()}" if why_not else f"{checkpoint.command} resumes from there"
                raise Interrupted(f"interrupted after {count} of {len(samples)} samples; {way_on}", 128 + stop.signal)
            if why_not:
                show_notes([f"{why_not}; after an interruption, {checkpoint.way_on()}"], console)

        model, processor, _ = loaded
        first = stream(
            model,
            processor,
            samples,
            metric,
            options,
            start=passage.done,
            batch_size=options.batch_size,
            after_sample=after_sample,
        )
    if first and passage.number == 1 and options.sinks == "report":
        show_notes([image_first(first, len(samples) - passage.done)], console)


@contextlib.contextmanager
def _kept_unless_written(
    result: MIRResult, metric: ModalityIntegrationRate, passage: Passage, checkpoint: Checkpoint, out: Path
) -> Iterator[None]:
    """Turn a failed write inside into NotWritten, with a checkpoint from which the same command finishes at once."""
    try:
        yield
    except (OSError, InputError) as error:  # InputError: another process failed to write
        words = in_words(error) if isinstance(error, OSError) else str(error)
        why_not, way_on = checkpoint.try_to_save(metric, passage), checkpoint.way_on()
        if checkpoint.kept is None and (out / "mir.json").exists():
            way_on = "mir.json was written, but there is no checkpoint; the same command starts over with --overwrite"
        raise NotWritten(
            "; ".join(filter(None, [f"the result could not be written: {words}", why_not, way_on])), result
        ) from error


def _drop(checkpoint: Checkpoint, console: Console, rank: int) -> None:
    """Remove the checkpoint of a run whose result is written; failure is only a note, as nothing is lost."""
    try:
        checkpoint.clear(of_all=rank == 0)
    except OSError as error:
        show_notes([f"the run is finished, but its checkpoint could not be removed: {in_words(error)}"], console)


def _record(
    options: ComputeOptions,
    result: MIRResult,
    arguments: dict[str, Any],
    skipped: Sequence[tuple[str, str]],
) -> dict[str, Any]:
    """The contents of run.json: options, value, arguments, skipped samples and versions."""
    return {
        "mir": result.value,
        "error": result.error,
        "groups": result.groups,  # groups of samples behind the standard error
        "images": str(options.images),
        "text": str(options.text),
        "options": _asked(options),
        "arguments": arguments,
        "skipped": [{"name": name, "reason": reason} for name, reason in skipped],
        **versions(),
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "transformers", "torchmetrics")},
        },
    }
