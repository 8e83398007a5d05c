"""Reproduce the paper's claims at small scale with the demo's model, as benchmarks/data/reproduce_*.csv and .png.

A few hundred captioned pictures replace LLaVA's 558,000, SmolLM2-135M replaces Vicuna, EfficientNet-Lite0 replaces
CLIP, and the loss on held-out captions replaces the benchmarks. docs/reproduction.md reports all results, whether they
support the claims or not.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path

from rich.console import Console

import harness
import reproduce_figures
from modality_integration.app import demo, study
from modality_integration.app.options import DemoOptions
from reproduce_units import TINY, Row, Scale, Training, Workshop, captions, descriptions, prose


def data(shop: Workshop) -> Iterator[Row]:
    """Figures 1 and 6, Table 1: MIR and the held-out loss for increasing amounts of pre-training data."""
    for images in shop.scale.images:
        for seed in shop.scale.seeds:
            yield {"images": images, "seed": seed, **shop.train(Training(images=images, seed=seed))[-1]}


def training(shop: Workshop) -> Iterator[Row]:
    """Figure 4: MIR and the held-out loss during the largest of those trainings."""
    for seed in shop.scale.seeds:
        for row in shop.train(Training(images=shop.scale.images[-1], seed=seed)):
            yield {"seed": seed, **row}


def projector(shop: Workshop) -> Iterator[Row]:
    """Table 4: a linear projector, two layers and four."""
    for name in demo.PROJECTORS:
        for seed in shop.scale.seeds:
            done = shop.train(Training(images=shop.scale.reference, seed=seed, projector=name))
            yield {"projector": name, "seed": seed, **done[-1]}


def moca(shop: Workshop) -> Iterator[Row]:
    """Table 5: with and without MoCa, from the same weights on the same batches."""
    for with_moca in (False, True):
        for seed in shop.scale.moca_seeds:
            done = shop.train(Training(images=shop.scale.reference, seed=seed, moca=with_moca))
            yield {"moca": with_moca, "seed": seed, **done[-1]}


def content(shop: Workshop) -> Iterator[Row]:
    """Figure 3: kinds of pictures and kinds of text, and the image at the very beginning of the prompt."""
    texts = {"reference": prose(), "descriptions": descriptions(), "captions": captions()}
    cells = [(kind, (kind,), "reference", "chat") for kind in demo.KINDS]
    cells += [("all", demo.KINDS, text, "chat") for text in texts]
    cells += [("all", demo.KINDS, "reference", "plain")]
    for images, kinds, text, template in cells:
        row = shop.measure(f"{images}-{text}-{template}", kinds, texts[text], template)
        yield {"images": images, "text": text, "template": template, **row}


def samples(shop: Workshop) -> Iterator[Row]:
    """Table 6: MIR against the number of samples."""
    yield from shop.study("samples", shop.scale.most_samples)


def normalization(shop: Workshop) -> Iterator[Row]:
    """Figure 7: each layer's distance with and without the text-centric normalisation."""
    yield from shop.study("normalization", shop.scale.samples)


EXPERIMENTS: dict[str, Callable[[Workshop], Iterator[Row]]] = {
    "training": training,
    "data": data,
    "projector": projector,
    "moca": moca,
    "samples": samples,
    "normalization": normalization,
    "content": content,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=EXPERIMENTS, default=list(EXPERIMENTS), metavar="NAME")
    parser.add_argument("--out", type=Path, default=harness.DATA, help="folder for tables and figures")
    parser.add_argument("--work", type=Path, default=Path("reproduce-out"), help="folder for finished units of work")
    parser.add_argument("--language-model", type=Path, help="folder of another language model, instead of SmolLM2")
    parser.add_argument("--tiny", action="store_true", help="run everything once at the smallest size")
    flags = parser.parse_args()

    demo.check_installed(DemoOptions(language_model=flags.language_model))
    flags.out.mkdir(parents=True, exist_ok=True)
    console = Console()
    shop = Workshop(flags.work, TINY if flags.tiny else Scale(), flags.language_model, console)
    for name in flags.only:
        rows = list(EXPERIMENTS[name](shop))
        table = flags.out / f"reproduce_{name}.csv"
        study.write_rows(table, rows, harness.environment_columns())
        reproduce_figures.plot(name, study.read(table), table.with_suffix(".png"))
        console.print(f"wrote {table}", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    main()
