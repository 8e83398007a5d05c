"""What the demo measured along the way: a file, a line a probe, a table and two plots."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from modality_integration.app import report
from modality_integration.app.console import proved
from modality_integration.metric.files import write_json
from modality_integration.metric.result import MIRResult
from modality_integration.metric.standard_error import with_error


class History:
    """What was measured so far, on disk after every probe."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.file = out / "history.json"
        self.results: dict[int, MIRResult] = {}
        self.loss: dict[int, float] = {}
        self.held_out_loss: dict[int, float] = {}

    def add(self, step: int, result: MIRResult, held_out_loss: float) -> None:
        """Record the MIR and the held-out loss after `step` steps; the last MIR is mir.json."""
        self.results[step], self.held_out_loss[step] = result, held_out_loss
        result.to_json(self.out / "mir.json")
        if step == 0:
            result.to_json(self.out / "before.json")
        write_json(
            self.file,
            {
                "steps": list(self.results),
                "mir": [r.value for r in self.results.values()],
                "error": [r.error for r in self.results.values()],
                "per_layer": [r.per_layer for r in self.results.values()],
                "held_out_loss": list(self.held_out_loss.values()),
                "loss": list(self.loss.values()),
            },
        )

    def line(self, step: int) -> str:
        """One line for a person."""
        result = self.results[step]
        interval = "" if result.lower is None else f" ({proved(result)})"
        mir = f"{with_error(result.value, result.error)}{interval}"
        return f"step {step:>3}: MIR {mir}, held-out loss {self.held_out_loss[step]:.3f}"

    def show(self, console: Console) -> None:
        """The table of all probes, layer by layer, and the two plots."""
        named = {"before" if step == 0 else f"step {step}": result for step, result in self.results.items()}
        console.print(report.comparison_table(named))
        report.plot_layers(named, self.out / "layers.png")
        report.plot_training(self.results, self.loss, self.out / "training.png", self.held_out_loss)
