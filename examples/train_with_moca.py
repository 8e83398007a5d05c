"""MoCa in a custom training loop: the projector and MoCa learn captions of drawings; MIR is measured before and after.

    mir demo --save model
    python examples/train_with_moca.py model --out moca.safetensors

The folder holds any LLaVA-like model with its processor, and `images/` and `prose.jsonl` for the probe set.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch.utils.data import DataLoader
from train_with_mir import Collator, Drawings
from transformers import AutoModelForImageTextToText, AutoProcessor, set_seed

from modality_integration import add_moca, build_probe, compare, measure_mir, moca_parameters, save_moca


def main() -> None:
    """Train, measure before and after, save MoCa."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="folder of the model and its processor")
    parser.add_argument("--out", type=Path, default=Path("moca.safetensors"), help="file for MoCa's parameters")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--samples", type=int, default=20, help="samples in the probe set")
    options = parser.parse_args()
    set_seed(0)

    processor = AutoProcessor.from_pretrained(options.model)
    processor.tokenizer.padding_side = "right"  # so that the prompt starts at the same place in every row
    model = AutoModelForImageTextToText.from_pretrained(options.model, dtype=torch.float32)
    print(add_moca(model))
    moca = moca_parameters(model)
    model.requires_grad_(False)
    projector = [parameter for name, parameter in model.named_parameters() if "projector" in name]
    for parameter in [*projector, *moca]:
        parameter.requires_grad = True
    optimizer = torch.optim.AdamW(
        [{"params": projector, "weight_decay": 0.1}, {"params": moca, "weight_decay": 0.0}], lr=2e-3
    )

    probe = build_probe(
        processor,
        options.model / "images",
        options.model / "prose.jsonl",
        samples=options.samples,
        batch_size=4,
        text_tokens=64,
    )
    before = measure_mir(model, probe, metric={"groups": 5})
    model.train()
    batches = DataLoader(Drawings(4 * options.steps), batch_size=4, collate_fn=Collator(processor))
    for step, batch in enumerate(batches, 1):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step}: loss {loss.item():.3f}")
    after = measure_mir(model, probe, metric={"groups": 5})

    names = ("before", "after")
    print(f"before: {before}\nafter: {after}\n{compare(before, after, paired=True, names=names)}")
    save_moca(model, options.out)
    print(f"wrote {options.out}")


if __name__ == "__main__":
    main()
