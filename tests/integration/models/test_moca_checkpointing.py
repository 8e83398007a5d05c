"""MoCa under gradient checkpointing: the same gradients, with little additional memory."""

import gc
import weakref
from functools import cached_property

import pytest
import torch
from torch import nn

from integration.calibrated_models import ROWS, calibrated, gradients, loss_of
from integration.tiny_models import HIDDEN, LAYERS, tiny_batch, tiny_model
from mir_kernels.ops.moca import VisionMask
from modality_integration.models.moca import NAME
from tolerances import assert_close


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("family", ["llava", "qwen3_vl"])
def test_gradient_checkpointing_gives_the_same_gradients(family, reentrant):
    model = calibrated(family).train()
    batch = tiny_batch(model, family, ROWS)
    loss_of(model, batch).backward()
    expected = gradients(model)
    model.zero_grad()
    model.activation_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    loss_of(model, batch).backward()
    for name, gradient in gradients(model).items():
        if "language_model" in name or "lm_head" in name:
            assert_close(gradient, expected[name], factor=10)
    assert all(name in gradients(model) for name in expected if NAME in name)


def test_the_vision_rows_of_a_pass_are_counted_once_and_forgotten_after_its_backward(monkeypatch):
    counted = []
    of = VisionMask.places.func
    places = cached_property(lambda self: counted.append(weakref.ref(self)) or of(self))
    places.__set_name__(VisionMask, "places")
    monkeypatch.setattr(VisionMask, "places", places)
    model = calibrated()
    for passes in (1, 2):
        loss = loss_of(model, tiny_batch(model, "llava", ROWS))
        assert len(counted) == passes
        loss.backward()
        del loss
        gc.collect()
        assert counted[-1]() is None


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_layers_keep_vision_rows_and_no_state_more(reentrant):
    kept = []
    for with_moca in (False, True):
        model = calibrated() if with_moca else tiny_model("llava")
        model.train().activation_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
        batch = tiny_batch(model, "llava", ROWS)
        shapes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, seen=shapes: seen.append(t.shape) or t, lambda t: t):
            loss_of(model, batch)
        kept.append((shapes.count((*batch.vision.shape, HIDDEN)), shapes.count((int(batch.vision.sum()), HIDDEN))))
    (states, none), (states_with_moca, rows) = kept
    assert states_with_moca == states
    assert rows - none == LAYERS


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints_around_whole_layers_recompute_with_the_mask_of_their_pass(reentrant):
    from torch.utils.checkpoint import checkpoint

    def around(layer):
        call = layer.__call__
        return lambda *args, **kwargs: checkpoint(lambda x: call(x, **kwargs), *args, use_reentrant=reentrant)

    model = calibrated().train()
    batches = [tiny_batch(model, "llava", [row]) for row in ("ttittt", "tittit", "titt", "ittt", "tttt")]
    for batch in batches:
        batch.inputs["use_cache"] = False  # recomputation would append to the cache a second time
    for batch in batches:
        loss_of(model, batch).backward()
    expected = gradients(model)
    model.zero_grad()
    text = model.model.language_model
    outer = nn.ModuleList(Around(layer, around(layer)) for layer in text.layers)
    text.layers = outer
    model.enable_input_require_grads()
    for batch in batches:  # gradient accumulation: a backward after every pass
        loss_of(model, batch).backward()
    for name, gradient in gradients(model).items():
        inner = name.replace(".inner.", ".")
        if NAME in name:
            assert_close(gradient, expected[inner], factor=10)
    sum(loss_of(model, batch) for batch in batches[:2]).backward()  # distinguished by their shapes
    alike = sum(loss_of(model, batch) for batch in batches[2:4])
    with pytest.raises(RuntimeError, match="run backward after each pass"):
        alike.backward()
    loss_of(model, batches[0]).backward()  # the next pass works again


class Around(nn.Module):
    """A decoder layer inside a checkpoint that also recomputes its hooks."""

    def __init__(self, inner, call):
        super().__init__()
        self.inner = inner
        object.__setattr__(self, "call", call)

    def forward(self, *args, **kwargs):
        return self.call(*args, **kwargs)
