"""Results from random features, and tables as text, for tests of output."""

import torch
from rich.console import Console

from modality_integration import mir


def result(seed=0, layers=3, **options):
    generator = torch.Generator().manual_seed(seed)
    vision = [torch.randn(90, 8, generator=generator) + 0.2 * seed for _ in range(layers)]
    text = [torch.randn(80, 8, generator=generator) for _ in range(layers)]
    return mir(vision, text, **options)


def printed(table, width=80):
    console = Console(width=width, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(table)
    return console.export_text()
