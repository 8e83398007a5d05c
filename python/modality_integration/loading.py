"""A vision-language model and its processor from a folder or a hub name, and the prompt of an image before prose."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from safetensors import SafetensorError

from modality_integration.data import InputError
from modality_integration.moca import FILE, KEY, load_moca, moca_parameters

DTYPES = {
    "auto": "auto",
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}
TEMPLATES = ("auto", "chat", "plain", "published")
# The published code's: LLaVA's conversation vicuna_v1, with prose as the answer.
PUBLISHED = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions. USER: {image}\n ASSISTANT: {prose}{end}"
)

# Of the processors of Qwen-VL, InternVL, LLaVA-OneVision, Pixtral and SmolVLM; the extra that brings them.
PROCESSOR_PACKAGES = {"torchvision": "torchvision", "num2words": "num2words"}
PROCESSOR_EXTRA = 'pip install "mir-kernels[processors]" (a torchvision that was built for another torch does not load)'

# What stands for the image in a plain prompt where it is not simply `processor.image_token`, by the processor's class.
_PLAIN_MARKERS = {
    "Qwen": "<|vision_start|><|image_pad|><|vision_end|>",
    "Blip2": "",  # these two put the image tokens first themselves
    "InstructBlip": "",
}


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
    name: str, device: torch.device, dtype: str = "auto", *, device_map: str | None = None, template: str = "auto"
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
        _prompt(processor, "", template)
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


def encode(processor: Any, image: Image.Image, text: str, template: str = "auto") -> dict[str, torch.Tensor]:
    """The model's inputs for one image followed by `text`, a batch of one on the CPU."""
    prompt = _prompt(processor, text, template)
    arguments: dict[str, Any] = {"images": [image], "text": [prompt], "return_tensors": "pt"}
    start = getattr(processor.tokenizer, "bos_token", None)
    if start and prompt.startswith(start):
        arguments["add_special_tokens"] = False  # the chat template has put it there
    inputs = dict(processor(**arguments))
    inputs.pop("labels", None)  # PaliGemma's has some, and the loss would want every token's logits
    return inputs


def looks_like_path(name: str) -> bool:
    """Whether `name` can only be meant as a folder: a hub name is `name` or `owner/name`."""
    return name.startswith((".", "/", "~")) or name.count("/") > 1 or (os.sep != "/" and os.sep in name)


def pick_device(name: str) -> torch.device:
    """ "auto" is CUDA, else Apple's MPS, else the CPU; under torchrun each process takes the GPU of its local rank."""
    if name == "auto" and not torch.cuda.is_available():
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    if name in ("auto", "cuda") and torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"device: {name!r} cannot be used here: {str(error).splitlines()[0]}") from error
    return device


def _prompt(processor: Any, text: str, template: str) -> str:
    marker = str(getattr(processor, "image_token", "") or "")
    if marker:
        text = text.replace(marker, " ")  # prose that names the marker would promise a second image
    has_chat = bool(getattr(processor, "chat_template", None))
    if template == "chat" and not has_chat:
        raise InputError("template: the processor has no chat template, use --template plain")
    if template == "chat" or (template == "auto" and has_chat):
        return _chat_prompt(processor, text)
    kind = type(processor).__name__
    plain = next((value for name, value in _PLAIN_MARKERS.items() if kind.startswith(name)), marker)
    if not plain and not kind.startswith(tuple(_PLAIN_MARKERS)):
        raise InputError(f"template: {kind} names no image token to write a prompt with, use --template chat")
    if template == "published":
        return PUBLISHED.format(image=plain, prose=text, end=processor.tokenizer.eos_token or "")
    return f"{plain}\n{text}"


def _chat_prompt(processor: Any, text: str) -> str:
    from jinja2 import TemplateError

    content = [{"type": "image"}, {"type": "text", "text": text}]
    try:
        return processor.apply_chat_template([{"role": "user", "content": content}], tokenize=False)
    except (TemplateError, TypeError) as error:  # a template for text alone adds strings to the list above
        raise InputError(
            f"template: the chat template does not take an image beside text ({error}), use --template plain"
        ) from error


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
