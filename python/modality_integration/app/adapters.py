"""PEFT adapters (such as LoRA) given as the model: merged in memory into their base model."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from modality_integration.app import hub
from modality_integration.app.errors import InputError
from modality_integration.app.hub import Source
from modality_integration.app.model_files import ADAPTER, CONFIG, has_weights, keys, read_json, reading
from modality_integration.app.packages import installed, pip_install
from modality_integration.app.processors import recorded_folder
from modality_integration.models.calibration import is_calibrated
from modality_integration.models.moca import add_moca, moca_parameters
from modality_integration.models.moca_files import FILE, KEY, load_moca

# Written by the original LLaVA's trainer next to its adapters: the projector, and MoCa of the published code.
NOT_OF_LORA = "non_lora_trainables.bin"
_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")


class Adapter(NamedTuple):
    """An adapter's folder, its kind, its base model, and the name of that model in the adapter's file.

    `inside`: the model's weights are in the adapter's folder.
    """

    name: str
    folder: Path
    kind: str
    base: Source
    trained_on: str
    inside: bool

    @property
    def note(self) -> str:
        """A note for the result on how the adapter was used."""
        if self.inside:
            return (
                f"{self.name} holds a model and a {self.kind} adapter, which was merged into it in memory, as "
                f"transformers applies it; if the model already includes the adapter, remove {ADAPTER}"
            )
        return f"{self.name} is a {self.kind} adapter, merged in memory into {self.base.name}"


def find(source: Source) -> Adapter | None:
    """The adapter at `source`, None if there is none; InputError if it cannot be merged into its model here."""
    file = source.file(ADAPTER)
    if file is None:
        return None
    config, folder = read_json(file), source.folder
    if folder is None:
        from huggingface_hub import snapshot_download

        folder = Path(snapshot_download(source.name, revision=source.revision))
    source = source._replace(folder=folder)
    kind, base = str(config.get("peft_type")), config.get("base_model_name_or_path")
    what = f"model: {source.name} is a {kind} adapter"
    inside = (folder / CONFIG).is_file() and has_weights(folder)
    if installed("peft") is None:
        beside = " next to a model" if inside else ""
        raise InputError(f"{what}{beside}, which needs peft: {pip_install('peft')}; or {_merge_first(base)}")
    if not any(source.file(name) for name in _WEIGHTS):
        raise InputError(f"{what} without weights: expected {' or '.join(_WEIGHTS)} next to {ADAPTER}")
    if inside:
        return Adapter(source.name, folder, kind, source, str(base or ""), True)
    if not base:
        raise InputError(f"{what}, but its {ADAPTER} names no base_model_name_or_path; {_merge_first(base)}")
    base = recorded_folder(str(base), folder)
    try:
        place = hub.find("base model", base, config.get("revision"))
    except InputError as error:
        raise InputError(
            f"{what} for {base}: {error}; if it has moved, set base_model_name_or_path in its {ADAPTER}, or "
            f"{_merge_first(base)}"
        ) from error
    if place.file(ADAPTER) is not None:
        raise InputError(f"{what} for {base}, which itself has an adapter; {_merge_first(base)}")
    return Adapter(source.name, folder, kind, place, base, False)


@contextlib.contextmanager
def weights_alone(adapter: Adapter | None, source: Source) -> Iterator[Source]:
    """The model's weights without the adapter, which transformers would otherwise load by itself."""
    if adapter is None or not adapter.inside:
        yield source if adapter is None else adapter.base
        return
    with tempfile.TemporaryDirectory() as links:
        for path in adapter.folder.absolute().iterdir():
            if path.is_file() and path.name not in (ADAPTER, *_WEIGHTS):
                (Path(links) / path.name).symlink_to(path)
        yield Source(adapter.name, Path(links))


def merge(model: torch.nn.Module, adapter: Adapter) -> tuple[torch.nn.Module, list[str]]:
    """`model` with the adapter merged into its weights and any MoCa trained with it; notes for the result.

    Raises InputError for adapters that do not change weights, or whose files are incomplete.
    """
    import peft

    with reading(adapter.name):
        others, moca = _trained_beside(adapter.folder)
    if others:
        raise InputError(
            f"model: {adapter.name} has {keys(others)} in {NOT_OF_LORA} next to its adapter, which only the code that "
            f"trained it can combine; {_merge_first(adapter.base.name)}"
        )
    with reading(adapter.name):
        config = peft.PeftConfig.from_pretrained(str(adapter.folder))
    if config.is_prompt_learning or config.is_adaption_prompt:
        raise InputError(
            f"model: {adapter.name} is a {adapter.kind} adapter, which adds virtual tokens and changes no weights, "
            "so it cannot be merged; measure the model in memory instead (measure_mir, capture)"
        )
    notes = [adapter.note]
    if getattr(model, "is_quantized", False):
        notes.append(f"the weights of {adapter.base.name} are quantised; merging the adapter rounded them again")
    if moca and not any(is_calibrated(module) for module in model.modules()):
        add_moca(model)  # first, because PEFT looks for every module it saved
    with reading(adapter.name):
        adapted: Any = peft.PeftModel(model, config)
        report = adapted.load_adapter(str(adapter.folder), "default", torch_device="cpu")
    if report.missing_keys:
        raise InputError(
            f"model: the adapter {adapter.name} lacks {keys(report.missing_keys)}; without them MIR would be that of "
            "another model"
        )
    if unused := [key for key in report.unexpected_keys if not KEY.search(key)]:
        notes.append(f"the adapter {adapter.name} contains {keys(unused)} that the model does not have; ignored")
    merged = adapted.merge_and_unload(safe_merge=True)
    if moca:
        load_moca(merged, adapter.folder)
        notes.append(f"using MoCa from {adapter.name} in {len(moca_parameters(merged)) // 2} decoder layers")
    return merged, notes


def _trained_beside(folder: Path) -> tuple[list[str], bool]:
    """Names of weights outside the adapter that do not belong to MoCa, and whether there is a MoCa."""
    from safetensors import safe_open

    names: list[str] = []
    beside: list[str] = []
    if (folder / _WEIGHTS[0]).is_file():
        with safe_open(folder / _WEIGHTS[0], "pt") as stored:
            names = list(stored.keys())
    elif (folder / _WEIGHTS[1]).is_file():
        names = list(torch.load(folder / _WEIGHTS[1], map_location="cpu", weights_only=True))
    if (folder / NOT_OF_LORA).is_file():
        beside = list(torch.load(folder / NOT_OF_LORA, map_location="cpu", weights_only=True))
    moca = (folder / FILE).is_file() or any(KEY.search(name) for name in (*names, *beside))
    return [name for name in beside if not KEY.search(name)], moca


def _merge_first(base: Any) -> str:
    return (
        "merge it first where it was trained: peft.PeftModel.from_pretrained(model"
        + (f" of {base}" if base else "")
        + ", ADAPTER).merge_and_unload().save_pretrained(FOLDER), and pass FOLDER"
    )
