"""PEFT adapters as the model: merged into their base model, or refused with advice."""

import json
import re
import shutil

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from modality_integration import add_moca, load_moca, moca_parameters, save_moca
from modality_integration.app import adapters, hub, loading
from modality_integration.app.errors import InputError
from modality_integration.app.hub import Source
from modality_integration.app.prompts import encode

peft = pytest.importorskip("peft")

CPU = torch.device("cpu")
MERGE_FIRST = "merge it first where it was trained: peft.PeftModel.from_pretrained"


def load(folder, **options):
    return loading.load(str(folder), CPU, **options)


@pytest.fixture(scope="module")
def base(folders):
    return folders / "model"


@pytest.fixture
def inputs(base):
    return encode(load(base).processor, Image.new("RGB", (20, 20), (9, 90, 200)), "the cat sits on a house")


def adapted(base, folder, kind=None, moca=None):
    """Write a random adapter for `base` to `folder`, as a Trainer saves it; returns the model with it, unmerged."""
    torch.manual_seed(1)
    model = load(base).model
    if moca:
        add_moca(model)
        for parameter in moca_parameters(model):
            torch.nn.init.normal_(parameter, 0.5, 0.3)
    saved = ["modality_layernorm"] if moca == "in the adapter" else None
    lora = {"target_modules": ["q_proj", "v_proj"], "r": 2, "lora_alpha": 8, "init_lora_weights": False}
    model = peft.get_peft_model(model, kind or peft.LoraConfig(**lora, modules_to_save=saved))
    model.save_pretrained(folder)
    if moca == "beside it":
        save_moca(model, folder)
    return model.eval()


def logits(model, inputs):
    with torch.no_grad():
        return model(**inputs).logits


def edit(folder, **values):
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


@pytest.mark.parametrize(
    "kind",
    [
        None,
        peft.LoraConfig(target_modules=["q_proj"], r=2, use_dora=True, init_lora_weights=False),
        peft.LoHaConfig(target_modules=["q_proj", "v_proj"], r=2, init_weights=False),
        peft.IA3Config(target_modules=["k_proj", "v_proj"], feedforward_modules=[], init_ia3_weights=False),
    ],
    ids=["lora", "dora", "loha", "ia3"],
)
def test_an_adapter_is_merged_into_the_model_it_was_trained_on(base, inputs, tmp_path, kind):
    model = adapted(base, tmp_path / "adapter", kind)
    loaded, _, notes = load(tmp_path / "adapter")
    torch.testing.assert_close(logits(loaded, inputs), logits(model, inputs), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(logits(loaded, inputs), logits(load(base).model, inputs), atol=1e-4)
    assert not any("lora" in name or "adapter" in name for name, _ in loaded.named_modules())
    assert any(f"adapter, merged in memory into {base}" in note for note in notes)
    assert f"{tmp_path / 'adapter'} has no processor; using the processor of {base}, which it was trained from" in notes


@pytest.mark.parametrize("place", ["in the adapter", "beside it"])
def test_the_moca_that_was_trained_with_an_adapter_is_in_the_model(base, inputs, tmp_path, place):
    model = adapted(base, tmp_path / "adapter", moca=place)
    loaded, _, notes = load(tmp_path / "adapter")
    torch.testing.assert_close(logits(loaded, inputs), logits(model, inputs), rtol=1e-4, atol=1e-5)
    assert f"using MoCa from {tmp_path / 'adapter'} in 3 decoder layers" in notes
    again = load(base).model
    load_moca(again, tmp_path / "adapter")
    for ours, theirs in zip(moca_parameters(loaded), moca_parameters(again), strict=True):
        assert torch.equal(ours, theirs)


def test_an_adapter_beside_a_model_is_merged_into_that_and_the_note_says_when_that_is_wrong(base, inputs, tmp_path):
    model = adapted(base, tmp_path / "both")
    for file in (
        "config.json",
        "model.safetensors",
        "processor_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ):
        shutil.copy(base / file, tmp_path / "both")
    edit(tmp_path / "both", base_model_name_or_path="/gone")
    loaded, _, notes = load(tmp_path / "both")
    torch.testing.assert_close(logits(loaded, inputs), logits(model, inputs), rtol=1e-4, atol=1e-5)
    (note,) = notes
    assert "holds a model and a LORA adapter, which was merged into it in memory, as transformers applies it" in note
    assert "if the model already includes the adapter, remove adapter_config.json" in note
    with loading.quiet():
        from transformers import AutoModelForImageTextToText

        theirs = AutoModelForImageTextToText.from_pretrained(tmp_path / "both")
    torch.testing.assert_close(logits(loaded, inputs), logits(theirs.eval(), inputs), rtol=1e-4, atol=1e-5)


def test_weights_that_the_model_beside_an_adapter_lacks_are_refused(base, tmp_path):
    adapted(base, tmp_path / "both")
    shutil.copy(base / "config.json", tmp_path / "both")
    weights = load_file(base / "model.safetensors")
    whole = {name: value for name, value in weights.items() if "projector" not in name}
    save_file(whole, tmp_path / "both" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"both lack 4 weights .*projector"):
        load(tmp_path / "both", processor=str(base))


def test_a_base_named_by_a_path_from_elsewhere_is_found_around_the_adapter(base, tmp_path):
    shutil.copytree(base, tmp_path / "models" / "base")
    adapted(base, tmp_path / "runs" / "adapter")
    edit(tmp_path / "runs" / "adapter", base_model_name_or_path="models/base")
    notes = load(tmp_path / "runs" / "adapter").notes
    assert any(f"merged in memory into {tmp_path / 'models' / 'base'}" in note for note in notes)


def no_peft(folder, patch):
    patch.setattr(adapters, "installed", lambda package: None)


def no_peft_beside_weights(folder, patch):
    shutil.copy(
        json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] + "/config.json", folder
    )
    (folder / "model.safetensors").write_bytes(b"")
    no_peft(folder, patch)


def no_base(folder, patch):
    edit(folder, base_model_name_or_path=None)


def base_is_gone(folder, patch):
    edit(folder, base_model_name_or_path="./gone")


def base_has_an_adapter(folder, patch):
    shutil.copytree(folder, folder.parent / "first")
    edit(folder, base_model_name_or_path=str(folder.parent / "first"))


def no_weights(folder, patch):
    (folder / "adapter_model.safetensors").unlink()


def fewer_weights(folder, patch):
    weights = load_file(folder / "adapter_model.safetensors")
    weights.pop(sorted(weights)[0])
    save_file(weights, folder / "adapter_model.safetensors")


def a_projector_beside(folder, patch):
    torch.save({"model.mm_projector.0.weight": torch.ones(2, 2)}, folder / "non_lora_trainables.bin")


def no_json(folder, patch):
    (folder / "adapter_config.json").write_text("{")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (no_peft, rf"is a LORA adapter, which needs peft: pip install peft; or {MERGE_FIRST}"),
        (no_peft_beside_weights, r"is a LORA adapter next to a model, which needs peft: pip install peft"),
        (no_base, rf"names no base_model_name_or_path; {MERGE_FIRST}"),
        (base_is_gone, rf"for ./gone: base model: ./gone does not exist; .* or {MERGE_FIRST}"),
        (base_has_an_adapter, rf"which itself has an adapter; {MERGE_FIRST}"),
        (no_weights, r"without weights: expected adapter_model.safetensors or adapter_model.bin"),
        (fewer_weights, r"lacks 1 weight \(.*lora_A"),
        (
            a_projector_beside,
            rf"has 1 weight \(model.mm_projector.0.weight\) in non_lora_trainables.bin .*{MERGE_FIRST}",
        ),
        (no_json, "is not valid JSON"),
    ],
)
def test_what_cannot_be_merged_here_is_one_line_that_says_what_to_do(base, tmp_path, monkeypatch, change, said):
    adapted(base, tmp_path / "adapter")
    change(tmp_path / "adapter", monkeypatch)
    with pytest.raises(InputError) as refused:
        load(tmp_path / "adapter")
    assert re.search(said, str(refused.value)), refused.value
    assert "\n" not in str(refused.value)


def test_virtual_tokens_are_no_change_of_weights(base, tmp_path):
    adapted(base, tmp_path / "adapter")
    edit(tmp_path / "adapter", peft_type="PROMPT_TUNING", num_virtual_tokens=4, task_type="CAUSAL_LM")
    with pytest.raises(
        InputError, match="is a PROMPT_TUNING adapter, which adds virtual tokens and changes no weights"
    ):
        load(tmp_path / "adapter")


def test_an_adapter_of_the_hub_is_downloaded_whole(base, inputs, tmp_path, monkeypatch):
    model = adapted(base, tmp_path / "adapter")
    find = hub.find

    def on_the_hub(what, name, revision=None):
        return Source(name, None, revision) if name == "owner/adapter" else find(what, name, revision)

    def download(name, revision):
        assert (name, revision) == ("owner/adapter", "v1")
        return str(tmp_path / "adapter")

    monkeypatch.setattr(hub, "find", on_the_hub)
    monkeypatch.setattr("transformers.utils.hub.cached_file", lambda name, file, **_: tmp_path / "adapter" / file)
    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    loaded, _, notes = load("owner/adapter", revision="v1")
    torch.testing.assert_close(logits(loaded, inputs), logits(model, inputs), rtol=1e-4, atol=1e-5)
    assert f"owner/adapter is a LORA adapter, merged in memory into {base}" in notes
