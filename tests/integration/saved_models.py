"""Tiny models, images and prose saved to folders, offline: what tests point `mir compute` and `mir demo` at."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image

WORDS = ["the", "a", "cat", "dog", "house", "sits", "runs", "on", "under", "and", "to", "river", "mountain"]


def tiny_tokenizer():
    """A word-level tokenizer made on the spot, with a fallback to characters so that any prose has tokens."""
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


def save_tiny_llava(folder: Path, *, seed: int = 0, layers: int = 3, hidden: int = 16) -> Path:
    """A random LLaVA (CLIP tower, 4 vision tokens an image) with its processor."""
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
    """A random Llama with its tokenizer: a model without eyes."""
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
