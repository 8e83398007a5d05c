"""MoCa in transformers models: the published formula at the end of every decoder layer, and no change elsewhere."""

import copy
import math
import pickle
import re
import types

import pytest
import torch
from torch import nn

from integration.calibrated_models import ROWS, calibrated, gradients, loss_of
from integration.tiny_models import FAMILIES, HIDDEN, LAYERS, decoder_of, tiny_batch, tiny_model
from modality_integration.models.capture import capture
from modality_integration.models.moca import NAME, add_moca, moca_parameters, remove_moca
from tolerances import assert_close

KEY = re.compile(r"layers\.\d+\.modality_layernorm\.(scale|shift)$")


def formula(model, family, batch):
    """A copy without hooks whose layers' forwards apply Eq. 5 as published, `(1 - m) h + m (u h + v)`."""
    layers, _ = decoder_of(model, family)
    vectors = [(layer.get_submodule(NAME).scale, layer.get_submodule(NAME).shift) for layer in layers]
    plain = copy.deepcopy(model)
    remove_moca(plain)
    m = batch.vision[..., None].to(vectors[0][0].dtype)
    for layer, (u, v) in zip(decoder_of(plain, family)[0], vectors, strict=True):
        forward = layer.forward

        def wrapped(*args, forward=forward, u=u, v=v, **kwargs):
            h = forward(*args, **kwargs)
            return (1 - m) * h + m * (u * h + v)

        layer.forward = wrapped
    return plain


@pytest.mark.parametrize("family", FAMILIES)
def test_ones_and_zeros_leave_every_logit_bit_as_it_was(family):
    model = tiny_model(family)
    batch = tiny_batch(model, family, ROWS)
    with torch.no_grad():
        before = model(**batch.inputs).logits
        report = add_moca(model)
        after = model(**batch.inputs).logits
    assert torch.equal(before, after)
    assert [site.hidden_size for site in report.sites] == [HIDDEN] * LAYERS
    names = [name for name, _ in model.named_parameters() if NAME in name]
    prefix = FAMILIES[family].layers
    assert names == [f"{prefix}.{i}.{NAME}.{part}" for i in range(LAYERS) for part in ("scale", "shift")]


@pytest.mark.parametrize("family", FAMILIES)
def test_capture_sees_what_moca_made_of_the_vision_tokens(family):
    model = tiny_model(family)
    batch = tiny_batch(model, family, ROWS, padding="left")
    torch.manual_seed(5)
    add_moca(model, std=0.3)
    with torch.no_grad(), capture(model, last="raw") as seen:
        logits = model(**batch.inputs).logits
        with capture(plain := formula(model, family, batch), last="raw") as expected:
            # The formula wraps the layers, and DeepStack additions come after it, as in the model itself.
            assert_close(plain(**batch.inputs).logits, logits)
    for state, reference in zip(seen.hidden_states, expected.hidden_states, strict=True):
        assert_close(state, reference)


@pytest.mark.parametrize("family", ["llava", "qwen3_vl", "gemma3", "blip_2"])
def test_gradients_are_those_of_the_published_formula(family):
    model = calibrated(family)
    batch = tiny_batch(model, family, ROWS)
    loss_of(model, batch).backward()
    ours = gradients(model)
    model.zero_grad()
    plain = formula(model, family, batch)
    loss_of(plain, batch).backward()
    reference = {**gradients(plain), **{n: g for n, g in gradients(model).items() if NAME in n}}
    assert set(ours) == set(reference)
    for name, gradient in ours.items():
        if reference[name].norm() > 1e-15:  # key biases have no gradient: the softmax ignores them
            assert_close(gradient, reference[name], factor=100)
    assert all(ours[n].norm() > 0 for n in ours if KEY.search(n))


def test_gradients_equal_finite_differences():
    model = calibrated("blip_2")  # OPT's norms stay in float64, Llama's use float32
    batch = tiny_batch(model, "blip_2", ROWS)
    loss_of(model, batch).backward()
    step = 1e-6
    for parameter in moca_parameters(model):
        direction = torch.randn(HIDDEN, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
        with torch.no_grad():
            values = []
            for sign in (1, -1):
                parameter.add_(sign * step * direction)
                values.append(loss_of(model, batch).item())
                parameter.sub_(sign * step * direction)
        assert (values[0] - values[1]) / (2 * step) == pytest.approx((parameter.grad @ direction).item(), rel=1e-5)


def test_text_only_batches_call_no_moca_and_keep_every_bit(monkeypatch):
    model = tiny_model("llava")
    batch = tiny_batch(model, "llava", ["ttttt", "tttt"])
    with torch.no_grad():
        before = model(**batch.inputs).logits
    torch.manual_seed(0)
    add_moca(model, std=0.3)
    for layer in decoder_of(model, "llava")[0]:
        monkeypatch.setattr(layer.get_submodule(NAME), "forward", None)
    assert torch.equal(model(**batch.inputs).logits, before)


def test_adding_twice_and_removing_nothing_are_refused():
    model = calibrated()
    with pytest.raises(ValueError, match="already has MoCa"):
        add_moca(model)
    remove_moca(model)
    for call in (remove_moca, moca_parameters):
        with pytest.raises(ValueError, match="has no MoCa"):
            call(model)
    with pytest.raises(ValueError, match="std: expected a number >= 0"):
        add_moca(model, std=-1.0)


def test_removing_restores_outputs_hooks_and_state_dict():
    model = tiny_model("llava")
    batch = tiny_batch(model, "llava", ROWS)
    with torch.no_grad():
        before = model(**batch.inputs).logits
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    keys = list(model.state_dict())
    add_moca(model, std=0.3)
    remove_moca(model)
    with torch.no_grad():
        assert torch.equal(model(**batch.inputs).logits, before)
    assert [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()] == hooks
    assert list(model.state_dict()) == keys


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_are_independent(duplicate):
    model = calibrated()
    batch = tiny_batch(model, "llava", ROWS)
    other = duplicate(model)
    with torch.no_grad():
        before = model(**batch.inputs).logits
        assert torch.equal(other(**batch.inputs).logits, before)
        for parameter in moca_parameters(other):
            parameter.zero_()
        assert not torch.equal(other(**batch.inputs).logits, before)
        assert torch.equal(model(**batch.inputs).logits, before)
    remove_moca(other)
    with torch.no_grad():
        assert torch.equal(model(**batch.inputs).logits, before)


def test_random_start_follows_the_published_distribution():
    model = tiny_model("llava")
    torch.manual_seed(0)
    add_moca(model, std=0.02)
    scales = torch.cat([p for n, p in model.named_parameters() if n.endswith(f"{NAME}.scale")])
    shifts = torch.cat([p for n, p in model.named_parameters() if n.endswith(f"{NAME}.shift")])
    assert scales.mean().item() == pytest.approx(1, abs=0.01)
    for values in (scales, shifts):
        assert values.std().item() == pytest.approx(0.02, rel=0.3)
    assert shifts.mean().item() == pytest.approx(0, abs=0.01)


def test_the_report_names_the_norm_that_reads_each_output():
    report = add_moca(tiny_model("llava"))
    prefix = "model.language_model"
    assert [site.layer for site in report.sites] == [f"{prefix}.layers.{i}" for i in range(LAYERS)]
    assert [site.read_by for site in report.sites] == [
        f"{prefix}.layers.1.input_layernorm",
        f"{prefix}.layers.2.input_layernorm",
        f"{prefix}.norm",
    ]
    assert "MoCa at the end of 3 decoder layers" in str(report)


def test_what_moca_cannot_compute_in_is_refused_before_anything_is_placed():
    model = tiny_model("llava")
    with pytest.raises(TypeError, match=r"vision_mask: expected the name of .* got Tensor; .* vision_tokens"):
        add_moca(tiny_model("llava"), vision_mask=torch.ones(1, 3))
    with pytest.raises(TypeError, match=r"dtype: expected one of the dtypes float32, bfloat16, .* got torch\.int32"):
        add_moca(model, dtype=torch.int32)
    assert not any(m._forward_hooks or m._forward_pre_hooks or hasattr(m, NAME) for m in model.modules())


def test_a_dtype_that_does_not_train_is_warned_of():
    with pytest.warns(UserWarning, match="dtype: in bfloat16, updates smaller than 0.002 leave a scale of 1 unchanged"):
        add_moca(tiny_model("llava"), dtype=torch.bfloat16)


def test_models_wrapped_for_distributed_training_are_refused(monkeypatch):
    model = tiny_model("llava")
    monkeypatch.setattr(nn.parallel.DistributedDataParallel, "__init__", lambda self, m: nn.Module.__init__(self))
    wrapped = nn.parallel.DistributedDataParallel(model)
    wrapped.module = model
    with pytest.raises(ValueError, match="already wrapped by DistributedDataParallel"):
        add_moca(wrapped)


class Wide(nn.Module):
    """A decoder with d = 8 whose layers return `shape` for ids (B, T)."""

    def __init__(self, shape):
        super().__init__()
        self.config = types.SimpleNamespace(hidden_size=8, image_token_id=5, num_hidden_layers=1)
        self.embedding, self.shape = nn.Embedding(10, 8), shape
        self.layers = nn.ModuleList([nn.Identity()])

    def forward(self, input_ids):
        states = self.embedding(input_ids).repeat(1, 1, 6)
        return self.layers[0](states.flatten()[: math.prod(self.shape)].view(self.shape))


@pytest.mark.parametrize("shape", [(2, 3, 16), (4, 2, 3, 8), (2, 3, 4, 8), (6, 8)], ids=str)
def test_streams_of_another_shape_are_refused_with_what_a_layer_returned(shape):
    model = Wide(shape)
    add_moca(model, layers="layers")
    given = re.escape(f"expected one state of 8 values per token from every layer, shape (B, T, 8), got {shape}")
    with pytest.raises(ValueError, match=given):
        model(torch.tensor([[1, 5, 2], [5, 1, 2]]))
