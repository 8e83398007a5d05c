"""MoCa in generation: the prefill is calibrated, decoding steps are not."""

import pytest
import torch

from integration.calibrated_models import calibrated
from integration.tiny_models import decoder_of, tiny_batch
from modality_integration.models.moca import NAME
from tolerances import assert_close


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
    assert lengths == [2 * 3 * 4]  # rows, beams, tokens of an image; then only decoding steps
