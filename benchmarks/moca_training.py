"""The demo's training with and without MoCa, side by side: benchmarks/data/moca_training.csv and .png.

Both trainings of a seed start from the same weights and see the same batches; MoCa starts from ones and zeros, so
before the first step they are one model. Several seeds, because such short trainings scatter. The learning rate is
below the demo's, at which the first steps throw the loss about. What comes out is written down, whatever it says.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console

import harness
from modality_integration.app import demo, report
from modality_integration.app.options import DemoOptions

RUNS = {"without MoCa": False, "with MoCa": True}
NAME = "moca_training"
COLUMNS = ("run", "seed", "learning_rate", "step", "loss", "mir", *harness.ENVIRONMENT)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=60, help="of training on captions, as in `mir demo`")
    parser.add_argument("--samples", type=int, default=48, help="image-text pairs in each measurement")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1], help="one training with, one without each")
    parser.add_argument("--learning-rate", type=float, default=3e-4)
    parser.add_argument("--language-model", type=Path, help="a folder with another language model, in place of SmolLM2")
    parser.add_argument("--out", type=Path, default=harness.DATA)
    flags = parser.parse_args()
    flags.out.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, object]] = []
    for seed in flags.seeds:
        for run, moca in RUNS.items():
            options = DemoOptions(
                steps=flags.steps,
                samples=flags.samples,
                seed=seed,
                language_model=flags.language_model,
                moca=moca,
                learning_rate=flags.learning_rate,
            )
            rows.extend(train(run, options))
        with (flags.out / f"{NAME}.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(rows)
        plot(flags.out / f"{NAME}.csv", flags.out / f"{NAME}.png")


def train(run: str, options: DemoOptions) -> Iterator[dict[str, object]]:
    """One training; a row a step, with MIR at the steps where it was measured."""
    print(f"\n{run}, seed {options.seed}", flush=True)
    environment = harness.environment_columns()
    with tempfile.TemporaryDirectory() as folder:
        demo.run(dataclasses.replace(options, out=Path(folder)), Console())
        history = json.loads((Path(folder) / "history.json").read_text())
    mir = dict(zip(history["steps"], history["mir"], strict=True))
    losses = dict(enumerate(history["loss"], 1))
    for step in range(options.steps + 1):
        numbers = {name: f"{v[step]:.6g}" if step in v else "" for name, v in (("loss", losses), ("mir", mir))}
        own = {"run": run, "seed": options.seed, "learning_rate": options.learning_rate, "step": step}
        yield {**own, **numbers, **environment}


def plot(source: Path, target: Path) -> Path:
    """Draw what `main` wrote: MIR and loss of all trainings against the steps."""
    mir: dict[str, list[dict[int, float]]] = {}
    losses: dict[str, list[dict[int, float]]] = {}
    with source.open(newline="") as file:
        for row in csv.DictReader(file):
            for values, name in ((mir, "mir"), (losses, "loss")):
                of_run = values.setdefault(row["run"], [])
                if row["step"] == "0":
                    of_run.append({})
                if row[name]:
                    of_run[-1][int(row["step"])] = float(row[name])
    return report.plot_runs(mir, losses, target)


if __name__ == "__main__":
    main()
