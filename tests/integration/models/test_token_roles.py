"""Token roles compared with transformers' processor, and the helper functions for token roles."""

import numpy as np
import pytest
import torch
from PIL import Image

from integration.saved_models import save_tiny_llava
from integration.tiny_models import FAMILIES, IMAGE, VIDEO, tiny_batch, tiny_model
from modality_integration.models.capture import capture
from modality_integration.models.token_roles import text_after_vision, vision_token_ids


def images(count, size):
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (size, size, 3), dtype=np.uint8)) for _ in range(count)]


@pytest.mark.parametrize("padding", ["left", "right"])
def test_llava_roles_are_the_processors_own_token_types(tmp_path, padding):
    import transformers as tf

    folder = save_tiny_llava(tmp_path)
    model = tf.LlavaForConditionalGeneration.from_pretrained(folder).eval()
    processor = tf.LlavaProcessor.from_pretrained(folder)
    processor.tokenizer.padding_side = padding
    prompts = ["the cat <image> sits on <image> a river", "<image> the dog runs under the house and a mountain"]
    inputs = processor(
        images=images(3, 16), text=prompts, return_tensors="pt", padding=True, return_mm_token_type_ids=True
    )
    types = inputs.pop("mm_token_type_ids")
    assert types.sum() == 3 * 4
    with torch.no_grad(), capture(model, text="all") as seen:
        model(**inputs)
    assert torch.equal(seen.vision_mask, types == 1)
    assert torch.equal(seen.text_mask, (types == 0) & inputs["attention_mask"].bool())


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_names_its_vision_tokens(family):
    ids = vision_token_ids(tiny_model(family))
    assert IMAGE in ids
    assert set(ids) <= {IMAGE, VIDEO}


def test_text_after_vision_begins_after_the_last_vision_token_of_each_row():
    vision = torch.tensor([[0, 1, 1, 0, 0], [1, 0, 1, 0, 0], [0, 0, 0, 0, 1], [0, 0, 0, 0, 0]]).bool()
    expected = torch.tensor([[0, 0, 0, 1, 1], [0, 0, 0, 1, 1], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1]]).bool()
    assert torch.equal(text_after_vision(vision), expected)


@pytest.mark.parametrize("form", ["bool", "float"])
def test_a_mask_of_attention_shows_padding_as_the_tokens_that_nobody_sees(form):
    model = tiny_model("llava")
    batch = tiny_batch(model, "llava", ["titttt", "titt"], padding="left")
    length = batch.vision.shape[1]
    seen_by = torch.ones(length, length, dtype=torch.bool).tril() & ~batch.padding[:, None, None, :]
    mask = seen_by
    if form == "float":
        mask = torch.zeros(seen_by.shape, dtype=torch.float64).masked_fill_(~seen_by, torch.finfo(torch.float64).min)
    with torch.no_grad(), capture(model) as seen:
        model(**{**batch.inputs, "attention_mask": mask})
    assert torch.equal(seen.text_mask, batch.text_after)


def test_a_mask_that_shows_no_padding_is_refused_when_roles_are_read():
    model = tiny_model("llava")
    batch = tiny_batch(model, "llava", ["titttt"])
    length = batch.vision.shape[1]
    inputs = {**batch.inputs, "attention_mask": torch.ones(1, length, length, dtype=torch.bool).tril()}
    ignored = model.model.language_model.register_forward_pre_hook(
        lambda _, args, kwargs: (args, {**kwargs, "attention_mask": None}), with_kwargs=True
    )
    with torch.no_grad(), capture(model) as seen:
        model(**inputs)
    with pytest.raises(ValueError, match=r"attention_mask \(shape \(1, 9, 9\)\) does not show padding"):
        _ = seen.text_mask
    with torch.no_grad(), capture(model, vision_mask=batch.vision, text_mask=batch.text_after) as seen:
        model(**inputs)
    assert torch.equal(seen.text_mask, batch.text_after)
    ignored.remove()


def test_a_model_that_expands_its_placeholders_asks_for_a_mask():
    model = tiny_model("llava")
    batch = tiny_batch(model, "llava", ["titttt"])
    expand = model.model.language_model.register_forward_pre_hook(
        lambda _, args, kwargs: (args, {**kwargs, "inputs_embeds": kwargs["inputs_embeds"].repeat(1, 2, 1)}),
        with_kwargs=True,
    )
    with torch.no_grad(), capture(model) as seen:
        model(input_ids=batch.inputs["input_ids"], pixel_values=batch.inputs["pixel_values"])
    expand.remove()
    with pytest.raises(ValueError, match=r"shape \(1, 9\), but the decoder ran on \(1, 18\) tokens.*pass vision_mask"):
        _ = seen.vision_mask
