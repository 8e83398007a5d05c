"""`capture`: hidden states bit for bit, and token roles, for every family."""

import pytest
import torch

from integration.tiny_models import FAMILIES, LAYERS, decoder_of, tiny_batch, tiny_model
from modality_integration.models.capture import capture
from tolerances import assert_close

ROWS = ("ttittt", "tittittt")


def recorded(model, family, inputs):
    """The output of each layer, recorded inside the layers' forwards: (raw states, state after the norm)."""
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
    """A row has the same vision and text features alone, padded left and padded right."""
    model = tiny_model("llava")
    features = []
    for padding, pad_to in (("left", 0), ("left", 20), ("right", 20)):
        batch = tiny_batch(model, "llava", ["ttittt"], padding=padding, pad_to=pad_to)
        with torch.no_grad(), capture(model) as seen:
            model(**batch.inputs)
        features.append([torch.cat([h[seen.vision_mask], h[seen.text_mask]]) for h in seen.hidden_states])
    for padded in features[1:]:
        for state, alone in zip(padded, features[0], strict=True):
            assert_close(state, alone, dtype=torch.float32)  # rotary angles are float32 and depend on the position


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
    with pytest.raises(ValueError, match=r"inputs_embeds alone do not mark them.*pass vision_mask"):
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
    with pytest.raises(ValueError, match=r"vision_mask: expected .* per token, shape \(1, 9\), got shape \(1, 8\)"):
        _ = seen.vision_mask


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


@pytest.mark.parametrize(("argument", "value"), [("last", "final"), ("text", "before")])
def test_wrong_options_are_named(argument, value):
    with (
        pytest.raises(ValueError, match=f"{argument}: expected one of"),
        capture(tiny_model("llava"), **{argument: value}),
    ):
        pass
