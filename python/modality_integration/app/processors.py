"""The processor of a model: its own, the one that was given, or the one of the model that it was trained from.

transformers' Trainer saves no processor unless it is given one, and a tokenizer alone is none. Where a checkpoint has
none, the folder around it, the model that its files name, and models of the same configuration close by are looked at.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from modality_integration.app import hub
from modality_integration.app.errors import InputError
from modality_integration.app.hub import Source
from modality_integration.app.model_files import CONFIG, read_json, reading

_IMAGES = ("preprocessor_config.json", "processor_config.json")
_WORDS = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tekken.json",
)
# What training changes in a configuration, or writing it: two that differ in these alone are of the same model.
_NOT_THE_MODEL = (
    "_name_or_path",
    "architectures",
    "bos_token_id",
    "dtype",
    "eos_token_id",
    "pad_token_id",
    "torch_dtype",
    "transformers_version",
    "use_cache",
)


def find(
    source: Source, config: Any, given: str | None, revision: str | None, recorded: Sequence[str]
) -> tuple[Any, list[str]]:
    """The processor for the model at `source`, and a sentence on where it is from unless it lies there.

    config: of the model. given: the folder or hub name that was asked for, of `revision`. recorded: names of models
    that the files at `source` give as what it was trained from. Raises InputError where there is no processor, or where
    the given one is of another model.
    """
    if given is not None:
        asked = hub.find("processor", given, revision)
        processor = _whole(asked)
        if processor is None:
            raise InputError(f"processor: {given} has no {_lacking(asked)}")
        if reason := _unfit(processor, config, None):
            raise InputError(f"processor: that of {given} is of another model than {source.name}: {reason}")
        notes = [f"with the processor of {given}", *([asked.note] if asked.note else [])]
        if reason := _unfit(processor, config, _own_words(source)):
            notes.append(f"of the processor of {given}, {reason}")
        return processor, notes

    processor = _whole(source)
    if processor is not None:
        return processor, []
    words = _own_words(source)
    tried = [source.note] if source.note else []  # the cache may have a model in part
    for place, why in _recorded(source, recorded):
        if isinstance(place, str):
            tried.append(place)
        elif (processor := _whole(place)) is None:
            tried.append(f"{place.name}, {why}, has no {_lacking(place)} either")
        elif reason := _unfit(processor, config, words):
            tried.append(f"that of {place.name}, {why}, does not fit: {reason}")
        else:
            return processor, [f"{source.name} has no {_lacking(source)}: with the processor of {place.name}, {why}"]
    near: dict[str, tuple[Any, str]] = {}
    for close, shown in _close_by(source):
        try:
            if not _same_model(close, source) or (processor := _whole(close)) is None:
                continue
        except (InputError, OSError, ValueError):  # a folder that happens to be there and cannot be read is no answer
            continue
        if not _unfit(processor, config, words):
            near.setdefault(_what_it_does(processor), (processor, shown))
    if len(near) == 1:
        ((processor, shown),) = near.values()
        return processor, [
            f"{source.name} has no {_lacking(source)}: with the processor of {shown}, a model of the same configuration"
        ]
    if near:
        names = ", ".join(shown for _, shown in near.values())
        tried.append(f"models of its configuration have different ones: {names}")
    raise InputError(
        f"model: {source.name} has no {_lacking(source)}, as transformers' Trainer saves what processing_class it is "
        "given: name the folder or the hub name of the model that it was trained from with --processor"
        + "".join(f"; {line}" for line in tried)
    )


def trained_from(source: Source, config: dict[str, Any], adapted: str) -> list[str]:
    """Names of the model that a training began from: as `adapted`, of an adapter, and the files at `source` have it."""
    names = [adapted, config.get("_name_or_path")]  # transformers 5 writes the second no more
    state = source.folder / "trainer_state.json" if source.folder is not None else None
    if state is not None and state.is_file():
        names += _values("trained_from", read_json(state).get("stateful_callbacks"))  # of MIRCallback
    return [name for name in dict.fromkeys(names) if isinstance(name, str) and name]


def recorded_folder(name: str, near: Path | None) -> str:
    """`name` as a file has it: where it is a relative path, from here or else from a folder around `near`."""
    if near is None or Path(name).is_absolute() or Path(name).is_dir():
        return name
    return next((str(parent / name) for parent in near.absolute().parents if (parent / name).is_dir()), name)


def _recorded(source: Source, names: Sequence[str]) -> Iterator[tuple[Source | str, str]]:
    """Places that belong to the model at `source`, and why; words on those that are not here."""
    folder = source.folder
    if folder is not None:
        around = Source(str(folder.parent), folder.parent)
        own = not (folder.parent / CONFIG).exists() or _same_model(around, source)
        if own and _has(around, _IMAGES):
            yield around, "the folder it lies in"
    for name in names:
        name = recorded_folder(name, folder)
        if folder is not None and Path(name).is_dir() and folder.samefile(name):
            continue
        try:
            place = hub.find("processor", name)
        except InputError as error:
            yield f"its files say that it was trained from {name} ({str(error).removeprefix('processor: ')})", ""
        else:
            yield place, "which it was trained from"


def _close_by(source: Source) -> Iterator[tuple[Source, str]]:
    """Folders of models around that of `source`, around here and in the hub's cache; how each is shown."""
    if source.folder is None:
        return
    folder = source.folder.absolute()
    near: dict[Path, str] = {}
    for parent in (*folder.parents[:2], Path.cwd()):
        inside = sorted(parent.iterdir()) if os.access(parent, os.R_OK | os.X_OK) else []
        near |= {path.resolve(): str(path) for path in (parent, *inside)}
    for path in sorted(_hub_cache().glob("models--*/snapshots/*")):
        near.setdefault(path.resolve(), path.parts[-3].removeprefix("models--").replace("--", "/", 1))
    near.pop(folder.resolve(), None)
    for path, shown in near.items():
        if os.path.isfile(path / CONFIG) and any(os.path.isfile(path / name) for name in _IMAGES):
            yield Source(str(path), path), shown


def _hub_cache() -> Path:
    from huggingface_hub.constants import HF_HUB_CACHE

    return Path(HF_HUB_CACHE)


def _whole(place: Source) -> Any | None:
    """The processor at `place`; None where it lacks the images' half or the words'."""
    from transformers import AutoProcessor

    both = _has(place, _IMAGES) and _has(place, _WORDS)
    try:
        with reading(place.name):
            processor = AutoProcessor.from_pretrained(place.where, **place.arguments)
    except (InputError, OSError, ValueError):
        if both:
            raise
        return None
    if hasattr(processor, "image_processor") and hasattr(processor, "tokenizer"):
        return processor
    if both:
        raise InputError(
            f"model: of the processor's files in {place.name} transformers makes a {type(processor).__name__}, and not "
            "an image processor and a tokenizer: is their processor_class one that it knows?"
        )
    return None


def _own_words(source: Source) -> Any | None:
    """The tokenizer beside the model, None if there is none."""
    from transformers import AutoTokenizer

    if not _has(source, _WORDS):
        return None
    with reading(source.name):
        return AutoTokenizer.from_pretrained(source.where, **source.arguments)


def _lacking(place: Source) -> str:
    if not _has(place, _IMAGES):
        return "image processor" if _has(place, _WORDS) else "processor"
    return "tokenizer"


def _has(place: Source, names: tuple[str, ...]) -> bool:
    """Whether one of the files `names` is at `place`; a processor_config.json counts if it has the image processor."""
    for name in names:
        file = place.file(name)
        if file is not None and (name != "processor_config.json" or "image_processor" in read_json(file)):
            return True
    return False


def _unfit(processor: Any, config: Any, words: Any | None) -> str | None:
    """Why `processor` is not one for a model of `config`, whose own tokenizer is `words`; None if it may be."""
    marker = getattr(processor, "image_token_id", None)
    wanted = getattr(config, "image_token_id", None)
    if isinstance(marker, int) and isinstance(wanted, int) and marker != wanted:
        return f"its image token is {marker}, the model's {wanted}"
    if words is not None and words.get_vocab() != processor.tokenizer.get_vocab():
        return "its tokenizer has another vocabulary than the one beside the model"
    return None


def _same_model(a: Source, b: Source) -> bool:
    """Whether the configurations of two folders are of one model, whatever its weights."""
    from transformers import AutoConfig

    configs = []
    for place in (a, b):
        file = place.file(CONFIG)
        configs.append(read_json(file) if file is not None else {})
    if configs[0].get("model_type") != configs[1].get("model_type"):
        return False
    loaded = [AutoConfig.from_pretrained(place.where, **place.arguments).to_dict() for place in (a, b)]
    return _of_model(loaded[0]) == _of_model(loaded[1])


def _of_model(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _of_model(inner) for key, inner in value.items() if key not in _NOT_THE_MODEL}
    return value


def _what_it_does(processor: Any) -> str:
    """What decides the tokens and pixels that a processor makes, to tell two apart."""
    tokenizer = processor.tokenizer
    backend = getattr(tokenizer, "backend_tokenizer", None)
    parts = {
        "own": {key: value for key, value in processor.to_dict().items() if key != "tokenizer"},
        "images": processor.image_processor.to_dict(),
        "words": sorted(tokenizer.get_vocab().items()) if backend is None else backend.to_str(),
        "special": tokenizer.special_tokens_map,
        "templates": [getattr(part, "chat_template", None) for part in (processor, tokenizer)],
    }
    return json.dumps(parts, sort_keys=True, default=str)


def _values(key: str, value: Any) -> list[Any]:
    """Every value of `key` in nested dicts."""
    if not isinstance(value, dict):
        return []
    below = [found for inner in value.values() for found in _values(key, inner)]
    return [value[key], *below] if key in value else below
