"""Which layers and norms are recognised as Llama's, so that MoCa is fused with them, and why others are not."""

import pytest
import torch
import transformers as tf

from integration.tiny_models import FAMILIES, LAYERS, TEXT, decoder_of, tiny_model
from modality_integration.models.llama_form import is_llama_layer, is_llama_norm
from modality_integration.models.moca import add_moca, remove_moca


@pytest.mark.parametrize("kind", ["Llama", "Qwen2", "Qwen3", "Mistral"])
def test_text_decoders_are_fused(kind):
    torch.manual_seed(1)
    model = getattr(tf, f"{kind}ForCausalLM")(getattr(tf, f"{kind}Config")(**TEXT)).eval()
    report = add_moca(model, std=0.3)
    assert [site.plain for site in report.sites] == [None] * LAYERS
    assert str(report).count("fused with model.") == LAYERS


@pytest.mark.parametrize(
    ("family", "reasons"),
    [
        ("gemma3", ["forward does not have Llama's form"] * 3),
        ("paligemma", ["GemmaRMSNorm is not Llama's RMSNorm"] * 3),
        ("blip_2", ["OPTDecoderLayer's forward does not have Llama's form"] * 3),
        ("qwen3_vl", ["DeepStack", "DeepStack", None]),
        ("qwen2_5_vl", [None] * 3),
        ("idefics3", [None] * 3),
    ],
)
def test_the_report_says_what_is_fused_and_why_the_rest_is_not(family, reasons):
    report = add_moca(tiny_model(family, dtype=torch.float32))
    for site, reason in zip(report.sites, reasons, strict=True):
        assert (site.plain is None) if reason is None else (reason in site.plain)
        line = next(line for line in str(report).splitlines() if line.startswith(f"{site.layer}:"))
        assert (f"fused with {site.read_by}" if reason is None else f"not fused: {site.plain}") in line


def test_what_is_not_fused_in_a_known_layer_has_its_reason():
    wide = add_moca(tiny_model("llava"))
    assert {site.plain for site in wide.sites} == {"Llama's RMSNorm rounds float64 to float32"}
    model = tiny_model("llava", dtype=torch.float32)
    assert {site.plain for site in add_moca(model, fused=False).sites} == {"fused=False"}
    remove_moca(model)
    layers, norm = decoder_of(model, "llava")
    layers[1].forward = layers[1].forward
    norm.forward = norm.forward
    reasons = [site.plain for site in add_moca(model).sites]
    assert [bool(reason) for reason in reasons] == [True, True, True]
    assert "LlamaDecoderLayer's forward" in reasons[0]
    assert "LlamaRMSNorm is not" in reasons[2]


def test_a_layer_that_does_anything_else_is_not_taken_for_llamas():
    layer = tf.models.llama.modeling_llama.LlamaDecoderLayer

    class Scaled(layer):
        def forward(self, hidden_states, **kwargs):
            return super().forward(hidden_states, **kwargs) * 2

    class Same(layer):
        def forward(self, hidden_states, attention_mask=None, position_embeddings=None, **kwargs):
            h = self.input_layernorm(hidden_states)
            h = (
                hidden_states
                + self.self_attn(
                    hidden_states=h, attention_mask=attention_mask, position_embeddings=position_embeddings, **kwargs
                )[0]
            )
            return h + self.mlp(self.post_attention_layernorm(h))

    class Deaf(layer):
        def forward(self, hidden_states, attention_mask=None, **kwargs):
            return super().forward(hidden_states, **kwargs)

    class Tuple(layer):
        def forward(self, hidden_states, **kwargs):
            return (super().forward(hidden_states, **kwargs),)

    found = [is_llama_layer(kind) for kind in (layer, Scaled, Same, Deaf, Tuple)]
    assert found == [True, False, True, False, False]


def test_a_model_built_on_no_device_does_not_spoil_the_trial_of_the_next():
    for trial in (is_llama_layer, is_llama_norm):
        trial.cache_clear()
    with torch.device("meta"):
        layers, norm = decoder_of(FAMILIES["llava"].build(), "llava")
        assert is_llama_layer(type(layers[0]))
        assert is_llama_norm(type(norm))
    assert {site.plain for site in add_moca(tiny_model("llava", dtype=torch.float32)).sites} == {None}
