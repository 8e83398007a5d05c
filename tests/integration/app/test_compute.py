"""`mir compute`: MIR against features collected sample by sample, its files and output, and its settings."""

import importlib.metadata
import io
import json

import pytest
import torch
from rich.console import Console

from integration.app.compute_runs import SAMPLES, quiet_run
from integration.saved_models import write_images
from modality_integration import MIRResult, mir
from modality_integration.app import loading
from modality_integration.app.compute import run
from modality_integration.app.prompts import truncate
from modality_integration.app.samples import choose_images, choose_texts, open_image, pair
from modality_integration.app.settings import versions
from modality_integration.metric import streaming
from modality_integration.models.capture import capture


def test_the_value_is_mir_of_the_features_that_the_model_gives_sample_by_sample(options):
    result = quiet_run(options)

    model, processor, _ = loading.load(options.model, torch.device("cpu"))
    images = choose_images(options.images, SAMPLES, 0).items
    texts = choose_texts(options.text, SAMPLES, 0).items
    vision, text = [], []
    for sample in pair(images, texts, SAMPLES, 0, groups=5):
        prose = truncate(sample.text.content, processor.tokenizer, options.text_tokens)
        inputs = processor(images=[open_image(sample.image)], text=[f"<image>\n{prose}"], return_tensors="pt")
        with torch.no_grad(), capture(model) as captured:
            model(**inputs)
        states = captured.hidden_states
        vision.append([h[captured.vision_mask] for h in states])
        text.append([h[captured.text_mask] for h in states])
    expected = mir([torch.cat(x) for x in zip(*vision, strict=True)], [torch.cat(x) for x in zip(*text, strict=True)])
    assert result.value == pytest.approx(expected.value, rel=1e-9)
    assert result.per_layer == pytest.approx(expected.per_layer, rel=1e-9)
    assert result.kept == expected.kept
    assert result.lower is result.upper is None


def test_it_writes_the_result_the_plot_and_what_was_run_and_leaves_no_checkpoint(options):
    result = quiet_run(options)
    assert MIRResult.from_json(options.out / "mir.json").value == result.value
    assert (options.out / "layers.png").read_bytes().startswith(b"\x89PNG")
    record = json.loads((options.out / "run.json").read_text())
    assert record["arguments"]["samples"] == SAMPLES
    assert record["mir"] == result.value
    assert not (options.out / "checkpoint").exists()


def test_it_prints_the_standard_error_beside_the_value_and_does_without_where_none_is_wanted(options, tmp_path):
    console = Console(record=True, file=io.StringIO())
    result = run(options, console)
    assert result.error > 0
    assert f"MIR {result.value:.4f} +- {result.error:.4f}" in console.export_text()
    assert json.loads((options.out / "run.json").read_text())["error"] == result.error
    plain = quiet_run(options, groups=0, out=tmp_path / "plain")
    assert plain.error is None
    assert plain.value == pytest.approx(result.value, rel=1e-9)


def test_an_error_of_fewer_groups_than_were_asked_for_is_in_the_notes(options, tmp_path):
    said = "the standard error uses 3 groups of samples instead of the requested 5; use more samples"
    assert said in quiet_run(options, samples=3).notes
    assert not any("requested" in note for note in quiet_run(options, samples=5, out=tmp_path / "five").notes)


def test_too_few_images_are_used_again_and_broken_ones_skipped_both_in_the_notes(options, tmp_path):
    write_images(tmp_path / "few", 3)
    (tmp_path / "few" / "broken.png").write_bytes(b"no picture")
    result = quiet_run(options, images=tmp_path / "few")
    assert "skipped 1 broken image" in result.notes
    assert f"3 usable images for {SAMPLES} samples: some are used more than once" in result.notes
    skipped = json.loads((options.out / "run.json").read_text())["skipped"]
    assert [entry["name"] for entry in skipped] == ["broken.png"]


def test_the_same_seed_gives_the_same_bits_and_another_seed_another_value(options, tmp_path):
    first = quiet_run(options).to_json()
    assert quiet_run(options, out=tmp_path / "again").to_json() == first
    assert quiet_run(options, out=tmp_path / "other", seed=1).to_json() != first


def test_a_second_pass_runs_where_the_first_missed_outliers_and_its_result_has_none_missed(options, monkeypatch):
    made = streaming.ModalityIntegrationRate

    def small_hold(**kwargs):
        return made(**kwargs, hold=17)

    monkeypatch.setattr(streaming, "ModalityIntegrationRate", small_hold)
    changes = {"samples": 40, "images": options.images, "text": options.text}
    first = quiet_run(options, **changes)
    second = quiet_run(options, **changes, second_pass=True, out=options.out / "second")
    monkeypatch.undo()
    in_memory = quiet_run(options, **changes, out=options.out / "memory")
    assert first.total_missed, "the stand-in no longer misses an outlier: choose one that does"
    assert second.total_missed == 0
    assert second.value == pytest.approx(in_memory.value, rel=1e-6)
    assert second.kept == in_memory.kept


def test_the_result_says_what_it_was_measured_with(options, folders):
    result = quiet_run(options, seed=3, precision="exact", last="raw")
    settings = MIRResult.from_json(options.out / "mir.json").settings
    assert settings == result.settings
    expected = {"model": str(folders / "model"), "samples": SAMPLES, "seed": 3, "in_order": False, "text_tokens": 20}
    expected |= {"template": "auto", "last": "raw", "text_role": "after", "precision": "exact", "dtype": "float32"}
    expected |= {"groups": 5, "processes": 1, "dealt": "in blocks", "batch_size": 1, "revision": None}
    expected |= {"processor": "LlavaProcessor", "model_commit": None, **versions()}
    assert settings | expected == settings
    assert set(settings) == {*expected, "chosen_samples", "image_processor"}
    assert settings["image_processor"].startswith("CLIPImageProcessor")
    other = quiet_run(options, seed=4, out=options.out / "other").settings
    assert settings["chosen_samples"] != other["chosen_samples"]
    record = json.loads((options.out / "run.json").read_text())
    for name in ("processor", "image_processor", *versions()):
        assert record[name] == settings[name]


@pytest.mark.parametrize(
    ("setting", "package"),
    [
        ("torch_version", "torch"),
        ("transformers_version", "transformers"),
        ("torchvision_version", "torchvision"),
        ("pillow_version", "pillow"),
        ("mir_kernels_version", "mir-kernels"),
    ],
)
def test_versions_are_those_that_are_installed(setting, package):
    try:
        installed = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        installed = None
    assert versions()[setting] == installed


def test_precision_reaches_the_metric(options, monkeypatch):
    made, seen = streaming.ModalityIntegrationRate, []
    monkeypatch.setattr(streaming, "ModalityIntegrationRate", lambda **kwargs: (seen.append(kwargs), made(**kwargs))[1])
    quiet_run(options, precision="exact", samples=2)
    assert seen[0]["precision"] == "exact"
