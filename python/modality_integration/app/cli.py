"""The `mir` command: what each of its commands takes, and which module does the work, imported when it is needed.

The options are the fields of the dataclasses in `options.py`: a parameter with such a type stands for all of them.
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
    help="Modality Integration Rate (MIR): how well a vision-language model blends image and text tokens.\n\n"
    "MIR is log10 of the Fréchet distance between vision and text tokens, summed over the decoder's layers; lower is "
    "better blended. Start with [bold]mir demo[/], then point [bold]mir compute[/] at your model.",
)


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"mir-kernels {version('mir-kernels')}")
        raise typer.Exit


Labels = Annotated[
    list[str] | None, of_output(metavar="NAME", help="What to call a result; once for each, in their order.")
]
Replace = Annotated[bool, of_output("--overwrite", help="Replace the file that --out names.")]


@main.callback()
def _options(
    ctx: typer.Context,
    version: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Print the version and leave."),
    ] = False,
    json: Annotated[bool, of_terminal("--json", help="Before or after the command: the result as JSON.")] = False,
    quiet: Annotated[bool, of_terminal("--quiet", "-q", help="Likewise: no progress and no notes.")] = False,
    verbose: Annotated[bool, of_terminal("--verbose", "-v", help="Likewise: more of what is done.")] = False,
) -> None:
    ctx.obj = {"json": json, "quiet": quiet, "verbose": verbose}


def command(epilog: str) -> Callable:
    """Register a command: its options flat, what it refuses in one line, its page of help."""

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
        paragraphs = (function.__doc__ or "").split("\n\n")  # whose line breaks are the source's, not the terminal's
        help = "\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs)
        return main.command(cls=CommandPage, epilog=epilog, help=help)(run)

    return register


def _talk(ctx: typer.Context, values: dict[str, Any]) -> dict[str, bool]:
    """--json, --quiet and --verbose, which may stand before the command as well."""
    assert ctx.parent is not None
    talk = {name: values[name] or ctx.parent.obj[name] for name in ("json", "quiet", "verbose")}
    if talk["quiet"] and talk["verbose"]:
        typed = {n for n in ("quiet", "verbose") for c in (ctx, ctx.parent) if source(c, n) == "COMMANDLINE"}
        if len(typed) != 1:  # what is typed counts before what a file or the environment says
            raise typer.BadParameter("--quiet and --verbose exclude one another: give one of them", ctx)
        talk |= {"quiet": "quiet" in typed, "verbose": "verbose" in typed}
    return talk


@command(
    epilog="Examples:\n\n  mir demo\n\n  mir demo --steps 240 --save demo-model   # then mir compute --model demo-model"
)
def demo(options: DemoOptions, terminal: Terminal) -> None:
    """MIR of a real model before, during and after training, offline, in a few minutes on a laptop.

    SmolLM2-135M gets eyes: an EfficientNet that was trained on ImageNet. Both stay frozen while the projector between
    them learns captions of photographs, emoji, drawn scenes and digits, as LLaVA pre-trains. MIR is measured along the
    way, with its standard error, on held-out pictures and unrelated prose. --json prints what history.json holds.
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
    "Interrupted (Ctrl-C, a kill, a power cut), the same command goes on from the last checkpoint with the same bits."
)
def compute(
    options: ComputeOptions,
    terminal: Terminal,
    study: Annotated[
        StudyName | None,
        typer.Option(
            rich_help_panel="Study",
            help="One of the paper's studies in place of one value, as a table and a plot: samples (how many are "
            "enough), normalization (on and off, layer by layer), content (each sub-folder of --images with each of "
            "--text), template (chat and plain), layers (the terms of each).",
        ),
    ] = None,
    repeat: Annotated[
        int,
        typer.Option(
            rich_help_panel="Study",
            min=1,
            help="Sets of samples that --study samples draws, a seed each; the paper's Table 6: 10.",
        ),
    ] = 1,
) -> None:
    """MIR of a model on your images and prose: one number, one per layer, a table and a plot.

    --json prints what mir.json holds, of a study its rows.
    """
    for path, option in ((options.images, "images"), (options.text, "text")):  # before seconds of imports
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
    "A file holds layer.1 ... layer.K, (T, d) or (B, T, d), vision_mask and text_mask, as "
    "modality_integration.save_states writes them."
)
def states(
    files: Annotated[list[Path], typer.Argument(help="Hidden states as safetensors, or folders of such files.")],
    options: StatesOptions,
    terminal: Terminal,
) -> None:
    """MIR of hidden states saved to files, from any model; memory for one layer at a time.

    --json prints what mir.json holds.
    """
    from modality_integration.app import states as work

    _measure(terminal, work.run, files, options)


@command(
    epilog="Examples:\n\n  mir compare before after\n\n"
    "  mir compare base moca lora --label base --label MoCa --label LoRA"
)
def compare(
    results: Annotated[
        list[Path], typer.Argument(help="mir.json files of two runs or more, or their folders: the reference first.")
    ],
    terminal: Terminal,
    label: Labels = None,
) -> None:
    """Runs side by side: each layer's distances, and whether MIR differs from that of the first.

    A difference is held against its standard error (mir compute --groups): that of the differences where both runs had
    the same samples, else of the two together. From 2 standard errors on one "seems" better, from 3 it is. --json
    prints results, differences and verdicts as an object.
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
        typer.Argument(help="mir.json files, or their folders: a curve each. Or history.json of one mir demo."),
    ],
    terminal: Terminal,
    out: Annotated[
        Path,
        of_output(
            metavar="FILE", help="The picture; its suffix is the format (.png, .svg, .pdf, .eps, .jpg, .tif, .webp)."
        ),
    ] = Path("layers.png"),
    overwrite: Replace = False,
    label: Labels = None,
) -> None:
    """The distance of every layer as a curve, one per run, as the paper's Figure 2; or a demo's training.

    --json prints the path that was written, as "written".
    """
    from modality_integration.app import plot as work

    terminal.write_json({"written": str(work.run(results, out, label or (), terminal.results(), overwrite))})


@command(epilog="Examples:\n\n  mir report mir-out\n\n  mir report before after --label before --label after")
def report(
    results: Annotated[list[Path], typer.Argument(help="Folders of runs, or their mir.json.")],
    terminal: Terminal,
    out: Annotated[Path, of_output(metavar="FILE", help="The page, HTML in one file.")] = Path("report.html"),
    overwrite: Replace = False,
    label: Labels = None,
) -> None:
    """Runs side by side as one page of HTML: values, layers, settings, samples, studies.

    --json prints the path that was written, as "written".
    """
    from modality_integration.app import report as work

    terminal.write_json({"written": str(work.run(results, out, label or (), terminal.results(), overwrite))})


@command(epilog="Example:\n\n  mir doctor")
def doctor(terminal: Terminal) -> None:
    """What is installed, what runs where and why the rest does not, free memory, and what to install.

    --json prints the same as an object.
    """
    from modality_integration.app import doctor as work

    work.run(terminal.results())
    terminal.write_json(work.facts())


def _measure(terminal: Terminal, run: Callable[..., Any], *arguments: Any) -> None:
    """Run it; its result as JSON where that is asked for, also where it was measured and could not be written."""
    from modality_integration.app.results import NotWritten

    try:
        result = run(*arguments, terminal.progress(), results=terminal.results())
    except NotWritten as error:
        terminal.write_json(error.result)
        raise
    terminal.write_json(result)
