"""The `mir` command: arguments, help and errors for people; each command imports the module that does the work."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

main = typer.Typer(
    name="mir",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Modality Integration Rate (MIR): how well a vision-language model blends image and text tokens.\n\n"
    "MIR is log10 of the Fréchet distance between vision and text tokens, summed over the decoder's layers; lower is "
    "better blended. Start with [bold]mir demo[/], then point [bold]mir compute[/] at your model.",
)


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"mir-kernels {version('mir-kernels')}")
        raise typer.Exit


@main.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and leave.")
    ] = False,
) -> None:
    pass


class Dtype(str, Enum):
    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"
    float64 = "float64"


class Template(str, Enum):
    auto = "auto"
    chat = "chat"
    plain = "plain"


class Protocol(str, Enum):
    random = "random"
    published = "published"


class Precision(str, Enum):
    auto = "auto"
    exact = "exact"


class Last(str, Enum):
    normed = "normed"
    raw = "raw"


class TextRole(str, Enum):
    after = "after"
    all = "all"


class Study(str, Enum):
    samples = "samples"
    normalization = "normalization"
    content = "content"
    template = "template"
    layers = "layers"


class Outliers(str, Enum):
    remove = "remove"
    none = "none"


class AllOutliers(str, Enum):
    remove = "remove"
    median = "median"
    none = "none"


def command(epilog: str) -> Callable:
    """Register a command whose refusals end in one line and exit code 1, and Ctrl-C in one line and 130."""

    def register(function: Callable) -> Callable:
        @functools.wraps(function)
        def guarded(*args: Any, **kwargs: Any) -> None:
            try:
                function(*args, **kwargs)
            except KeyboardInterrupt as interrupt:
                _say(str(interrupt) or "interrupted", "yellow")
                raise typer.Exit(getattr(interrupt, "code", 130)) from None
            except ModuleNotFoundError as error:
                if (error.name or "").startswith(("modality_integration", "mir_kernels")):
                    raise
                _say(f'{error.name} is not installed: pip install "mir-kernels[mir]"', "red")
                raise typer.Exit(1) from None
            except (ValueError, OSError) as error:
                if not isinstance(error, OSError) and type(error).__name__ != "InputError":
                    raise  # a bug, which keeps its traceback
                _say(str(error), "red")
                raise typer.Exit(1) from None

        paragraphs = (function.__doc__ or "").split("\n\n")  # whose line breaks are the source's, not the terminal's
        help = "\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs)
        return main.command(epilog=epilog, rich_help_panel=None, help=help)(guarded)

    return register


@command(
    epilog="Examples:\n\nmir demo\n\nmir demo --steps 120 --save demo-model   (and mir compute --model demo-model ...)"
)
def demo(
    out: Annotated[Path, typer.Option(help="Folder for mir.json, the plots and the numbers behind them.")] = Path(
        "mir-out"
    ),
    steps: Annotated[int, typer.Option(min=1, help="Training steps on captions.")] = 60,
    samples: Annotated[int, typer.Option(min=2, help="Image-text pairs in each measurement.")] = 48,
    seed: Annotated[int, typer.Option(help="Same seed, same machine, same numbers.")] = 0,
    save: Annotated[
        Path | None, typer.Option(help="Also save model, processor, images and prose here, for `mir compute`.")
    ] = None,
    language_model: Annotated[
        Path | None,
        typer.Option(help="A folder with another causal language model of transformers, in place of SmolLM2-135M."),
    ] = None,
    moca: Annotated[bool, typer.Option("--moca", help="Train with MoCa in the decoder.")] = False,
) -> None:
    """MIR of a real model before, during and after training, offline, in a few minutes on a laptop.

    SmolLM2-135M gets eyes: a small vision tower and projector, trained from scratch on captions of real images while
    the language model stays frozen, as LLaVA pre-trains. MIR is measured along the way with unrelated prose.
    """
    from modality_integration import demo as work

    work.run(
        work.Options(
            out=out, steps=steps, samples=samples, seed=seed, save=save, language_model=language_model, moca=moca
        ),
        _console(),
    )


@command(
    epilog="Examples:\n\n"
    "mir compute --model ./llava-1.5-7b-hf --images ./photos --text ./news --out llava\n\n"
    "mir compute --model ./model --images ./photos --text prose.jsonl --samples 20 --dtype bfloat16 --device cuda\n\n"
    "mir compute --model ./model --images ./photos --text ./news --samples 200 --study samples --out study\n\n"
    "torchrun --nproc-per-node 2 -m modality_integration compute --model ./model --images ./photos --text ./news\n\n"
    "Interrupted (Ctrl-C, a kill, a power cut), the same command goes on from the last checkpoint with the same bits."
)
def compute(
    model: Annotated[str, typer.Option(help="Folder of a saved vision-language model, or its hub name.")],
    images: Annotated[Path, typer.Option(help="Folder of images, searched recursively; whatever Pillow opens.")],
    text: Annotated[Path, typer.Option(help="Prose: a .txt, .story or .jsonl file, or a folder of them.")],
    samples: Annotated[int, typer.Option(min=1, help="Random image-text pairs; the paper takes 100.")] = 100,
    seed: Annotated[int, typer.Option(help="Chooses and pairs the images and texts.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps.")] = "auto",
    device_map: Annotated[
        str | None,
        typer.Option(help="For weights that outgrow one device: auto, balanced or sequential, as in transformers."),
    ] = None,
    dtype: Annotated[
        Dtype,
        typer.Option(help="Of the weights; auto is as saved."),
    ] = Dtype.auto,
    out: Annotated[Path, typer.Option(help="Folder for mir.json, layers.png, run.json and the checkpoint.")] = Path(
        "mir-out"
    ),
    text_tokens: Annotated[int, typer.Option(min=1, help="Prose is cut to this many tokens.")] = 512,
    template: Annotated[
        Template,
        typer.Option(help="chat template, plain image and prose, or auto: chat where there is one."),
    ] = Template.auto,
    last: Annotated[
        Last,
        typer.Option(help="Last layer normed (after the final norm, as published) or raw (before it)."),
    ] = Last.normed,
    text_role: Annotated[
        TextRole, typer.Option(help="Text tokens: those after the image (as published), or all.")
    ] = TextRole.after,
    outliers: Annotated[
        Outliers, typer.Option(help="Tokens beyond 3 sigma in norm: remove (as the paper), or none.")
    ] = Outliers.remove,
    normalize: Annotated[bool, typer.Option(help="Scale each layer by its mean text norm (Eq. 2).")] = True,
    bounds: Annotated[bool, typer.Option(help="Prove an interval around the value.")] = True,
    groups: Annotated[
        int,
        typer.Option(min=0, help="Of samples, for a standard error; memory for covariances times this. 0: no error."),
    ] = 5,
    precision: Annotated[
        Precision, typer.Option(help="Of the covariances: exact is float64 throughout, for features short of rank.")
    ] = Precision.auto,
    protocol: Annotated[
        Protocol,
        typer.Option(
            help="How samples are made: random pairs and the prompt of --template, or as the published code makes "
            "them: files in order, its conversation with whole prose as the answer."
        ),
    ] = Protocol.random,
    checkpoint_every: Annotated[
        int | None,
        typer.Option(min=1, help="Samples between checkpoints; if not given, a twentieth of the time goes to them."),
    ] = None,
    second_pass: Annotated[
        bool, typer.Option("--second-pass", help="Stream again if the one-pass outlier rule turns out inexact.")
    ] = False,
    restart: Annotated[bool, typer.Option("--restart", help="Drop the checkpoint in --out, if any.")] = False,
    study: Annotated[
        Study | None,
        typer.Option(
            help="One of the paper's studies in place of one value, as a table and a plot: samples (how many are "
            "enough), normalization (on and off, layer by layer), content (each sub-folder of --images with each of "
            "--text), template (chat and plain), layers (the terms of each).",
        ),
    ] = None,
    repeat: Annotated[
        int,
        typer.Option(min=1, help="Sets of samples that --study samples draws, a seed each; the paper's Table 6: 10."),
    ] = 1,
) -> None:
    """MIR of a model on your images and prose: one number, one per layer, a table and a plot."""
    for path, option in ((images, "images"), (text, "text")):  # before seconds of imports
        if not path.exists():
            _say(f"{option}: {path} does not exist", "red")
            raise typer.Exit(1)
    from modality_integration import compute as work
    from modality_integration.data import InputError

    published = protocol is Protocol.published
    options = work.Options(
        model=model,
        images=images,
        text=text,
        samples=samples,
        seed=seed,
        device=device,
        dtype=dtype.value,
        out=out,
        text_tokens=None if published else text_tokens,
        template="published" if published else template.value,
        in_order=published,
        precision=precision.value,
        device_map=device_map,
        last=last.value,
        text_role=text_role.value,
        outliers=outliers.value,
        normalize=normalize,
        bounds=bounds,
        groups=groups,
        checkpoint_every=checkpoint_every,
        second_pass=second_pass,
        restart=restart,
    )
    if study is None and repeat > 1:
        raise InputError("repeat: draws sets of samples for --study samples alone")
    if study is None:
        work.run(options, _console())
    else:
        from modality_integration import study as studies

        studies.run(study.value, options, _console(), repeat)


@command(
    epilog="Examples:\n\nmir states run/*.safetensors --out run\n\nmir states run --outliers median\n\n"
    "A file holds layer.1 ... layer.K, (T, d) or (B, T, d), vision_mask and text_mask, as "
    "modality_integration.states.save_states writes them."
)
def states(
    files: Annotated[list[Path], typer.Argument(help="Hidden states as safetensors, or folders of such files.")],
    out: Annotated[Path, typer.Option(help="Folder for mir.json and layers.png.")] = Path("mir-out"),
    device: Annotated[str, typer.Option(help="Where the arithmetic runs: auto, cpu, cuda.")] = "auto",
    outliers: Annotated[
        AllOutliers,
        typer.Option(help="Tokens beyond 3 sigma: remove (paper), median (published code), none."),
    ] = AllOutliers.remove,
    normalize: Annotated[bool, typer.Option(help="Scale each layer by its mean text norm (Eq. 2).")] = True,
    bounds: Annotated[bool, typer.Option(help="Prove an interval around the value.")] = True,
    groups: Annotated[
        int, typer.Option(min=0, help="Of samples, for a standard error (a row of a batch is one). 0: no error.")
    ] = 0,
) -> None:
    """MIR of hidden states saved to files, from any model; memory for one layer at a time."""
    from modality_integration import compute as work

    work.run_states(files, out, device, outliers.value, normalize, bounds, _console(), groups)


@command(epilog="Example:\n\nmir compare before/mir.json after/mir.json")
def compare(
    a: Annotated[Path, typer.Argument(help="mir.json of one run, or its folder.")],
    b: Annotated[Path, typer.Argument(help="mir.json of the other.")],
) -> None:
    """Two runs side by side: each layer's distances and their ratio, and whether MIR differs.

    The difference is held against its standard error (mir compute --groups): that of the differences where both runs
    had the same samples, else of the two together. From 2 standard errors on one "seems" better, from 3 it is.
    """
    from modality_integration import report
    from modality_integration.data import refusals

    with refusals(""):
        comparison = report.compare(_result(a), _result(b))
    console = _console()
    for letter, path in (("A", a), ("B", b)):
        console.print(f"[bold]{letter}[/]  {path}", highlight=False, soft_wrap=True)
    console.print(comparison.table())
    for note in comparison.notes:
        console.print(f"[yellow]note[/] {note}", highlight=False)
    console.print(comparison.verdict(), highlight=False, soft_wrap=True)


@command(epilog="Examples:\n\nmir plot mir-out\n\nmir plot before/mir.json after/mir.json --out both.svg")
def plot(
    results: Annotated[list[Path], typer.Argument(help="mir.json files, or their folders: a curve each.")],
    out: Annotated[Path, typer.Option(help="The picture; its suffix is the format (.png, .svg, .pdf).")] = Path(
        "layers.png"
    ),
) -> None:
    """The distance of every layer as a curve, one per run, as the paper's Figure 2."""
    from modality_integration import report
    from modality_integration.data import refusals

    with refusals(""):
        curves = {str(path): _result(path) for path in results}
        out.parent.mkdir(parents=True, exist_ok=True)
        written = report.plot_layers(curves, out)
    _console().print(f"wrote {written}", highlight=False)


@command(epilog="Example:\n\nmir doctor")
def doctor() -> None:
    """What is installed, what runs where and why the rest does not, free memory, and what to install."""
    from modality_integration import doctor as work

    work.run(_console())


def _result(path: Path) -> Any:
    from modality_integration.data import InputError, refusals
    from modality_integration.result import MIRResult

    file = path / "mir.json" if path.is_dir() else path
    if not file.exists():
        raise InputError(f"{file} does not exist")
    with refusals(""):
        return MIRResult.from_json(file)


def _console() -> Any:
    from rich.console import Console

    # A pipe or a log has no width: tables there get one that fits them, and never a terminal's guess of 80.
    width = None if Console().is_terminal or "COLUMNS" in os.environ else 120
    return Console(width=width)


def _say(message: str, color: str) -> None:
    rank = os.environ.get("RANK", "0")
    typer.secho(("" if rank == "0" else f"[rank {rank}] ") + message, fg=color, err=True)
