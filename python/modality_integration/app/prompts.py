"""Prompts of an image followed by prose: chat templates, a plain one, and that of the published code."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image

from modality_integration.app.errors import InputError
from modality_integration.app.options import Template

# As in the published code: LLaVA's conversation vicuna_v1, with the prose as the answer.
PUBLISHED = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions. USER: {image}\n ASSISTANT: {prose}{end}"
)

_NO_WAY = "and no other template works; pass a processor that has one with --processor"

# Image placeholders of plain prompts that are not `processor.image_token`, by the processor's class.
_PLAIN_MARKERS = {
    "Qwen": "<|vision_start|><|image_pad|><|vision_end|>",
    "Blip2": "",  # these two prepend the image tokens themselves
    "InstructBlip": "",
}


def encode(processor: Any, image: Image.Image, text: str, template: Template = "auto") -> dict[str, torch.Tensor]:
    """The model's inputs for one image followed by `text`: a batch of one, on the CPU."""
    whole = prompt(processor, text, template)
    arguments: dict[str, Any] = {"images": [image], "text": [whole], "return_tensors": "pt"}
    start = getattr(processor.tokenizer, "bos_token", None)
    if start and whole.startswith(start):
        arguments["add_special_tokens"] = False  # the chat template has already added it
    inputs = dict(processor(**arguments))
    inputs.pop("labels", None)  # PaliGemma's processor adds them, and a loss would need the logits of every token
    return inputs


def prompt(processor: Any, text: str, template: Template) -> str:
    """The image placeholder and `text` in a template. NoPrompt if the processor cannot support it."""
    marker = str(getattr(processor, "image_token", "") or "")
    if marker:
        text = text.replace(marker, " ")  # a placeholder in the prose would stand for a second image
    has_chat, plain = bool(getattr(processor, "chat_template", None)), _plain_marker(processor)
    if template == "chat" and not has_chat:
        raise NoPrompt("the processor has no chat template", "" if plain is None else "--template plain")
    if template == "chat" or (template == "auto" and has_chat):
        return _chat_prompt(processor, text, "" if plain is None else "--template plain")
    if plain is None:
        way = "--protocol random --template chat" if template == "published" else "--template chat"
        kind = type(processor).__name__
        raise NoPrompt(f"{kind} names no image token for a plain prompt", way if has_chat else "")
    if template == "published":
        return PUBLISHED.format(image=plain, prose=text, end=processor.tokenizer.eos_token or "")
    return f"{plain}\n{text}"


class NoPrompt(InputError):
    """A processor cannot produce a template's prompt: the reason, and options that work instead, "" if none."""

    def __init__(self, reason: str, instead: str) -> None:
        super().__init__(f"template: {reason}, " + (f"use {instead}" if instead else _NO_WAY))
        self.reason = reason


def check(processor: Any, templates: Sequence[Template]) -> None:
    """InputError unless the processor supports each of `templates`; several belong to a study, which needs all."""
    for template in templates:
        try:
            prompt(processor, "", template)
        except NoPrompt as error:
            if len(templates) == 1:
                raise
            raise InputError(
                f"study: template compares the prompts {' and '.join(templates)} and needs a processor for both; "
                f"{error.reason}"
            ) from error


def truncate(text: str, tokenizer: Any, tokens: int | None) -> str:
    """The first `tokens` tokens of `text`, None for all; an exact slice of it if the tokenizer reports offsets."""
    if tokens is None:
        return text
    text = text[: 100 * tokens]  # tokenizers process the whole string before truncating
    if getattr(tokenizer, "is_fast", False):
        encoded = tokenizer(
            text, add_special_tokens=False, truncation=True, max_length=tokens, return_offsets_mapping=True
        )
        offsets = encoded["offset_mapping"]
        return text[: offsets[-1][1]] if offsets else ""
    ids = tokenizer(text, add_special_tokens=False, truncation=True, max_length=tokens)["input_ids"]
    return tokenizer.decode(ids)


def _plain_marker(processor: Any) -> str | None:
    """The image placeholder of a plain prompt; None if the processor does not define one."""
    kind = type(processor).__name__
    known = next((value for name, value in _PLAIN_MARKERS.items() if kind.startswith(name)), None)
    return str(getattr(processor, "image_token", "") or "") or None if known is None else known


def _chat_prompt(processor: Any, text: str, instead: str) -> str:
    from jinja2 import TemplateError

    content = [{"type": "image"}, {"type": "text", "text": text}]
    try:
        whole = processor.apply_chat_template([{"role": "user", "content": content}], tokenize=False)
        bare = processor.apply_chat_template([{"role": "user", "content": content[1:]}], tokenize=False)
    except (TemplateError, TypeError) as error:  # a text-only template concatenates strings with the list above
        raise NoPrompt(f"the chat template does not accept an image with text ({error})", instead) from error
    if whole == bare or str(content[0]) in whole:  # a text-only template drops the image or prints the list
        raise NoPrompt("the chat template adds no image token to the text", instead)
    return whole
