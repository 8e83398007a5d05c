"""MoCa inside transformers models: where it acts, where it costs nothing, and the training set-ups it survives."""

import copy
import gc
import pickle
import re
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from integration.tiny_models import FAMILIES, HIDDEN, LAYERS, Batch, decoder_of, tiny_batch, tiny_model
from mir_kernels.moca import rows as kernels
from modality_integration.moca import (
    NAME,
    add_moca,
    load_moca,
    moca_parameters,
    remove_moca,
    save_moca,
    vision_tokens,
)
from modality_integration.residual_stream import capture
from tolerances import assert_close

ROWS = ("ttittt", "tittittt")
KEY = re.compile(r"layers\.\d+\.modality_layernorm\.(scale|shift)$")


def calibrated(family="llava", *, dtype=torch.float64, seed=0, std=0.3):
    model = tiny_model(family, dtype=dtype)
    torch.manual_seed(seed)
    add_moca(model, std=std)
    return model


def loss_of(model, batch):
    labels = batch.inputs["input_ids"].masked_fill(batch.vision | batch.padding, -100)
    logits = model(**batch.inputs).logits  # the models' own loss is float32
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def formula(model, family, batch):
    """Eq. 5 as published, `(1 - m) h + m (u h + v)`, put around every layer's forward of a model without hooks."""
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
            # the published formula around the layers, DeepStack additions after it as in the model itself
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
        if reference[name].norm() > 1e-15:  # key biases have none: the softmax does not see them
            assert_close(gradient, reference[name], factor=100)
    assert all(ours[n].norm() > 0 for n in ours if KEY.search(n))


def test_gradients_equal_finite_differences():
    model = calibrated("blip_2")  # OPT's norms stay in float64, Llama's go through float32
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


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "gemma3", "blip_2"])
def test_generation_with_a_cache_equals_generation_without(family):
    model = calibrated(family)
    batch = tiny_batch(model, family, ["tittt", "titttt"], padding="left")
    options = {"max_new_tokens": 6, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    cached = model.generate(**batch.inputs, **options, use_cache=True)
    whole = model.generate(**batch.inputs, **options, use_cache=False)
    assert torch.equal(cached.sequences, whole.sequences)
    for step, reference in zip(cached.logits, whole.logits, strict=True):
        assert_close(step, reference, dtype=torch.float32)


def test_generation_calibrates_the_prefill_and_no_decoding_step():
    model = calibrated()
    batch = tiny_batch(model, "llava", ["tittt"])
    lengths = []
    layer = decoder_of(model, "llava")[0][0]
    layer.get_submodule(NAME).register_forward_pre_hook(lambda _, args: lengths.append(args[0].shape[1]))
    model.generate(**batch.inputs, max_new_tokens=5, do_sample=False)
    assert lengths == [batch.vision.shape[1]]


def test_blip_beam_search_repeats_the_mask_with_the_rows():
    model = calibrated("blip_2")
    batch = tiny_batch(model, "blip_2", ["ittt", "itttt"], padding="left")
    lengths = []
    layer = decoder_of(model, "blip_2")[0][0]
    layer.get_submodule(NAME).register_forward_pre_hook(lambda _, args: lengths.append(args[1].sum().item()))
    model.generate(**batch.inputs, max_new_tokens=3, do_sample=False, num_beams=3)
    assert lengths == [2 * 3 * 4]  # rows, beams, tokens of an image; then only decoding steps


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


def test_nothing_of_a_pass_is_kept_after_its_backward_but_its_mask():
    gc.collect()
    before, model = len(kernels._PLACES), calibrated()
    loss = loss_of(model, tiny_batch(model, "llava", ROWS))
    assert len(kernels._PLACES) == before + 1
    loss.backward()
    del loss
    gc.collect()
    assert len(kernels._PLACES) == before


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
        batch.inputs["use_cache"] = False  # recomputation would append to the cache once more
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
    sum(loss_of(model, batch) for batch in batches[:2]).backward()  # told apart by their shapes
    alike = sum(loss_of(model, batch) for batch in batches[2:4])
    with pytest.raises(RuntimeError, match="run backward after each pass"):
        alike.backward()
    loss_of(model, batches[0]).backward()  # and the next pass is sound again


class Around(nn.Module):
    """A decoder layer inside a checkpoint that recomputes its hooks too."""

    def __init__(self, inner, call):
        super().__init__()
        self.inner = inner
        object.__setattr__(self, "call", call)

    def forward(self, *args, **kwargs):
        return self.call(*args, **kwargs)


def test_gradient_accumulation_equals_one_large_batch():
    model = calibrated()
    whole = tiny_batch(model, "llava", ["ttittt", "ittttt", "tttitt"])
    loss_of(model, whole).backward()
    expected = gradients(model)
    model.zero_grad()
    for row in range(3):
        one = Batch(
            {k: v[row : row + 1] for k, v in whole.inputs.items()},
            *(mask[row : row + 1] for mask in (whole.vision, whole.text_after, whole.text_all, whole.padding)),
        )
        (loss_of(model, one) * text_targets(one) / text_targets(whole)).backward()
    for name, gradient in gradients(model).items():
        if NAME in name:
            assert_close(gradient, expected[name], factor=100)


def text_targets(batch):
    return batch.text_all[:, 1:].sum().item()


def test_bf16_activations_with_float32_parameters():
    exact, model = tiny_model("llava"), tiny_model("llava", dtype=torch.bfloat16)
    report = add_moca(model)
    add_moca(exact)
    torch.manual_seed(0)
    for wide, narrow in zip(moca_parameters(exact), moca_parameters(model), strict=True):
        with torch.no_grad():
            narrow.add_(0.3 * torch.randn(HIDDEN))
            wide.copy_(narrow)
    assert {site.dtype for site in report.sites} == {torch.float32}
    batch = tiny_batch(model, "llava", ROWS)
    with capture(model) as seen:
        loss_of(model, batch).backward()
    assert {state.dtype for state in seen.hidden_states} == {torch.bfloat16}
    assert {p.grad.dtype for p in moca_parameters(model)} == {torch.float32}
    with torch.no_grad(), capture(exact) as wide:
        exact(**tiny_batch(exact, "llava", ROWS).inputs)
    for state, reference in zip(seen.hidden_states, wide.hidden_states, strict=True):
        assert_close(state, reference, dtype=torch.bfloat16, factor=3)


def test_autocast_trains_float32_parameters():
    model = calibrated(dtype=torch.float32)
    batch = tiny_batch(model, "llava", ROWS)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = loss_of(model, batch)
    loss.backward()
    ours = [p.grad.clone() for p in moca_parameters(model)]
    model.zero_grad()
    loss_of(model, batch).backward()
    for gradient, p in zip(ours, moca_parameters(model), strict=True):
        assert_close(gradient, p.grad, dtype=torch.bfloat16, factor=10)


def test_state_dict_round_trip():
    model, other = calibrated(seed=1), calibrated(seed=2)
    missing, unexpected = other.load_state_dict(model.state_dict())
    assert not missing
    assert not unexpected
    batch = tiny_batch(model, "llava", ROWS)
    with torch.no_grad():
        assert torch.equal(model(**batch.inputs).logits, other(**batch.inputs).logits)


@pytest.mark.parametrize("name", ["", "weights.safetensors"])
def test_saved_keys_are_the_published_ones_and_load_into_a_model_without_moca(tmp_path, name):
    model, bare = calibrated("idefics3"), tiny_model("idefics3")
    file = save_moca(model, tmp_path / name)
    keys = {f"model.layers.{i}.modality_layernorm.{part}" for i in range(LAYERS) for part in ("scale", "shift")}
    assert set(load_file(file)) == keys
    load_moca(bare, tmp_path / name)
    batch = tiny_batch(model, "idefics3", ROWS)
    with torch.no_grad():
        assert torch.equal(model(**batch.inputs).logits, bare(**batch.inputs).logits)


def test_published_checkpoints_and_whole_model_checkpoints_load(tmp_path):
    model = calibrated()
    vectors = {n: p.detach().clone() for n, p in model.named_parameters() if NAME in n}
    torch.save({n.replace("language_model.", ""): p for n, p in vectors.items()}, tmp_path / "non_lora_trainables.bin")
    model.save_pretrained(tmp_path / "whole")
    for path in (tmp_path / "non_lora_trainables.bin", tmp_path, tmp_path / "whole"):
        other = calibrated(seed=7)
        load_moca(other, path)
        for name, value in vectors.items():
            assert torch.equal(other.get_parameter(name), value)


def test_a_folder_of_a_lora_run_loads(tmp_path):
    """MoCa in a torch file, beside an adapter in safetensors and a pickle that is no file of tensors."""
    model, other = calibrated(), calibrated(seed=7)
    vectors = {n: p.detach().clone() for n, p in model.named_parameters() if NAME in n}
    torch.save(vectors, tmp_path / "non_lora_trainables.bin")
    torch.save(re.compile("arguments"), tmp_path / "training_args.bin")
    save_file({"base_model.model.x.lora_A.weight": torch.ones(2, 2)}, tmp_path / "adapter_model.safetensors")
    load_moca(other, tmp_path)
    assert all(torch.equal(other.get_parameter(name), value) for name, value in vectors.items())


def test_incomplete_or_misfitting_checkpoints_change_nothing(tmp_path):
    model = calibrated()
    before = [p.clone() for p in moca_parameters(model)]
    stored = load_file(save_moca(model, tmp_path / "good.safetensors"))
    last = f"model.layers.{LAYERS - 1}.modality_layernorm.shift"
    save_file({k: v + 1 for k, v in stored.items() if k != last}, tmp_path / "short.safetensors")
    save_file({**{k: v + 1 for k, v in stored.items()}, last: torch.ones(3)}, tmp_path / "odd.safetensors")
    save_file({"lm_head.weight": torch.ones(3)}, tmp_path / "none.safetensors")
    for name, reason in (("short", f"left over: {LAYERS - 1}.shift"), ("odd", "length 32"), ("none", "no key")):
        with pytest.raises(ValueError, match=reason):
            load_moca(model, tmp_path / f"{name}.safetensors")
    with pytest.raises(FileNotFoundError, match="no safetensors or torch file"):
        load_moca(model, tmp_path / "absent")
    for parameter, value in zip(moca_parameters(model), before, strict=True):
        assert torch.equal(parameter, value)


def test_adding_twice_and_removing_nothing_are_refused():
    model = calibrated()
    with pytest.raises(ValueError, match="has MoCa already"):
        add_moca(model)
    remove_moca(model)
    for call in (remove_moca, moca_parameters):
        with pytest.raises(ValueError, match="has no MoCa"):
            call(model)
    with pytest.raises(ValueError, match="std: takes a number >= 0"):
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


def test_trainer_leaves_moca_out_of_weight_decay():
    from transformers import Trainer, TrainingArguments

    model = calibrated()
    decayed = Trainer(model, TrainingArguments(output_dir="unused", use_cpu=True)).get_decay_parameter_names(model)
    assert decayed
    assert not [name for name in decayed if NAME in name]
    listed = moca_parameters(model)
    assert len(listed) == 2 * LAYERS
    assert {id(p) for p in listed} == {id(p) for n, p in model.named_parameters() if NAME in n}


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


def test_a_mask_of_the_caller_replaces_the_marker():
    model = calibrated()
    batch = tiny_batch(model, "llava", ["titttt"])
    with torch.no_grad():
        marked = model(**batch.inputs).logits
        with vision_tokens(model, batch.vision):
            assert torch.equal(model(**batch.inputs).logits, marked)
        with vision_tokens(model, torch.zeros_like(batch.vision)):
            nothing = model(**batch.inputs).logits
        assert torch.equal(model(**batch.inputs).logits, marked)
        embeds = model.get_input_embeddings()(batch.inputs["input_ids"])
        with pytest.raises(ValueError, match="inputs_embeds alone do not say"):
            model(inputs_embeds=embeds)
    remove_moca(model)
    with torch.no_grad():
        assert torch.equal(model(**batch.inputs).logits, nothing)


def test_a_layer_run_outside_the_model_is_an_error_and_not_a_guess():
    model = calibrated()
    layer = decoder_of(model, "llava")[0][0]
    x = torch.randn(1, 5, HIDDEN, dtype=torch.float64)
    rotary = model.model.language_model.rotary_emb(x, position_ids=torch.arange(5)[None])
    with pytest.raises(RuntimeError, match="outside a forward pass"):
        layer(x, position_embeddings=rotary)
    vision = torch.tensor([[0, 1, 1, 0, 0]])
    with torch.no_grad(), vision_tokens(model, vision):
        out = layer(x, position_embeddings=rotary)
        with vision_tokens(model, vision * 0):
            plain = layer(x, position_embeddings=rotary)
    assert torch.equal(out[:, [0, 3, 4]], plain[:, [0, 3, 4]])
    moca = layer.get_submodule(NAME)
    assert_close(out[:, 1:3], plain[:, 1:3] * moca.scale + moca.shift)


def test_a_forward_after_an_interrupted_one_goes_by_its_own_mask():
    model, interrupted = calibrated(), calibrated()
    first, second = (tiny_batch(model, "llava", [row]) for row in ("itttt", "tttti"))

    def interrupt(*_):
        raise KeyboardInterrupt

    hook = decoder_of(interrupted, "llava")[0][1].mlp.register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        interrupted(**first.inputs)
    hook.remove()
    with torch.no_grad():
        assert torch.equal(interrupted(**second.inputs).logits, model(**second.inputs).logits)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])  # plain; fused
def test_threads_in_one_model_go_by_their_own_masks(dtype):
    model = calibrated(dtype=dtype)
    batches = [tiny_batch(model, "llava", [row]) for row in ("itttt", "tttti")]
    layer = decoder_of(model, "llava")[0][0]
    with torch.no_grad():
        expected = [model(**batch.inputs).logits for batch in batches]
        # the first thread stops inside its first layer until the second one is through, which then outlives nothing
        inside, through = threading.Event(), threading.Event()
        main = threading.get_ident()

        def wait(*_):
            if threading.get_ident() != main:
                inside.set()
                assert through.wait(60)

        layer.mlp.register_forward_pre_hook(wait)
        with ThreadPoolExecutor(1) as pool:
            other = pool.submit(torch.no_grad()(lambda: model(**batches[0].inputs).logits))
            assert inside.wait(60)
            found = model(**batches[1].inputs).logits
            through.set()
            assert torch.equal(other.result(), expected[0])
        assert torch.equal(found, expected[1])
        assert torch.equal(model(**batches[0].inputs).logits, expected[0])


def test_a_thread_that_came_second_keeps_its_mask_when_the_first_has_left():
    model = calibrated()
    batches = [tiny_batch(model, "llava", [row]) for row in ("itttt", "tttti")]
    watch = decoder_of(model, "llava")[0][0]._moca.watch
    with torch.no_grad():
        expected = model(**batches[1].inputs).logits
        entered, left = threading.Event(), threading.Event()

        def wait(*_):
            entered.set()
            assert left.wait(60)

        watch._enter(model, (), {})  # this thread is in a pass, the other one comes and outlasts it
        hook = decoder_of(model, "llava")[0][0].mlp.register_forward_pre_hook(wait)
        with ThreadPoolExecutor(1) as pool:
            other = pool.submit(torch.no_grad()(lambda: model(**batches[1].inputs).logits))
            assert entered.wait(60)
            watch._leave(model, (), None)
            left.set()
            assert torch.equal(other.result(), expected)
        hook.remove()


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("recorded", [False, True])
def test_what_a_hook_from_before_moca_kept_is_not_overwritten(fused, recorded):
    model = tiny_model("llava", dtype=torch.float32)
    kept = []
    hook = decoder_of(model, "llava")[0][0].register_forward_hook(lambda _, __, out: kept.append((out, out.clone())))
    add_moca(model, std=0.3, fused=fused)
    batch = tiny_batch(model, "llava", ROWS)
    if recorded:
        (loss_of(model, batch) + kept[0][0].square().mean()).backward()  # square keeps the state for its gradient
    else:
        with torch.no_grad():
            model(**batch.inputs)
    assert all(torch.equal(state, copied) for state, copied in kept)
    hook.remove()


def test_what_moca_cannot_compute_in_is_refused_before_anything_is_placed():
    model = tiny_model("llava")
    with pytest.raises(TypeError, match=r"dtype: takes float32, bfloat16, float16, float64, got torch\.int32"):
        add_moca(model, dtype=torch.int32)
    assert not any(m._forward_hooks or m._forward_pre_hooks or hasattr(m, NAME) for m in model.modules())


def test_a_dtype_that_does_not_train_is_warned_of():
    with pytest.warns(UserWarning, match="dtype: in bfloat16 a scale of 1 stays 1 under steps smaller than 0.002"):
        add_moca(tiny_model("llava"), dtype=torch.bfloat16)


class Decoder(nn.Module):
    """The least that MoCa can be put into: residual layers and an argument that marks the vision tokens."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(Residual() for _ in range(2))
        self.norm = nn.RMSNorm(HIDDEN)

    def forward(self, x, marks):
        for layer in self.layers:
            x = layer(x)
        return self.norm(x)


class Residual(nn.Linear):
    def __init__(self):
        super().__init__(HIDDEN, HIDDEN)

    def forward(self, x):
        return x + torch.tanh(super().forward(x))


def test_compiles_in_one_graph_and_serves_every_mask_and_length():
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = Decoder()
    add_moca(model, std=0.3, vision_mask="marks")
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=True)
    for length in (9, 12, 1):
        x = torch.randn(2, length, HIDDEN)
        for marks in (torch.arange(length) % 3 == 1, torch.arange(length) > 5, torch.zeros(length).bool()):
            marks = marks.expand(2, length)
            expected, out = model(x, marks), compiled(x, marks)
            assert_close(out, expected)
            ours = torch.autograd.grad(out.square().mean(), list(model.layers.parameters()), allow_unused=True)
            reference = torch.autograd.grad(
                expected.square().mean(), list(model.layers.parameters()), allow_unused=True
            )
            for gradient, exact in zip(ours, reference, strict=True):
                if exact is not None:
                    assert_close(gradient, exact, factor=3)
                elif gradient is not None:  # without an image compiled code gives zeros where eager gives none
                    assert not gradient.any()
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])  # plain; fused but where compiled
def test_a_compiled_vision_language_model_gives_the_same_logits_and_breaks_no_more_graphs(dtype):
    breaks = []
    for with_moca in (False, True):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        model = calibrated(dtype=dtype) if with_moca else tiny_model("llava", dtype=dtype)
        compiled = torch.compile(model, backend="aot_eager")
        for rows in (ROWS, ("titttt",)):
            batch = tiny_batch(model, "llava", rows)
            with torch.no_grad():
                found, expected = compiled(**batch.inputs).logits, model(**batch.inputs).logits
                assert torch.equal(found, expected) or (dtype == torch.float32 and with_moca)
                assert_close(found, expected)
        breaks.append(sum(torch._dynamo.utils.counters["graph_break"].values()))
    torch._dynamo.reset()
    assert breaks[1] == breaks[0]


def test_models_wrapped_for_distributed_training_are_refused(monkeypatch):
    model = tiny_model("llava")
    monkeypatch.setattr(nn.parallel.DistributedDataParallel, "__init__", lambda self, m: nn.Module.__init__(self))
    wrapped = nn.parallel.DistributedDataParallel(model)
    wrapped.module = model
    with pytest.raises(ValueError, match="DistributedDataParallel already"):
        add_moca(wrapped)


def lora(**options):
    from peft import LoraConfig

    return LoraConfig(target_modules=["q_proj", "v_proj"], r=2, task_type="CAUSAL_LM", **options)


@pytest.mark.parametrize("family", ["llava", "blip_2"])
@pytest.mark.parametrize("first", ["moca", "lora"])
def test_lora_before_or_after_moca_trains_both(family, first, tmp_path):
    peft = pytest.importorskip("peft")
    base = tiny_model(family)
    batch = tiny_batch(base, family, ROWS)
    reference = tiny_model(family)
    torch.manual_seed(3)
    add_moca(reference, std=0.3)
    torch.manual_seed(3)
    if first == "moca":
        add_moca(base, std=0.3)
        model = peft.get_peft_model(base, lora(modules_to_save=[NAME]))
    else:
        model = peft.get_peft_model(base, lora())
        torch.manual_seed(3)
        add_moca(model, std=0.3)
    model.eval()
    with torch.no_grad():  # LoRA starts as the identity
        assert_close(model(**batch.inputs).logits, reference(**batch.inputs).logits)
    loss_of(model, batch).backward()
    loss_of(reference, batch).backward()
    assert any("lora_B" in name for name in gradients(model))
    for parameter, expected in zip(moca_parameters(model), moca_parameters(reference), strict=True):
        assert parameter.requires_grad
        assert_close(parameter.grad, expected.grad, factor=100)
    file = save_moca(model, tmp_path)
    fresh = tiny_model(family)
    load_moca(fresh, file)
    for parameter, expected in zip(moca_parameters(fresh), moca_parameters(reference), strict=True):
        assert torch.equal(parameter, expected)


def test_peft_freezes_moca_that_is_not_named_in_modules_to_save():
    peft = pytest.importorskip("peft")
    base = tiny_model("llava")
    add_moca(base)
    model = peft.get_peft_model(base, lora())
    assert not any(p.requires_grad for p in moca_parameters(model))
