"""MIR in transformers' Trainer: a projector learns captions of drawings while MIR is measured on a probe set.

    mir demo --save model
    python examples/train_with_mir.py model --out training

The model folder holds any LLaVA-like model with its processor. The probe set is `images/` and `prose.jsonl` in that
folder, as written by `mir demo --save`, or in the folder given by --probe. Checkpoints go to training/checkpoint-N, for
`mir compute`; the curves of MIR and of the loss go to training/training.png.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw
from torch import Tensor
from torch.utils.data import Dataset
from transformers import AutoModelForImageTextToText, AutoProcessor, Trainer, TrainingArguments, set_seed

from modality_integration import MIRCallback, add_moca, build_probe, plot_training

COLORS = ("red", "green", "blue", "yellow", "purple", "orange", "black", "white")
SHAPES = ("circle", "square")


class Drawings(Dataset[tuple[Image.Image, str]]):
    """Pictures of a shape on a background, with captions such as "a red circle on white"."""

    def __init__(self, count: int, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.draws = torch.rand(count, 4, generator=generator).tolist()

    def __len__(self) -> int:
        return len(self.draws)

    def __getitem__(self, index: int) -> tuple[Image.Image, str]:
        which, color, ground, place = self.draws[index]
        shape = SHAPES[int(which * len(SHAPES))]
        fore = COLORS[int(color * len(COLORS))]
        back = [other for other in COLORS if other != fore][int(ground * (len(COLORS) - 1))]
        image = Image.new("RGB", (224, 224), back)
        left = int(place * 100)
        box = (left, left, left + 110, left + 110)
        draw = ImageDraw.Draw(image)
        (draw.ellipse if shape == "circle" else draw.rectangle)(box, fill=fore)
        return image, f"a {fore} {shape} on {back}"


class Collator:
    """Makes model inputs from pictures and captions: the user sends the image, the assistant the caption."""

    def __init__(self, processor: Any) -> None:
        self.processor = processor
        self.prompt = processor.apply_chat_template(
            [{"role": "user", "content": [{"type": "image"}]}], add_generation_prompt=True
        )

    def __call__(self, rows: list[tuple[Image.Image, str]]) -> dict[str, Tensor]:
        end = self.processor.tokenizer.eos_token or ""
        texts = [self.prompt + caption + end for _, caption in rows]
        options = {"add_special_tokens": False, "padding": True, "return_tensors": "pt"}  # the template has them
        images = [image for image, _ in rows]
        inputs = dict(self.processor(images=images, text=texts, **options))
        before = self.processor(images=images[:1], text=[self.prompt], **options)["input_ids"].shape[1]
        labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
        labels[:, :before] = -100  # loss only on captions
        return {**inputs, "labels": labels}


def main() -> None:
    """Train, measure, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="folder of the model and its processor")
    parser.add_argument("--probe", type=Path, help="folder with images/ and prose.jsonl (default: the model folder)")
    parser.add_argument("--out", type=Path, default=Path("training"), help="folder for checkpoints and the plot")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--every", type=int, default=10, help="steps between measurements and between checkpoints")
    parser.add_argument("--samples", type=int, default=20, help="samples in the probe set")
    parser.add_argument("--moca", action="store_true", help="train with MoCa in every decoder layer")
    options = parser.parse_args()
    set_seed(0)

    processor = AutoProcessor.from_pretrained(options.model)
    processor.tokenizer.padding_side = "right"  # so that every prompt begins at the start of its row
    model = AutoModelForImageTextToText.from_pretrained(options.model, dtype=torch.float32)
    if options.moca:
        add_moca(model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad = "projector" in name or "modality_layernorm" in name

    files = options.probe or options.model
    probe = build_probe(
        processor, files / "images", files / "prose.jsonl", samples=options.samples, batch_size=4, text_tokens=64
    )
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(options.out),
            max_steps=options.steps,
            per_device_train_batch_size=4,
            learning_rate=2e-3,
            lr_scheduler_type="cosine",
            logging_steps=1,
            save_steps=options.every,
            report_to=[],
            remove_unused_columns=False,
        ),
        train_dataset=Drawings(4 * options.steps),
        data_collator=Collator(processor),
    )
    callback = MIRCallback(probe, every=options.every, metric={"groups": 5}).attach(trainer)
    trainer.train()

    for step, result in callback.history:
        print(f"step {step}: {result}")
    loss = {row["step"]: row["loss"] for row in trainer.state.log_history if "loss" in row}
    print(f"wrote {plot_training(callback.history, loss, options.out / 'training.png')}")


if __name__ == "__main__":
    main()
