"""Where the `mir` command starts: with no package but Python's own, so that it can say which one is missing."""

from __future__ import annotations

import sys

from modality_integration.app.packages import not_installed


def main() -> None:
    """Run the command line; one line and exit code 1 where a package that it is made of is not installed."""
    try:
        from modality_integration.app.cli import main as command
    except ModuleNotFoundError as error:
        name = error.name or ""
        if name.startswith(("modality_integration", "mir_kernels")):  # a broken installation keeps its traceback
            raise
        print(not_installed(name), file=sys.stderr)
        raise SystemExit(1) from None
    command(prog_name="mir")
