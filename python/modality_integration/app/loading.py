"""A vision-language model and its processor, from a folder or a hub name."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from safetensors import SafetensorError

from modality_integration.app.errors import InputError
from modality_integration.app.options import Dtype, ModelOptions, Template
from modality_integration.app.prompts import prompt
from modality_integration.models.moca import moca_parameters
from modality_integration.models.moca_files import FILE, KEY, load_moca

DTYPES = {
    "auto": "auto",
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}

# Of the processors of Qwen-VL, InternVL, LLaVA-OneVision, Pixtral and SmolVLM; the extra that brings them.
PROCESSOR_PACKAGES = {"torchvision": "torchvision", "num2words": "num2words"}
PROCESSOR_EXTRA = 'pip install "mir-kernels[processors]" (a torchvision that was built for another torch does not load)'


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """transformers and its progress bars say nothing but errors inside."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


class Loaded(NamedTuple):
    """A model in eval mode, its processor, and sentences on what was not ordinary in the files."""

    model: torch.nn.Module
    processor: Any
    notes: list[str]


def load(
    name: str,
    device: torch.device,
    dtype: Dtype = "auto",
    *,
    device_map: str | None = None,
    template: Template = "auto",
) -> Loaded:
    """`name`, a folder or a hub name, on `device`, or spread by transformers' `device_map`; a folder needs no network.

    dtype: "auto" (as saved), "float32", "bfloat16", "float16" or "float64". template: of the prompts to come, refused
    before the weights are read if the processor has none. MoCa in the weights is put into the model.
    Raises InputError if there is no such model, it does not take images and text, a package is missing, or the files
    lack weights that the model has: their random stand-ins would be measured in silence.
    """
    from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as TAKES_IMAGES

    if looks_like_path(name) and not Path(name).exists():
        raise InputError(f"model: {name} does not exist")
    local = Path(name).exists()
    with quiet(), _said(name, local):
        config = AutoConfig.from_pretrained(name, local_files_only=local)
        if config.model_type not in TAKES_IMAGES:
            raise InputError(
                f"model: {name} is a {config.model_type!r}, which takes no images beside text; "
                "MIR compares the vision and the text tokens of one decoder"
            )
        processor = AutoProcessor.from_pretrained(name, local_files_only=local)
        if not hasattr(processor, "image_processor"):
            raise InputError(
                f"model: {name} has a tokenizer but no image processor: save its processor there with "
                "processor.save_pretrained(folder)"
            )
        prompt(processor, "", template)
        loaded: Any = AutoModelForImageTextToText.from_pretrained(
            name, dtype=DTYPES[dtype], device_map=device_map, local_files_only=local, output_loading_info=True
        )
        model, info = loaded
        if info["missing_keys"]:
            raise InputError(
                f"model: the files of {name} lack {_keys(info['missing_keys'])}; with random numbers in their place "
                f"MIR would mean nothing{_instead(info['unexpected_keys'])}"
            )
        if device_map is None:
            model.to(device)
        moca = [key for key in info["unexpected_keys"] if KEY.search(key)]
        notes = []
        if moca or (local and (Path(name) / FILE).exists()):  # among the weights, or beside them as save_moca writes it
            load_moca(model, _folder(name))
            notes.append(f"with the MoCa that {name} holds, in {len(moca_parameters(model)) // 2} decoder layers")
    if unused := set(info["unexpected_keys"]) - set(moca):
        notes.append(f"the model has no place for {_keys(unused)} in its files, which are not used")
    return Loaded(model.eval(), processor, notes)


def load_chosen(options: ModelOptions, template: Template, device: torch.device, console: Console) -> Loaded:
    """The model that `options` name, with a word on the way. template: of the prompts to come."""
    with console.status(f"loading {options.model}"):
        return load(options.model, device, options.dtype, device_map=options.device_map, template=template)


def looks_like_path(name: str) -> bool:
    """Whether `name` can only be meant as a folder: a hub name is `name` or `owner/name`."""
    return name.startswith((".", "/", "~")) or name.count("/") > 1 or (os.sep != "/" and os.sep in name)


@contextlib.contextmanager
def _said(name: str, local: bool) -> Iterator[None]:
    """What transformers raises inside, as an InputError of one line."""
    try:
        yield
    except InputError:
        raise
    except ImportError as error:
        package = next((p for p in PROCESSOR_PACKAGES if p in str(error).lower()), None)
        if package is None:
            raise InputError(f"model: {name} cannot be loaded: {_first_line(error)}") from error
        raise InputError(f"model: the processor of {name} needs {package}: {PROCESSOR_EXTRA}") from error
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise InputError(
            f"model: out of memory while loading {name}: load the weights smaller with --dtype bfloat16, spread them "
            "with --device-map auto, or use --device cpu"
        ) from error
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        if "nms does not exist" in str(error):
            raise InputError(f"model: torchvision, which {name} needs, does not load: {PROCESSOR_EXTRA}") from error
        raise InputError(f"model: {_why_not(name, local, error)}") from error


def _keys(keys: Iterable[str], most: int = 3) -> str:
    first = sorted(keys)
    more = f" and {len(first) - most} more" if len(first) > most else ""
    return f"{len(first)} weight{'s' * (len(first) > 1)} ({', '.join(first[:most])}{more})"


def _instead(unexpected: Iterable[str]) -> str:
    return f"; they have {_keys(unexpected)} instead: were they renamed?" if unexpected else ""


def _folder(name: str) -> Path:
    """Where the files of `name` are: the folder itself, or the hub's cache."""
    if Path(name).exists():
        return Path(name)
    from transformers.utils.hub import cached_file

    return Path(str(cached_file(name, "config.json"))).parent


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def _why_not(name: str, local: bool, error: Exception) -> str:
    first = _first_line(error)
    if "ignore_mismatched_sizes" in first:
        first = "weights in its files have other shapes than its config.json says"
    if local:
        return f"{name} cannot be loaded: {first}"
    return (
        f"{name} is no folder here, and as a hub name it cannot be loaded: {first} "
        "(offline, give the folder that the model was saved in)"
    )
