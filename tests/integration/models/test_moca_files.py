"""MoCa's scale and shift in files: our own, published checkpoints, whole models, and files that do not fit."""

import re

import pytest
import torch
from safetensors.torch import load_file, save_file

from integration.calibrated_models import ROWS, calibrated
from integration.tiny_models import LAYERS, tiny_batch, tiny_model
from modality_integration.models.moca import NAME, moca_parameters
from modality_integration.models.moca_files import load_moca, save_moca


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
    """MoCa in a torch file, next to an adapter in safetensors and a pickle that is not a file of tensors."""
    model, other = calibrated(), calibrated(seed=7)
    vectors = {n: p.detach().clone() for n, p in model.named_parameters() if NAME in n}
    torch.save(vectors, tmp_path / "non_lora_trainables.bin")
    torch.save(re.compile("arguments"), tmp_path / "training_args.bin")
    save_file({"base_model.model.x.lora_A.weight": torch.ones(2, 2)}, tmp_path / "adapter_model.safetensors")
    load_moca(other, tmp_path)
    assert all(torch.equal(other.get_parameter(name), value) for name, value in vectors.items())


@pytest.mark.parametrize(
    "form",
    [
        "model.layers.{i}.modality_layernorm.{part}",
        "model.transformer.blocks.{i}.modality_layernorm.{part}",  # Molmo 2 as written by transformers
        "model.language_model.layers.{i}._orig_mod.modality_layernorm.{part}",  # compiled layers
        "layers.{i}._fsdp_wrapped_module._checkpoint_wrapped_module.modality_layernorm.{part}",
        "model.layers.{i}.modality_layernorm._fsdp_wrapped_module.modules_to_save.default.{part}",
    ],
)
def test_keys_are_known_by_their_ends_whatever_stands_before_and_between(tmp_path, form):
    model, other = calibrated(), calibrated(seed=7)
    stored = load_file(save_moca(model, tmp_path / "own.safetensors"))
    renamed = {}
    for key, value in stored.items():
        i, part = re.fullmatch(r"model\.layers\.(\d+)\.modality_layernorm\.(scale|shift)", key).groups()
        renamed[form.format(i=i, part=part)] = value
    save_file(renamed, tmp_path / "theirs.safetensors")
    load_moca(other, tmp_path / "theirs.safetensors")
    for ours, theirs in zip(moca_parameters(other), moca_parameters(model), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    "way", ["another adapter is active", "the adapter was deleted", "two are active", "adapters are disabled"]
)
def test_of_several_adapters_the_moca_that_runs_is_listed_and_saved(tmp_path, way):
    peft = pytest.importorskip("peft")
    model = calibrated(dtype=torch.float32)
    own = [p.detach().clone() for p in moca_parameters(model)]
    with_moca = peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["modality_layernorm"])
    wrapped = peft.get_peft_model(model, with_moca)
    for parameter in moca_parameters(wrapped):
        parameter.data += 1
    wrapped.add_adapter("plain", peft.LoraConfig(target_modules=["q_proj"]))
    if way == "another adapter is active":
        wrapped.set_adapter("plain")
    elif way == "the adapter was deleted":
        wrapped.set_adapter("plain")
        wrapped.delete_adapter("default")
    elif way == "adapters are disabled":
        wrapped.base_model.disable_adapter_layers()
    else:
        wrapped.base_model.set_adapter(["plain", "default"])
    expected = [p + (way == "two are active") for p in own]
    assert all(torch.equal(p, q) for p, q in zip(moca_parameters(wrapped), expected, strict=True))
    bare = tiny_model("llava", dtype=torch.float32)
    load_moca(bare, save_moca(wrapped, tmp_path))
    batch = tiny_batch(bare, "llava", ROWS)
    with torch.no_grad():
        difference = bare(**batch.inputs).logits - wrapped(**batch.inputs).logits
    assert difference.abs().max() < 1e-5


def test_incomplete_or_misfitting_checkpoints_change_nothing(tmp_path):
    model = calibrated()
    before = [p.clone() for p in moca_parameters(model)]
    stored = load_file(save_moca(model, tmp_path / "good.safetensors"))
    last = f"model.layers.{LAYERS - 1}.modality_layernorm.shift"
    save_file({k: v + 1 for k, v in stored.items() if k != last}, tmp_path / "short.safetensors")
    save_file({**{k: v + 1 for k, v in stored.items()}, last: torch.ones(3)}, tmp_path / "odd.safetensors")
    save_file({"lm_head.weight": torch.ones(3)}, tmp_path / "none.safetensors")
    for name, reason in (("short", f"unexpected: {LAYERS - 1}.shift"), ("odd", "length 32"), ("none", "no key")):
        with pytest.raises(ValueError, match=reason):
            load_moca(model, tmp_path / f"{name}.safetensors")
    with pytest.raises(FileNotFoundError, match="no safetensors or torch file"):
        load_moca(model, tmp_path / "absent")
    for parameter, value in zip(moca_parameters(model), before, strict=True):
        assert torch.equal(parameter, value)
