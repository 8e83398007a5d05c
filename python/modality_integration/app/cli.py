"""The commands of `mir`: their options, and the modules that do the work, imported only when a command runs.

The options are the fields of the dataclasses in `options.py`: a parameter of such a type stands for all its fields.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from modality_integration.app import config
from modality_integration.app.effects import refuse_without_effect
from modality_integration.app.endings import one_line_endings
from modality_integration.app.errors import InputError
from modality_integration.app.flat_options import FlatOptions, source
from modality_integration.app.help_pages import CommandPage, FrontPage
from modality_integration.app.options import ComputeOptions, DemoOptions, StatesOptions, StudyName, of_output
from modality_integration.app.terminal import Terminal, of_terminal

main = typer.Typer(
    name="mir",
    cls=FrontPage,
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Modality Integration Rate (MIR): how well a vision-language model integrates image and text tokens.\n\n"
    "MIR is log10 of the sum over decoder layers of the Fréchet distance between vision and text tokens. Lower is "
    "better. Start with [bold]mir demo[/], then run [bold]mir compute[/] on your model.",
)


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"mir-kernels {version('mir-kernels')}")
        raise typer.Exit


Labels = Annotated[
    list[str] | None, of_output(metavar="NAME", help="Label of a result; repeat once per result, in the same order.")
]
Replace = Annotated[bool, of_output("--overwrite", help="Overwrite the file given by --out.")]


@main.callback()
def _options(
    ctx: typer.Context,
    version: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit."),
    ] = False,
    json: Annotated[
        bool, of_terminal("--json", help="Print the result as JSON. Also accepted after the command.")
    ] = False,
    quiet: Annotated[
        bool, of_terminal("--quiet", "-q", help="Hide progress and notes. Also accepted after the command.")
    ] = False,
    verbose: Annotated[
        bool, of_terminal("--verbose", "-v", help="Show more detail. Also accepted after the command.")
    ] = False,
) -> None:
    ctx.obj = {"json": json, "quiet": quiet, "verbose": verbose}


def command(epilog: str) -> Callable:
    """Register a command with flat options, one-line errors and its own help page."""

    def register(function: Callable) -> Callable:
        flat = FlatOptions(function)
        config.remember(function.__name__, flat.known)

        def run(ctx: typer.Context, **values: Any) -> None:
            with one_line_endings():
                values |= _talk(ctx, values)
                refuse_without_effect(ctx, values)
                arguments = flat.grouped(values)
                with arguments["terminal"].listening():
                    arguments["terminal"].note(config.unknown_variables())
                    function(**arguments)

        context = inspect.Parameter("ctx", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context)
        described: Any = run
        described.__signature__ = inspect.Signature([context, *flat.parameters])
        run.__annotations__ = {"ctx": typer.Context, **{p.name: p.annotation for p in flat.parameters}}
        run.__name__ = function.__name__
        paragraphs = (function.__doc__ or "").split("\n\n")  # unwrapped: the terminal breaks the lines
        help = "\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs)
        return main.command(cls=CommandPage, epilog=epilog, help=help)(run)

    return register


def _talk(ctx: typer.Context, values: dict[str, Any]) -> dict[str, bool]:
    """--json, --quiet and --verbose, given before or after the command."""
    assert ctx.parent is not None
    talk = {name: values[name] or ctx.parent.obj[name] for name in ("json", "quiet", "verbose")}
    if talk["quiet"] and talk["verbose"]:
        typed = {n for n in ("quiet", "verbose") for c in (ctx, ctx.parent) if source(c, n) == "COMMANDLINE"}
        if len(typed) != 1:  # a typed option overrides the file and the environment
            raise typer.BadParameter("--quiet and --verbose are mutually exclusive: use only one of them", ctx)
        talk |= {"quiet": "quiet" in typed, "verbose": "verbose" in typed}
    return talk


@command(epilog="Examples:\n\n  mir demo\n\n  mir demo --steps 240 --save demo-model   # also saves a model to measure")
def demo(options: DemoOptions, terminal: Terminal) -> None:
    """Measure the MIR of a real model before, during and after training, offline, in a few minutes on a laptop.

    SmolLM2-135M is given a vision encoder: an EfficientNet trained on ImageNet. Both stay frozen while the projector
    between them learns captions of photographs, emoji, drawn scenes and digits, as in LLaVA's pre-training. MIR and its
    standard error are measured along the way on held-out pictures and unrelated prose. --json prints the contents of
    history.json.
    """
    from modality_integration.app import demo as work
    from modality_integration.app.out_folder import HISTORY

    work.run(options, terminal.progress(), terminal.results())
    if terminal.json:
        terminal.write_json((options.out / HISTORY).read_text(encoding="utf-8"))


@command(
    epilog="Examples:\n\n"
    "  mir compute --model ./llava --images ./photos --text ./news --out llava\n\n"
    "  mir compute --model ./llava --images ./photos --text prose.jsonl \\\n"
    "    --samples 20 --dtype bfloat16 --device cuda\n\n"
    "  mir compute --config run.yaml --samples 200 --study samples --out study\n\n"
    "  torchrun --nproc-per-node 2 -m modality_integration compute \\\n"
    "    --config run.yaml\n\n"
    "After an interruption (Ctrl-C, kill, power cut), rerun the same command: it resumes from the last checkpoint, and "
    "the result is bit-identical."
)
def compute(
    options: ComputeOptions,
    terminal: Terminal,
    study: Annotated[
        StudyName | None,
        typer.Option(
            rich_help_panel="Study",
            help="Run one of the paper's studies instead of a single measurement; writes a table and a plot. samples: "
            "how many are enough; normalization: on and off, for each layer; content: each sub-folder of --images with "
            "each of --text; template: chat and plain; layers: the terms of each layer's distance.",
        ),
    ] = None,
    repeat: Annotated[
        int,
        typer.Option(
            rich_help_panel="Study",
            min=1,
            help="Number of sample sets for --study samples, each with its own seed; the paper's Table 6 has 10.",
        ),
    ] = 1,
) -> None:
    """Measure the MIR of a model on your images and prose: one value, the distance of each layer, a table and a plot.

    --json prints the contents of mir.json, or the rows of a study.
    """
    for path, option in ((options.images, "images"), (options.text, "text")):  # before slow imports
        if not path.exists():
            raise InputError(f"{option}: {path} does not exist")
    if study is None:
        from modality_integration.app import compute as work

        _measure(terminal, work.run, options)
    else:
        from modality_integration.app import study as studies

        _measure(terminal, partial(studies.run, repeat=repeat), study, options)


@command(
    epilog="Examples:\n\n  mir states run/*.safetensors --out run\n\n  mir states run --outliers median\n\n"
    "Each file holds layer.1 ... layer.K of shape (T, d) or (B, T, d), vision_mask and text_mask, as written by "
    "modality_integration.save_states."
)
def states(
    files: Annotated[list[Path], typer.Argument(help="Safetensors files of hidden states, or folders of such files.")],
    options: StatesOptions,
    terminal: Terminal,
) -> None:
    """Compute MIR from saved hidden states of any model, with one layer in memory at a time.

    --json prints the contents of mir.json.
    """
    from modality_integration.app import states as work

    _measure(terminal, work.run, files, options)


@command(
    epilog="Examples:\n\n  mir compare before after\n\n"
    "  mir compare base moca lora --label base --label MoCa --label LoRA"
)
def compare(
    results: Annotated[
        list[Path], typer.Argument(help="mir.json files of two or more runs, or their folders, the reference first.")
    ],
    terminal: Terminal,
    label: Labels = None,
) -> None:
    """Compare runs: the distances of each layer, and whether MIR differs from that of the first run.

    A difference is tested against its standard error (mir compute --groups): of the paired differences if both runs
    used the same samples, otherwise of both runs combined. From 2 standard errors on, a run "seems" better; from 3 on,
    it "is" better. --json prints results, differences and verdicts as an object.
    """
    from modality_integration.app.console import show_comparison
    from modality_integration.app.errors import refusals
    from modality_integration.app.saved_results import named_results
    from modality_integration.metric.comparison import compare_several

    with refusals(""):
        several = compare_several(named_results(results, label or ()))
    show_comparison(several, terminal.results())
    terminal.write_json(several.to_json())


@command(
    epilog="Examples:\n\n  mir plot mir-out\n\n  mir plot before/mir.json after/mir.json --out both.svg\n\n"
    "  mir plot mir-out/history.json --out training.pdf"
)
def plot(
    results: Annotated[
        list[Path],
        typer.Argument(
            help="mir.json files or their folders, one curve each; or the history.json of one mir demo run."
        ),
    ],
    terminal: Terminal,
    out: Annotated[
        Path,
        of_output(
            metavar="FILE",
            help="Output picture; the suffix sets the format (.png, .svg, .pdf, .eps, .jpg, .tif, .webp).",
        ),
    ] = Path("layers.png"),
    overwrite: Replace = False,
    label: Labels = None,
) -> None:
    """Plot the distance of every layer, one curve per run, as in the paper's Figure 2; or the training of a demo.

    --json prints the path of the picture, as "written".
    """
    from modality_integration.app import plot as work

    terminal.write_json({"written": str(work.run(results, out, label or (), terminal.results(), overwrite))})


@command(epilog="Examples:\n\n  mir report mir-out\n\n  mir report before after --label before --label after")
def report(
    results: Annotated[list[Path], typer.Argument(help="Folders of runs, or their mir.json files.")],
    terminal: Terminal,
    out: Annotated[Path, of_output(metavar="FILE", help="Output page, a single HTML file.")] = Path("report.html"),
    overwrite: Replace = False,
    label: Labels = None,
) -> None:
    """Write an HTML page that shows runs side by side: values, layers, settings, samples, studies.

    --json prints the path of the page, as "written".
    """
    from modality_integration.app import report as work

    terminal.write_json({"written": str(work.run(results, out, label or (), terminal.results(), overwrite))})


@command(epilog="Example:\n\n  mir doctor")
def doctor(terminal: Terminal) -> None:
    """Show installed packages, devices, free memory, which kernels run here (or why not), and what to install.

    --json prints the same information as an object.
    """
    from modality_integration.app import doctor as work

    work.run(terminal.results())
    terminal.write_json(work.facts())


def _measure(terminal: Terminal, run: Callable[..., Any], *arguments: Any) -> None:
    """Run it and, with --json, print its result; also a result that was measured but could not be written."""
    from modality_integration.app.results import NotWritten

    try:
        result = run(*arguments, terminal.progress(), results=terminal.results())
    except NotWritten as error:
        terminal.write_json(error.result)
        raise
    terminal.write_json(result)
