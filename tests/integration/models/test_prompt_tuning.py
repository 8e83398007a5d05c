"""PEFT's prompt tuning and P-tuning, which put trained tokens before every row: they are neither vision nor text."""

import pytest
import torch
from torch import nn

from integration.tiny_models import HIDDEN, LAYERS, tiny_batch, tiny_model
from modality_integration import add_moca, capture, measure_mir, moca_parameters
from modality_integration.models.moca import vision_tokens
from tolerances import assert_close

peft = pytest.importorskip("peft")

VIRTUAL = 5
ROWS = ("ttittt", "tittttitt")
METHODS = {
    "prompt tuning": (peft.PromptTuningConfig, {}),
    "P-tuning": (peft.PromptEncoderConfig, {"encoder_hidden_size": 16}),
}
BOTH_SIDES = pytest.mark.parametrize("padding", ["left", "right"])


def tuned(family, method="prompt tuning"):
    """A model that PEFT puts `VIRTUAL` tokens before every row of."""
    kind, options = METHODS[method]
    shape = {"token_dim": HIDDEN, "num_layers": LAYERS, "num_attention_heads": 2, "num_transformer_submodules": 1}
    base = tiny_model(family, dtype=torch.float32)
    torch.manual_seed(3)
    config = kind(task_type="CAUSAL_LM", num_virtual_tokens=VIRTUAL, **shape, **options)
    return peft.get_peft_model(base, config).eval()


def with_moca(model):
    torch.manual_seed(0)
    add_moca(model, std=0.3)
    return model


def behind_virtual(marks, fill=False):
    """`marks` (B, T) of the tokens of a batch, with `fill` for the virtual tokens before them."""
    return nn.functional.pad(marks, (VIRTUAL, 0), value=fill)


def by_hand(model, batch):
    """The inputs that PEFT gives the model inside: embeddings, with the trained ones before."""
    with torch.no_grad():
        embeds = model.get_base_model().get_input_embeddings()(batch.inputs["input_ids"])
        embeds = torch.cat([model.get_prompt(batch_size=len(embeds)), embeds], 1)
    rest = {name: value for name, value in batch.inputs.items() if name != "input_ids"}
    return {**rest, "inputs_embeds": embeds, "attention_mask": behind_virtual(rest["attention_mask"], 1)}


@BOTH_SIDES
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", ["llava", "gemma3"])
def test_roles_stand_behind_the_virtual_tokens_and_states_are_of_all(family, method, padding):
    model, plain = tuned(family, method), tiny_model(family, dtype=torch.float32)
    batch = tiny_batch(plain, family, ROWS, padding=padding)
    vision, after, every = map(behind_virtual, (batch.vision, batch.text_after, batch.text_all))
    with torch.no_grad(), capture(model) as seen, capture(model, text="all") as of_all_text:
        model(**batch.inputs)
    assert torch.equal(seen.vision_mask, vision)
    assert torch.equal(seen.text_mask, after)
    assert torch.equal(of_all_text.text_mask, every)
    with torch.no_grad(), capture(plain, vision_mask=vision, text_mask=after) as expected:
        plain(**by_hand(model, batch))
    for state, wanted in zip(seen.hidden_states, expected.hidden_states, strict=True):
        assert state.shape == (*vision.shape, HIDDEN)
        assert_close(state, wanted)


@pytest.mark.parametrize("named", ["attention_mask", None])
def test_virtual_tokens_are_no_text_whether_a_mask_comes_or_not(named):
    model = tuned("llava")
    batch = tiny_batch(model.get_base_model(), "llava", ["ttittt", "tttitt"])
    inputs = {name: value for name, value in batch.inputs.items() if name in ("input_ids", "pixel_values", named)}
    with torch.no_grad(), capture(model, text="all") as seen:
        model(**inputs)
    assert torch.equal(seen.text_mask, behind_virtual(batch.text_all))


def test_a_mask_of_the_caller_may_leave_the_virtual_tokens_out():
    model = with_moca(tuned("llava"))
    batch = tiny_batch(model.get_base_model(), "llava", ROWS)
    some = batch.vision & (torch.arange(batch.vision.shape[1]) % 2 == 0)
    outputs = []
    for mask in (some, behind_virtual(some)):
        with torch.no_grad(), vision_tokens(model, mask), capture(model, vision_mask=mask) as seen:
            outputs.append(model(**batch.inputs).logits)
        assert torch.equal(seen.vision_mask, behind_virtual(some))
    assert torch.equal(*outputs)


@BOTH_SIDES
@pytest.mark.parametrize("family", ["llava", "gemma3"])
def test_moca_moves_the_vision_tokens_alone(family, padding):
    model, calibrated = tuned(family), with_moca(tuned(family))
    batch = tiny_batch(model.get_base_model(), family, ROWS, padding=padding)
    states = []
    for each in (model, calibrated):
        with torch.no_grad(), capture(each) as seen:
            each(**batch.inputs)
        states.append(seen.hidden_states[0])  # later layers mix the tokens
    moved = (states[0] != states[1]).any(-1)
    assert torch.equal(moved, behind_virtual(batch.vision))
    scale, shift = moca_parameters(calibrated)[:2]
    assert_close(states[1][moved], (scale * states[0] + shift)[moved])


def test_moca_and_the_prompt_are_trained_together():
    model = with_moca(tuned("llava")).train()
    reference = with_moca(tiny_model("llava", dtype=torch.float32))
    batch = tiny_batch(reference, "llava", ROWS, padding="left")
    model(**batch.inputs).logits.square().mean().backward()
    with vision_tokens(reference, behind_virtual(batch.vision)):
        reference(**by_hand(model, batch)).logits.square().mean().backward()
    for parameter, expected in zip(moca_parameters(model), moca_parameters(reference), strict=True):
        assert_close(parameter.grad, expected.grad, factor=10)
    (prompt,) = model.prompt_encoder.parameters()
    assert prompt.grad.isfinite().all()
    assert prompt.grad.any()


@BOTH_SIDES
@pytest.mark.parametrize("beams", [1, 2])
@pytest.mark.parametrize("family", ["llava", "gemma3"])
def test_generation_embeds_the_prompt_itself_and_has_roles_too(family, beams, padding):
    model = with_moca(tuned(family))
    batch = tiny_batch(model.get_base_model(), family, ROWS, padding=padding)
    options = {"max_new_tokens": 5, "do_sample": False, "num_beams": beams}
    with torch.no_grad(), capture(model, text="all") as seen:
        got = model.generate(**batch.inputs, **options)
    with torch.no_grad(), vision_tokens(model, behind_virtual(batch.vision)):
        expected = model.generate(**batch.inputs, **options)
    assert torch.equal(got, expected)
    assert seen.passes == 1
    assert torch.equal(seen.vision_mask, behind_virtual(batch.vision).repeat_interleave(beams, 0))
    assert torch.equal(seen.text_mask, behind_virtual(batch.text_all).repeat_interleave(beams, 0))


def test_the_first_token_of_a_row_is_a_virtual_one():
    """So an image that comes first is no attention sink, of which `measure_mir` warns."""
    for model, count in ((tuned("llava"), 0), (tiny_model("llava", dtype=torch.float32), 2)):
        with torch.no_grad(), capture(model) as seen:
            model(**tiny_batch(tiny_model("llava", dtype=torch.float32), "llava", ["ittt", "itt"]).inputs)
        assert seen.image_first == count


def test_mir_is_that_of_the_tokens_without_the_virtual_ones():
    model, plain = tuned("llava"), tiny_model("llava", dtype=torch.float32)
    batch = tiny_batch(plain, "llava", ["ttitttttt"] * 6)
    masks = {"vision_mask": behind_virtual(batch.vision), "text_mask": behind_virtual(batch.text_after)}
    # Groups are dealt by the rows of input_ids, which only one of the two has.
    whole = {"groups": 0}
    expected = measure_mir(plain, [by_hand(model, batch)], capture=masks, metric=whole)
    assert measure_mir(model, [batch.inputs], metric=whole).value == pytest.approx(expected.value, rel=1e-5)
