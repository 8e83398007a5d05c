"""The configuration of a model folder, or a one-line reason why transformers cannot load it."""

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
    ".metadata",  # torch's distributed checkpoints
)
_ORIGINAL_LLAVA = {"mm_vision_tower", "mm_projector_type", "mm_hidden_size"}
_TRAINER_STATE = ("trainer_state.json", "optimizer.pt", "optimizer.bin", "scheduler.pt", "training_args.bin")
# This works for every model: its own environment writes the hidden states, and `mir states` reads them.
BY_STATES = (
    "capture its hidden states in the environment that runs it, write them with save_states, then run `mir states "
    "FOLDER` (docs/models.md, Models that `mir compute` cannot load)"
)


def raw_config(source: Source) -> dict[str, Any]:
    """The contents of config.json; InputError if `source` holds no transformers model."""
    file = source.file(CONFIG)
    named = source.name + (f", in the hub's cache ({source.note})," if source.note else "")
    if file is None:
        raise InputError(f"model: {named} has no {CONFIG}{_what_else(source.folder)}")
    config = read_json(file)
    _check_type(source.name, config)
    if source.folder is not None and not has_weights(source.folder):
        raise InputError(f"model: {named} has a {CONFIG} but no weights{_what_else(source.folder)}")
    return config


def read_json(file: Path) -> dict[str, Any]:
    """The JSON object in `file`; InputError if there is none."""
    try:
        value = files.read_json(file)
    except ValueError as error:
        raise InputError(f"model: {file} is not valid JSON ({error})") from error
    if not isinstance(value, dict):
        raise InputError(f"model: {file} holds a {type(value).__name__}, not an object")
    return value


@contextlib.contextmanager
def reading(name: str) -> Iterator[None]:
    """Turn any unexpected exception of transformers on malformed files into a one-line InputError.

    Exceptions with their own messages elsewhere (`loading.load`) pass through.
    """
    try:
        yield
    except (InputError, ImportError, MemoryError, OSError, RuntimeError, ValueError):
        raise
    except Exception as error:
        raise InputError(f"model: {name} cannot be loaded: {type(error).__name__}: {in_one_line(error)}") from error


def in_one_line(error: Exception, most: int = 300) -> str:
    """The first informative line of the error's message, truncated to `most` characters."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    said = " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
    return said if len(said) <= most else f"{said[:most]} ..."


def has_weights(folder: Path) -> bool:
    """Whether `folder` has weights that transformers can read."""
    return any((folder / name).exists() for name in _WEIGHTS)


def keys(names: Iterable[str], most: int = 3) -> str:
    """ "5 weights (a, b, c and 2 more)"."""
    first = sorted(names)
    more = f" and {len(first) - most} more" if len(first) > most else ""
    return f"{len(first)} weight{'s' * (len(first) != 1)} ({', '.join(first[:most])}{more})"


def _check_type(name: str, config: dict[str, Any]) -> None:
    """InputError unless transformers has an image-text-to-text class for this model_type."""
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as TAKES_IMAGES

    kind = config.get("model_type")
    if not _ORIGINAL_LLAVA.isdisjoint(config):
        raise InputError(
            f"model: {name} ({kind!r}) is from the original LLaVA code or a derivative of it, and transformers loads "
            f"only converted checkpoints (such as llava-hf/llava-1.5-7b-hf); {BY_STATES}"
        )
    if kind is None:
        raise InputError(f"model: {CONFIG} of {name} names no model_type, so transformers cannot load it; {BY_STATES}")
    if kind not in CONFIG_MAPPING:
        own = ", and the code shipped with it is not run" if "auto_map" in config else " (a newer version may)"
        raise InputError(
            f"model: {name} is a {kind!r}, which transformers {transformers.__version__} does not support{own}; "
            f"{BY_STATES}"
        )
    if kind in TAKES_IMAGES:
        return
    if any(isinstance(value, dict) and "vision" in key for key, value in config.items()):
        raise InputError(
            f"model: {name} is a {kind!r}, for which transformers {transformers.__version__} has no image-text-to-text "
            f"class; {BY_STATES}"
        )
    raise InputError(
        f"model: {name} is a {kind!r}, which does not accept images with text; MIR compares the vision tokens and text "
        "tokens of one decoder"
    )


def _what_else(folder: Path | None) -> str:
    """What a folder without a complete model contains, and what to do."""
    if folder is None:
        return ""
    inside = {path.name for path in folder.iterdir()}
    if not inside:
        return ": the folder is empty"
    if checkpoints := _checkpoints(folder):
        names = ", ".join(path.name for path in checkpoints[-3:])
        return f", but contains checkpoints ({names}); the newest is --model {checkpoints[-1]}"
    config = "" if CONFIG in inside else f"; get {CONFIG} from the model that was trained, with config.save_pretrained"
    if "zero_to_fp32.py" in inside or any(re.fullmatch(r"global_step\d+", name) for name in inside):
        return (
            ": its weights are DeepSpeed shards; merge them with: python "
            f"{folder}/zero_to_fp32.py {folder} {folder} --safe_serialization{config}"
        )
    if any(re.fullmatch(r"(mp_rank|zero_pp_rank|bf16_zero_pp_rank)_.*_states\.pt", name) for name in inside):
        return f": it holds DeepSpeed checkpoint shards; merge them with zero_to_fp32.py in {folder.absolute().parent}"
    if shards := sorted(name for name in inside if re.fullmatch(r"pytorch_model_fsdp_\d+", name)):
        return (
            ": its weights are FSDP shards; merge them with: accelerate merge-weights "
            f"{folder / shards[0]} {folder}{config}"
        )
    if any(name.endswith(".distcp") for name in inside):
        return f": it holds FSDP shards; merge them with: accelerate merge-weights {folder} {folder.parent}"
    if CONFIG not in inside and has_weights(folder):
        return " next to its weights; get it from the model that was trained, with config.save_pretrained"
    if MOCA in inside:
        return f": {MOCA} belongs in the folder of its model"
    if any(name.endswith(".gguf") for name in inside):
        return ": GGUF files are not supported; pass the folder they were converted from"
    if inside & set(_TRAINER_STATE):
        return ": it holds the state of a trainer but no model"
    if models := sorted(path.parent.name for path in folder.glob(f"*/{CONFIG}")):
        return f", but its sub-folders do ({', '.join(models[:5])}); pass one of them"
    return ""


def _checkpoints(folder: Path) -> list[Path]:
    """The checkpoint folders that a Trainer wrote into `folder`, the newest last."""
    found = [
        (int(match[1]), path) for path in folder.iterdir() if (match := re.fullmatch(r"checkpoint-(\d+)", path.name))
    ]
    return [path for _, path in sorted(found)]
