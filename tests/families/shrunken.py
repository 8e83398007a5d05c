"""Tiny random models of any family that transformers maps to image-text-to-text, from its default configuration.

    model = tiny_model("aya_vision")

Sizes are shrunk by name, placeholder ids are set to those of `sizes.py`, and OVERRIDES holds further changes per
family. None of it depends on the library: the families are those that transformers defines.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as IMAGE_TEXT_TO_TEXT
from transformers.models.auto.modeling_auto import MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES as MULTIMODAL

from families.overrides import OVERRIDES, PARTS
from families.sizes import AUDIO, BOS, EOS, FIRST_MARK, IMAGE, LAYERS, PAD, PATCH, SIDE, VIDEO, VOCAB

# Phi-4-multimodal also accepts images, but is only in the mapping of multimodal models.
MODELS = {**IMAGE_TEXT_TO_TEXT, **{name: MULTIMODAL[name] for name in ("phi4_multimodal",) if name in MULTIMODAL}}
FAMILIES = tuple(sorted(MODELS))

SMALL = {
    **dict.fromkeys(
        ("hidden_size", "d_model", "embed_dim", "n_embd", "dim", "projection_dim", "out_hidden_size", "in_hidden_size",
         "encoder_hidden_size", "word_embed_proj_dim", "text_hidden_size", "projector_hidden_size"), 32),
    **dict.fromkeys(
        ("intermediate_size", "ffn_dim", "intermediate_size_mlp", "encoder_ffn_dim", "decoder_ffn_dim"), 48),
    **dict.fromkeys(
        ("moe_intermediate_size", "shared_expert_intermediate_size", "head_dim", "global_head_dim", "v_head_dim",
         "linear_key_head_dim", "linear_value_head_dim"), 16),
    **dict.fromkeys(
        ("hidden_size_per_layer_input", "q_lora_rank", "kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim"), 8),
    **dict.fromkeys(("num_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(
        ("depth", "num_attention_heads", "n_head", "num_heads", "num_blocks", "attention_heads", "num_key_value_heads",
         "encoder_attention_heads", "decoder_attention_heads", "num_global_key_value_heads", "num_local_experts",
         "num_experts_per_tok", "linear_num_value_heads", "linear_num_key_heads"), 2),
    **dict.fromkeys(
        ("num_hidden_layers", "n_layer", "num_layers", "layers", "encoder_layers", "decoder_layers"), LAYERS),
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), VOCAB),
    "max_position_embeddings": 256,
    "image_size": SIDE,
    "patch_size": PATCH,
}  # fmt: skip
# Lists with one entry per layer of the default; the configuration then builds short ones.
PER_LAYER = {"layer_types", "mlp_layer_types", "no_rope_layers", "moe_layers", "mlp_only_layers", "per_layer_config"}
NOT_PARTS = {"transformers_version", "architectures", "_name_or_path", "dtype", "id2label", "label2id"}
TOKENS = {"image": IMAGE, "video": VIDEO, "audio": AUDIO}
SPECIAL = {"pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS}


def tiny_model(family: str, *, seed: int = 0) -> nn.Module:
    """A random model of `family` in eval mode, float32, with different weights in every layer."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = getattr(transformers, MODELS[family])(tiny_config(family)).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                _draw(parameter)
    return model


def _draw(parameter: Tensor) -> None:
    unset = not parameter.abs().max() < 100  # or NaN: some modules leave their memory uninitialised
    if parameter.dim() == 1 and not unset:  # norms and biases start as ones and zeros
        parameter.add_(0.1 * torch.randn_like(parameter))
    elif unset or not parameter.std() > 0.05:  # so small that the image would be rounded away
        parameter.normal_(std=0.1)


def tiny_config(family: str) -> Any:
    """The default configuration of `family` with small sizes."""
    config_class = getattr(transformers, CONFIG_MAPPING_NAMES[family])
    values = config_class().to_dict()
    values |= {part: getattr(transformers, name)().to_dict() for part, name in PARTS.get(family, {}).items()}
    values = shrunken(values, _marks())
    _update(values, OVERRIDES.get(family, {}))
    values.pop("model_type", None)
    config = config_class(**values)
    if family in TOWERS:
        object.__setattr__(config, "vision_config", TOWERS[family](config.vision_config))  # bypasses a class check
    return config


def shrunken(values: Mapping[str, Any], marks: Iterator[int]) -> dict[str, Any]:
    """The configuration's dictionary with small sizes and ids below VOCAB, including nested configurations."""
    small: dict[str, Any] = {}
    for name, value in values.items():
        number = isinstance(value, int) and not isinstance(value, bool)
        if name in PER_LAYER or name in NOT_PARTS:
            continue
        if isinstance(value, dict):
            small[name] = shrunken(value, marks)
        elif name in SMALL and number:
            small[name] = SMALL[name]
        elif name in SPECIAL:
            small[name] = SPECIAL[name]
        elif str(name).endswith(("_token_id", "_token_index")) and number:
            kind, _, rest = str(name).partition("_")
            small[name] = TOKENS[kind] if kind in TOKENS and rest.startswith("token_") else next(marks)
        elif name == "mrope_section":
            small[name] = [2, 3, 3]
        else:
            small[name] = value
    return small


def _marks() -> Iterator[int]:
    """Distinct ids for begin and end marks."""
    yield from range(FIRST_MARK, VOCAB)


def _update(values: dict[str, Any], changes: Mapping[str, Any]) -> None:
    for name, change in changes.items():
        if isinstance(change, dict) and isinstance(values.get(name), dict):
            _update(values[name], change)
        else:
            values[name] = change


def _siglip(default: Any) -> Any:
    tower = transformers.SiglipVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, image_size=SIDE,
        patch_size=PATCH, vision_use_head=False,
    )  # fmt: skip
    tower.model_args = {"embed_dim": 32}
    for name in ("vocab_offset", "vocab_size", "rms_norm_eps"):  # Gemma 3n embeds image tokens with these
        setattr(tower, name, getattr(default, name, None))
    return tower


def _resnet(default: Any) -> Any:
    tower = transformers.ResNetConfig(embedding_size=32, hidden_sizes=[32], depths=[1], layer_type="basic")
    tower.hidden_size = 32
    return tower


# Families whose vision tower is from timm. A tower from transformers needs no further package and returns features of
# the same form, patches or a map.
TOWERS = {"fast_vlm": _resnet, "gemma3n": _siglip, "perception_lm": _siglip}
