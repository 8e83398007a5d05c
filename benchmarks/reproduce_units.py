"""The units of work of `reproduce.py`: trainings of the demo's model, and measurements of a trained one.

The result of a unit is a JSON file in the work folder, written atomically together with everything it depends on.
Finished units are never repeated, and a killed run resumes. After a code change, remove the folder.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from safetensors.torch import load_file, save_file

from modality_integration.app import demo, study
from modality_integration.app.samples import Sample, Text
from modality_integration.metric.files import write_json, written_whole
from modality_integration.metric.result import MIRResult
from modality_integration.models.moca import add_moca

Row = dict[str, Any]
PIECE = 600  # characters of prose: more than the demo's TEXT_TOKENS tokens


pictures = cache(demo.Pictures)  # by seed; reading and splitting them for every unit would take seconds


@dataclass(frozen=True)
class Scale:
    """The size of everything. images: sizes of the training set, ascending; samples: per measurement; groups: of
    samples, for the standard error; captions: held out, for the loss; most_samples: in the study of sample counts.
    """

    images: tuple[int, ...] = (40, 80, 160, 320)
    reference: int = 160  # images of the trainings that compare projectors, and MoCa
    seeds: tuple[int, ...] = (0, 1)
    moca_seeds: tuple[int, ...] = (0, 1, 2)
    samples: int = 32
    groups: int = 5
    captions: int = 32
    most_samples: int = 200
    learning_rate: float = 2e-3


TINY = Scale(images=(4, 8), reference=4, moca_seeds=(0,), samples=6, groups=2, captions=4, most_samples=6)


@dataclass(frozen=True, kw_only=True)
class Training:
    """One epoch on `images` captioned pictures; curve: also measure during training, and keep the projector."""

    images: int
    seed: int
    projector: str = "mlp2"
    moca: bool = False
    curve: bool = False

    @property
    def name(self) -> str:
        """The name of its file."""
        words = ("train", self.images, f"seed{self.seed}", self.projector, *["moca"] * self.moca)
        return "-".join(map(str, words))

    @property
    def steps(self) -> int:
        """The number of optimizer steps."""
        return self.images // demo.BATCH

    @property
    def probes(self) -> list[int]:
        """The steps after which MIR and the held-out loss are measured."""
        before = {0, *(self.steps // part for part in (16, 8, 4, 2))} if self.curve else set()
        return [*sorted(before - {self.steps}), self.steps]


class Workshop:
    """Runs units of work, and finds finished ones."""

    def __init__(self, folder: Path, scale: Scale, language_model: Path | None, console: Console) -> None:
        self.folder, self.scale, self.language_model, self.console = folder, scale, language_model, console
        folder.mkdir(parents=True, exist_ok=True)
        self._began = time.monotonic()

    def unit(self, name: str, depends: Row, work: Callable[[], Any]) -> Any:
        """The result of `work`, read from the file of this name if that has the same `depends`."""
        file = self.folder / f"{name}.json"
        depends = json.loads(json.dumps({**depends, "language_model": str(self.language_model)}))
        if file.exists():
            saved = json.loads(file.read_text())
            if saved["depends"] == depends:
                return saved["result"]
        began = time.monotonic()
        result = work()
        write_json(file, {"depends": depends, "result": result, "seconds": round(time.monotonic() - began, 1)})
        minutes = (time.monotonic() - self._began) / 60
        self.console.print(
            f"{minutes:5.1f} min  {name}: {time.monotonic() - began:.0f} s", highlight=False, soft_wrap=True
        )
        return result

    def train(self, training: Training) -> list[Row]:
        """Rows of step, mir, error and held_out_loss, the last one after all steps."""
        # A curve includes the last step, so it also serves requests for that step only.
        if training.images == self.scale.images[-1] and training.projector == "mlp2" and not training.moca:
            training = replace(training, curve=True)
        depends = {**asdict(training), **self._measured()}
        return self.unit(training.name, depends, lambda: self._train(training))

    def study(self, name: str, count: int) -> list[Row]:
        """The rows of a study (see `modality_integration.app.study`) of the trained model."""

        def work() -> list[Row]:
            model, processor = self.trained
            subject = study.Subject(
                model=model,
                processor=processor,
                text_tokens=demo.TEXT_TOKENS,
                template="chat",
                groups=self.scale.groups,
            )
            in_turn = name == "samples"  # whose values come before the last sample, each of all groups
            samples = self.samples(count, prose(), pictures(self.scale.seeds[0]), in_turn=in_turn)
            return list(study.rows_of(name, subject, {("demo", "reference"): samples}))

        return self.unit(f"study-{name}", {"count": count, "seed": self.scale.seeds[0], **self._measured()}, work)

    def measure(self, name: str, kinds: Sequence[str], texts: Sequence[Text], template: str) -> Row:
        """MIR of the trained model on pictures of these kinds with these texts."""

        def work() -> Row:
            model, processor = self.trained
            samples = self.samples(self.scale.samples, texts, pictures(self.scale.seeds[0]), kinds)
            return values(demo.measure(model, processor, samples, groups=self.scale.groups, template=template))

        depends = {"kinds": list(kinds), "template": template, "seed": self.scale.seeds[0], **self._measured()}
        return self.unit(f"measure-{name}", depends, work)

    def samples(
        self,
        count: int,
        texts: Sequence[Text],
        own: demo.Pictures,
        kinds: Sequence[str] = demo.KINDS,
        in_turn: bool = False,
    ) -> Sequence[Sample]:
        """Held-out pictures with unrelated prose, in groups that share neither, assigned round-robin or as blocks."""
        return demo.probe_samples(own, count, 0, kinds, texts, groups=self.scale.groups, in_turn=in_turn)

    @cached_property
    def trained(self) -> tuple[Any, Any]:
        """The model after the largest training of the first seed, and its processor."""
        training = Training(images=self.scale.images[-1], seed=self.scale.seeds[0], curve=True)
        if not self._weights(training).exists():  # without weights the finished unit is useless: train again
            (self.folder / f"{training.name}.json").unlink(missing_ok=True)
        self.train(training)
        model, processor = self._build(training)
        model.model.multi_modal_projector.load_state_dict(load_file(self._weights(training)))
        return model, processor

    def _train(self, training: Training) -> list[Row]:
        model, processor = self._build(training)
        # Each seed has different held-out pictures, so only trainings of one seed are measured on the same ones.
        own = pictures(training.seed)
        samples = self.samples(self.scale.samples, prose(), own)
        captions = own.held_out(self.scale.captions)[:]
        rows: list[Row] = []

        def probe(step: int, loss: float | None = None) -> None:
            if step in training.probes:
                result = demo.measure(model, processor, samples, groups=self.scale.groups)
                held_out = demo.held_out_loss(model, processor, captions)
                rows.append({"step": step, **values(result), "held_out_loss": held_out})

        probe(0)
        demo.train(
            model,
            processor,
            own.training(training.images),
            steps=training.steps,
            learning_rate=self.scale.learning_rate,
            after_step=probe,
        )
        if training.curve:
            with written_whole(self._weights(training)) as partial:
                save_file(model.model.multi_modal_projector.state_dict(), partial)
        return rows

    def _build(self, training: Training) -> tuple[Any, Any]:
        torch.manual_seed(training.seed)
        model, processor = demo.build(self.language_model, projector=training.projector)
        if training.moca:
            add_moca(model)
        return model, processor

    def _weights(self, training: Training) -> Path:
        return self.folder / f"{training.name}.safetensors"

    def _measured(self) -> Row:
        scale = self.scale
        return {
            "samples": scale.samples,
            "groups": scale.groups,
            "captions": scale.captions,
            "learning_rate": scale.learning_rate,
            "largest": scale.images[-1],
        }


def values(result: MIRResult) -> Row:
    """The values of a result that the tables keep."""
    return {"mir": result.value, "error": result.error, "mir_without_sinks": result.value_without_sinks}


def prose() -> list[Text]:
    """Distinct pieces of Python's language reference."""
    return _pieces([text.content for text in demo.language_reference()])


def descriptions() -> list[Text]:
    """Pieces of scikit-learn's descriptions of its data sets."""
    files = sorted((demo.folder_of("sklearn") / "datasets" / "descr").glob("*.rst"))
    return _pieces([" ".join(file.read_text(encoding="utf-8").split()) for file in files])


def captions() -> list[Text]:
    """Captions of training pictures, one after another."""
    words = ". ".join(item.caption for item in pictures(0).training(2000))
    return _pieces([words])


def _pieces(whole: Sequence[str]) -> list[Text]:
    pieces = dict.fromkeys(text[i : i + PIECE] for text in whole for i in range(0, len(text) - PIECE + 1, PIECE))
    return [Text(f"piece {number}", piece) for number, piece in enumerate(pieces)]
