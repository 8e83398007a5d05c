"""A vision-language model and its processor from a folder or a hub name, and the prompt of an image before prose."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from modality_integration.data import InputError

DTYPES = {
    "auto": "auto",
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}
TEMPLATES = ("auto", "chat", "plain")

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


def load(name: str, device: torch.device, dtype: str = "auto") -> tuple[torch.nn.Module, Any]:
    """Model (in eval mode, on `device`) and processor of `name`, a folder or a hub name; a folder needs no network.

    dtype: "auto" (as saved), "float32", "bfloat16", "float16" or "float64". Raises InputError if there is no such model
    or it does not take images and text.
    """
    from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as TAKES_IMAGES

    if looks_like_path(name) and not Path(name).exists():
        raise InputError(f"model: {name} does not exist")
    local = Path(name).exists()
    with quiet():
        try:
            config = AutoConfig.from_pretrained(name, local_files_only=local)
        except (OSError, ValueError) as error:
            raise InputError(f"model: {_why_not(name, local, error)}") from error
        if config.model_type not in TAKES_IMAGES:
            raise InputError(
                f"model: {name} is a {config.model_type!r}, which takes no images beside text; "
                "MIR compares the vision and the text tokens of one decoder"
            )
        try:
            processor = AutoProcessor.from_pretrained(name, local_files_only=local)
            if not hasattr(processor, "image_processor"):
                raise InputError(
                    f"model: {name} has a tokenizer but no image processor: save its processor there with "
                    "processor.save_pretrained(folder)"
                )
            model: Any = AutoModelForImageTextToText.from_pretrained(name, dtype=DTYPES[dtype], local_files_only=local)
        except InputError:
            raise
        except (OSError, ValueError) as error:
            raise InputError(f"model: {_why_not(name, local, error)}") from error
    return model.to(device).eval(), processor


def encode(processor: Any, image: Image.Image, text: str, template: str = "auto") -> dict[str, torch.Tensor]:
    """The model's inputs for one image followed by `text`, a batch of one on the CPU."""
    prompt = _prompt(processor, text, template)
    arguments: dict[str, Any] = {"images": [image], "text": [prompt], "return_tensors": "pt"}
    start = getattr(processor.tokenizer, "bos_token", None)
    if start and prompt.startswith(start):
        arguments["add_special_tokens"] = False  # the chat template has put it there
    return dict(processor(**arguments))


def looks_like_path(name: str) -> bool:
    """Whether `name` can only be meant as a folder: a hub name is `name` or `owner/name`."""
    return name.startswith((".", "/", "~")) or name.count("/") > 1 or (os.sep != "/" and os.sep in name)


def pick_device(name: str) -> torch.device:
    """ "auto" is CUDA, else Apple's MPS, else the CPU; under torchrun each process takes the GPU of its local rank."""
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
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
        raise InputError(f"template: {kind} names no image token to write a plain prompt with, use --template chat")
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


def _why_not(name: str, local: bool, error: Exception) -> str:
    first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    if local:
        return f"{name} cannot be loaded: {first}"
    return (
        f"{name} is no folder here, and as a hub name it cannot be loaded: {first} "
        "(offline, give the folder that the model was saved in)"
    )
