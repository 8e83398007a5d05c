"""Load a vision-language model and its processor from a folder or a hub name."""

from __future__ import annotations

import contextlib
import logging
import time
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.markup import escape

from modality_integration.app import adapters, hub, processors, prompts
from modality_integration.app.errors import InputError
from modality_integration.app.hub import Source
from modality_integration.app.model_files import CONFIG, in_one_line, keys, raw_config, reading
from modality_integration.app.options import Dtype, ModelOptions, Template
from modality_integration.app.packages import EXTRAS, pip_install
from modality_integration.models.moca import moca_parameters
from modality_integration.models.moca_files import FILE, KEY, load_moca

logger = logging.getLogger(__name__)

DTYPES = {
    "auto": "auto",
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Inside, transformers reports only errors and shows no progress bars."""
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
    """A model in eval mode, its processor, and notes on anything unusual in the files."""

    model: torch.nn.Module
    processor: Any
    notes: list[str]


def load(
    name: str,
    device: torch.device,
    dtype: Dtype = "auto",
    *,
    device_map: str | None = None,
    template: Template | tuple[Template, ...] = "auto",
    processor: str | None = None,
    revision: str | None = None,
) -> Loaded:
    """Load `name`, a folder or a hub name, onto `device` or spread by transformers' `device_map`.

    A folder needs no network. dtype: "auto" (as saved), "float32", "bfloat16", "float16" or "float64". template: one or
    several templates of the prompts to come, checked against the processor before the weights are read. processor:
    folder or hub name of the processor, if not the one next to the model. revision: of the model's hub name, or of the
    processor's if the model is a folder. MoCa weights are loaded into the model, and an adapter (LoRA) is merged into
    its base model.
    Raises InputError if there is no such model, it does not accept images and text, a package is missing, or the files
    lack weights of the model, which would otherwise be measured with random values.
    """
    from transformers import AutoConfig

    of_model, of_processor = _revisions(name, processor, revision)
    source = hub.find("model", name, of_model)
    notes = [source.note] if source.note else []
    with quiet(), _said(source):
        adapter = adapters.find(source)
        base = source if adapter is None else adapter.base
        source = source if adapter is None else source._replace(folder=adapter.folder)
        if base.note and base.note not in notes:
            notes.append(base.note)
        raw = raw_config(base)
        with reading(base.name):
            config = AutoConfig.from_pretrained(base.where, **base.arguments)
        recorded = processors.trained_from(source, raw, adapter.trained_on if adapter else "")
        own_processor, from_where = processors.find(source, config, processor, of_processor, recorded)
        prompts.check(own_processor, (template,) if isinstance(template, str) else template)
        with adapters.weights_alone(adapter, source) as place:
            model, of_weights = _model(place, device, DTYPES[dtype], device_map)
        notes += [*from_where, *of_weights]
        if adapter is not None:
            model, of_adapter = adapters.merge(model, adapter)
            notes += of_adapter
    return Loaded(model.eval(), own_processor, notes)


def load_chosen(
    options: ModelOptions, template: Template | tuple[Template, ...], device: torch.device, console: Console
) -> Loaded:
    """Load the model of `options`, with a status line. template: one or several templates of the prompts to come."""
    began = time.monotonic()
    with console.status(f"loading {escape(options.model)}"):
        loaded = load(
            options.model,
            device,
            options.dtype,
            device_map=options.device_map,
            template=template,
            processor=options.processor,
            revision=options.revision,
        )
    first = next(loaded.model.parameters())
    logger.info(
        "loaded %s (%s, %.1f M parameters, %s, on %s) and its %s in %.1f s",
        options.model,
        type(loaded.model).__name__,
        sum(parameter.numel() for parameter in loaded.model.parameters()) / 1e6,
        str(first.dtype).removeprefix("torch."),
        first.device if options.device_map is None else f"devices of device map {options.device_map}",
        type(loaded.processor).__name__,
        time.monotonic() - began,
    )
    return loaded


def processor_names(processor: Any) -> dict[str, str]:
    """Class names of `processor` and its image processor, whose pixels differ with and without torchvision."""
    return {"processor": type(processor).__name__, "image_processor": type(processor.image_processor).__name__}


def _revisions(name: str, processor: str | None, revision: str | None) -> tuple[str | None, str | None]:
    """Revisions of the model and processor: `revision` belongs to the model's hub name, else to the processor's."""
    if revision is None:
        return None, None
    if not Path(name).exists():
        return revision, revision if processor == name else None
    if processor is not None and not Path(processor).exists():
        return None, revision
    raise InputError(f"revision: applies only to a hub name, but {name} is a local folder")


def _model(
    place: Source, device: torch.device, dtype: Any, device_map: str | None
) -> tuple[torch.nn.Module, list[str]]:
    """The model at `place`, with any MoCa in or next to its weights; notes on anything unusual in the files."""
    from transformers import AutoModelForImageTextToText

    with reading(place.name):
        loaded: Any = AutoModelForImageTextToText.from_pretrained(
            place.where, dtype=dtype, device_map=device_map, output_loading_info=True, **place.arguments
        )
    model, info = loaded
    if info["missing_keys"]:
        raise InputError(
            f"model: the files of {place.name} lack {keys(info['missing_keys'])}; with random values in their place "
            f"MIR would be meaningless{_instead(info['unexpected_keys'])}"
        )
    if device_map is None:
        model.to(device)
    notes = []
    moca = [key for key in info["unexpected_keys"] if KEY.search(key)]
    if moca or place.file(FILE):  # among the weights, or next to them as written by save_moca
        config = place.file(CONFIG)
        assert config is not None  # it was read before the weights
        load_moca(model, config.parent)
        notes.append(f"using MoCa from {place.name} in {len(moca_parameters(model)) // 2} decoder layers")
    if unused := set(info["unexpected_keys"]) - set(moca):
        notes.append(f"the model's files contain {keys(unused)} that the model does not have; ignored")
    return model, notes


@contextlib.contextmanager
def _said(source: Source) -> Iterator[None]:
    """Turn errors of transformers raised inside into a one-line InputError."""
    name = source.name
    try:
        yield
    except InputError:
        raise
    except ImportError as error:
        package = next((p for p in EXTRAS["processors"] if p in str(error).lower()), None)
        if package is None:
            raise InputError(f"model: {name} cannot be loaded: {in_one_line(error)}") from error
        raise InputError(f"model: the processor of {name} needs {package}: {_brings(package)}") from error
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise InputError(
            f"model: out of memory while loading {name}; load smaller weights with --dtype bfloat16, spread them "
            "with --device-map auto, or use --device cpu"
        ) from error
    except (OSError, ValueError, RuntimeError) as error:
        if "nms does not exist" in str(error):
            said = f"{name} needs torchvision, which does not load: {_brings('torchvision')}"
            raise InputError(f"model: {said}") from error
        first = in_one_line(error)
        if "ignore_mismatched_sizes" in first:
            first = "the shapes of the weights in its files do not match its config.json"
        raise InputError(f"model: {name} cannot be loaded: {first}") from error


def _brings(package: str) -> str:
    line = pip_install(package)
    return f"{line} (built for the installed torch)" if package == "torchvision" else line


def _instead(unexpected: Iterable[str]) -> str:
    return f"; the files have {keys(unexpected)} instead, perhaps renamed" if unexpected else ""
