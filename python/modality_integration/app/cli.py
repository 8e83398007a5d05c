"""The `mir` command: help and errors for people; each command imports the module that does the work.

The options are the fields of the dataclasses in `options.py`: a parameter with such a type stands for all of them.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from modality_integration.app.errors import InputError, Interrupted
from modality_integration.app.options import ComputeOptions, DemoOptions, StatesOptions, StudyName

if TYPE_CHECKING:
    from rich.console import Console

    from modality_integration.metric.result import MIRResult

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


def command(epilog: str) -> Callable:
    """Register a command whose refusals end in one line and exit code 1, and Ctrl-C in one line and 130."""

    def register(function: Callable) -> Callable:
        run = with_flat_options(function)

        @functools.wraps(run)
        def guarded(**arguments: Any) -> None:
            try:
                run(**arguments)
            except KeyboardInterrupt as interrupt:
                _say(str(interrupt) or "interrupted", "yellow")
                raise typer.Exit(interrupt.code if isinstance(interrupt, Interrupted) else 130) from None
            except ModuleNotFoundError as error:
                if (error.name or "").startswith(("modality_integration", "mir_kernels")):
                    raise
                _say(f'{error.name} is not installed: pip install "mir-kernels[mir]"', "red")
                raise typer.Exit(1) from None
            except (InputError, OSError) as error:  # any other error is a bug and keeps its traceback
                _say(str(error), "red")
                raise typer.Exit(1) from None

        paragraphs = (function.__doc__ or "").split("\n\n")  # whose line breaks are the source's, not the terminal's
        help = "\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs)
        return main.command(epilog=epilog, rich_help_panel=None, help=help)(guarded)

    return register


def with_flat_options(function: Callable) -> Callable:
    """The function with the options of a dataclass in place of each parameter of that type, for typer to read.

    Fields without a `typer.Option` are no options of the command line and keep their defaults.
    """
    hints = get_type_hints(function, include_extras=True)
    groups: dict[str, Any] = {name: hint for name, hint in hints.items() if dataclasses.is_dataclass(hint)}
    options: dict[str, list[str]] = {}
    parameters = []
    for name, parameter in inspect.signature(function).parameters.items():
        if name not in groups:
            parameters.append(parameter.replace(annotation=hints[name], kind=parameter.KEYWORD_ONLY))
            continue
        of_fields = get_type_hints(groups[name], include_extras=True)
        fields = [field for field in dataclasses.fields(groups[name]) if hasattr(of_fields[field.name], "__metadata__")]
        options[name] = [field.name for field in fields]
        for field in fields:
            default = parameter.empty if field.default is dataclasses.MISSING else field.default
            parameters.append(
                inspect.Parameter(field.name, parameter.KEYWORD_ONLY, default=default, annotation=of_fields[field.name])
            )

    def flat(**arguments: Any) -> None:
        for name, group in groups.items():
            arguments[name] = group(**{field: arguments.pop(field) for field in options[name]})
        function(**arguments)

    parameters.sort(key=lambda parameter: parameter.default is not parameter.empty)  # what must be given comes first
    signature: Any = flat
    signature.__signature__ = inspect.Signature(parameters)
    flat.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    flat.__name__, flat.__doc__ = function.__name__, function.__doc__
    return flat


@command(
    epilog="Examples:\n\nmir demo\n\nmir demo --steps 240 --save demo-model   (and mir compute --model demo-model ...)"
)
def demo(options: DemoOptions) -> None:
    """MIR of a real model before, during and after training, offline, in a few minutes on a laptop.

    SmolLM2-135M gets eyes: an EfficientNet that was trained on ImageNet. Both stay frozen while the projector between
    them learns captions of photographs, emoji, drawn scenes and digits, as LLaVA pre-trains. MIR is measured along the
    way, with its standard error, on held-out pictures and unrelated prose.
    """
    from modality_integration.app import demo as work

    work.run(options, _console())


@command(
    epilog="Examples:\n\n"
    "mir compute --model ./llava-1.5-7b-hf --images ./photos --text ./news --out llava\n\n"
    "mir compute --model ./model --images ./photos --text prose.jsonl --samples 20 --dtype bfloat16 --device cuda\n\n"
    "mir compute --model ./model --images ./photos --text ./news --samples 200 --study samples --out study\n\n"
    "torchrun --nproc-per-node 2 -m modality_integration compute --model ./model --images ./photos --text ./news\n\n"
    "Interrupted (Ctrl-C, a kill, a power cut), the same command goes on from the last checkpoint with the same bits."
)
def compute(
    options: ComputeOptions,
    study: Annotated[
        StudyName | None,
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
    for path, option in ((options.images, "images"), (options.text, "text")):  # before seconds of imports
        if not path.exists():
            raise InputError(f"{option}: {path} does not exist")
    if study is None and repeat > 1:
        raise InputError("repeat: draws sets of samples for --study samples alone")
    if study is None:
        from modality_integration.app import compute as work

        work.run(options, _console())
    else:
        from modality_integration.app import study as studies

        studies.run(study, options, _console(), repeat)


@command(
    epilog="Examples:\n\nmir states run/*.safetensors --out run\n\nmir states run --outliers median\n\n"
    "A file holds layer.1 ... layer.K, (T, d) or (B, T, d), vision_mask and text_mask, as "
    "modality_integration.save_states writes them."
)
def states(
    files: Annotated[list[Path], typer.Argument(help="Hidden states as safetensors, or folders of such files.")],
    options: StatesOptions,
) -> None:
    """MIR of hidden states saved to files, from any model; memory for one layer at a time."""
    from modality_integration.app import states as work

    work.run(files, options, _console())


@command(epilog="Example:\n\nmir compare before/mir.json after/mir.json")
def compare(
    a: Annotated[Path, typer.Argument(help="mir.json of one run, or its folder.")],
    b: Annotated[Path, typer.Argument(help="mir.json of the other.")],
) -> None:
    """Two runs side by side: each layer's distances and their ratio, and whether MIR differs.

    The difference is held against its standard error (mir compute --groups): that of the differences where both runs
    had the same samples, else of the two together. From 2 standard errors on one "seems" better, from 3 it is.
    """
    from modality_integration.app.errors import refusals
    from modality_integration.metric import comparison as work

    with refusals(""):
        comparison = work.compare(_result(a), _result(b))
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
    from modality_integration.app import report
    from modality_integration.app.errors import refusals

    with refusals(""):
        curves = {str(path): _result(path) for path in results}
        out.parent.mkdir(parents=True, exist_ok=True)
        written = report.plot_layers(curves, out)
    _console().print(f"wrote {written}", highlight=False)


@command(epilog="Example:\n\nmir doctor")
def doctor() -> None:
    """What is installed, what runs where and why the rest does not, free memory, and what to install."""
    from modality_integration.app import doctor as work

    work.run(_console())


def _result(path: Path) -> MIRResult:
    from modality_integration.app.errors import refusals
    from modality_integration.metric.result import MIRResult

    file = path / "mir.json" if path.is_dir() else path
    if not file.exists():
        raise InputError(f"{file} does not exist")
    with refusals(""):
        return MIRResult.from_json(file)


def _console() -> Console:
    from rich.console import Console

    # A pipe or a log has no width: tables there get one that fits them, and never a terminal's guess of 80.
    width = None if Console().is_terminal or "COLUMNS" in os.environ else 120
    return Console(width=width)


def _say(message: str, color: str) -> None:
    rank = os.environ.get("RANK", "0")
    typer.secho(("" if rank == "0" else f"[rank {rank}] ") + message, fg=color, err=True)
