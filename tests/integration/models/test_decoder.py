"""Decoders that `capture` finds, inside wrappers or by the layers' names, and models that it rejects."""

import pytest
import torch
from torch import nn

from integration.tiny_models import HIDDEN, VOCAB, tiny_batch, tiny_model
from modality_integration.models.capture import capture


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
    with pytest.raises(ValueError, match=r"layers\.0 is already compiled"), capture(model):
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
    """A custom model: arbitrary decoder layers, and a forward argument that marks the vision tokens."""

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
    with pytest.raises(ValueError, match=r"pass the name of one of: blocks \(4\), other \(2\)"), capture(StandIn()):
        pass
    with pytest.raises(ValueError, match="no module 'bloks'"), capture(StandIn(), layers="bloks"):
        pass


def test_lists_inside_layers_are_no_candidates():
    def layer():
        block = nn.Module()
        block.experts = nn.ModuleList(nn.Linear(HIDDEN, HIDDEN) for _ in range(2))
        return block

    model = nn.Module()
    model.trunk = nn.Module()
    model.trunk.blocks = nn.ModuleList(layer() for _ in range(3))
    with capture(model, last="raw") as seen:
        assert seen.layer_names == [f"trunk.blocks.{i}" for i in range(3)]
