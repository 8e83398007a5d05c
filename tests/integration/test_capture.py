"""`capture`: every family's features bit for bit, through every kind of wrapper, and hooks that always come off."""

import copy

import pytest
import torch
from torch import nn

from integration.tiny_models import FAMILIES, HIDDEN, LAYERS, VOCAB, decoder_of, tiny_batch, tiny_model
from modality_integration.residual_stream import capture
from tolerances import assert_close

ROWS = ("ttittt", "tittittt")


def recorded(model, family, inputs):
    """What each layer handed on, seen from inside the layers' own forward: (raw states, state after the norm)."""
    layers, norm = decoder_of(model, family)
    received, final = [], []

    def listen(module, store, after=False):
        forward = module.forward

        def wrapped(*args, **kwargs):
            store.append((args[0] if args else kwargs["hidden_states"]).clone())
            out = forward(*args, **kwargs)
            if after:
                store.append(out.clone())
            return out

        module.forward = wrapped

    for layer in layers:
        listen(layer, received)
    listen(norm, final, after=True)
    try:
        with torch.no_grad():
            model(**inputs)
    finally:
        for module in (*layers, norm):
            del module.forward
    return [*received[1:], final[0]], final[1]


def hooks_in(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def with_failing(module, run):
    """`run()` while `module` raises ZeroDivisionError."""
    handle = module.register_forward_pre_hook(lambda *_: 1 / 0)
    try:
        run()
    finally:
        handle.remove()


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("family", FAMILIES)
def test_features_are_what_the_layers_hand_on_bit_for_bit(family, padding):
    model = tiny_model(family)
    batch = tiny_batch(model, family, ROWS, padding=padding)
    raw, normed = recorded(model, family, batch.inputs)
    for last, expected in (("raw", raw), ("normed", [*raw[:-1], normed])):
        with torch.no_grad(), capture(model, last=last) as seen:
            model(**batch.inputs)
        assert len(seen.hidden_states) == LAYERS
        for state, reference in zip(seen.hidden_states, expected, strict=True):
            assert torch.equal(state, reference)


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("family", FAMILIES)
def test_roles_are_those_the_batch_was_built_with(family, padding):
    model = tiny_model(family)
    batch = tiny_batch(model, family, ROWS, padding=padding)
    for text, expected in (("after", batch.text_after), ("all", batch.text_all)):
        with torch.no_grad(), capture(model, text=text) as seen:
            model(**batch.inputs)
        assert torch.equal(seen.vision_mask, batch.vision)
        assert torch.equal(seen.text_mask, expected)
        assert not (seen.text_mask & (batch.vision | batch.padding)).any()


def test_padding_does_not_change_which_features_are_counted():
    """The same row alone, padded left and padded right gives the same vision and text features."""
    model = tiny_model("llava")
    features = []
    for padding, pad_to in (("left", 0), ("left", 20), ("right", 20)):
        batch = tiny_batch(model, "llava", ["ttittt"], padding=padding, pad_to=pad_to)
        with torch.no_grad(), capture(model) as seen:
            model(**batch.inputs)
        features.append([torch.cat([h[seen.vision_mask], h[seen.text_mask]]) for h in seen.hidden_states])
    for padded in features[1:]:
        for state, alone in zip(padded, features[0], strict=True):
            assert_close(state, alone, dtype=torch.float32)  # the rotary angles are float32 and depend on the place


def test_a_plain_loop_over_the_layers_gives_the_captured_features():
    model = tiny_model("llava")
    batch = tiny_batch(model, "llava", ["titttt"])
    with torch.no_grad(), capture(model) as seen:
        model(**batch.inputs)
        text = model.model.language_model
        embeds = text.embed_tokens(batch.inputs["input_ids"])
        image = torch.cat(list(model.get_image_features(batch.inputs["pixel_values"]).pooler_output))
        state = embeds.masked_scatter(batch.vision[..., None], image)
        positions = torch.arange(state.shape[1])[None]
        rotary = text.rotary_emb(state, position_ids=positions)
        states = []
        for layer in text.layers:
            state = layer(state, position_embeddings=rotary, position_ids=positions)
            states.append(state)
    expected = [*states[:-1], text.norm(states[-1])]
    for got, reference in zip(seen.hidden_states, expected, strict=True):
        assert torch.equal(got, reference)


def test_deepstack_additions_are_part_of_the_layer_output():
    model = tiny_model("qwen3_vl")
    batch = tiny_batch(model, "qwen3_vl", ["ttittt"])
    with torch.no_grad(), capture(model) as seen:
        reported = model(**batch.inputs, output_hidden_states=True).hidden_states
    assert not torch.equal(seen.hidden_states[0][batch.vision], reported[1][batch.vision])
    assert torch.equal(seen.hidden_states[0][~batch.vision], reported[1][~batch.vision])


def test_a_row_without_an_image_is_named_when_masks_are_read():
    model = tiny_model("llava")
    batch = tiny_batch(model, "llava", ["titt", "tttttt", "titt"])
    with torch.no_grad(), capture(model) as seen:
        model(**batch.inputs)
    assert len(seen.hidden_states) == LAYERS
    with pytest.raises(ValueError, match=r"vision_mask: no vision token in row 1 of the batch \(3 rows\)"):
        _ = seen.text_mask


def test_reading_before_any_pass_is_an_error():
    model = tiny_model("llava")
    with capture(model) as seen, pytest.raises(RuntimeError, match="no forward pass"):
        _ = seen.hidden_states


def test_inputs_embeds_alone_are_an_error_and_masks_or_type_ids_make_it_good():
    model = tiny_model("qwen2_5_vl")
    batch = tiny_batch(model, "qwen2_5_vl", ["titttt"])
    embeds = {"inputs_embeds": model.get_input_embeddings()(batch.inputs["input_ids"])}
    with torch.no_grad(), capture(model) as seen:
        model(**embeds)
    with pytest.raises(ValueError, match=r"inputs_embeds alone do not say.*give vision_mask"):
        _ = seen.vision_mask
    with torch.no_grad(), capture(model, vision_mask=batch.vision) as seen:
        model(**embeds)
    assert torch.equal(seen.vision_mask, batch.vision)
    assert torch.equal(seen.text_mask, batch.text_after)
    with torch.no_grad(), capture(model) as seen:
        model(**embeds, mm_token_type_ids=batch.vision.int())
    assert torch.equal(seen.vision_mask, batch.vision)


def test_masks_of_the_caller_win_and_a_wrong_shape_is_refused():
    model = tiny_model("llava")
    batch = tiny_batch(model, "llava", ["titttt"])
    vision, text = torch.zeros_like(batch.vision), torch.zeros_like(batch.vision)
    vision[0, 0], text[0, 1] = True, True
    with torch.no_grad(), capture(model, vision_mask=vision.float(), text_mask=text) as seen:
        model(**batch.inputs)
    assert torch.equal(seen.vision_mask, vision)
    assert torch.equal(seen.text_mask, text)
    with torch.no_grad(), capture(model, vision_mask=vision[:, :-1]) as seen:
        model(**batch.inputs)
    with pytest.raises(ValueError, match=r"vision_mask: takes one entry per token, shape \(1, 9\), got shape \(1, 8\)"):
        _ = seen.vision_mask


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
        model(**batch.inputs)  # transformers puts hooks of its own on the vision tower in the first pass
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


def test_states_are_detached_and_in_place_damage_is_noticed():
    model = tiny_model("llava")
    batch = tiny_batch(model, "llava", ["titttt"])
    with capture(model) as seen:
        model(**batch.inputs)
    assert not any(state.requires_grad for state in seen.hidden_states)
    seen.hidden_states[1].add_(1)
    with pytest.raises(RuntimeError, match=r"layers\.1 was overwritten in place"):
        _ = seen.hidden_states


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_capture_changes_no_output_bit(mode):
    model = tiny_model("gemma3")
    batch = tiny_batch(model, "gemma3", ROWS)
    with mode():
        alone = model(**batch.inputs).logits
        with capture(model):
            watched = model(**batch.inputs).logits
    assert torch.equal(alone, watched)


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


def test_peft_models_are_looked_through():
    peft = pytest.importorskip("peft")
    model = tiny_model("llava")
    batch = tiny_batch(model, "llava", ["titttt"])
    with torch.no_grad(), capture(model) as plain:
        model(**batch.inputs)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")).eval()
    for given in (wrapped, model):
        with torch.no_grad(), capture(given) as seen:
            wrapped(**batch.inputs)
        assert torch.equal(seen.vision_mask, batch.vision)
        for state, reference in zip(seen.hidden_states, plain.hidden_states, strict=True):
            assert torch.equal(state, reference)


def test_compiled_models_are_refused_with_the_reason():
    model = tiny_model("llava")
    with pytest.raises(ValueError, match="compiled code does not see hooks"), capture(torch.compile(model)):
        pass
    model.model.language_model.layers[0].compile()
    with pytest.raises(ValueError, match=r"layers\.0 is compiled already"), capture(model):
        pass


def test_data_parallel_is_refused():
    with pytest.raises(ValueError, match="DistributedDataParallel"), capture(nn.DataParallel(tiny_model("llava"))):
        pass


def test_cross_attention_models_are_refused_with_the_reason():
    import transformers as tf

    sizes = {"hidden_size": HIDDEN, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = tf.models.mllama.MllamaTextConfig(
        **sizes, vocab_size=VOCAB, num_key_value_heads=1, cross_attention_layers=[1], pad_token_id=0,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4},
    )  # fmt: skip
    model = tf.MllamaForCausalLM(text)
    with pytest.raises(ValueError, match=r"cross-attention.*no vision tokens in its residual stream"), capture(model):
        pass


def test_encoder_decoder_language_models_are_refused_with_the_reason():
    import transformers as tf

    model = tf.T5ForConditionalGeneration(
        tf.T5Config(vocab_size=VOCAB, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    )
    with pytest.raises(ValueError, match="encoder-decoder language model"), capture(model):
        pass


class StandIn(nn.Module):
    """A model of somebody's own: any decoder layers, and a forward argument that marks the vision tokens."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(HIDDEN, HIDDEN) for _ in range(4))
        self.other = nn.ModuleList(nn.Linear(HIDDEN, HIDDEN) for _ in range(2))
        self.ln_f = nn.LayerNorm(HIDDEN)

    def forward(self, hidden_states, images_seq_mask=None, attention_mask=None):
        for block in self.blocks:
            hidden_states = hidden_states + block(hidden_states)
        return self.ln_f(hidden_states)


@pytest.mark.parametrize("by_name", [True, False])
def test_any_module_can_be_captured_by_its_layers_and_a_named_mask(by_name):
    torch.manual_seed(0)
    model = StandIn()
    x, vision = torch.randn(2, 7, HIDDEN), torch.zeros(2, 7, dtype=torch.long)
    vision[0, 1:4], vision[1, 0:2] = 1, 1
    kept = torch.ones(2, 7, dtype=torch.bool)
    kept[1, 5:] = False
    layers = "blocks" if by_name else list(model.blocks)
    with torch.no_grad(), capture(model, layers=layers, vision_mask="images_seq_mask", last="raw") as seen:
        model(x, images_seq_mask=vision, attention_mask=kept)
        state, states = x, []
        for block in model.blocks:
            state = state + block(state)
            states.append(state)
    for got, reference in zip(seen.hidden_states, states, strict=True):
        assert torch.equal(got, reference)
    assert seen.vision_mask.nonzero().tolist() == vision.nonzero().tolist()
    assert seen.text_mask.nonzero().tolist() == [[0, 4], [0, 5], [0, 6], [1, 2], [1, 3], [1, 4]]
    with torch.no_grad(), capture(model, layers=layers, vision_mask="images_seq_mask") as seen:
        assert torch.equal(model(x, images_seq_mask=vision), seen.hidden_states[-1])


def test_an_unclear_layer_list_is_refused_with_the_candidates():
    with pytest.raises(ValueError, match=r"name one of: blocks \(4\), other \(2\)"), capture(StandIn()):
        pass
    with pytest.raises(ValueError, match="no module 'bloks'"), capture(StandIn(), layers="bloks"):
        pass


@pytest.mark.parametrize(("argument", "value"), [("last", "final"), ("text", "before")])
def test_wrong_options_are_named(argument, value):
    with (
        pytest.raises(ValueError, match=f"{argument}: takes one of"),
        capture(tiny_model("llava"), **{argument: value}),
    ):
        pass
