"""The options of the `mir` commands, each spelled once: name, type, default, help; for the command line and for code.

A dataclass is one concept, and what works by a concept takes that dataclass: `stream` a `TokenOptions`, `loading` a
`ModelOptions`. `ComputeOptions` is all of them. A field with a `typer.Option` is an option of the command line. A new
one goes here; `flat_options.py` reads it off. An `Option` says under which heading of the help it stands; where it says
no metavar, that follows from the type, as the choices do.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from typer import Option

from modality_integration.app.errors import refusals
from modality_integration.metric.options import Sinks

if TYPE_CHECKING:
    from modality_integration.metric.streaming import ModalityIntegrationRate

Dtype = Literal["auto", "float32", "bfloat16", "float16", "float64"]
Template = Literal["auto", "chat", "plain", "published"]
Last = Literal["normed", "raw"]
TextRole = Literal["after", "all"]
StudyName = Literal["samples", "normalization", "content", "template", "layers"]
PlotFormat = Literal["png", "svg", "pdf"]

# An `Option` under each heading of the help.
of_model = partial(Option, rich_help_panel="Model")
of_samples = partial(Option, rich_help_panel="Samples")
of_tokens = partial(Option, rich_help_panel="Tokens")
of_measurement = partial(Option, rich_help_panel="Measurement")
of_training = partial(Option, rich_help_panel="Training")
of_output = partial(Option, rich_help_panel="Output")

Normalize = Annotated[bool, of_measurement(help="Scale each layer by its mean text norm (Eq. 2).")]
Bounds = Annotated[
    bool,
    of_measurement(help="Also bound how far the arithmetic can be off; of the choice of samples that says nothing."),
]
SinksOption = Annotated[
    Sinks,
    of_measurement(
        help="Attention sinks, tokens of massive activation: report counts them, as the paper, and says what they make "
        'of the value; "leave out" takes them out.'
    ),
]
Overwrite = Annotated[bool, of_output("--overwrite", help="Replace the results that --out holds.")]
Plots = Annotated[PlotFormat, of_output(help="Format of the pictures.")]


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """Which model, and where it runs."""

    model: Annotated[str, of_model(metavar="DIR", help="Folder of a saved vision-language model, or its hub name.")]
    device: Annotated[str, of_model(metavar="DEVICE", help="auto, cpu, cuda, cuda:1, mps.")] = "auto"
    device_map: Annotated[
        str | None,
        of_model(help="For weights that outgrow one device: auto, balanced or sequential, as in transformers."),
    ] = None
    dtype: Annotated[Dtype, of_model(help="Of the weights; auto is as saved.")] = "auto"
    processor: Annotated[
        str | None,
        of_model(
            metavar="DIR", help="Folder or hub name of the processor, where --model has none (a Trainer checkpoint)."
        ),
    ] = None
    revision: Annotated[str | None, of_model(metavar="REV", help="Of a hub name: branch, tag or commit.")] = None
    batch_size: Annotated[
        int, of_model(min=1, help="Samples in a forward pass; the value is that of 1 but for rounding.")
    ] = 1


@dataclass(frozen=True, kw_only=True)
class ProtocolOptions:
    """Whose way of making samples is followed."""

    protocol: Annotated[
        Literal["random", "published"],
        of_samples(
            help="How samples are made: random pairs and the prompt of --template, or as the published code makes "
            "them: files in order, its conversation with whole prose as the answer."
        ),
    ] = "random"


@dataclass(frozen=True, kw_only=True)
class SampleOptions(ProtocolOptions):
    """Which images and prose, and how they are paired."""

    images: Annotated[
        Path,
        of_samples(
            metavar="PATH",
            help="Folder of images, searched recursively, whatever Pillow opens; or a data set: .parquet, .arrow, .tar "
            "shards, a folder of datasets.save_to_disk; or a .json list of paths, LLaVA's too.",
        ),
    ]
    text: Annotated[
        Path,
        of_samples(
            metavar="PATH",
            help="Prose: a .txt, .md, .story, .jsonl or .json file (of conversations, what the assistant says), a "
            "folder of them, or a data set as for --images.",
        ),
    ]
    samples: Annotated[int, of_samples(min=1, help="Random image-text pairs; the paper takes 100.")] = 100
    seed: Annotated[int, of_samples(help="Chooses and pairs the images and texts.")] = 0

    @property
    def in_order(self) -> bool:
        """Files as sorted by name, not a random choice."""
        return self.protocol == "published"


@dataclass(frozen=True, kw_only=True)
class TokenOptions(ProtocolOptions):
    """How a sample becomes tokens, and which of them count. text_tokens: None takes prose whole."""

    text_tokens: Annotated[int | None, of_tokens(min=1, help="Prose is cut to this many tokens.")] = 512
    template: Annotated[
        Literal["auto", "chat", "plain"],
        of_tokens(help="chat template, plain image and prose, or auto: chat where there is one."),
    ] = "auto"
    last: Annotated[
        Last, of_tokens(help="Last layer normed (after the final norm, as published) or raw (before it).")
    ] = "normed"
    text_role: Annotated[TextRole, of_tokens(help="Text tokens: those after the image (as published), or all.")] = (
        "after"
    )

    @property
    def prompt(self) -> Template:
        """The template of the prompts; the published protocol has its own."""
        return "published" if self.protocol == "published" else self.template

    @property
    def prose_tokens(self) -> int | None:
        """How many tokens of prose are taken; None for all, as the published protocol does."""
        return None if self.protocol == "published" else self.text_tokens


@dataclass(frozen=True, kw_only=True)
class MeasureOptions:
    """What `mir compute` asks of the metric; see `ModalityIntegrationRate`."""

    outliers: Annotated[
        Literal["remove", "none"], of_measurement(help="Tokens beyond 3 sigma in norm: remove (as the paper), or none.")
    ] = "remove"
    normalize: Normalize = True
    bounds: Bounds = False
    groups: Annotated[
        int,
        of_measurement(
            min=0,
            help="Groups of samples for a standard error. Each takes main memory for covariances, a GPU holds those of "
            "one; 0: no error.",
        ),
    ] = 5
    precision: Annotated[
        Literal["auto", "exact"],
        of_measurement(help="Of the covariances: exact is float64 throughout, for features short of rank."),
    ] = "auto"
    sinks: SinksOption = "report"

    def metric(self, samples: int | None = None) -> ModalityIntegrationRate:
        """A fresh one; InputError for options that cannot be. samples: how many will come, in random order."""
        from modality_integration.metric.streaming import ModalityIntegrationRate

        with refusals("options"):
            return ModalityIntegrationRate(**part(self, MeasureOptions), samples=samples)


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """What a run leaves on disk, and how it goes on after an interrupt.

    checkpoint_every: in samples; None goes by the clock.
    """

    out: Annotated[
        Path, of_output(metavar="DIR", help="Folder for mir.json, run.json, a plot of the layers and the checkpoint.")
    ] = Path("mir-out")
    checkpoint_every: Annotated[
        int | None,
        of_output(min=1, help="Samples between checkpoints; if not given, a twentieth of the time goes to them."),
    ] = None
    second_pass: Annotated[
        bool, of_measurement("--second-pass", help="Stream again if the one-pass outlier rule turns out inexact.")
    ] = False
    restart: Annotated[bool, of_output("--restart", help="Drop the checkpoint in --out, if any.")] = False
    overwrite: Overwrite = False
    plots: Plots = "png"


@dataclass(frozen=True, kw_only=True)
class ComputeOptions(RunOptions, MeasureOptions, TokenOptions, SampleOptions, ModelOptions):
    """The options of `mir compute`."""


@dataclass(frozen=True, kw_only=True)
class StatesOptions:
    """The options of `mir states`."""

    out: Annotated[Path, of_output(metavar="DIR", help="Folder for mir.json and a plot of the layers.")] = Path(
        "mir-out"
    )
    overwrite: Overwrite = False
    plots: Plots = "png"
    device: Annotated[str, of_measurement(metavar="DEVICE", help="Where the arithmetic runs: auto, cpu, cuda.")] = (
        "auto"
    )
    outliers: Annotated[
        Literal["remove", "median", "none"],
        of_measurement(help="Tokens beyond 3 sigma: remove (paper), median (published code), none."),
    ] = "remove"
    normalize: Normalize = True
    bounds: Bounds = False
    groups: Annotated[
        int, of_measurement(min=0, help="Groups of samples for a standard error; a row of a batch is one. 0: no error.")
    ] = 5
    sinks: SinksOption = "report"


@dataclass(frozen=True, kw_only=True)
class DemoOptions:
    """The options of `mir demo`."""

    out: Annotated[
        Path, of_output(metavar="DIR", help="Folder for mir.json, the plots and the numbers behind them.")
    ] = Path("mir-out")
    overwrite: Overwrite = False
    plots: Plots = "png"
    steps: Annotated[int, of_training(min=1, help="Training steps on captions, 4 pictures each.")] = 80
    samples: Annotated[int, of_measurement(min=2, help="Image-text pairs in each measurement.")] = 40
    seed: Annotated[int, of_training(help="Same seed, same machine, same numbers.")] = 0
    save: Annotated[
        Path | None,
        of_output(metavar="DIR", help="Also save model, processor, images and prose here, for `mir compute`."),
    ] = None
    language_model: Annotated[
        Path | None,
        of_training(
            metavar="DIR", help="A folder with another causal language model of transformers, in place of SmolLM2-135M."
        ),
    ] = None
    moca: Annotated[bool, of_training("--moca", help="Train with MoCa in the decoder.")] = False
    bounds: Bounds = False
    learning_rate: float = 2e-3


def part(options: Any, concept: type) -> dict[str, Any]:
    """The fields of one concept, a dataclass above, by name."""
    return {field.name: getattr(options, field.name) for field in fields(concept)}
