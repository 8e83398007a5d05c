"""The options of the `mir` commands, each spelled once: name, type, default, help; for the command line and for code.

A dataclass is one concept, and what works by a concept takes that dataclass: `stream` a `TokenOptions`, `loading` a
`ModelOptions`. `ComputeOptions` is all of them. A field with a `typer.Option` is an option of the command line. A new
one goes here; `cli.py` reads it off.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
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

Normalize = Annotated[bool, Option(help="Scale each layer by its mean text norm (Eq. 2).")]
Bounds = Annotated[
    bool, Option(help="Also prove an interval around the value: of the arithmetic, not of the choice of samples.")
]
SinksOption = Annotated[
    Sinks,
    Option(
        help="Attention sinks, tokens of massive activation: report counts them, as the paper, and says what they make "
        'of the value; "leave out" takes them out.'
    ),
]


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """Which model, and where it runs."""

    model: Annotated[str, Option(help="Folder of a saved vision-language model, or its hub name.")]
    device: Annotated[str, Option(help="auto, cpu, cuda, cuda:1, mps.")] = "auto"
    device_map: Annotated[
        str | None,
        Option(help="For weights that outgrow one device: auto, balanced or sequential, as in transformers."),
    ] = None
    dtype: Annotated[Dtype, Option(help="Of the weights; auto is as saved.")] = "auto"


@dataclass(frozen=True, kw_only=True)
class ProtocolOptions:
    """Whose way of making samples is followed."""

    protocol: Annotated[
        Literal["random", "published"],
        Option(
            help="How samples are made: random pairs and the prompt of --template, or as the published code makes "
            "them: files in order, its conversation with whole prose as the answer."
        ),
    ] = "random"


@dataclass(frozen=True, kw_only=True)
class SampleOptions(ProtocolOptions):
    """Which images and prose, and how they are paired."""

    images: Annotated[Path, Option(help="Folder of images, searched recursively; whatever Pillow opens.")]
    text: Annotated[Path, Option(help="Prose: a .txt, .story or .jsonl file, or a folder of them.")]
    samples: Annotated[int, Option(min=1, help="Random image-text pairs; the paper takes 100.")] = 100
    seed: Annotated[int, Option(help="Chooses and pairs the images and texts.")] = 0

    @property
    def in_order(self) -> bool:
        """Files as sorted by name, not a random choice."""
        return self.protocol == "published"


@dataclass(frozen=True, kw_only=True)
class TokenOptions(ProtocolOptions):
    """How a sample becomes tokens, and which of them count. text_tokens: None takes prose whole."""

    text_tokens: Annotated[int | None, Option(min=1, help="Prose is cut to this many tokens.")] = 512
    template: Annotated[
        Literal["auto", "chat", "plain"],
        Option(help="chat template, plain image and prose, or auto: chat where there is one."),
    ] = "auto"
    last: Annotated[Last, Option(help="Last layer normed (after the final norm, as published) or raw (before it).")] = (
        "normed"
    )
    text_role: Annotated[TextRole, Option(help="Text tokens: those after the image (as published), or all.")] = "after"

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
        Literal["remove", "none"], Option(help="Tokens beyond 3 sigma in norm: remove (as the paper), or none.")
    ] = "remove"
    normalize: Normalize = True
    bounds: Bounds = False
    groups: Annotated[
        int,
        Option(
            min=0,
            help="Of samples, for a standard error; main memory for covariances times this, a GPU's as of one. 0: no "
            "error.",
        ),
    ] = 5
    precision: Annotated[
        Literal["auto", "exact"],
        Option(help="Of the covariances: exact is float64 throughout, for features short of rank."),
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

    out: Annotated[Path, Option(help="Folder for mir.json, layers.png, run.json and the checkpoint.")] = Path("mir-out")
    checkpoint_every: Annotated[
        int | None,
        Option(min=1, help="Samples between checkpoints; if not given, a twentieth of the time goes to them."),
    ] = None
    second_pass: Annotated[
        bool, Option("--second-pass", help="Stream again if the one-pass outlier rule turns out inexact.")
    ] = False
    restart: Annotated[bool, Option("--restart", help="Drop the checkpoint in --out, if any.")] = False


@dataclass(frozen=True, kw_only=True)
class ComputeOptions(RunOptions, MeasureOptions, TokenOptions, SampleOptions, ModelOptions):
    """The options of `mir compute`."""


@dataclass(frozen=True, kw_only=True)
class StatesOptions:
    """The options of `mir states`."""

    out: Annotated[Path, Option(help="Folder for mir.json and layers.png.")] = Path("mir-out")
    device: Annotated[str, Option(help="Where the arithmetic runs: auto, cpu, cuda.")] = "auto"
    outliers: Annotated[
        Literal["remove", "median", "none"],
        Option(help="Tokens beyond 3 sigma: remove (paper), median (published code), none."),
    ] = "remove"
    normalize: Normalize = True
    bounds: Bounds = False
    groups: Annotated[
        int, Option(min=0, help="Of samples, for a standard error (a row of a batch is one). 0: no error.")
    ] = 0
    sinks: SinksOption = "report"


@dataclass(frozen=True, kw_only=True)
class DemoOptions:
    """The options of `mir demo`."""

    out: Annotated[Path, Option(help="Folder for mir.json, the plots and the numbers behind them.")] = Path("mir-out")
    steps: Annotated[int, Option(min=1, help="Training steps on captions, 4 pictures each.")] = 80
    samples: Annotated[int, Option(min=2, help="Image-text pairs in each measurement.")] = 40
    seed: Annotated[int, Option(help="Same seed, same machine, same numbers.")] = 0
    save: Annotated[
        Path | None, Option(help="Also save model, processor, images and prose here, for `mir compute`.")
    ] = None
    language_model: Annotated[
        Path | None,
        Option(help="A folder with another causal language model of transformers, in place of SmolLM2-135M."),
    ] = None
    moca: Annotated[bool, Option("--moca", help="Train with MoCa in the decoder.")] = False
    bounds: Bounds = False
    learning_rate: float = 2e-3


def part(options: Any, concept: type) -> dict[str, Any]:
    """The fields of one concept, a dataclass above, by name."""
    return {field.name: getattr(options, field.name) for field in fields(concept)}
