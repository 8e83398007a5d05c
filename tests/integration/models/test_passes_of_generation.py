"""Passes and decoding steps are distinguished by token roles and the stage of generate(), not by lengths."""

import pytest
import torch
from transformers import DynamicCache, LlamaForCausalLM

from integration.tiny_models import IMAGE, tiny_batch, tiny_model
from modality_integration import add_moca, capture
from modality_integration.models.moca import vision_tokens

ROW = "ttittttt"


def prefill(model, batch):
    with torch.no_grad(), capture(model) as seen:
        model(**batch.inputs)
    return seen.hidden_states, seen.vision_mask, seen.text_mask


def assert_is_prefill(seen, expected):
    states, vision, text = expected
    assert seen.passes == 1
    assert torch.equal(seen.vision_mask, vision)
    assert torch.equal(seen.text_mask, text)
    for got, wanted in zip(seen.hidden_states, states, strict=True):
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llava", {}),
        ("llava", {"use_cache": False}),
        ("llava", {"prompt_lookup_num_tokens": 3}),
        ("llava", {"guidance_scale": 1.5}),
        ("llava", {"cache_implementation": "static"}),
        ("gemma3", {"cache_implementation": "static"}),
        ("qwen2_vl", {"cache_implementation": "static"}),
    ],
    ids=str,
)
def test_after_generate_the_prefill_is_what_stands(family, options):
    model = tiny_model(family, dtype=torch.float32)
    rows = [ROW] if "prompt_lookup_num_tokens" in options else [ROW, "tittttt"]
    batch = tiny_batch(model, family, rows, padding="left")
    if "prompt_lookup_num_tokens" in options:  # repeats earlier tokens, so the first step has a draft
        batch.inputs["input_ids"][0, -2:] = batch.inputs["input_ids"][0, 6:8]
    expected = prefill(model, batch)
    with torch.no_grad(), capture(model) as seen:
        model.generate(**batch.inputs, max_new_tokens=5, do_sample=False, **options)
    assert_is_prefill(seen, expected)


@pytest.mark.parametrize("size", [1, 3, 4])
def test_a_prompt_in_chunks_is_one_pass_and_moca_calibrates_all_of_its_vision_tokens(size):
    """A single image token is a vision token, not a decoding step."""
    model = tiny_model("llava")
    batch = tiny_batch(model, "llava", [ROW])
    torch.manual_seed(0)
    add_moca(model, std=0.3)
    ids = batch.inputs["input_ids"]
    with torch.no_grad(), capture(model, vision_mask=batch.vision) as whole:
        embeds = model.get_input_embeddings()(ids)
        features = model.model.get_image_features(pixel_values=batch.inputs["pixel_values"]).pooler_output
        embeds[batch.vision] = torch.cat(list(features))
        with vision_tokens(model, batch.vision):
            expected = model(inputs_embeds=embeds).logits
    with torch.no_grad(), capture(model, vision_mask=batch.vision) as seen, vision_tokens(model, batch.vision):
        logits, cache = [], DynamicCache()
        for part in embeds.split(size, 1):
            out = model(inputs_embeds=part, past_key_values=cache, use_cache=True)
            logits.append(out.logits)
    torch.testing.assert_close(torch.cat(logits, 1), expected, rtol=0, atol=1e-6)  # rotary angles are float32
    if size > 1:
        assert seen.passes == 1
        assert torch.equal(seen.vision_mask, whole.vision_mask)
        assert torch.equal(seen.text_mask, whole.text_mask)
        for got, wanted in zip(seen.hidden_states, whole.hidden_states, strict=True):
            torch.testing.assert_close(got, wanted, rtol=0, atol=1e-6)


def test_chunks_of_generates_own_prefill_are_one_pass():
    model = tiny_model("llava", dtype=torch.float32).model.language_model
    language = LlamaForCausalLM(model.config).eval()
    ids = torch.arange(3, 14)[None]
    vision = (ids > 4) & (ids < 9)
    with torch.no_grad(), capture(language, vision_mask=vision) as whole:
        language(input_ids=ids)
    for size in (1, 3, 11):
        with torch.no_grad(), capture(language, vision_mask=vision) as seen:
            language.generate(ids, max_new_tokens=4, do_sample=False, prefill_chunk_size=size)
        assert_is_prefill(seen, (whole.hidden_states, whole.vision_mask, whole.text_mask))


def test_a_sequence_that_was_read_is_complete():
    """A second image in the same conversation is a separate pass, so that no token counts twice."""
    model = tiny_model("llava")
    batch, more = (tiny_batch(model, "llava", [row], seed=seed) for seed, row in enumerate((ROW, "titttt")))
    with torch.no_grad(), capture(model) as seen:
        cache = model(**batch.inputs, use_cache=True).past_key_values
        first = seen.vision_mask
        more.inputs.pop("attention_mask")
        model(**more.inputs, past_key_values=cache)
        assert torch.equal(first, batch.vision)
        assert torch.equal(seen.vision_mask, more.vision)
        assert seen.passes == 2


def a_conversation(model, seed):
    """A cache that holds the tokens of another `ROW`."""
    return model(**tiny_batch(model, "llava", [ROW], seed=seed).inputs, use_cache=True).past_key_values


@pytest.mark.parametrize("before", ["no cache", "its own cache, gone since", "its own cache", "a cache given to it"])
def test_passes_on_caches_of_their_own_are_not_put_together(before):
    """The second pass's cache holds as many tokens as the first pass had, but different ones."""
    model = tiny_model("llava")
    first, second = (tiny_batch(model, "llava", [ROW], seed=seed) for seed in (1, 2))
    length = first.vision.shape[1]
    inputs = {**second.inputs, "attention_mask": torch.ones(1, 2 * length).long()}
    with torch.no_grad():
        cache, own = a_conversation(model, 7), DynamicCache(config=model.config)
        with capture(model) as seen:
            options = {"no cache": {"use_cache": False}, "a cache given to it": {"past_key_values": own}}
            out = model(**first.inputs, **options.get(before, {}))
            if before != "its own cache":
                del out
            model(**inputs, past_key_values=cache)
    assert seen.passes == 2
    assert torch.equal(seen.vision_mask, second.vision)
    assert seen.hidden_states[0].shape[:2] == second.vision.shape


def test_a_pass_that_failed_parts_no_chunks():
    """Between two chunks on one cache, a pass on another cache begins but fails."""
    model = tiny_model("llava")
    batch = tiny_batch(model, "llava", [ROW])
    first, second = batch.inputs["input_ids"].split([6, 5], 1)
    cache, other = DynamicCache(config=model.config), DynamicCache(config=model.config)
    with torch.no_grad(), capture(model) as seen:
        model(input_ids=first, past_key_values=cache)
        handle = model.model.language_model.layers[1].register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model(input_ids=second, past_key_values=other)
        handle.remove()
        model(input_ids=second, past_key_values=cache)
    assert seen.passes == 1
    assert torch.equal(seen.vision_mask, batch.vision)


def test_passes_behind_a_trained_prefix_are_not_put_together():
    """PEFT's prefix tuning fills a new cache for each pass, here with as many tokens as a row has."""
    peft = pytest.importorskip("peft")
    model = tiny_model("llava", dtype=torch.float32)
    first, second = (tiny_batch(model, "llava", [ROW, ROW], seed=seed) for seed in (1, 2))
    config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=first.vision.shape[1])
    model = peft.get_peft_model(model, config).eval()
    states = []
    for batches in ([second], [first, second]):
        with torch.no_grad(), capture(model) as seen:
            for batch in batches:
                model(**batch.inputs)
        assert seen.passes == len(batches)
        assert torch.equal(seen.vision_mask, second.vision)
        states.append(seen.hidden_states)
    for got, wanted in zip(*states, strict=True):
        assert torch.equal(got, wanted)


@pytest.mark.parametrize("size", [3, 4, None])
@pytest.mark.parametrize("by", ["generate", "hand"])
def test_chunks_on_a_cache_that_was_filled_before_are_one_pass(by, size):
    model = tiny_model("llava", dtype=torch.float32)
    batch = tiny_batch(model, "llava", [ROW])
    ids, length = batch.inputs["input_ids"], batch.vision.shape[1]
    mask = torch.ones(1, 2 * length).long()
    with torch.no_grad():
        cache, again = a_conversation(model, 7), a_conversation(model, 7)
        with capture(model) as whole:
            model(input_ids=ids, attention_mask=mask, past_key_values=again)
        with capture(model) as seen:
            if by == "generate":
                options = {"max_new_tokens": 3, "do_sample": False, "suppress_tokens": [IMAGE]}
                model.generate(ids, attention_mask=mask, past_key_values=cache, prefill_chunk_size=size, **options)
            else:
                for part in ids.split(size or length, 1):
                    model(input_ids=part, past_key_values=cache)
    assert_is_prefill(seen, (whole.hidden_states, batch.vision, batch.text_after))


def test_assisted_decoding_with_guidance_leaves_the_prefill_standing():
    model = tiny_model("llava", dtype=torch.float32)
    batch = tiny_batch(model, "llava", [ROW])
    batch.inputs["input_ids"][0, -2:] = batch.inputs["input_ids"][0, -4:-2]
    expected = prefill(model, batch)
    options = {"prompt_lookup_num_tokens": 2, "guidance_scale": 1.5, "negative_prompt_ids": torch.arange(5, 9)[None]}
    with torch.no_grad(), capture(model) as seen:
        model.generate(**batch.inputs, max_new_tokens=5, do_sample=False, suppress_tokens=[IMAGE], **options)
    assert_is_prefill(seen, expected)


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("use_cache", [True, False])
def test_masks_of_the_caller_are_read_for_the_beams_that_ran(beams, use_cache):
    model = tiny_model("llava", dtype=torch.float32)
    batch = tiny_batch(model, "llava", [ROW, "tittttt"], padding="left")
    with torch.no_grad(), capture(model, vision_mask=batch.vision, text_mask=batch.text_all) as seen:
        model.generate(**batch.inputs, max_new_tokens=3, do_sample=False, num_beams=beams, use_cache=use_cache)
    assert torch.equal(seen.vision_mask, batch.vision.repeat_interleave(beams, 0))
    assert torch.equal(seen.text_mask, batch.text_all.repeat_interleave(beams, 0))


@pytest.mark.parametrize("beams", [1, 3])
def test_a_mask_of_the_caller_serves_generation_from_embeddings(beams):
    model = tiny_model("llava", dtype=torch.float32)
    torch.manual_seed(0)
    add_moca(model, std=0.3)
    batch = tiny_batch(model, "llava", [ROW, "tittttt"], padding="left")
    length = batch.vision.shape[1]
    options = {"max_new_tokens": 5, "do_sample": False, "num_beams": beams}
    with torch.no_grad():
        expected = model.generate(**batch.inputs, **options)[:, length:]
        embeds = model.get_input_embeddings()(batch.inputs["input_ids"])
        features = model.model.get_image_features(pixel_values=batch.inputs["pixel_values"]).pooler_output
        embeds[batch.vision] = torch.cat(list(features))
        with vision_tokens(model, batch.vision):
            got = model.generate(inputs_embeds=embeds, attention_mask=batch.inputs["attention_mask"], **options)
    assert torch.equal(got, expected)


@pytest.mark.parametrize(("asked", "count"), [("leave out", 4), ("text", 9)])
def test_audio_is_neither_vision_nor_text_unless_asked(asked, count):
    model = tiny_model("qwen2_5_vl")
    model.config.audio_token_id = 55
    ids = torch.tensor([[1, 5, *[60] * 4, 6, *[55] * 5, 7, 8, 9]])
    vision, audio = ids == 60, ids == 55
    embeds = model.get_input_embeddings()(ids)
    types = vision.int() + 3 * audio.int()
    for inputs in ({"input_ids": ids}, {"inputs_embeds": embeds, "mm_token_type_ids": types}):
        with torch.no_grad(), capture(model, audio=asked) as seen:
            model(**inputs)
        assert torch.equal(seen.vision_mask, vision)
        assert int(seen.text_mask.sum()) == count
        assert bool((seen.text_mask & audio).any()) == (asked == "text")


@pytest.mark.parametrize("name", ["altup_num_inputs", "hc_mult", "hc_count"])
def test_several_residual_streams_are_refused_when_placed(name):
    model = tiny_model("llava")
    setattr(model.config.text_config, name, 4)
    for place in (add_moca, lambda m: capture(m).__enter__()):
        with pytest.raises(ValueError, match=rf"keeps 4 residual streams per token \({name} of its text config"):
            place(model)
