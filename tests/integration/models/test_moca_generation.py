"""MoCa in generation: it calibrates the prefill but not the decoding steps."""

import pytest
import torch
from torch import nn
from transformers import DynamicCache, LogitsProcessor, LogitsProcessorList

from integration.calibrated_models import calibrated
from integration.tiny_models import IMAGE, VOCAB, decoder_of, tiny_batch, tiny_model
from modality_integration.models.moca import NAME, add_moca, vision_tokens
from tolerances import assert_close

STEPS = 4
# As long as the prompt, so that the prompt's mask would fit.
NEGATIVE = {
    "negative_prompt_ids": torch.arange(5, 16)[None],
    "negative_prompt_attention_mask": torch.ones(1, 11).long(),
}
WAYS = [
    {},
    {"use_cache": False},
    {"num_beams": 2},
    {"num_beams": 2, "use_cache": False},
    {"cache_implementation": "static"},
    {"prompt_lookup_num_tokens": 3},
    {"guidance_scale": 3.0},
    {"guidance_scale": 3.0, "use_cache": False},
    {"guidance_scale": 3.0, **NEGATIVE},
    {"guidance_scale": 3.0, **NEGATIVE, "use_cache": False},
    {"guidance_scale": 3.0, **NEGATIVE, "prompt_lookup_num_tokens": 3},
]
IN_EVERY_WAY = pytest.mark.parametrize("options", WAYS, ids=lambda ways: "-".join(ways) or "plain")


def generated(model, inputs, **options):
    """`STEPS` tokens after the prompt, and the outputs with their scores."""
    options = {"max_new_tokens": STEPS, "min_new_tokens": STEPS, "do_sample": False, **options}
    out = model.generate(**inputs, **options, output_scores=True, output_logits=True, return_dict_in_generate=True)
    return out.sequences[:, -STEPS:], out


def assert_same(got, expected):
    assert torch.equal(got[0], expected[0])
    for name in ("scores", "logits"):
        for step, wanted in zip(getattr(got[1], name), getattr(expected[1], name), strict=True):
            assert torch.equal(step.isfinite(), wanted.isfinite())
            assert_close(step[step.isfinite()], wanted[wanted.isfinite()], dtype=torch.float32)


def an_image_token_first(length):
    """Makes the token after the first `length` ones the image id, and forbids it afterwards."""
    words = [i for i in range(VOCAB) if i != IMAGE]
    return {"prefix_allowed_tokens_fn": lambda _, ids: [IMAGE] if len(ids) == length else words}


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "gemma3", "blip_2"])
def test_generation_with_a_cache_equals_generation_without(family):
    model = calibrated(family)
    batch = tiny_batch(model, family, ["tittt", "titttt"], padding="left")
    options = {"max_new_tokens": 6, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    cached = model.generate(**batch.inputs, **options, use_cache=True)
    whole = model.generate(**batch.inputs, **options, use_cache=False)
    assert torch.equal(cached.sequences, whole.sequences)
    for step, reference in zip(cached.logits, whole.logits, strict=True):
        assert_close(step, reference, dtype=torch.float32)


def test_generation_calibrates_the_prefill_and_no_decoding_step():
    model = calibrated()
    batch = tiny_batch(model, "llava", ["tittt"])
    lengths = []
    layer = decoder_of(model, "llava")[0][0]
    layer.get_submodule(NAME).register_forward_pre_hook(lambda _, args: lengths.append(args[0].shape[1]))
    model.generate(**batch.inputs, max_new_tokens=5, do_sample=False)
    assert lengths == [batch.vision.shape[1]]


def test_blip_beam_search_repeats_the_mask_with_the_rows():
    model = calibrated("blip_2")
    batch = tiny_batch(model, "blip_2", ["ittt", "itttt"], padding="left")
    lengths = []
    layer = decoder_of(model, "blip_2")[0][0]
    layer.get_submodule(NAME).register_forward_pre_hook(lambda _, args: lengths.append(args[1].sum().item()))
    model.generate(**batch.inputs, max_new_tokens=3, do_sample=False, num_beams=3)
    assert lengths == [2 * 3 * 4]  # rows, beams, tokens per image; the rest are decoding steps


@IN_EVERY_WAY
def test_a_mask_of_the_caller_does_what_the_models_own_marker_does(options):
    model = calibrated()
    batch = tiny_batch(model, "llava", ["ttittttt"])
    batch.inputs["input_ids"][0, -2:] = batch.inputs["input_ids"][0, -4:-2]  # so that the first step has a draft
    expected = generated(model, batch.inputs, suppress_tokens=[IMAGE], **options)
    with vision_tokens(model, batch.vision):
        got = generated(model, batch.inputs, suppress_tokens=[IMAGE], **options)
    assert_same(got, expected)


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_a_mask_of_the_caller_is_laid_over_the_prompt_of_padded_rows(family, use_cache):
    """A mask that differs from the model's own, compared with one pass on all tokens."""
    model = calibrated(family)
    batch = tiny_batch(model, family, ["ttittt", "tittttt"], padding="left")
    mask = batch.vision.clone()
    mask[:, -1] = True
    with vision_tokens(model, mask):
        tokens, out = generated(model, batch.inputs, suppress_tokens=[IMAGE], use_cache=use_cache)
    attention = nn.functional.pad(batch.inputs["attention_mask"], (0, STEPS), value=1)
    inputs = {
        **batch.inputs,
        "input_ids": torch.cat([batch.inputs["input_ids"], tokens], 1),
        "attention_mask": attention,
    }
    if family == "llava":
        inputs["position_ids"] = (attention.cumsum(1) - 1).clamp(min=0)
    else:
        inputs["mm_token_type_ids"] = nn.functional.pad(batch.inputs["mm_token_type_ids"], (0, STEPS))
    with torch.no_grad(), vision_tokens(model, nn.functional.pad(mask, (0, STEPS))):
        whole = model(**inputs).logits[:, mask.shape[1] - 1 : -1]
    for step, wanted in zip(out.logits, whole.unbind(1), strict=True):
        assert_close(step, wanted, dtype=torch.float32)


@pytest.mark.parametrize("use_cache", [True, False])
def test_a_mask_that_does_not_fit_the_prompt_is_refused_without_a_cache(use_cache):
    model = calibrated()
    batch = tiny_batch(model, "llava", ["ttittttt"])
    wrong = torch.ones(2, 9, dtype=torch.bool) if use_cache else batch.vision[:, :-2]
    with vision_tokens(model, wrong), pytest.raises(ValueError, match=r"vision_mask: expected .* shape \(1, 11\)"):
        generated(model, batch.inputs, use_cache=use_cache)


@IN_EVERY_WAY
def test_a_generated_token_with_the_id_of_images_is_no_vision_token(options):
    """The prompt has no images, so MoCa changes nothing, whatever follows it."""
    plain, model = tiny_model("llava"), calibrated()
    batch = tiny_batch(model, "llava", ["ttttttttttt"])
    batch.inputs["input_ids"][0, -2:] = batch.inputs["input_ids"][0, -4:-2]
    options = {**options, **an_image_token_first(11)}
    expected, got = (generated(each, batch.inputs, **options) for each in (plain, model))
    assert IMAGE in got[0]
    assert_same(got, expected)


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"prompt_lookup_num_tokens": 3}], ids=str)
def test_a_generated_image_token_changes_nothing_for_those_of_the_prompt(family, options):
    model = calibrated(family)
    batch = tiny_batch(model, family, ["ttittttt"])
    batch.inputs["input_ids"][0, -2:] = batch.inputs["input_ids"][0, -4:-2]
    options = {**options, **an_image_token_first(batch.vision.shape[1])}
    got = generated(model, batch.inputs, **options)
    with vision_tokens(model, batch.vision):
        expected = generated(model, batch.inputs, **options)
    assert IMAGE in got[0]
    assert_same(got, expected)


@pytest.mark.parametrize("size", [1, 3, 20])
@pytest.mark.parametrize("by", ["generate", "hand"])
def test_a_second_image_on_a_filled_cache_is_calibrated_in_chunks_too(by, size):
    """A single token with the image id belongs to the prompt, in `generate`'s prefill and in a loop."""
    model = calibrated()
    layer = decoder_of(model, "llava")[0][0]
    masks = []
    layer.get_submodule(NAME).register_forward_pre_hook(lambda _, args: masks.append(args[1]))
    cache = DynamicCache(config=model.config)
    first, second = (tiny_batch(model, "llava", [row], seed=i) for i, row in enumerate(("ttittt", "titt")))
    with torch.no_grad():
        model(**first.inputs, past_key_values=cache)
        masks.clear()
        ids = second.inputs["input_ids"]
        if by == "generate":
            length = first.vision.shape[1] + second.vision.shape[1]
            inputs = {"input_ids": ids, "attention_mask": torch.ones(1, length).long(), "past_key_values": cache}
            if size == 20:
                inputs["pixel_values"] = second.inputs["pixel_values"]
            else:
                inputs["prefill_chunk_size"] = size
            generated(model, inputs, suppress_tokens=[IMAGE])
        else:
            for part in ids.split(size, 1):
                model(input_ids=part, past_key_values=cache)
    assert sum(int(mask.sum()) for mask in masks) == 4


def test_assisted_decoding_on_a_filled_cache_calibrates_the_new_image_and_not_the_draft():
    model = calibrated()
    first, second = (tiny_batch(model, "llava", [row], seed=i) for i, row in enumerate(("ttittt", "titttt")))
    second.inputs["input_ids"][0, -2:] = second.inputs["input_ids"][0, 5:7]
    length = first.vision.shape[1] + second.vision.shape[1]
    tokens = []
    for options in ({}, {"prompt_lookup_num_tokens": 2}):
        with torch.no_grad():
            cache = model(**first.inputs, use_cache=True).past_key_values
        inputs = {**second.inputs, "attention_mask": torch.ones(1, length).long(), "past_key_values": cache}
        tokens.append(generated(model, inputs, suppress_tokens=[IMAGE], **options)[0])
    assert torch.equal(*tokens)


def test_what_a_logits_processor_of_the_caller_runs_is_a_pass_like_any_other():
    """Contrastive decoding runs the model on another image between two steps, and MoCa applies to it."""

    class Contrast(LogitsProcessor):
        def __init__(self, model, inputs):
            self.model, self.inputs, self.seen = model, inputs, []

        def __call__(self, ids, scores):
            self.seen.append(self.model(**self.inputs).logits[:, -1])
            return scores

    model = calibrated()
    batch, other = (tiny_batch(model, "llava", ["ttittttt"], seed=seed) for seed in (1, 2))
    contrast = Contrast(model, other.inputs)
    generated(model, batch.inputs, logits_processor=LogitsProcessorList([contrast]), suppress_tokens=[IMAGE])
    with torch.no_grad():
        expected = model(**other.inputs).logits[:, -1]
    assert len(contrast.seen) == STEPS
    assert all(torch.equal(seen, expected) for seen in contrast.seen)


def test_an_argument_that_marks_the_prompt_need_not_grow_with_what_is_generated():
    model, own = tiny_model("gemma3"), calibrated("gemma3")
    torch.manual_seed(0)
    add_moca(model, std=0.3, vision_mask="token_type_ids")
    batch = tiny_batch(model, "gemma3", ["ttittttt"])
    batch.inputs["token_type_ids"] = batch.vision.long()
    for use_cache in (True, False):
        expected, got = (
            generated(each, batch.inputs, use_cache=use_cache, suppress_tokens=[IMAGE]) for each in (own, model)
        )
        assert_same(got, expected)
