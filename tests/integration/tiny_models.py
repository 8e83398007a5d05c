"""Tiny random vision-language models of every supported family, and batches with known token roles.

    model = tiny_model("llava")
    batch = tiny_batch(model, "llava", ["ttittt", "tittttitt"], padding="left")
    model(**batch.inputs)

A row is a string: `t` is one text token, `i` is one image with all of the family's tokens for it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import transformers as tf
from torch import Tensor, nn

HIDDEN, LAYERS, VOCAB = 32, 3, 64
PAD, BOS, EOS, IMAGE, VIDEO, VISION_START, VISION_END = 0, 1, 2, 60, 61, 62, 63
FIRST_WORD, LAST_WORD = 3, 50


@dataclass(frozen=True)
class Batch:
    """Inputs of a model and the token roles they were built with; all masks are (B, T) bool."""

    inputs: dict[str, Tensor]
    vision: Tensor
    text_after: Tensor  # after the row's last vision token
    text_all: Tensor  # every token that is neither vision nor padding
    padding: Tensor


@dataclass(frozen=True)
class Family:
    """How to build a tiny model, the tokens of one image, and the image inputs for a number of images per row."""

    build: Callable[[], nn.Module]
    image_tokens: tuple[int, ...]  # token ids of one image, including markers that are not vision tokens
    image_inputs: Callable[[list[int]], dict[str, Tensor]]
    layers: str = "model.language_model.layers"
    norm: str = "model.language_model.norm"


def tiny_model(family: str, *, dtype: torch.dtype = torch.float64, seed: int = 0) -> nn.Module:
    """A random model of `family` in eval mode; all parameters are random, so that no two layers or norms are equal."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = FAMILIES[family].build().eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.dim() == 1:  # norms and biases are initialised to ones and zeros
                    parameter.add_(0.1 * torch.randn_like(parameter))
                elif "embed" not in name:
                    parameter.normal_(std=0.08)
    return model.to(dtype)


def tiny_batch(
    model: nn.Module, family: str, rows: Sequence[str], *, padding: str = "right", pad_to: int = 0, seed: int = 1
) -> Batch:
    """A batch of `rows` for a model of `family`, padded on the left or on the right."""
    spec, generator = FAMILIES[family], torch.Generator().manual_seed(seed)
    sequences = []
    for row in rows:
        tokens: list[int] = []
        for piece in row:
            word = int(torch.randint(FIRST_WORD, LAST_WORD, (), generator=generator))
            tokens.extend(spec.image_tokens if piece == "i" else [word])
        sequences.append(tokens)
    length = max(pad_to, *(len(s) for s in sequences))
    ids = torch.full((len(rows), length), PAD)
    kept = torch.zeros(len(rows), length, dtype=torch.bool)
    for i, tokens in enumerate(sequences):
        start = length - len(tokens) if padding == "left" else 0
        ids[i, start : start + len(tokens)] = torch.tensor(tokens)
        kept[i, start : start + len(tokens)] = True
    vision = (ids == IMAGE) | (ids == VIDEO)
    after = torch.zeros_like(vision)
    for i in range(len(rows)):
        places = vision[i].nonzero()
        if len(places):
            after[i, int(places[-1]) + 1 :] = True
    inputs: dict[str, Tensor] = {"input_ids": ids, "attention_mask": kept.long()}
    images = [row.count("i") for row in rows]
    if sum(images):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            inputs |= spec.image_inputs(images)
    if family in ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_video"):
        inputs["mm_token_type_ids"] = (ids == IMAGE).int() + 2 * (ids == VIDEO).int()
    if family == "instructblip":
        inputs["qformer_input_ids"] = torch.full((max(1, sum(images)), 3), FIRST_WORD)
    dtype = next(model.parameters()).dtype
    inputs = {k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs.items()}
    return Batch(inputs, vision, after & ~vision & kept, ~vision & kept, ~kept)


def decoder_of(model: nn.Module, family: str) -> tuple[nn.ModuleList, nn.Module]:
    """The decoder layers and the final norm by their known names; `capture` must find them without these."""
    spec = FAMILIES[family]
    return model.get_submodule(spec.layers), model.get_submodule(spec.norm)


TEXT = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "pad_token_id": PAD,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "tie_word_embeddings": False,
}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
    "num_channels": 3,
}
MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}


def _pixels(*shape: int) -> Callable[[list[int]], dict[str, Tensor]]:
    """A tensor of `shape` for every image of the batch."""
    return lambda images: {"pixel_values": torch.randn(sum(images), *shape)}


def _llava() -> nn.Module:
    config = tf.LlavaConfig(
        vision_config=tf.CLIPVisionConfig(**VISION),
        text_config=tf.LlamaConfig(**TEXT),
        image_token_id=IMAGE,
        image_token_index=IMAGE,
        tie_word_embeddings=False,
    )
    return tf.LlavaForConditionalGeneration(config)


def _llava_next() -> nn.Module:
    config = tf.LlavaNextConfig(
        vision_config=tf.CLIPVisionConfig(**VISION),
        text_config=tf.MistralConfig(**TEXT),
        image_token_index=IMAGE,
        image_grid_pinpoints=[[8, 8]],
        tie_word_embeddings=False,
    )
    return tf.LlavaNextForConditionalGeneration(config)


def _llava_onevision() -> nn.Module:
    config = tf.LlavaOnevisionConfig(
        vision_config=tf.SiglipVisionConfig(**VISION, vision_use_head=False),
        text_config=tf.Qwen2Config(**TEXT),
        image_token_index=IMAGE,
        video_token_index=VIDEO,
        image_grid_pinpoints=[[8, 8]],
        tie_word_embeddings=False,
    )
    return tf.LlavaOnevisionForConditionalGeneration(config)


def _anyres(images: list[int]) -> dict[str, Tensor]:
    n = sum(images)
    return {
        "pixel_values": torch.randn(n, 2, 3, 8, 8),
        "image_sizes": torch.full((n, 2), 8),
        "batch_num_images": torch.ones(n, dtype=torch.long),
    }


def _anyres_next(images: list[int]) -> dict[str, Tensor]:
    return {k: v for k, v in _anyres(images).items() if k != "batch_num_images"}


def _qwen2_vl() -> nn.Module:
    config = tf.Qwen2VLConfig(
        text_config={**TEXT, "rope_parameters": MROPE, "head_dim": None},
        vision_config={
            "depth": 2, "embed_dim": 16, "hidden_size": HIDDEN, "num_heads": 2, "patch_size": 4, "in_channels": 3,
            "mlp_ratio": 2,
        },
        **_QWEN_TOKENS,
    )  # fmt: skip
    return tf.Qwen2VLForConditionalGeneration(config)


def _qwen2_5_vl() -> nn.Module:
    config = tf.Qwen2_5_VLConfig(
        text_config={**TEXT, "rope_parameters": MROPE, "head_dim": None},
        vision_config={
            "depth": 2, "hidden_size": 16, "out_hidden_size": HIDDEN, "num_heads": 2, "patch_size": 4,
            "in_channels": 3, "intermediate_size": 24, "window_size": 16, "fullatt_block_indexes": [1],
        },
        **_QWEN_TOKENS,
    )  # fmt: skip
    return tf.Qwen2_5_VLForConditionalGeneration(config)


def _qwen3_vl() -> nn.Module:
    config = tf.Qwen3VLConfig(
        text_config={**TEXT, "rope_parameters": MROPE},
        vision_config={
            "depth": 2, "hidden_size": 16, "out_hidden_size": HIDDEN, "num_heads": 2, "patch_size": 4,
            "in_channels": 3, "intermediate_size": 24, "num_position_embeddings": 16,
            "deepstack_visual_indexes": [0, 1],
        },
        **_QWEN_TOKENS,
    )  # fmt: skip
    return tf.Qwen3VLForConditionalGeneration(config)


_QWEN_TOKENS = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vision_start_token_id": VISION_START,
    "vision_end_token_id": VISION_END,
    "tie_word_embeddings": False,
}


def _qwen_image(images: list[int]) -> dict[str, Tensor]:
    n = sum(images)  # 4 x 4 patches per image, merged two by two: 4 tokens
    return {"pixel_values": torch.randn(16 * n, 3 * 2 * 16), "image_grid_thw": torch.tensor([[1, 4, 4]] * n)}


def _qwen_video(videos: list[int]) -> dict[str, Tensor]:
    n = sum(videos)  # one pair of frames per video
    return {"pixel_values_videos": torch.randn(16 * n, 3 * 2 * 16), "video_grid_thw": torch.tensor([[1, 4, 4]] * n)}


def _internvl() -> nn.Module:
    config = tf.InternVLConfig(
        vision_config=tf.InternVLVisionConfig(**{**VISION, "image_size": [16, 16], "patch_size": [4, 4]}),
        text_config=tf.Qwen2Config(**TEXT),
        image_token_id=IMAGE,
        image_seq_length=4,
        tie_word_embeddings=False,
    )
    return tf.InternVLForConditionalGeneration(config)


def _gemma3() -> nn.Module:
    config = tf.Gemma3Config(
        vision_config=tf.SiglipVisionConfig(**VISION, vision_use_head=False),
        text_config=tf.Gemma3TextConfig(**TEXT, query_pre_attn_scalar=16, sliding_window=8),
        image_token_index=IMAGE,
        mm_tokens_per_image=4,
        boi_token_index=VISION_START,
        eoi_token_index=VISION_END,
        tie_word_embeddings=False,
    )
    return tf.Gemma3ForConditionalGeneration(config)


def _paligemma() -> nn.Module:
    config = tf.PaliGemmaConfig(
        vision_config=tf.SiglipVisionConfig(**VISION, vision_use_head=False, projection_dim=HIDDEN),
        text_config=tf.GemmaConfig(**TEXT),
        image_token_index=IMAGE,
        projection_dim=HIDDEN,
        hidden_size=HIDDEN,
        tie_word_embeddings=False,
    )
    return tf.PaliGemmaForConditionalGeneration(config)


def _idefics3(config_class: type, model_class: type) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        config = config_class(
            vision_config={**VISION, "image_size": 16},
            text_config=tf.LlamaConfig(**TEXT),
            image_token_id=IMAGE,
            scale_factor=2,
            pad_token_id=PAD,
            tie_word_embeddings=False,
        )
        return model_class(config)

    return build


def _image_slots(images: list[int]) -> dict[str, Tensor]:
    pixels = torch.randn(len(images), max(images), 3, 16, 16)
    for row, n in enumerate(images):
        pixels[row, n:] = 0  # padding images are all zero
    return {"pixel_values": pixels}


def _mistral3() -> nn.Module:
    config = tf.Mistral3Config(
        vision_config=tf.PixtralVisionConfig(**{**VISION, "image_size": 16}),
        text_config=tf.MistralConfig(**TEXT),
        image_token_index=IMAGE,
        spatial_merge_size=2,
        tie_word_embeddings=False,
    )
    return tf.Mistral3ForConditionalGeneration(config)


def _pixtral() -> nn.Module:
    config = tf.LlavaConfig(
        vision_config=tf.PixtralVisionConfig(**{**VISION, "image_size": 16}),
        text_config=tf.MistralConfig(**TEXT),
        image_token_index=IMAGE,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        tie_word_embeddings=False,
    )
    return tf.LlavaForConditionalGeneration(config)


def _sized(size: int) -> Callable[[list[int]], dict[str, Tensor]]:
    return lambda images: {
        "pixel_values": torch.randn(sum(images), 3, size, size),
        "image_sizes": torch.full((sum(images), 2), size),
    }


def _blip(prefix: str) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        config_class = getattr(tf, f"{prefix}Config")
        config = config_class(
            vision_config={k: v for k, v in VISION.items() if k != "num_channels"},
            qformer_config={
                "vocab_size": VOCAB, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
                "intermediate_size": 24, "encoder_hidden_size": 16,
            },
            text_config=tf.OPTConfig(
                vocab_size=VOCAB, hidden_size=HIDDEN, num_hidden_layers=LAYERS, ffn_dim=48, num_attention_heads=2,
                word_embed_proj_dim=HIDDEN, max_position_embeddings=256, dropout=0.0, pad_token_id=PAD,
                bos_token_id=BOS, eos_token_id=EOS,
            ),
            num_query_tokens=4,
            image_token_index=IMAGE,
        )  # fmt: skip
        return getattr(tf, f"{prefix}ForConditionalGeneration")(config)

    return build


_BLIP_NAMES = {"layers": "language_model.model.decoder.layers", "norm": "language_model.model.decoder.final_layer_norm"}
_IDEFICS_NAMES = {"layers": "model.text_model.layers", "norm": "model.text_model.norm"}
_FOUR = (IMAGE,) * 4
_QWEN_IMAGE = (VISION_START, *_FOUR, VISION_END)

FAMILIES: dict[str, Family] = {
    "llava": Family(_llava, _FOUR, _pixels(3, 8, 8)),
    "llava_next": Family(_llava_next, (IMAGE,) * 10, _anyres_next),  # 4 for the overview, 2 x (2 and a newline)
    "llava_onevision": Family(_llava_onevision, (IMAGE,) * 10, _anyres),
    "qwen2_vl": Family(_qwen2_vl, _QWEN_IMAGE, _qwen_image),
    "qwen2_5_vl": Family(_qwen2_5_vl, _QWEN_IMAGE, _qwen_image),
    "qwen3_vl": Family(_qwen3_vl, _QWEN_IMAGE, _qwen_image),
    "qwen3_vl_video": Family(_qwen3_vl, (VISION_START, *(VIDEO,) * 4, VISION_END), _qwen_video),
    "internvl": Family(_internvl, _FOUR, _pixels(3, 16, 16)),
    "gemma3": Family(_gemma3, _QWEN_IMAGE, _pixels(3, 8, 8)),
    "paligemma": Family(_paligemma, _FOUR, _pixels(3, 8, 8)),
    "idefics3": Family(
        _idefics3(tf.Idefics3Config, tf.Idefics3ForConditionalGeneration), _QWEN_IMAGE, _image_slots, **_IDEFICS_NAMES
    ),
    "smolvlm": Family(
        _idefics3(tf.SmolVLMConfig, tf.SmolVLMForConditionalGeneration), _QWEN_IMAGE, _image_slots, **_IDEFICS_NAMES
    ),
    "mistral3": Family(_mistral3, (IMAGE, IMAGE, VISION_START, IMAGE, IMAGE, VISION_END), _sized(16)),
    "pixtral": Family(_pixtral, (*_FOUR, *_FOUR, VISION_START, *_FOUR, *_FOUR, VISION_END), _sized(16)),
    "blip_2": Family(_blip("Blip2"), _FOUR, _pixels(3, 8, 8), **_BLIP_NAMES),
    "instructblip": Family(_blip("InstructBlip"), _FOUR, _pixels(3, 8, 8), **_BLIP_NAMES),
}
