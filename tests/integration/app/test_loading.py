"""Accepted and refused model files; refusals come before anything is measured."""

import shutil
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file

from integration.app.compute_runs import quiet_run
from integration.saved_models import save_tiny_llama
from modality_integration import add_moca, load_moca, remove_moca, save_moca
from modality_integration.app import loading
from modality_integration.app.errors import InputError
from modality_integration.app.options import TokenOptions
from modality_integration.app.samples import choose
from modality_integration.app.stream import stream
from modality_integration.metric import streaming


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "./nowhere"}, "nowhere does not exist"),
        ({"images": "nowhere"}, "images: nowhere does not exist"),
        ({"text": "nowhere"}, "text: nowhere does not exist"),
        ({"device": "cuda:99"}, "device: 'cuda:99' cannot be used here"),
        ({"device": "gpu"}, "device: 'gpu' cannot be used here"),
        ({"samples": 1, "text_tokens": 1, "outliers": "none"}, "layer 1.*text"),
    ],
)
def test_what_cannot_work_is_refused_in_words(options, changes, message):
    with pytest.raises(InputError, match=message):
        quiet_run(options, **changes)


def test_a_model_without_eyes_is_refused_with_its_type(options, tmp_path):
    with pytest.raises(InputError, match="'llama', which does not accept images"):
        quiet_run(options, model=str(save_tiny_llama(tmp_path / "llama")))


def test_a_model_saved_without_its_processor_is_refused_with_the_remedy(options, folders, tmp_path):
    (tmp_path / "bare").mkdir()
    for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "bare" / name).write_bytes((folders / "model" / name).read_bytes())
    with pytest.raises(InputError, match=r"bare"):
        quiet_run(options, model=str(tmp_path / "bare"))


def changed_weights(folders, folder, change):
    """A copy of the model with weights `change(weights)`."""
    shutil.copytree(folders / "model", folder)
    file = folder / "model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})
    return str(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda weights: {k: v for k, v in weights.items() if "projector" not in k},
            r"lack 4 weights \(model.multi_modal_projector.linear_1.bias, .* and 1 more\); with random values",
        ),
        (
            lambda weights: {f"module.{k}": v for k, v in weights.items()},
            r"lack \d+ weights .*; the files have \d+ weights \(module\..* instead, perhaps renamed",
        ),
        (
            lambda weights: {k: v[:, :-1].contiguous() if "linear_1.weight" in k else v for k, v in weights.items()},
            "the shapes of the weights in its files do not match its config.json",
        ),
    ],
)
def test_weights_that_are_missing_or_of_another_shape_are_refused_by_name(options, folders, tmp_path, change, message):
    with pytest.raises(InputError, match=message):
        quiet_run(options, model=changed_weights(folders, tmp_path / "changed", change))


def test_weights_that_the_model_has_no_place_for_are_in_the_notes(options, folders, tmp_path):
    model = changed_weights(folders, tmp_path / "more", lambda weights: weights | {"head.weight": torch.ones(3)})
    result = quiet_run(options, model=model)
    assert "the model's files contain 1 weight (head.weight) that the model does not have; ignored" in result.notes
    assert result.value == quiet_run(options, out=tmp_path / "plain").value


@pytest.mark.parametrize("beside", [False, True])
def test_moca_in_the_models_files_is_measured_with_it(options, tmp_path, beside):
    model, processor, _ = loading.load(options.model, torch.device("cpu"))
    add_moca(model, std=0.5)
    if beside:
        save_moca(model, tmp_path / "trained")
        remove_moca(model)
    model.save_pretrained(tmp_path / "trained")
    processor.save_pretrained(tmp_path / "trained")
    if beside:
        load_moca(model, tmp_path / "trained")
    samples, _, _ = choose(options, Console(quiet=True))
    metric = streaming.ModalityIntegrationRate(groups=5)
    stream(model, processor, samples, metric, TokenOptions(text_tokens=options.text_tokens))

    result = quiet_run(options, model=str(tmp_path / "trained"))
    assert result.value == pytest.approx(metric.compute().value, rel=1e-9)
    assert any("using MoCa from" in note and "in 3 decoder layers" in note for note in result.notes)
    assert result.value != pytest.approx(quiet_run(options, out=tmp_path / "plain").value, rel=1e-3)


def test_a_broken_weight_file_is_one_line(options, folders, tmp_path):
    shutil.copytree(folders / "model", tmp_path / "half")
    file = tmp_path / "half" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-500])
    with pytest.raises(InputError, match=r"model: .*half cannot be loaded: .*incomplete metadata"):
        quiet_run(options, model=str(tmp_path / "half"))


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ImportError("\nQwen2VLVideoProcessor requires the Torchvision library but\nit was"), "needs torchvision: pip"),
        (ImportError("Package `num2words` is required to run SmolVLM processor."), "needs num2words: pip"),
        (ImportError("Using a `device_map` requires Accelerate: pip\nmore"), "device_map` requires Accelerate: pip$"),
        (RuntimeError("operator torchvision::nms does not exist"), "needs torchvision, which does not load: pip"),
        (torch.OutOfMemoryError("CUDA"), "out of memory while loading .*--device-map auto"),
    ],
)
def test_a_package_that_is_missing_or_broken_is_one_line_that_says_what_to_install(options, monkeypatch, error, said):
    def refuse(*args, **kwargs):
        raise error

    monkeypatch.setattr("transformers.AutoProcessor.from_pretrained", refuse)
    with pytest.raises(InputError, match=rf"\Amodel: [^\n]*{said}") as refused:
        quiet_run(options)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"groups": 1}, "groups: expected 0"),
        ({"outliers": "median"}, "outliers: expected .*median"),
        ({"precision": "most"}, "precision: expected"),
        ({"template": "chat"}, "no chat template"),
        ({"out": Path(__file__)}, "out: expected a folder, got the file .*test_loading.py"),
        ({"out": Path(__file__) / "deeper"}, "out: expected a folder, got the file .*test_loading.py"),
    ],
)
def test_what_cannot_work_is_refused_before_the_weights_are_read(options, monkeypatch, changes, message):
    def read(*args, **kwargs):
        pytest.fail("the weights were read")

    monkeypatch.setattr("transformers.AutoModelForImageTextToText.from_pretrained", read)
    with pytest.raises(InputError, match=message):
        quiet_run(options, **changes)


@pytest.mark.parametrize(
    "error", [MemoryError(), torch.OutOfMemoryError("CUDA"), RuntimeError("DefaultCPUAllocator: can't allocate memory")]
)
def test_out_of_memory_says_what_to_lower(options, monkeypatch, error):
    def exhausted(*args, **kwargs):
        raise error

    monkeypatch.setattr(streaming.ModalityIntegrationRate, "update", exhausted)
    with pytest.raises(
        InputError, match=r"out of memory on cpu at sample 1 of 12 .*lower --text-tokens \(now 20\) or --groups"
    ):
        quiet_run(options)


def test_a_device_map_spreads_the_model_and_gives_the_same_bits(options, tmp_path):
    pytest.importorskip("accelerate")
    spread = quiet_run(options, device_map="auto", samples=4)
    assert spread.per_layer == quiet_run(options, samples=4, out=tmp_path / "one").per_layer
