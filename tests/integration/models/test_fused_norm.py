"""MoCa fused with the preceding addition and the following norm: values and gradients equal the unfused ones."""

import copy
import pickle

import numpy as np
import pytest
import torch
import transformers as tf
from torch import nn
from torch.utils.checkpoint import checkpoint

from integration.calibrated_models import ROWS, gradients, loss_of
from integration.tiny_models import FAMILIES, LAYERS, decoder_of, tiny_batch, tiny_model
from mir_kernels.ops.moca import launch
from modality_integration.models.capture import capture
from modality_integration.models.moca import NAME, add_moca, moca_parameters, remove_moca
from tolerances import assert_close

GEMMA = ("gemma3", "paligemma")
OPT = ("blip_2", "instructblip")
DEEPSTACK = ("qwen3_vl", "qwen3_vl_video")
FUSED = [family for family in FAMILIES if family not in (*GEMMA, *OPT)]


def pair_of(family="llava", *, dtype=torch.float32):
    """The same model twice, with unfused and with fused MoCa."""
    plain = tiny_model(family, dtype=dtype)
    torch.manual_seed(0)
    add_moca(plain, std=0.3, fused=False)
    fused = tiny_model(family, dtype=dtype)
    torch.manual_seed(0)
    add_moca(fused, std=0.3)
    return plain, fused


@pytest.fixture
def calls(monkeypatch):
    """The sequence length of every run of the fused operation in a model."""
    seen = []
    forward = launch.add_rms_forward

    def counted(x, *args):
        if x.dim() == 3:  # not the test of a norm's form
            seen.append(x.shape[1])
        return forward(x, *args)

    monkeypatch.setattr(launch, "add_rms_forward", counted)
    return seen


@pytest.fixture
def norms(monkeypatch):
    """One entry for every Llama RMSNorm that was computed unfused."""
    seen = []
    kind = tf.models.llama.modeling_llama.LlamaRMSNorm
    forward = kind.forward
    monkeypatch.setattr(kind, "forward", lambda self, x: (seen.append(self), forward(self, x))[1])
    return seen


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", FUSED)
def test_logits_states_and_gradients_are_those_of_the_plain_way(family, dtype, calls):
    results = []
    for model in pair_of(family, dtype=dtype):
        batch = tiny_batch(model, family, ROWS)
        with capture(model, last="raw") as seen:
            loss = loss_of(model, batch)
            states = [state.clone() for state in seen.hidden_states]
        loss.backward()
        results.append((model(**batch.inputs).logits.detach(), states, gradients(model)))
    assert len(calls) == 2 * (LAYERS - 2 * (family in DEEPSTACK))
    (logits, states, expected), (fused_logits, fused_states, found) = results
    assert_close(fused_logits, logits)
    first = 2 if family in DEEPSTACK else 0  # bit-equal up to the first fused norm
    for layer, (state, reference) in enumerate(zip(fused_states, states, strict=True)):
        assert_close(state, reference)
        assert torch.equal(state, reference) or layer > first
    assert set(found) == set(expected)
    for name, gradient in found.items():
        # Key biases have only rounding errors as gradients: the softmax ignores them. In fp16, one rounding step is
        # larger than these gradients.
        if expected[name].norm() > 1e-4 * max(g.norm() for g in expected.values()):
            assert_close(gradient, expected[name], dtype=torch.bfloat16 if dtype != torch.float32 else dtype, factor=20)


def test_a_fused_pass_runs_one_norm_a_layer_and_the_first_and_last_no_more(calls, norms):
    _, model = pair_of()
    norms.clear()
    with torch.no_grad():
        model(**tiny_batch(model, "llava", ROWS).inputs)
    assert len(calls) == LAYERS
    assert len(norms) == LAYERS + 1  # the first norm of the first layer, and the second norm of each layer


def test_text_only_batches_and_decoding_steps_are_not_fused_and_keep_every_bit(calls):
    plain, model = pair_of()
    batch = tiny_batch(model, "llava", ["ttttt", "tttt"])
    assert torch.equal(model(**batch.inputs).logits, plain(**batch.inputs).logits)
    assert not calls
    batch = tiny_batch(model, "llava", ["tittt"])
    options = {"max_new_tokens": 6, "do_sample": False}
    found = model.generate(**batch.inputs, **options)
    assert torch.equal(found, plain.generate(**batch.inputs, **options))
    assert torch.equal(found, model.generate(**batch.inputs, **options, use_cache=False))
    prefill = batch.vision.shape[1]
    assert calls == [n for n in (prefill, *range(prefill, prefill + 6)) for _ in range(LAYERS)]  # cached, then not


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("every", [1, 2])
def test_gradient_checkpointing_takes_the_plain_way_and_its_gradients(reentrant, every):
    results = []
    for model in pair_of():
        model.train()
        batch = tiny_batch(model, "llava", ROWS)
        model.activation_checkpointing_enable({"use_reentrant": reentrant}, every_n_layers=every)
        model.enable_input_require_grads()
        loss_of(model, batch).backward()
        results.append(gradients(model))
    assert set(results[0]) == set(results[1])
    for name, gradient in results[1].items():
        if results[0][name].norm() > 1e-7:
            assert_close(gradient, results[0][name], factor=20)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("wrapped", [(0, 1, 2), (1,), (0, 2)])
def test_checkpoints_around_some_layers_leave_the_gradients_alone(reentrant, wrapped):
    results = []
    for model in pair_of():
        model.train()
        batch = tiny_batch(model, "llava", ROWS)
        batch.inputs["use_cache"] = False
        model.enable_input_require_grads()
        layers, named = decoder_of(model, "llava")[0], dict(model.named_parameters())
        for i in wrapped:
            call = layers[i].__call__

            class Around(nn.Module):
                def forward(self, x, call=call, **kwargs):
                    return checkpoint(lambda x: call(x, **kwargs), x, use_reentrant=reentrant)

            layers[i] = Around()
        loss_of(model, batch).backward()
        results.append({name: p.grad for name, p in named.items() if p.grad is not None})
    assert set(results[0]) == set(results[1])
    for name, gradient in results[1].items():
        if results[0][name].norm() > 1e-7:
            assert_close(gradient, results[0][name], factor=20)


@pytest.mark.parametrize("how", ["retain_grad", "backward_hook", "forward_hook", "output_hidden_states", "pre_hook"])
def test_whoever_asks_for_the_gradient_of_the_stream_gets_all_of_it(how):
    results = []
    for model in pair_of():
        batch = tiny_batch(model, "llava", ROWS)
        layers, _ = decoder_of(model, "llava")
        kept = []
        if how == "backward_hook":
            layers[1].register_full_backward_hook(lambda _, __, grad, kept=kept: kept.append(grad[0]))
        elif how == "forward_hook":
            layers[1].register_forward_hook(lambda _, __, out, kept=kept: kept.append(out))
        elif how == "pre_hook":
            layers[2].register_forward_pre_hook(lambda _, args, kept=kept: kept.append(args[0]))
        if how in ("retain_grad", "output_hidden_states"):
            out = model(**batch.inputs, output_hidden_states=True)
            kept, loss = [out.hidden_states[2]], out.logits.square().mean()
        else:
            loss = model(**batch.inputs).logits.square().mean()
        if how == "backward_hook":
            loss.backward()
            results.append(kept[0])
        elif how == "retain_grad":
            kept[0].retain_grad()
            loss.backward()
            results.append(kept[0].grad)
        else:
            results.append(torch.autograd.grad(loss, kept[0])[0])
    assert_close(results[1], results[0], factor=20)


def behind_autograd(h):
    h.data.add_(1)


def through_numpy(h):
    np.add(h.numpy(), 1, out=h.numpy())


CHANGES = {
    "another tensor": lambda h: h * 2,
    "in place": lambda h: h.add_(1),
    "behind autograd's back": behind_autograd,
    "through NumPy": through_numpy,
}


@pytest.mark.parametrize("how", CHANGES)
@pytest.mark.parametrize("where", ["after a layer", "before the next", "before the norm"])
def test_a_state_that_is_changed_between_the_layers_is_normed_anew(how, where):
    change, results = CHANGES[how], []

    def before(_, args):
        changed = change(args[0])
        return None if changed is None else (changed, *args[1:])

    for model in pair_of():
        layers, _ = decoder_of(model, "llava")
        if where == "after a layer":
            layers[1].register_forward_hook(lambda _, __, h: change(h))
        else:
            (layers[2] if where == "before the next" else layers[2].input_layernorm).register_forward_pre_hook(before)
        with torch.no_grad():
            results.append(model(**tiny_batch(model, "llava", ROWS).inputs).logits)
    assert_close(results[1], results[0])


def test_autocast_and_inference_mode_take_the_plain_way(calls):
    plain, model = pair_of()
    batch = tiny_batch(model, "llava", ROWS)
    with torch.inference_mode():
        assert torch.equal(model(**batch.inputs).logits, plain(**batch.inputs).logits)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(model(**batch.inputs).logits, plain(**batch.inputs).logits)
    assert not calls


def test_removing_gives_layers_and_norms_their_forwards_back():
    model = tiny_model("llava", dtype=torch.float32)
    batch = tiny_batch(model, "llava", ROWS)
    before = model(**batch.inputs).logits
    add_moca(model, std=0.3)
    remove_moca(model)
    assert not [m for m in model.modules() if "forward" in m.__dict__ or "_moca" in m.__dict__]
    assert torch.equal(model(**batch.inputs).logits, before)
    add_moca(model, std=0.3)
    layer = decoder_of(model, "llava")[0][1]
    inner = layer.forward
    layer.forward = lambda *args, **kwargs: inner(*args, **kwargs)  # as accelerate's hooks do
    remove_moca(model)
    assert torch.equal(model(**batch.inputs).logits, before)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_are_fused_with_their_own_weights(duplicate, calls):
    _, model = pair_of()
    other = duplicate(model)
    batch = tiny_batch(model, "llava", ROWS)
    with torch.no_grad():
        before = model(**batch.inputs).logits
        assert torch.equal(other(**batch.inputs).logits, before)
        for parameter in (*moca_parameters(other), decoder_of(other, "llava")[1].weight):
            parameter.zero_()
        assert not other(**batch.inputs).logits.any()
        assert torch.equal(model(**batch.inputs).logits, before)
    assert len(calls) == 4 * LAYERS


@pytest.mark.parametrize("first", ["moca", "lora"])
def test_lora_and_moca_train_fused_as_they_do_plain(first):
    peft = pytest.importorskip("peft")
    results = []
    for fused in (False, True):
        base = tiny_model("llava", dtype=torch.float32)
        torch.manual_seed(3)
        options = {"target_modules": ["q_proj", "down_proj"], "r": 2, "init_lora_weights": False}
        if first == "moca":
            add_moca(base, std=0.3, fused=fused)
            model = peft.get_peft_model(base, peft.LoraConfig(modules_to_save=[NAME], **options))
        else:
            torch.manual_seed(5)
            model = peft.get_peft_model(base, peft.LoraConfig(**options))
            add_moca(model, std=0.3, fused=fused)
        model.eval()
        loss_of(model, tiny_batch(base, "llava", ROWS)).backward()
        results.append(gradients(model))
    assert set(results[0]) == set(results[1])
    assert any("lora_B" in name for name in results[0])
    for name, gradient in results[1].items():
        if results[0][name].norm() > 1e-7:
            assert_close(gradient, results[0][name], factor=20)


def test_training_moves_every_parameter_as_the_plain_way_does():
    trained = []
    for model in pair_of():
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for step in range(3):
            optimizer.zero_grad()
            batch = tiny_batch(model, "llava", ("ttittt", "ttttt", "tittit")[step : step + 1], seed=step)
            loss_of(model, batch).backward()
            optimizer.step()
        trained.append(dict(model.named_parameters()))
    for name, parameter in trained[1].items():
        assert_close(parameter, trained[0][name], factor=10)
