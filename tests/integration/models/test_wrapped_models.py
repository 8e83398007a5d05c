"""MoCa and `capture` when other code runs the model: DataParallel, accelerate, adapters, and enclosing models."""

import importlib

import accelerate
import pytest
import torch
from torch import nn

from integration.calibrated_models import PROBE, ROWS, calibrated, loss_of
from integration.tiny_models import HIDDEN, LAYERS, tiny_batch, tiny_model
from modality_integration import add_moca, capture, load_moca, measure_mir, moca_parameters, save_moca
from modality_integration.models.moca import NAME
from tolerances import assert_close


def logits_of(model, batch):
    with torch.no_grad():
        return model(**batch.inputs).logits


@pytest.fixture
def replicas_of(monkeypatch):
    """Creates replicas as nn.DataParallel does, with copies in CPU memory instead of on GPUs."""
    replicating = importlib.import_module("torch.nn.parallel.replicate")
    monkeypatch.setattr(replicating, "_get_device_index", lambda device, optional: device)
    monkeypatch.setattr(
        replicating, "_broadcast_coalesced_reshape", lambda tensors, devices, detach: [list(tensors) for _ in devices]
    )
    return lambda model: replicating.replicate(model, [0, 1])


@pytest.fixture
def accelerator():
    """An accelerator that computes in bf16; its options are global to the process, so they are reset afterwards."""
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    yield accelerate.Accelerator(mixed_precision="bf16", cpu=True)
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)


def test_replicas_of_data_parallel_are_refused_with_the_reason(replicas_of, recwarn):
    plain, model = tiny_model("llava"), calibrated()
    batch = tiny_batch(plain, "llava", ROWS)
    expected = logits_of(plain, batch)
    for replica in replicas_of(plain):
        assert torch.equal(logits_of(replica, batch), expected)
    reason = "runs as a copy that shares this model's hooks, as nn.DataParallel's replicas do.*DistributedDataParallel"
    for replica in replicas_of(model):
        with pytest.raises(RuntimeError, match=reason):
            logits_of(replica, batch)
    with capture(plain) as seen:
        for replica in replicas_of(plain):
            with pytest.raises(RuntimeError, match=reason):
                logits_of(replica, batch)
    assert seen.passes == 0
    assert torch.equal(logits_of(plain, batch), expected)
    assert not [warning for warning in recwarn if "silenced" in str(warning.message)]  # from a failed hook


def test_data_parallel_without_gpus_runs_the_model_itself(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("replicates on this machine")
    model = calibrated()
    wrapped, batch = nn.DataParallel(model), tiny_batch(model, "llava", ROWS)
    with capture(model) as seen:
        assert torch.equal(logits_of(wrapped, batch), logits_of(model, batch))
    assert torch.equal(seen.vision_mask, batch.vision)
    other = calibrated(seed=1)
    load_moca(wrapped, save_moca(other, tmp_path))
    for parameter, expected in zip(moca_parameters(wrapped), moca_parameters(other), strict=True):
        assert torch.equal(parameter, expected)


@pytest.mark.parametrize("first", ["moca", "prepare"])
def test_a_model_that_accelerate_prepared_for_bf16_is_measured_and_trained_in_it(accelerator, first):
    def in_autocast(model, run):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return run(model)

    reference, model = calibrated(dtype=torch.float32), tiny_model("llava", dtype=torch.float32)
    batch, probe = tiny_batch(model, "llava", ROWS), [tiny_batch(model, "llava", PROBE).inputs]
    if first == "prepare":
        model = accelerator.prepare(model)
    torch.manual_seed(0)
    add_moca(model, std=0.3)
    if first == "moca":
        model = accelerator.prepare(model)
    assert measure_mir(model, probe).value == in_autocast(reference, lambda m: measure_mir(m, probe)).value
    with torch.no_grad(), capture(model) as seen:
        model(*(batch.inputs[name] for name in ("input_ids", "pixel_values", "attention_mask")))
    assert torch.equal(seen.vision_mask, batch.vision)
    loss_of(model, batch).backward()
    in_autocast(reference, lambda m: loss_of(m, batch)).backward()
    for parameter, expected in zip(moca_parameters(model), moca_parameters(reference), strict=True):
        assert_close(parameter.grad, expected.grad, dtype=torch.bfloat16)


def test_an_adapter_of_transformers_own_holds_moca(tmp_path):
    """`add_adapter` does not wrap the model; MoCa is listed in modules_to_save."""
    peft = pytest.importorskip("peft")
    model = tiny_model("llava", dtype=torch.float32)
    batch = tiny_batch(model, "llava", ROWS)
    bare = logits_of(model, batch)
    add_moca(model)
    config = peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=2, modules_to_save=[NAME])
    model.add_adapter(config)
    listed = moca_parameters(model)
    assert [parameter.shape for parameter in listed] == [(HIDDEN,)] * 2 * LAYERS
    assert all(parameter.requires_grad for parameter in listed)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    for _ in range(3):
        optimizer.zero_grad()
        loss_of(model, batch).backward()
        optimizer.step()
    trained = logits_of(model, batch)
    assert all(not torch.equal(p, torch.ones(HIDDEN)) and bool(p.any()) for p in moca_parameters(model))
    model.disable_adapters()
    assert torch.equal(logits_of(model, batch), bare)
    model.enable_adapters()
    model.save_pretrained(tmp_path / "adapter")

    from_adapter, from_both = tiny_model("llava", dtype=torch.float32), tiny_model("llava", dtype=torch.float32)
    add_moca(from_adapter)
    from_adapter.load_adapter(tmp_path / "adapter")
    from_both.load_adapter(tmp_path / "adapter")
    load_moca(from_both, tmp_path / "adapter")
    load_moca(file_model := tiny_model("llava", dtype=torch.float32), save_moca(model, tmp_path / "moca"))
    for again in (from_adapter, from_both):
        assert_close(logits_of(again.eval(), batch), trained)
    for parameter, expected in zip(moca_parameters(file_model), moca_parameters(model), strict=True):
        assert torch.equal(parameter, expected)


def test_a_part_of_the_model_with_moca_serves_the_whole():
    whole, reference = tiny_model("llava"), calibrated()
    batch = tiny_batch(whole, "llava", ROWS)
    torch.manual_seed(0)
    add_moca(whole.model, std=0.3)  # it has no head
    assert torch.equal(logits_of(whole, batch), logits_of(reference, batch))
    with torch.no_grad(), capture(whole.model) as seen:
        whole.model(**batch.inputs)
    assert torch.equal(seen.vision_mask, batch.vision)


def test_the_language_model_alone_takes_text_as_without_moca():
    model, plain = calibrated(), tiny_model("llava")
    words = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        states = [m.model.language_model(input_ids=words).last_hidden_state for m in (model, plain)]
    assert torch.equal(*states)


def test_a_head_that_classifies_has_roles_and_moca_too():
    import transformers as tf

    config = tiny_model("gemma3").config
    config.num_labels = 2
    model = tf.Gemma3ForSequenceClassification(config).eval()
    batch = tiny_batch(model, "gemma3", ["ttittttt"])
    with torch.no_grad(), capture(model) as seen:
        plain = model(**batch.inputs).logits
    assert torch.equal(seen.vision_mask, batch.vision)
    assert torch.equal(seen.text_mask, batch.text_after)
    add_moca(model, std=0.3)
    assert not torch.equal(logits_of(model, batch), plain)


@pytest.mark.parametrize("sequences", [1, 3])
def test_several_sequences_of_one_prompt_have_the_roles_of_their_row(sequences):
    model = calibrated(dtype=torch.float32)
    batch = tiny_batch(model, "llava", ROWS, padding="left")
    with torch.no_grad(), capture(model) as seen:
        model.generate(**batch.inputs, max_new_tokens=3, do_sample=True, num_return_sequences=sequences)
    assert torch.equal(seen.vision_mask, batch.vision.repeat_interleave(sequences, 0))
