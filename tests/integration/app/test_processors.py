"""Model inputs of `mir compute` from transformers' processors, whose image placeholders must be our vision tokens."""

import contextlib

import numpy as np
import pytest
import torch
from PIL import Image

from integration import tiny_models
from integration.saved_models import QWEN_MARKERS, WORDS, tiny_processor
from modality_integration import ModalityIntegrationRate, capture
from modality_integration.app import loading
from modality_integration.app.errors import InputError
from modality_integration.app.options import TokenOptions
from modality_integration.app.prompts import check, encode
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
        with contextlib.suppress(RuntimeError):  # from a torchvision built for a different torch
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


CHATS = {
    "with the image": "{% for c in messages[0].content %}{{ '<image>' if c.type == 'image' else c.text }}{% endfor %}",
    "of text alone": "USER: {{ messages[0]['content'] + '!' }}",
    "that prints the list": "USER: {{ messages[0]['content'] }}",
    "that drops the image": "{% for c in messages[0].content %}{{ c.text }}{% endfor %}",
    None: None,
}
STUDY = "study: template compares the prompts chat and plain and needs a processor for both; "


@pytest.mark.parametrize(
    ("chat", "marker", "templates", "said"),
    [
        ("with the image", True, ["chat", "plain"], None),
        ("with the image", False, ["auto"], None),
        (None, True, ["auto"], None),
        (None, True, ["chat"], "template: the processor has no chat template, use --template plain"),
        (None, True, ["chat", "plain"], f"{STUDY}the processor has no chat template"),
        (None, False, ["chat"], "template: the processor has no chat template, and no other template works"),
        (None, False, ["auto"], "names no image token for a plain prompt, and no other template works"),
        ("with the image", False, ["plain"], "names no image token .*, use --template chat"),
        ("with the image", False, ["published"], "names no image .*, use --protocol random --template chat"),
        ("with the image", False, ["chat", "plain"], f"{STUDY}LlavaProcessor names no image token"),
        ("of text alone", True, ["auto"], "does not accept an image with text .*, use --template plain"),
        ("of text alone", True, ["chat", "plain"], f"{STUDY}the chat template does not accept an image with text"),
        ("that prints the list", True, ["auto"], "adds no image token to the text, use --template plain"),
        ("that drops the image", True, ["auto"], "adds no image token to the text, use --template plain"),
        ("that drops the image", False, ["auto"], "adds no image token to the text, and no other template works"),
    ],
)
def test_a_prompt_that_cannot_be_written_is_refused_with_options_that_can_help(chat, marker, templates, said):
    with loading.quiet():
        processor = tiny_processor("llava")
    processor.chat_template = CHATS[chat]
    if not marker:
        processor.image_token = None
    if said is None:
        check(processor, templates)
        return
    with pytest.raises(InputError, match=said) as refused:
        check(processor, templates)
    if len(templates) > 1:
        assert "use --template" not in str(refused.value)


def test_names_tell_which_image_processor_makes_the_pixels():
    with loading.quiet():
        processor = tiny_processor("llava")
    names = loading.processor_names(processor)
    assert names == {"processor": "LlavaProcessor", "image_processor": type(processor.image_processor).__name__}
    assert names["image_processor"].startswith("CLIPImageProcessor")
