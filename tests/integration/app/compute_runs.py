"""Run `mir compute` on a tiny model: in this process, as a command, and in a separate process."""

import os
import subprocess
import sys

import torch
from rich.console import Console

from modality_integration.app.compute import run
from modality_integration.app.options import ComputeOptions

SAMPLES = 12


def quiet_run(options, **changes):
    return run(ComputeOptions(**{**vars(options), **changes}), Console(quiet=True))


def command(options):
    """The arguments of `mir` for these options."""
    out = ["compute"]
    for name in ("model", "images", "text", "samples", "out", "device", "text_tokens", "checkpoint_every"):
        out += [f"--{name.replace('_', '-')}", str(getattr(options, name))]
    return out


def in_process(options, *before):
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads()), "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        [sys.executable, *before, *command(options)], env=environment, capture_output=True, text=True, timeout=300
    )
