"""What `capture` counts as a forward pass: generation, failures, nesting, copies, and removal of its hooks."""

import copy

import pytest
import torch

from integration.tiny_models import HIDDEN, tiny_batch, tiny_model
from modality_integration.models.capture import capture
from tolerances import assert_close

ROWS = ("ttittt", "tittittt")


def hooks_in(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def with_failing(module, run):
    """Calls `run()` while `module` raises ZeroDivisionError."""
    handle = module.register_forward_pre_hook(lambda *_: 1 / 0)
    try:
        run()
    finally:
        handle.remove()


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_generation_leaves_the_prefill_standing(family):
    model = tiny_model(family)
    batch = tiny_batch(model, family, ROWS, padding="left")
    with torch.no_grad(), capture(model) as alone:
        model(**batch.inputs)
    with capture(model) as seen:
        model.generate(**batch.inputs, max_new_tokens=4, do_sample=False)
    assert seen.passes == 1
    assert torch.equal(seen.vision_mask, batch.vision)
    for state, reference in zip(seen.hidden_states, alone.hidden_states, strict=True):
        assert_close(state, reference, dtype=torch.float32)  # generate counts positions without the padding


def test_blip_generation_which_skips_the_models_forward_has_roles_too():
    model = tiny_model("blip_2")
    batch = tiny_batch(model, "blip_2", ["ittt", "ittt"])
    with capture(model) as seen:
        model.generate(**batch.inputs, max_new_tokens=3, do_sample=False)
    assert torch.equal(seen.vision_mask, batch.vision)
    assert torch.equal(seen.text_mask, batch.text_after)


def test_each_pass_replaces_the_one_before_and_positional_inputs_are_understood():
    model = tiny_model("llava")
    with torch.no_grad(), capture(model) as seen:
        for rows in (["ttit"], ["itttt", "tittt"]):
            batch = tiny_batch(model, "llava", rows)
            inputs = batch.inputs
            model(inputs["input_ids"], inputs["pixel_values"], inputs["attention_mask"])
            assert torch.equal(seen.vision_mask, batch.vision)
            assert seen.hidden_states[0].shape == (*batch.vision.shape, HIDDEN)
    assert seen.passes == 2


def test_hooks_come_off_after_an_exception_and_a_failed_pass_is_not_a_result():
    model = tiny_model("llava")
    batch = tiny_batch(model, "llava", ["titt"])
    with torch.no_grad():
        model(**batch.inputs)  # in the first pass, transformers adds hooks to the vision tower
    before = hooks_in(model)
    inner = model.model.language_model.layers[1].mlp
    longer = tiny_batch(model, "llava", ["titttt"])

    def one_good_pass_and_one_bad():
        with torch.no_grad(), capture(model) as seen:
            passes.append(seen)
            model(**batch.inputs)
            with_failing(inner, lambda: model(**longer.inputs))

    passes = []
    with pytest.raises(ZeroDivisionError):
        one_good_pass_and_one_bad()
    (seen,) = passes
    assert hooks_in(model) == before
    assert seen.passes == 1
    assert seen.hidden_states[0].shape[1] == batch.vision.shape[1]


def test_a_pass_after_a_failed_one_is_recorded_as_usual():
    model = tiny_model("llava")
    batch = tiny_batch(model, "llava", ["titttt"])
    with torch.no_grad(), capture(model) as seen:
        with pytest.raises(ValueError, match="do not match"):
            model(**{**batch.inputs, "pixel_values": batch.inputs["pixel_values"].repeat(3, 1, 1, 1)})
        model(**batch.inputs)
    assert torch.equal(seen.vision_mask, batch.vision)


def test_nested_captures_agree():
    model = tiny_model("llava")
    batch = tiny_batch(model, "llava", ["titttt"])
    with torch.no_grad(), capture(model) as outer, capture(model, last="raw") as inner:
        model(**batch.inputs)
    for one, other in zip(outer.hidden_states[:-1], inner.hidden_states[:-1], strict=True):
        assert torch.equal(one, other)
    assert not torch.equal(outer.hidden_states[-1], inner.hidden_states[-1])


def test_gradient_checkpointing_does_not_disturb_the_capture():
    model = tiny_model("llava")
    batch = tiny_batch(model, "llava", ["titttt"])
    with torch.no_grad(), capture(model) as plain:
        model(**batch.inputs)
    model.gradient_checkpointing_enable()
    model.train()
    with capture(model) as seen:
        model(**batch.inputs, labels=batch.inputs["input_ids"]).loss.backward()
    assert seen.passes == 1
    for state, reference in zip(seen.hidden_states, plain.hidden_states, strict=True):
        assert torch.equal(state, reference)


def test_a_deep_copy_made_while_capturing_records_nothing_of_the_original():
    model = tiny_model("llava")
    batch = tiny_batch(model, "llava", ["titttt"])
    with torch.no_grad(), capture(model) as seen:
        copy.deepcopy(model)(**batch.inputs)
    assert seen.passes == 0
