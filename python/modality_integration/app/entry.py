"""Entry point of the `mir` command. Imports only the standard library, so that it can report a missing package."""

from __future__ import annotations

import sys

from modality_integration.app.packages import not_installed


def main() -> None:
    """Run the command line. If a required package is missing, print one line and exit with code 1."""
    try:
        from modality_integration.app.cli import main as command
    except ModuleNotFoundError as error:
        name = error.name or ""
        if name.startswith(("modality_integration", "mir_kernels")):  # a broken installation keeps its traceback
            raise
        print(not_installed(name), file=sys.stderr)
        raise SystemExit(1) from None
    command(prog_name="mir")
