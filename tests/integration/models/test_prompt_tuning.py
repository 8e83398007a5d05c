"""PEFT's prompt tuning, P-tuning and CPT: their trained tokens before every row are neither vision nor text."""

import copy

import pytest
import torch
from torch import nn

from integration.tiny_models import HIDDEN, IMAGE, LAYERS, tiny_batch, tiny_model
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
CPT = {"cpt_token_ids": [5, 6, 7, 8, 9], "cpt_mask": [1] * 5, "cpt_tokens_type_mask": [1, 2, 3, 3, 3]}
BOTH_SIDES = pytest.mark.parametrize("padding", ["left", "right"])


def tuned(family, method="prompt tuning"):
    """A model with PEFT's `VIRTUAL` tokens before every row."""
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
    """`marks` (B, T) of a batch's tokens, preceded by `fill` for the virtual tokens."""
    return nn.functional.pad(marks, (VIRTUAL, 0), value=fill)


def by_hand(model, batch):
    """The inputs that PEFT passes to the inner model: embeddings, preceded by the trained ones."""
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
    """So a leading image is not the attention sink that `measure_mir` warns of."""
    for model, count in ((tuned("llava"), 0), (tiny_model("llava", dtype=torch.float32), 2)):
        with torch.no_grad(), capture(model) as seen:
            model(**tiny_batch(tiny_model("llava", dtype=torch.float32), "llava", ["ittt", "itt"]).inputs)
        assert seen.image_first == count


def test_mir_is_that_of_the_tokens_without_the_virtual_ones():
    model, plain = tuned("llava"), tiny_model("llava", dtype=torch.float32)
    batch = tiny_batch(plain, "llava", ["ttitttttt"] * 6)
    masks = {"vision_mask": behind_virtual(batch.vision), "text_mask": behind_virtual(batch.text_after)}
    # No groups: they are assigned by the rows of input_ids, which only one of the two has.
    whole = {"groups": 0}
    expected = measure_mir(plain, [by_hand(model, batch)], capture=masks, metric=whole)
    assert measure_mir(model, [batch.inputs], metric=whole).value == pytest.approx(expected.value, rel=1e-5)


@pytest.fixture(params=[*METHODS, "CPT"])
def untuned(request):
    """A function that adds PEFT's `VIRTUAL` tokens to an existing model."""

    def tune(base):
        torch.manual_seed(3)
        if request.param == "CPT":
            return peft.get_peft_model(base, peft.CPTConfig(task_type="CAUSAL_LM", **CPT)).eval()
        kind, options = METHODS[request.param]
        config = kind(task_type="CAUSAL_LM", num_virtual_tokens=VIRTUAL, **options)
        return peft.get_peft_model(base, config).eval()

    return tune


@BOTH_SIDES
@pytest.mark.parametrize("family", ["llava", "gemma3"])
@pytest.mark.parametrize("placed", ["before", "on the model inside"])
def test_moca_is_the_same_on_either_side_of_peft(untuned, family, placed, padding):
    """PEFT passes only embeddings to the inner model, so the ids must be those that it embedded."""
    model = with_moca(untuned(tiny_model(family, dtype=torch.float32)))
    base = tiny_model(family, dtype=torch.float32)
    if placed == "before":
        other = untuned(with_moca(base))
    else:
        other = untuned(base)
        with_moca(base)
    other.load_state_dict(model.state_dict())  # prompts are initialised randomly
    batch = tiny_batch(base, family, ROWS, padding=padding)
    with torch.no_grad():
        assert torch.equal(other(**batch.inputs).logits, model(**batch.inputs).logits)
        for rows in (["tttt"], ROWS):  # a text-only row, with other ids than the previous pass
            each = tiny_batch(base, family, rows, padding=padding)
            assert torch.equal(other(**each.inputs).logits, model(**each.inputs).logits)
        for beams, use_cache in ((1, True), (2, True), (1, False)):
            options = {"max_new_tokens": 5, "do_sample": False, "num_beams": beams, "use_cache": use_cache}
            options["suppress_tokens"] = [IMAGE]  # without a cache, the model would expect features for it
            assert torch.equal(other.generate(**batch.inputs, **options), model.generate(**batch.inputs, **options))
        with other.disable_adapter(), model.disable_adapter():
            assert torch.equal(other(**batch.inputs).logits, model(**batch.inputs).logits)


@BOTH_SIDES
def test_roles_are_read_of_the_model_inside(untuned, padding):
    base = tiny_model("llava", dtype=torch.float32)
    model = untuned(base)
    batch = tiny_batch(base, "llava", ROWS, padding=padding)
    runs = (lambda: model(**batch.inputs), lambda: model.generate(**batch.inputs, max_new_tokens=3, do_sample=False))
    for run in runs:
        with torch.no_grad(), capture(base) as seen:
            run()
        assert torch.equal(seen.vision_mask, behind_virtual(batch.vision))
        assert torch.equal(seen.text_mask, behind_virtual(batch.text_after))
        assert seen.image_first == 0


def test_mir_of_a_model_that_had_moca_before_its_prompt(untuned):
    model, other = with_moca(tuned("llava")), tiny_model("llava", dtype=torch.float32)
    other = untuned(with_moca(other))
    batch = tiny_batch(model.get_base_model(), "llava", ["ttitttttt"] * 6)
    assert measure_mir(other, [batch.inputs], metric={"groups": 0}).value > 0


def unmarked(model, embeds):
    with torch.no_grad(), pytest.raises(ValueError, match=r"inputs_embeds alone do not mark them\); pass vision_mask"):
        model(inputs_embeds=embeds)


@pytest.mark.parametrize("tune", [False, True])
def test_embeddings_of_the_callers_own_do_not_say_what_is_vision(tune):
    """Ids embedded earlier may be only a part of the row, or belong to another one."""
    base = with_moca(tiny_model("llava", dtype=torch.float32))
    model = tuned_around(base) if tune else base
    ids = tiny_batch(base, "llava", ["ttittttt"]).inputs["input_ids"]
    embedding = base.get_input_embeddings()
    unmarked(base, embedding(ids))
    unmarked(base, torch.cat([torch.randn(1, VIRTUAL, HIDDEN), embedding(ids)], 1))
    features = torch.randn(1, 4, HIDDEN)
    unmarked(base, torch.cat([embedding(ids[:, :2]), features, embedding(ids[:, 6:])], 1))
    unmarked(model, torch.cat([embedding(ids[:, :2]), features, embedding(ids[:, 6:])], 1))


def tuned_around(base):
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=VIRTUAL)
    return peft.get_peft_model(base, config).eval()


@pytest.mark.parametrize("through_peft", [False, True])
def test_ids_of_a_pass_that_failed_are_not_those_of_the_next(through_peft):
    """PEFT embedded as many ids as the next pass has, but never called the inner model."""
    base = with_moca(tiny_model("llava", dtype=torch.float32))
    model = tuned_around(base)
    batch = tiny_batch(base, "llava", ["ttittttt"])
    embeds = torch.randn(*batch.vision.shape, HIDDEN)
    with torch.no_grad(), pytest.raises(RuntimeError, match="Sizes of tensors"):
        model(**batch.inputs, labels=torch.ones(3, 2).long())
    if through_peft:
        unmarked(model, embeds)
    else:
        unmarked(base, behind_virtual_embeds(embeds))
    with torch.no_grad():
        model(**batch.inputs)


def behind_virtual_embeds(embeds):
    return torch.cat([torch.randn(len(embeds), VIRTUAL, HIDDEN), embeds], 1)


def test_a_copy_of_the_embedding_takes_no_model_along():
    """PEFT copies fully trained modules, including their hooks."""
    base = with_moca(tiny_model("llava", dtype=torch.float32))
    embedding = base.get_input_embeddings()
    memo = {}
    copy.deepcopy(embedding, memo)
    assert not {id(module) for module in base.modules() if module is not embedding} & set(memo)
    whole = copy.deepcopy(base)
    model = tuned_around(whole)
    batch = tiny_batch(base, "llava", ROWS)
    with torch.no_grad():
        copied = model(**batch.inputs).logits
        with vision_tokens(whole, behind_virtual(batch.vision)):
            assert torch.equal(model(**batch.inputs).logits, copied)
