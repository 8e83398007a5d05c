"""Tiny models, images and texts saved to folders, offline, as inputs for `mir compute` and `mir demo`."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image

WORDS = ["the", "a", "cat", "dog", "house", "sits", "runs", "on", "under", "and", "to", "river", "mountain"]


def tiny_tokenizer():
    """A word-level tokenizer built in memory, with a fallback to characters so that any text has tokens."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    characters = [chr(c) for c in range(33, 127)]
    pieces = ["<pad>", "<unk>", "<s>", "</s>", "<image>", *WORDS, *characters, *("##" + c for c in characters)]
    vocabulary = {piece: index for index, piece in enumerate(dict.fromkeys(pieces))}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="<unk>", max_input_chars_per_word=200))
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=["<image>"],
    )


QWEN_MARKERS = {
    "vision_start_token": "<|vision_start|>",
    "vision_end_token": "<|vision_end|>",
    "image_token": "<|image_pad|>",
    "video_token": "<|video_pad|>",
}


def marked_tokenizer(**markers: str):
    """The tiny tokenizer with more special tokens; those whose names do not start with _ become its attributes."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": list(markers.values())})
    for name, token in markers.items():
        if not name.startswith("_"):
            setattr(tokenizer, name, token)
            setattr(tokenizer, f"{name}_id", tokenizer.convert_tokens_to_ids(token))
    return tokenizer


def tiny_processor(family: str):
    """A transformers processor of `family`, for the image size of the model in `tiny_models`."""
    import transformers as tf

    square = {"size": {"height": 8, "width": 8}}
    patches = {"patch_size": 4, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    tiles = {"size": {"longest_edge": 32}, "max_image_size": {"longest_edge": 16}}
    if family == "llava":
        crop = {"size": {"shortest_edge": 8}, "crop_size": square["size"]}
        return tf.LlavaProcessor(tf.CLIPImageProcessor(**crop), tiny_tokenizer(), **patches)
    if family == "llava_next":
        crop = {"size": {"shortest_edge": 8}, "crop_size": square["size"], "image_grid_pinpoints": [[8, 8]]}
        return tf.LlavaNextProcessor(tf.LlavaNextImageProcessor(**crop), tiny_tokenizer(), **patches)
    if family == "gemma3":
        markers = {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"}
        return tf.Gemma3Processor(tf.Gemma3ImageProcessor(**square), marked_tokenizer(**markers), image_seq_length=4)
    if family == "paligemma":
        images = tf.SiglipImageProcessor(**square)
        images.image_seq_length = 4
        return tf.PaliGemmaProcessor(images, tiny_tokenizer())
    if family == "idefics3":
        markers = {"_a": "<fake_token_around_image>", "_b": "<end_of_utterance>", "_c": "<global-img>"}
        return tf.Idefics3Processor(tf.Idefics3ImageProcessor(**tiles), marked_tokenizer(**markers), image_seq_len=4)
    if family == "blip_2":
        return tf.Blip2Processor(tf.BlipImageProcessor(**square), tiny_tokenizer(), num_query_tokens=4)
    if family == "instructblip":
        images = tf.BlipImageProcessor(**square)
        return tf.InstructBlipProcessor(images, tiny_tokenizer(), tiny_tokenizer(), num_query_tokens=4)
    if family == "internvl":
        markers = {"start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>"}
        images = tf.GotOcr2ImageProcessor(size={"height": 16, "width": 16}, crop_to_patches=False)
        tokenizer = marked_tokenizer(**markers, video_token="<video>")
        return tf.InternVLProcessor(images, tokenizer, tf.InternVLVideoProcessor(), image_seq_length=4)
    if family == "pixtral":
        markers = {"_a": "[IMG]", "_b": "[IMG_BREAK]", "_c": "[IMG_END]"}
        images = tf.PixtralImageProcessor(size={"longest_edge": 16}, patch_size={"height": 4, "width": 4})
        return tf.PixtralProcessor(images, marked_tokenizer(**markers), patch_size=4)
    if family == "llava_onevision":
        images = tf.LlavaOnevisionImageProcessor(**square, image_grid_pinpoints=[[8, 8]])
        parts = (images, marked_tokenizer(_v="<video>"), tf.LlavaOnevisionVideoProcessor())
        return tf.LlavaOnevisionProcessor(*parts, num_image_tokens=4, vision_feature_select_strategy="full")
    if family == "smolvlm":
        markers = {"fake_image_token": "<fake_token_around_image>", "end_of_utterance_token": "<end_of_utterance>"}
        markers |= {"image_token": "<image>", "global_image_token": "<global-img>", "video_token": "<video>"}
        parts = (tf.SmolVLMImageProcessor(**tiles), marked_tokenizer(**markers), tf.SmolVLMVideoProcessor())
        return tf.SmolVLMProcessor(*parts, image_seq_len=4)
    if family in ("qwen2_vl", "qwen2_5_vl", "qwen3_vl"):
        parts = {"patch_size": 4, "temporal_patch_size": 2, "merge_size": 2}
        images = tf.Qwen2VLImageProcessor(**parts, min_pixels=64, max_pixels=1024)
        kind = {"qwen2_vl": "Qwen2VL", "qwen2_5_vl": "Qwen2_5_VL", "qwen3_vl": "Qwen3VL"}[family]
        video = tf.Qwen3VLVideoProcessor if family == "qwen3_vl" else tf.Qwen2VLVideoProcessor
        return getattr(tf, f"{kind}Processor")(images, marked_tokenizer(**QWEN_MARKERS), video(**parts))
    raise ValueError(f"family: there is no tiny processor for {family!r}")


def save_tiny_llava(folder: Path, *, seed: int = 0, layers: int = 3, hidden: int = 16) -> Path:
    """A random LLaVA (CLIP tower, 4 vision tokens per image) with its processor."""
    from transformers import (
        CLIPImageProcessor,
        CLIPVisionConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
    )

    tokenizer = tiny_tokenizer()
    torch.manual_seed(seed)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=16,
            patch_size=8,
        ),
        text_config=_llama_config(len(tokenizer), layers, hidden),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
    )
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    image_processor = CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    LlavaProcessor(
        image_processor=image_processor,
        tokenizer=tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    ).save_pretrained(folder)
    return folder


def save_tiny_llama(folder: Path, *, seed: int = 0, layers: int = 3, hidden: int = 16) -> Path:
    """A random Llama with its tokenizer: a model without vision."""
    from transformers import LlamaForCausalLM

    tokenizer = tiny_tokenizer()
    torch.manual_seed(seed)
    LlamaForCausalLM(_llama_config(len(tokenizer), layers, hidden)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_images(folder: Path, count: int, *, seed: int = 0) -> Path:
    """`count` small random PNG files."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    for i in range(count):
        Image.fromarray(rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(folder / f"image-{i:02d}.png")
    return folder


def write_texts(folder: Path, count: int, *, seed: int = 0) -> Path:
    """`count` .txt files of random words."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    for i in range(count):
        (folder / f"text-{i:02d}.txt").write_text(" ".join(rng.choice(WORDS, 30)))
    return folder


def _llama_config(vocabulary: int, layers: int, hidden: int):
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=512,
        tie_word_embeddings=True,
    )
