"""The paper's claims in small, on the demo's model: benchmarks/data/reproduce_*.csv and .png, for docs/reproduction.md.

A few hundred captioned pictures stand in for LLaVA's 558,000, SmolLM2-135M for Vicuna, EfficientNet-Lite0 for CLIP, the
loss on held-out captions for the benchmarks. What comes out is written down, whatever it says.
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
    """Figures 1 and 6, Table 1: MIR and the held-out loss after more and more pre-training data."""
    for images in shop.scale.images:
        for seed in shop.scale.seeds:
            yield {"images": images, "seed": seed, **shop.train(Training(images=images, seed=seed))[-1]}


def training(shop: Workshop) -> Iterator[Row]:
    """Figure 4: both while the largest of those trainings runs."""
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
    """Table 5: with MoCa and without, from the same weights on the same batches."""
    for with_moca in (False, True):
        for seed in shop.scale.moca_seeds:
            done = shop.train(Training(images=shop.scale.reference, seed=seed, moca=with_moca))
            yield {"moca": with_moca, "seed": seed, **done[-1]}


def content(shop: Workshop) -> Iterator[Row]:
    """Figure 3: kinds of pictures with kinds of text, and the image at the very beginning."""
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
    """Figure 7: each layer's distance with the text-centric normalisation and without."""
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
    parser.add_argument("--out", type=Path, default=harness.DATA, help="folder of the tables and figures")
    parser.add_argument("--work", type=Path, default=Path("reproduce-out"), help="folder of what is finished")
    parser.add_argument("--language-model", type=Path, help="a folder with another language model, in place of SmolLM2")
    parser.add_argument("--tiny", action="store_true", help="everything once, as small as it can be")
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
