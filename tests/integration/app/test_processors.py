"""What `mir compute` feeds a model: transformers' own processors, whose marker has to be our vision tokens."""

import contextlib

import numpy as np
import pytest
import torch
from PIL import Image

from integration import tiny_models
from integration.saved_models import QWEN_MARKERS, WORDS, tiny_processor
from modality_integration import ModalityIntegrationRate, capture
from modality_integration.app import loading
from modality_integration.app.options import TokenOptions
from modality_integration.app.prompts import encode
from modality_integration.app.samples import Sample, Text
from modality_integration.app.stream import stream

PROSE = " ".join(WORDS)
WITHOUT_TORCHVISION = ("llava", "llava_next", "gemma3", "paligemma", "idefics3", "blip_2", "instructblip")
WITH_TORCHVISION = ("llava_onevision", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "internvl", "smolvlm", "pixtral")


@pytest.fixture(params=[*WITHOUT_TORCHVISION, *WITH_TORCHVISION])
def model_and_processor(request, monkeypatch):
    """The tiny model of a family with the vocabulary of its processor."""
    family = request.param
    if family == "smolvlm":
        pytest.importorskip("num2words")
    if family in WITH_TORCHVISION:
        with contextlib.suppress(RuntimeError):  # of one that was built for another torch
            pytest.importorskip("torchvision")
    with loading.quiet():
        processor = tiny_processor(family)
        own = getattr(processor, "image_token_ids", None) or [None]
        marker = own[0] or processor.tokenizer.convert_tokens_to_ids("<image>")
        monkeypatch.setattr(tiny_models, "VOCAB", len(processor.tokenizer))
        monkeypatch.setattr(tiny_models, "IMAGE", marker)
        monkeypatch.setitem(tiny_models.TEXT, "vocab_size", len(processor.tokenizer))
        for name, token in QWEN_MARKERS.items() if "qwen" in family else ():
            identity = processor.tokenizer.convert_tokens_to_ids(token)
            monkeypatch.setitem(tiny_models._QWEN_TOKENS, f"{name}_id", identity)
        return tiny_models.tiny_model(family, dtype=torch.float32), processor, marker


def picture(seed):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (40, 40, 3), dtype=np.uint8))


def test_vision_tokens_are_the_processors_marker_and_text_is_the_prose_after_it(model_and_processor):
    model, processor, marker = model_and_processor
    inputs = encode(processor, picture(0), PROSE, "plain")
    with torch.no_grad(), capture(model) as seen:
        model(**inputs)
    ids = inputs["input_ids"]
    assert torch.equal(seen.vision_mask, ids == marker)
    assert seen.vision_mask.sum() >= 4
    assert processor.tokenizer.decode(ids[seen.text_mask], skip_special_tokens=True).split() == WORDS


def test_samples_stream_into_the_metric(model_and_processor):
    model, processor, marker = model_and_processor
    samples = [Sample(picture(seed), Text(str(seed), PROSE)) for seed in range(3)]
    metric = ModalityIntegrationRate()
    stream(model, processor, samples, metric, TokenOptions(text_tokens=5, template="plain"))
    result = metric.compute()
    vision = sum(int((encode(processor, s.image, "", "plain")["input_ids"] == marker).sum()) for s in samples)
    assert result.kept["vision"][0] + result.removed["vision"][0] == vision
    assert len(result.terms) == tiny_models.LAYERS
