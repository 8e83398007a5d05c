"""The options of the `mir` commands, for the command line and for code. Name, type, default and help are set only here.

Each dataclass is one concept, and code that needs a concept accepts its dataclass: `stream` a `TokenOptions`, `loading`
a `ModelOptions`. `ComputeOptions` combines them all. A field with a `typer.Option` is an option of the command line.
Add new options here; `flat_options.py` picks them up. The `Option` sets the option's heading in the help. Choices, and
the metavar unless given, follow from the type.
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

# One kind of `Option` per heading of the help.
of_model = partial(Option, rich_help_panel="Model")
of_samples = partial(Option, rich_help_panel="Samples")
of_tokens = partial(Option, rich_help_panel="Tokens")
of_measurement = partial(Option, rich_help_panel="Measurement")
of_training = partial(Option, rich_help_panel="Training")
of_output = partial(Option, rich_help_panel="Output")

Normalize = Annotated[bool, of_measurement(help="Scale each layer by its mean text-token norm (Eq. 2).")]
Bounds = Annotated[
    bool,
    of_measurement(
        help="Also compute certified bounds on the arithmetic error. They do not cover the choice of samples."
    ),
]
SinksOption = Annotated[
    Sinks,
    of_measurement(
        help="Attention sinks (tokens with massive activations): report includes them, as the paper does, and shows "
        'their effect on MIR; "leave out" excludes them.'
    ),
]
Overwrite = Annotated[bool, of_output("--overwrite", help="Overwrite results in --out.")]
Plots = Annotated[PlotFormat, of_output(help="File format of the plots.")]


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """Which model to load, and where to run it."""

    model: Annotated[
        str, of_model(metavar="DIR", help="Folder of a saved vision-language model, or its Hugging Face Hub name.")
    ]
    device: Annotated[str, of_model(metavar="DEVICE", help="Device: auto, cpu, cuda, cuda:1, mps.")] = "auto"
    device_map: Annotated[
        str | None,
        of_model(help="Spread weights too large for one device: auto, balanced or sequential, as in transformers."),
    ] = None
    dtype: Annotated[Dtype, of_model(help="Dtype of the weights; auto: as saved.")] = "auto"
    processor: Annotated[
        str | None,
        of_model(
            metavar="DIR", help="Folder or hub name of the processor, if --model has none (e.g. a Trainer checkpoint)."
        ),
    ] = None
    revision: Annotated[str | None, of_model(metavar="REV", help="Branch, tag or commit of a hub name.")] = None
    batch_size: Annotated[int, of_model(min=1, help="Samples per forward pass; affects MIR only by rounding.")] = 1


@dataclass(frozen=True, kw_only=True)
class ProtocolOptions:
    """Which protocol samples follow."""

    protocol: Annotated[
        Literal["random", "published"],
        of_samples(
            help="How samples are made. random: random pairs in the prompt of --template; published: as in the "
            "published code, files in order, in its conversation template, with the whole prose as the answer."
        ),
    ] = "random"


@dataclass(frozen=True, kw_only=True)
class SampleOptions(ProtocolOptions):
    """Which images and prose to use, and how to pair them."""

    images: Annotated[
        Path,
        of_samples(
            metavar="PATH",
            help="Folder of images, searched recursively for any format that Pillow opens; or a data set (.parquet, "
            ".arrow, .tar shards, a folder from datasets.save_to_disk); or a .json list of paths, including LLaVA's "
            "format.",
        ),
    ]
    text: Annotated[
        Path,
        of_samples(
            metavar="PATH",
            help="Prose: a .txt, .md, .story, .jsonl or .json file (of conversations, the assistant's turns), a folder "
            "of such files, or a data set as for --images.",
        ),
    ]
    samples: Annotated[int, of_samples(min=1, help="Number of image-text pairs; the paper uses 100.")] = 100
    seed: Annotated[int, of_samples(help="Random seed for choosing and pairing images and texts.")] = 0

    @property
    def in_order(self) -> bool:
        """Whether files are used in order of their names rather than chosen at random."""
        return self.protocol == "published"


@dataclass(frozen=True, kw_only=True)
class TokenOptions(ProtocolOptions):
    """How a sample becomes tokens, and which of them count. text_tokens: None keeps the whole prose."""

    text_tokens: Annotated[int | None, of_tokens(min=1, help="Truncate prose to this many tokens.")] = 512
    template: Annotated[
        Literal["auto", "chat", "plain"],
        of_tokens(
            help="Prompt: chat template, plain (image, then prose), or auto: chat if the processor has a template."
        ),
    ] = "auto"
    last: Annotated[
        Last, of_tokens(help="Last layer: normed (after the final norm, as published) or raw (before it).")
    ] = "normed"
    text_role: Annotated[
        TextRole, of_tokens(help="Which text tokens count: those after the image (as published), or all.")
    ] = "after"

    @property
    def prompt(self) -> Template:
        """The template of the prompts; the published protocol has its own."""
        return "published" if self.protocol == "published" else self.template

    @property
    def prose_tokens(self) -> int | None:
        """Maximum number of prose tokens; None for all, as in the published protocol."""
        return None if self.protocol == "published" else self.text_tokens


@dataclass(frozen=True, kw_only=True)
class MeasureOptions:
    """The options that `mir compute` passes to the metric; see `ModalityIntegrationRate`."""

    outliers: Annotated[
        Literal["remove", "none"],
        of_measurement(help="Tokens whose norm is beyond 3 sigma: remove (as the paper does), or none (keep them)."),
    ] = "remove"
    normalize: Normalize = True
    bounds: Bounds = False
    groups: Annotated[
        int,
        of_measurement(
            min=0,
            help="Groups of samples for the standard error. Each adds covariances to main memory; a GPU holds one "
            "group at a time. 0: no standard error.",
        ),
    ] = 5
    precision: Annotated[
        Literal["auto", "exact"],
        of_measurement(help="Precision of the covariances; exact: float64 throughout, for rank-deficient features."),
    ] = "auto"
    sinks: SinksOption = "report"

    def metric(self, samples: int | None = None) -> ModalityIntegrationRate:
        """A new metric; InputError for invalid options. samples: how many will come, in random order."""
        from modality_integration.metric.streaming import ModalityIntegrationRate

        with refusals("options"):
            return ModalityIntegrationRate(**part(self, MeasureOptions), samples=samples)


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """What a run writes to disk, and how it resumes after an interruption.

    checkpoint_every: in samples; None: by elapsed time.
    """

    out: Annotated[
        Path,
        of_output(metavar="DIR", help="Output folder for mir.json, run.json, a plot of the layers and the checkpoint."),
    ] = Path("mir-out")
    checkpoint_every: Annotated[
        int | None,
        of_output(
            min=1, help="Samples between checkpoints; by default, at most a twentieth of the time is spent on them."
        ),
    ] = None
    second_pass: Annotated[
        bool, of_measurement("--second-pass", help="Stream the samples again if the one-pass outlier rule was inexact.")
    ] = False
    restart: Annotated[bool, of_output("--restart", help="Discard any checkpoint in --out and start over.")] = False
    overwrite: Overwrite = False
    plots: Plots = "png"


@dataclass(frozen=True, kw_only=True)
class ComputeOptions(RunOptions, MeasureOptions, TokenOptions, SampleOptions, ModelOptions):
    """The options of `mir compute`."""


@dataclass(frozen=True, kw_only=True)
class StatesOptions:
    """The options of `mir states`."""

    out: Annotated[Path, of_output(metavar="DIR", help="Output folder for mir.json and a plot of the layers.")] = Path(
        "mir-out"
    )
    overwrite: Overwrite = False
    plots: Plots = "png"
    device: Annotated[str, of_measurement(metavar="DEVICE", help="Device for the arithmetic: auto, cpu, cuda.")] = (
        "auto"
    )
    outliers: Annotated[
        Literal["remove", "median", "none"],
        of_measurement(
            help="Tokens whose norm is beyond 3 sigma: remove (paper), median (published code), or none (keep them)."
        ),
    ] = "remove"
    normalize: Normalize = True
    bounds: Bounds = False
    groups: Annotated[
        int,
        of_measurement(
            min=0,
            help="Groups of samples for the standard error; each row of a batch is a sample. 0: no standard error.",
        ),
    ] = 5
    sinks: SinksOption = "report"


@dataclass(frozen=True, kw_only=True)
class DemoOptions:
    """The options of `mir demo`."""

    out: Annotated[
        Path, of_output(metavar="DIR", help="Output folder for mir.json, the plots and the numbers behind them.")
    ] = Path("mir-out")
    overwrite: Overwrite = False
    plots: Plots = "png"
    steps: Annotated[int, of_training(min=1, help="Training steps on captions, with 4 pictures per step.")] = 80
    samples: Annotated[int, of_measurement(min=2, help="Image-text pairs per measurement.")] = 40
    seed: Annotated[
        int, of_training(help="Random seed; on one machine, the same seed reproduces the same numbers.")
    ] = 0
    save: Annotated[
        Path | None,
        of_output(
            metavar="DIR", help="Also save the model, processor, images and prose to this folder, for `mir compute`."
        ),
    ] = None
    language_model: Annotated[
        Path | None,
        of_training(
            metavar="DIR", help="Folder of another causal language model of transformers, to replace SmolLM2-135M."
        ),
    ] = None
    moca: Annotated[bool, of_training("--moca", help="Train with MoCa in the decoder.")] = False
    bounds: Bounds = False
    learning_rate: float = 2e-3


def part(options: Any, concept: type) -> dict[str, Any]:
    """The fields of one concept, a dataclass above, by name."""
    return {field.name: getattr(options, field.name) for field in fields(concept)}
