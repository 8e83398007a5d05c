"""The sample-count and normalisation studies on the demo's model: benchmarks/data/study_*.csv and .png.

The demo's vision side is trained for some steps first; the images are the demo's, the prose is cut from Python's
language reference, each piece once.
"""

from __future__ import annotations

import argparse
import pydoc_data.topics
import random
from pathlib import Path

import torch
from rich.console import Console

import harness
from modality_integration.app import demo, report, study
from modality_integration.app.options import DemoOptions
from modality_integration.app.samples import Text, pair

PIECE = 600  # characters of prose: more than the demo's TEXT_TOKENS tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=60, help="of training on captions, as in `mir demo`")
    parser.add_argument("--samples", type=int, default=200)
    parser.add_argument("--groups", type=int, default=10, help="of samples, for the standard error")
    parser.add_argument("--language-model", type=Path, help="a folder with another language model, in place of SmolLM2")
    parser.add_argument("--out", type=Path, default=harness.DATA)
    flags = parser.parse_args()

    options = DemoOptions(language_model=flags.language_model)
    demo.check_installed(options)
    torch.manual_seed(0)
    model, processor = demo.build(options.language_model)
    pictures = demo.Pictures(0)
    optimizer = torch.optim.AdamW(demo.trainable(model), lr=options.learning_rate, weight_decay=0.0)
    for step in range(1, flags.steps + 1):
        loss = demo.training_step(model, processor, pictures.batch(demo.BATCH), optimizer)
        if step % 10 == 0:
            print(f"step {step}: loss {loss:.3f}", flush=True)
    images = pictures.probe(flags.samples, 0)
    random.Random(0).shuffle(images)  # digits come first, and the first few samples are to be like all
    samples = {("demo", "reference"): pair(images, prose(), flags.samples, 0)}

    subject = study.Subject(
        model=model, processor=processor, text_tokens=demo.TEXT_TOKENS, template="plain", groups=flags.groups
    )
    for name in ("samples", "normalization"):
        rows = study.write(name, study.rows_of(name, subject, samples), flags.out, harness.environment_columns())
        Console().print(report.rows_table(rows))


def prose() -> list[Text]:
    """Pieces of the reference, none of which comes twice."""
    whole = [" ".join(text.split()) for _, text in sorted(pydoc_data.topics.topics.items())]
    pieces = dict.fromkeys(text[i : i + PIECE] for text in whole for i in range(0, len(text) - PIECE + 1, PIECE))
    return [Text(f"piece {number}", piece) for number, piece in enumerate(pieces)]


if __name__ == "__main__":
    main()
