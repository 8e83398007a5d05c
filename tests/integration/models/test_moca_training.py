"""Training MoCa: gradient accumulation, mixed precision, transformers' Trainer and PEFT."""

import copy
import warnings

import pytest
import torch

from integration.calibrated_models import ROWS, calibrated, gradients, loss_of
from integration.tiny_models import HIDDEN, LAYERS, Batch, tiny_batch, tiny_model
from modality_integration.models.capture import capture
from modality_integration.models.moca import NAME, add_moca, moca_parameters
from modality_integration.models.moca_files import load_moca, save_moca
from tolerances import assert_close


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


def test_trainer_leaves_moca_out_of_weight_decay(tmp_path):
    from transformers import Trainer, TrainingArguments

    model = calibrated()
    decayed = Trainer(model, TrainingArguments(output_dir=str(tmp_path), use_cpu=True)).get_decay_parameter_names(model)
    assert decayed
    assert not [name for name in decayed if NAME in name]
    listed = moca_parameters(model)
    assert len(listed) == 2 * LAYERS
    assert {id(p) for p in listed} == {id(p) for n, p in model.named_parameters() if NAME in n}


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


def told_of_dtypes(run):
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        run()
    return [str(warning.message) for warning in told if "leave a scale of 1 unchanged" in str(warning.message)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_cast_after_add_moca_is_told_at_the_first_training_pass_with_a_way_out_that_holds(dtype):
    model = tiny_model("llava", dtype=torch.float32)
    batch = tiny_batch(model, "llava", ["tittt"])
    add_moca(model)
    model.to(torch.bfloat16)
    for parameter in moca_parameters(model):
        parameter.data = parameter.data.to(dtype)
    with torch.no_grad():
        assert not told_of_dtypes(lambda: model(**batch.inputs))
    step = {torch.bfloat16: "0.002", torch.float16: "0.0002"}[dtype]
    said = told_of_dtypes(lambda: [model(**batch.inputs) for _ in range(3)])
    assert len(said) == 1
    assert f"in {str(dtype).removeprefix('torch.')}, updates smaller than {step} leave a scale of 1" in said[0]
    moved = []
    for cast in (False, True):
        if cast:
            for p in moca_parameters(model):
                p.data = p.data.float()
        optimizer = torch.optim.SGD(moca_parameters(model), lr=1.0)
        for parameter in moca_parameters(model):
            parameter.grad = torch.full_like(parameter, 1e-4)
        optimizer.step()
        moved.append(all((scale != 1).all() for scale in moca_parameters(model)[::2]))
    assert moved == [False, True]


@pytest.mark.parametrize("why", ["float32", "add_moca has told", "frozen", "trained by an optimizer's copies"])
def test_nothing_is_told_of_dtypes_where_nothing_is_lost(why):
    model = tiny_model("llava", dtype=torch.float32)
    batch = tiny_batch(model, "llava", ["tittt"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        add_moca(model, dtype=torch.bfloat16 if why == "add_moca has told" else None)
    if why != "float32":
        model.to(torch.bfloat16)
    if why == "frozen":
        model.requires_grad_(False)
    if why == "trained by an optimizer's copies":
        for parameter in model.parameters():
            parameter._hp_mapping = "set by DeepSpeed's ZeRO on trained parameters"
    assert not told_of_dtypes(lambda: model(**batch.inputs))


@pytest.mark.parametrize("cast", [False, True], ids=["as PEFT makes it", "cast as TRL does over a quantised base"])
def test_what_peft_trains_is_told_of_where_it_was_cast(cast):
    peft = pytest.importorskip("peft")
    model = tiny_model("llava", dtype=torch.bfloat16)
    batch = tiny_batch(model, "llava", ["tittt"])
    add_moca(model)
    wrapped = peft.get_peft_model(
        model, peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["modality_layernorm"])
    )
    for parameter in wrapped.parameters():
        if cast and parameter.requires_grad:
            parameter.data = parameter.data.to(torch.bfloat16)
    assert len(told_of_dtypes(lambda: [wrapped(**batch.inputs) for _ in range(2)])) == cast


@pytest.mark.parametrize(
    "before",
    ["trained in float32", "a pass with gradients", "copied", "frozen", "one layer alone", "float32 asked for"],
)
def test_a_cast_is_told_of_whatever_was_run_before_it(before):
    model = tiny_model("llava", dtype=torch.float32).train()
    batch = tiny_batch(model, "llava", ["tittt"])
    add_moca(model, dtype=torch.float32 if before == "float32 asked for" else None)
    if before == "frozen":
        model.requires_grad_(False)
        model.to(torch.bfloat16)
    if before == "one layer alone":
        model.model.language_model.layers[2].modality_layernorm.to(torch.bfloat16)
    else:
        assert not told_of_dtypes(lambda: model(**batch.inputs).logits.float().sum())
    if before == "trained in float32":
        model(**batch.inputs).logits.sum().backward()
    if before == "copied":
        model = copy.deepcopy(model)
    if before != "one layer alone":
        model.to(torch.bfloat16)
        model.requires_grad_(True)
    assert len(told_of_dtypes(lambda: [model(**batch.inputs) for _ in range(2)])) == 1


def test_stretches_of_something_flat_may_be_copies_of_float32_parameters():
    """As FSDP1 gathers them: in 16 bits, from 32-bit shards."""
    model = tiny_model("llava", dtype=torch.bfloat16)
    batch = tiny_batch(model, "llava", ["tittt"])
    add_moca(model)
    parameters = moca_parameters(model)
    flat = torch.cat([p.detach().to(torch.bfloat16) for p in parameters])
    for parameter, piece in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
        parameter.data = piece
    assert not told_of_dtypes(lambda: model(**batch.inputs))
