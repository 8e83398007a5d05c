"""The processor of a model: its own, a given one, or that of the model it was trained from.

transformers' Trainer saves no processor unless it is given one, and a tokenizer alone is not enough. If a checkpoint
has none, `find` searches its parent folder, the model named in its files, and nearby models of the same configuration.
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
# Fields that training or saving changes: configurations that differ only in these belong to the same model.
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
    """The processor for the model at `source`, and a note on its origin unless it is there.

    config: of the model. given: the requested folder or hub name, at `revision`. recorded: names of models that, by the
    files at `source`, it was trained from. Raises InputError if there is no processor, or if the given one belongs to
    another model.
    """
    if given is not None:
        asked = hub.find("processor", given, revision)
        processor = _whole(asked)
        if processor is None:
            raise InputError(f"processor: {given} has no {_lacking(asked)}")
        if reason := _unfit(processor, config, None):
            raise InputError(f"processor: {given} belongs to another model than {source.name}: {reason}")
        notes = [f"using the processor of {given}", *([asked.note] if asked.note else [])]
        if reason := _unfit(processor, config, _own_words(source)):
            notes.append(f"the processor of {given} differs: {reason}")
        return processor, notes

    processor = _whole(source)
    if processor is not None:
        return processor, []
    words = _own_words(source)
    tried = [source.note] if source.note else []  # the cache may hold only part of a model
    for place, why in _recorded(source, recorded):
        if isinstance(place, str):
            tried.append(place)
        elif (processor := _whole(place)) is None:
            tried.append(f"{place.name}, {why}, has no {_lacking(place)} either")
        elif reason := _unfit(processor, config, words):
            tried.append(f"the processor of {place.name}, {why}, does not match: {reason}")
        else:
            return processor, [f"{source.name} has no {_lacking(source)}; using the processor of {place.name}, {why}"]
    near: dict[str, tuple[Any, str]] = {}
    for close, shown in _close_by(source):
        try:
            if not _same_model(close, source) or (processor := _whole(close)) is None:
                continue
        except (InputError, OSError, ValueError):  # skip unrelated folders that cannot be read
            continue
        if not _unfit(processor, config, words):
            near.setdefault(_what_it_does(processor), (processor, shown))
    if len(near) == 1:
        ((processor, shown),) = near.values()
        return processor, [
            f"{source.name} has no {_lacking(source)}; using the processor of {shown}, of the same configuration"
        ]
    if near:
        names = ", ".join(shown for _, shown in near.values())
        tried.append(f"models of the same configuration have different processors: {names}")
    raise InputError(
        f"model: {source.name} has no {_lacking(source)} (transformers' Trainer saves only the processing_class it is "
        "given); pass the folder or hub name of the model it was trained from with --processor"
        + "".join(f"; {line}" for line in tried)
    )


def trained_from(source: Source, config: dict[str, Any], adapted: str) -> list[str]:
    """Names of the model that training started from: `adapted`, from an adapter, and those in the files at `source`."""
    names = [adapted, config.get("_name_or_path")]  # transformers 5 no longer writes the second
    state = source.folder / "trainer_state.json" if source.folder is not None else None
    if state is not None and state.is_file():
        names += _values("trained_from", read_json(state).get("stateful_callbacks"))  # written by MIRCallback
    return [name for name in dict.fromkeys(names) if isinstance(name, str) and name]


def recorded_folder(name: str, near: Path | None) -> str:
    """Resolve `name` from a file: a relative path starts here, or else at a parent folder of `near`."""
    if near is None or Path(name).is_absolute() or Path(name).is_dir():
        return name
    return next((str(parent / name) for parent in near.absolute().parents if (parent / name).is_dir()), name)


def _recorded(source: Source, names: Sequence[str]) -> Iterator[tuple[Source | str, str]]:
    """Places that belong to the model at `source`, and why; a message for those that are missing."""
    folder = source.folder
    if folder is not None:
        around = Source(str(folder.parent), folder.parent)
        own = not (folder.parent / CONFIG).exists() or _same_model(around, source)
        if own and _has(around, _IMAGES):
            yield around, "the folder that contains it"
    for name in names:
        name = recorded_folder(name, folder)
        if folder is not None and Path(name).is_dir() and folder.samefile(name):
            continue
        try:
            place = hub.find("processor", name)
        except InputError as error:
            yield f"its files say it was trained from {name} ({str(error).removeprefix('processor: ')})", ""
        else:
            yield place, "which it was trained from"


def _close_by(source: Source) -> Iterator[tuple[Source, str]]:
    """Model folders near `source`, near the working directory and in the hub's cache, and the name to show for each."""
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
    """The processor at `place`; None if it lacks the image processor or the tokenizer."""
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
            f"model: transformers loads the processor files in {place.name} as a {type(processor).__name__}, not as an "
            "image processor with a tokenizer; check that it knows their processor_class"
        )
    return None


def _own_words(source: Source) -> Any | None:
    """The tokenizer saved with the model; None if there is none."""
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
    """Whether one of the files `names` is at `place`; processor_config.json counts if it has the image processor."""
    for name in names:
        file = place.file(name)
        if file is not None and (name != "processor_config.json" or "image_processor" in read_json(file)):
            return True
    return False


def _unfit(processor: Any, config: Any, words: Any | None) -> str | None:
    """Why `processor` does not match a model of `config` whose own tokenizer is `words`; None if it may."""
    marker = getattr(processor, "image_token_id", None)
    wanted = getattr(config, "image_token_id", None)
    if isinstance(marker, int) and isinstance(wanted, int) and marker != wanted:
        return f"its image token is {marker}, that of the model is {wanted}"
    if words is not None and words.get_vocab() != processor.tokenizer.get_vocab():
        return "its tokenizer has another vocabulary than the one saved with the model"
    return None


def _same_model(a: Source, b: Source) -> bool:
    """Whether two folders have the configuration of the same model, whatever the weights."""
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
    """Everything that determines a processor's tokens and pixels, to compare two processors."""
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
