"""MIR of a saved checkpoint in Python: load it, make a probe set, measure, and save the result and its plot.

    mir demo --save model
    python examples/checkpoint_mir.py model --out model-mir

The model folder holds any LLaVA-like model with its processor. The probe set is `images/` and `prose.jsonl` in that
folder, as written by `mir demo --save`, or in the folder given by --probe. `mir compute` does the same on the command
line; it can be resumed and does not hold the probe set in memory.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from transformers import AutoModelForImageTextToText, AutoProcessor

from modality_integration import build_probe, measure_mir


def main() -> None:
    """Load, measure, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="folder of the model and its processor")
    parser.add_argument("--probe", type=Path, help="folder with images/ and prose.jsonl (default: the model folder)")
    parser.add_argument("--out", type=Path, default=Path("model-mir"), help="folder for mir.json and layers.png")
    parser.add_argument("--samples", type=int, default=40, help="image-prose pairs in the probe set")
    options = parser.parse_args()

    model = AutoModelForImageTextToText.from_pretrained(options.model, dtype="auto")
    processor = AutoProcessor.from_pretrained(options.model)
    files = options.probe or options.model
    probe = build_probe(
        processor, files / "images", files / "prose.jsonl", samples=options.samples, batch_size=4, text_tokens=64
    )
    result = measure_mir(model, probe, metric={"groups": 5})
    print(result)
    for note in result.notes:
        print(f"note: {note}")

    options.out.mkdir(parents=True, exist_ok=True)
    result.to_json(options.out / "mir.json")
    result.plot(options.out / "layers.png")
    print(f"wrote mir.json and layers.png in {options.out}")


if __name__ == "__main__":
    main()
