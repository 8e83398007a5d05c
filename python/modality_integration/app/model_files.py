"""What a folder given as the model holds: its configuration, or in one line why transformers cannot load it."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from modality_integration.app.errors import InputError
from modality_integration.app.hub import Source
from modality_integration.metric import files
from modality_integration.models.moca_files import FILE as MOCA

CONFIG, ADAPTER = "config.json", "adapter_config.json"
_WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    ".metadata",  # of torch's distributed checkpoints
)
_ORIGINAL_LLAVA = {"mm_vision_tower", "mm_projector_type", "mm_hidden_size"}
_TRAINER_STATE = ("trainer_state.json", "optimizer.pt", "optimizer.bin", "scheduler.pt", "training_args.bin")
# The way that is open to every model: its own environment writes the states, and this one reads them.
BY_STATES = (
    "in the environment that runs it, capture its hidden states and write them with save_states, then `mir states "
    "FOLDER` (docs/models.md, Models that `mir compute` cannot load)"
)


def raw_config(source: Source) -> dict[str, Any]:
    """config.json as it was written; InputError where `source` holds no model of transformers."""
    file = source.file(CONFIG)
    named = source.name + (f", in the hub's cache ({source.note})," if source.note else "")
    if file is None:
        raise InputError(f"model: {named} has no {CONFIG}{_what_else(source.folder)}")
    config = read_json(file)
    _check_type(source.name, config)
    if source.folder is not None and not has_weights(source.folder):
        raise InputError(f"model: {named} has a {CONFIG} and no weights{_what_else(source.folder)}")
    return config


def read_json(file: Path) -> dict[str, Any]:
    """The object in `file`; InputError where there is none."""
    try:
        value = files.read_json(file)
    except ValueError as error:
        raise InputError(f"model: {file} is no JSON ({error})") from error
    if not isinstance(value, dict):
        raise InputError(f"model: {file} holds a {type(value).__name__}, not an object")
    return value


@contextlib.contextmanager
def reading(name: str) -> Iterator[None]:
    """Whatever transformers' readers raise inside on files that are not what they take, as an InputError of one line.

    The errors that are said in words of their own elsewhere (`loading.load`) pass.
    """
    try:
        yield
    except (InputError, ImportError, MemoryError, OSError, RuntimeError, ValueError):
        raise
    except Exception as error:
        raise InputError(f"model: {name} cannot be loaded: {type(error).__name__}: {in_one_line(error)}") from error


def in_one_line(error: Exception, most: int = 300) -> str:
    """The first line of its message that says something, cut where it is a list of all there is."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    said = " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
    return said if len(said) <= most else f"{said[:most]} ..."


def has_weights(folder: Path) -> bool:
    """Whether there are weights in `folder` that transformers reads."""
    return any((folder / name).exists() for name in _WEIGHTS)


def keys(names: Iterable[str], most: int = 3) -> str:
    """ "5 weights (a, b, c and 2 more)"."""
    first = sorted(names)
    more = f" and {len(first) - most} more" if len(first) > most else ""
    return f"{len(first)} weight{'s' * (len(first) != 1)} ({', '.join(first[:most])}{more})"


def _check_type(name: str, config: dict[str, Any]) -> None:
    """InputError unless transformers has a class for images and text of this model_type."""
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as TAKES_IMAGES

    kind = config.get("model_type")
    if not _ORIGINAL_LLAVA.isdisjoint(config):
        raise InputError(
            f"model: {name} ({kind!r}) is of the original LLaVA's code or one that grew from it, and transformers "
            f"loads only converted ones (as llava-hf/llava-1.5-7b-hf); {BY_STATES}"
        )
    if kind is None:
        raise InputError(f"model: {CONFIG} of {name} names no model_type, so transformers cannot load it; {BY_STATES}")
    if kind not in CONFIG_MAPPING:
        own = " and its own code beside it is not run" if "auto_map" in config else " (a newer one may)"
        raise InputError(
            f"model: {name} is a {kind!r}, which transformers {transformers.__version__} does not know{own}; "
            f"{BY_STATES}"
        )
    if kind in TAKES_IMAGES:
        return
    if any(isinstance(value, dict) and "vision" in key for key, value in config.items()):
        raise InputError(
            f"model: {name} is a {kind!r}, which transformers {transformers.__version__} has no image-text-to-text "
            f"class for; {BY_STATES}"
        )
    raise InputError(
        f"model: {name} is a {kind!r}, which takes no images beside text; MIR compares the vision and the text tokens "
        "of one decoder"
    )


def _what_else(folder: Path | None) -> str:
    """What is in a folder without a whole model, and what to do."""
    if folder is None:
        return ""
    inside = {path.name for path in folder.iterdir()}
    if not inside:
        return ": the folder is empty"
    if checkpoints := _checkpoints(folder):
        names = ", ".join(path.name for path in checkpoints[-3:])
        return f", but checkpoints in it ({names}): --model {checkpoints[-1]} is the newest"
    config = "" if CONFIG in inside else f"; {CONFIG} comes from the model that was trained: config.save_pretrained"
    if "zero_to_fp32.py" in inside or any(re.fullmatch(r"global_step\d+", name) for name in inside):
        return (
            ": its weights are in DeepSpeed's shards, which its zero_to_fp32.py puts together: python "
            f"{folder}/zero_to_fp32.py {folder} {folder} --safe_serialization{config}"
        )
    if any(re.fullmatch(r"(mp_rank|zero_pp_rank|bf16_zero_pp_rank)_.*_states\.pt", name) for name in inside):
        return f": it is the shards of a DeepSpeed checkpoint; see zero_to_fp32.py in {folder.absolute().parent}"
    if shards := sorted(name for name in inside if re.fullmatch(r"pytorch_model_fsdp_\d+", name)):
        return (
            ": its weights are in FSDP's shards; put them together with: accelerate merge-weights "
            f"{folder / shards[0]} {folder}{config}"
        )
    if any(name.endswith(".distcp") for name in inside):
        return f": it is FSDP's shards; put them together with: accelerate merge-weights {folder} {folder.parent}"
    if CONFIG not in inside and has_weights(folder):
        return " beside its weights; it comes from the model that was trained: config.save_pretrained"
    if MOCA in inside:
        return f": {MOCA} belongs beside the files of the model that has it"
    if any(name.endswith(".gguf") for name in inside):
        return ": GGUF files are not read; give the folder they were converted from"
    if inside & set(_TRAINER_STATE):
        return ": it holds the state of a trainer and no model"
    if models := sorted(path.parent.name for path in folder.glob(f"*/{CONFIG}")):
        return f", but folders in it have one ({', '.join(models[:5])}): give one of them"
    return ""


def _checkpoints(folder: Path) -> list[Path]:
    """The folders that a Trainer wrote below `folder`, the newest last."""
    found = [
        (int(match[1]), path) for path in folder.iterdir() if (match := re.fullmatch(r"checkpoint-(\d+)", path.name))
    ]
    return [path for _, path in sorted(found)]
