"""The demo's measurements: files, one line per probe, a table and two plots."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from modality_integration.app import plots
from modality_integration.app.out_folder import HISTORY
from modality_integration.app.results import draw, remove_stale
from modality_integration.metric.files import write_json
from modality_integration.metric.result import MIRResult
from modality_integration.metric.standard_error import arithmetic, missing_error, with_error
from modality_integration.metric.tables import distance_table

FILES = ("mir.json", "before.json", HISTORY)


class History:
    """The measurements so far, in memory and, after each `write`, on disk."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.file = out / HISTORY
        self.results: dict[int, MIRResult] = {}
        self.loss: dict[int, float] = {}
        self.held_out_loss: dict[int, float] = {}
        self.written: list[int] = []  # steps already on disk

    def add(self, step: int, result: MIRResult, held_out_loss: float) -> None:
        """Record the MIR and the held-out loss after `step` steps."""
        self.results[step], self.held_out_loss[step] = result, held_out_loss

    def write(self) -> None:
        """Write all numbers to history.json, the last MIR to mir.json and the first to before.json.

        The first call removes files of an earlier measurement. Raises OSError naming a file that cannot be written.
        """
        steps = list(self.results)
        self.out.mkdir(parents=True, exist_ok=True)
        self.results[steps[-1]].to_json(self.out / "mir.json")
        if not self.written:
            remove_stale(self.out, ["mir.json"])
        self.results[steps[0]].to_json(self.out / "before.json")
        write_json(
            self.file,
            {
                "steps": steps,
                "mir": [r.value for r in self.results.values()],
                "error": [r.error for r in self.results.values()],
                "per_layer": [r.per_layer for r in self.results.values()],
                "held_out_loss": list(self.held_out_loss.values()),
                "loss": list(self.loss.values()),
            },
        )
        self.written = steps

    def line(self, step: int) -> str:
        """A one-line summary of a probe."""
        result = self.results[step]
        known = ", ".join(filter(None, (missing_error(result), arithmetic(result))))
        mir = f"{with_error(result.value, result.error)}{f' ({known})' if known else ''}"
        return f"step {step:>3}: MIR {mir}, held-out loss {self.held_out_loss[step]:.3f}"

    def show(self, console: Console) -> None:
        """Print the table of all probes by layer."""
        console.print(distance_table(self._named()))

    def draw(self, suffix: str, console: Console) -> list[str]:
        """Draw the plots of layers and training; returns the names of those that could be drawn."""
        layers, training = (self.out / f"{name}.{suffix}" for name in ("layers", "training"))
        return [
            *draw(lambda file: plots.plot_layers(self._named(), file), layers, console),
            *draw(
                lambda file: plots.plot_training(self.results, self.loss, file, self.held_out_loss), training, console
            ),
        ]

    def _named(self) -> dict[str, MIRResult]:
        return {"before" if step == 0 else f"step {step}": result for step, result in self.results.items()}
