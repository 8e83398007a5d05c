"""`--batch-size`: several samples in one forward pass count the same as each alone."""

import io
import json
import os
import signal

import pytest
import torch
from PIL import Image
from rich.console import Console
from torch import nn

from integration import tiny_models
from integration.app.compute_runs import SAMPLES, quiet_run
from integration.saved_models import WORDS, save_tiny_llava, tiny_processor
from modality_integration import ModalityIntegrationRate, capture
from modality_integration.app import loading, stream, study
from modality_integration.app.batches import CannotBatch, collated
from modality_integration.app.checkpoint import Due
from modality_integration.app.compute import run
from modality_integration.app.errors import InputError, Interrupted
from modality_integration.app.options import ComputeOptions, TokenOptions
from modality_integration.app.samples import Sample, Text
from modality_integration.metric import streaming

FAMILIES = tuple(name for name in tiny_models.FAMILIES if name != "qwen3_vl_video")
# Rows of images (i) and words, of different lengths; models with an images axis accept several images.
ROWS = ("wiwww", "iw", "wwiwwwwwww")


class Padding:
    """The part of a tokenizer that `collated` uses."""

    pad_token_id = tiny_models.PAD


@pytest.mark.parametrize("rows", [ROWS, ("wiw", "wiww", "iwiww")], ids=["one image a row", "one or two"])
@pytest.mark.parametrize("family", FAMILIES)
def test_states_and_roles_in_a_batch_are_those_of_each_sample_alone(family, rows):
    model = tiny_models.tiny_model(family)
    each = [tiny_models.tiny_batch(model, family, [row], seed=seed).inputs for seed, row in enumerate(rows)]
    if family in ("llava_onevision", "instructblip") and len({row.count("i") for row in rows}) > 1:
        pytest.skip("its image inputs are of one image a row")
    if family == "paligemma":  # its processor marks prompt and answer; without that, tokens attend to padding
        each = [inputs | {"token_type_ids": torch.zeros_like(inputs["input_ids"])} for inputs in each]
    with torch.no_grad(), capture(model) as seen:
        model(**collated(each, Padding))
        together = seen.hidden_states, seen.vision_mask, seen.text_mask
        for row, inputs in enumerate(each):
            model(**inputs)
            length = inputs["input_ids"].shape[1]
            for mask, alone in zip(together[1:], (seen.vision_mask, seen.text_mask), strict=True):
                assert torch.equal(mask[row, :length], alone[0])
                assert not mask[row, length:].any()
            for state, alone in zip(together[0], seen.hidden_states, strict=True):
                torch.testing.assert_close(state[row, :length], alone[0], rtol=1e-9, atol=1e-9)


def test_images_of_sizes_of_their_own_go_together_where_the_model_is_told_the_sizes():
    model = tiny_models.tiny_model("pixtral")
    small, large = (tiny_models.tiny_batch(model, "pixtral", ["iw"], seed=seed).inputs for seed in (1, 2))
    marker = small["input_ids"] == tiny_models.IMAGE
    small["pixel_values"] = small["pixel_values"][..., :8, :]  # half the height, so half the tokens
    small["image_sizes"] = torch.tensor([[8, 16]])
    kept = ~marker | (marker.cumsum(1) <= marker.sum() // 2)
    small |= {name: small[name][kept][None] for name in ("input_ids", "attention_mask")}
    with torch.no_grad(), capture(model) as seen:
        model(**collated([large, small], Padding))
        together = seen.hidden_states[-1][1]
        model(**small)
        alone = seen.hidden_states[-1][0]
    torch.testing.assert_close(together[: len(alone)], alone, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"pixel_values": torch.zeros(1, 3, 8, 9)}, r"pixel_values has the shapes \(1, 3, 8, 8\), \(1, 3, 8, 9\)"),
        ({"pixel_values": [torch.zeros(3, 8, 8)]}, "pixel_values is a Tensor|pixel_values is a list"),
        ({"extra": torch.zeros(1)}, "different names"),
        ({"input_ids": torch.ones(1, 7, dtype=torch.long), "attention_mask": None}, "no attention_mask"),
        ({"cu_seqlens": torch.tensor([0, 6])}, "cu_seqlens counts the tokens of one sequence"),
    ],
)
def test_inputs_that_do_not_go_together_are_refused_with_the_reason(change, reason):
    one = {"input_ids": torch.ones(1, 6, dtype=torch.long), "attention_mask": torch.ones(1, 6, dtype=torch.long)}
    one["pixel_values"] = torch.zeros(1, 3, 8, 8)
    other = {**one, **change}
    if change.get("attention_mask", 0) is None:
        del one["attention_mask"], other["attention_mask"]
    if "cu_seqlens" in change:
        one |= change
    with pytest.raises(CannotBatch, match=reason):
        collated([one, other], Padding)


def samples(count, high=40):
    generator = torch.Generator().manual_seed(0)
    out = []
    for index in range(count):
        pixels = torch.randint(0, 256, (40 if index % 2 else high, 40, 3), dtype=torch.uint8, generator=generator)
        words = torch.randint(0, len(WORDS), (3 + 5 * index % 17,), generator=generator)
        out.append(Sample(Image.fromarray(pixels.numpy()), Text(str(index), " ".join(WORDS[w] for w in words))))
    return out


@pytest.fixture(scope="module")
def llava(tmp_path_factory):
    folder = save_tiny_llava(tmp_path_factory.mktemp("batches") / "model")
    model, processor, _ = loading.load(str(folder), torch.device("cpu"))
    return model.double(), processor


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("text_role", ["after", "all"])
@pytest.mark.parametrize("size", [2, 3, 16])
def test_a_stream_in_batches_gives_the_value_tokens_and_groups_of_one_by_one(llava, size, side, text_role, monkeypatch):
    model, processor = llava
    monkeypatch.setattr(processor.tokenizer, "padding_side", side)
    tokens, results, counts = TokenOptions(text_tokens=15, template="plain", text_role=text_role), [], []
    for batch_size in (1, size):
        metric = ModalityIntegrationRate(groups=3, samples=10)
        counts = []
        stream.stream(model, processor, samples(10), metric, tokens, batch_size=batch_size, after_sample=counts.append)
        results.append(metric.compute())
    one, several = results
    assert counts == [*range(size, 10, size), 10]
    assert several.value == pytest.approx(one.value, rel=1e-12)
    assert (several.kept, several.removed) == (one.kept, one.removed)
    for left_out, alone in zip(several.left_out, one.left_out, strict=True):
        assert left_out == pytest.approx(alone, rel=1e-9)


@pytest.mark.parametrize("family", ["llava_next", "gemma3", "paligemma", "idefics3", "blip_2", "instructblip"])
def test_processors_own_inputs_go_together(family, monkeypatch):
    with loading.quiet():
        processor = tiny_processor(family)
    own = getattr(processor, "image_token_ids", None) or [None]
    monkeypatch.setattr(tiny_models, "IMAGE", own[0] or processor.tokenizer.convert_tokens_to_ids("<image>"))
    monkeypatch.setattr(tiny_models, "VOCAB", len(processor.tokenizer))
    monkeypatch.setitem(tiny_models.TEXT, "vocab_size", len(processor.tokenizer))
    model = tiny_models.tiny_model(family)
    results = []
    for batch_size in (1, 4):
        metric = ModalityIntegrationRate()
        tokens = TokenOptions(text_tokens=15, template="plain")
        stream.stream(model, processor, samples(6, high=24), metric, tokens, batch_size=batch_size)
        results.append(metric.compute())
    assert results[1].value == pytest.approx(results[0].value, rel=1e-10)
    assert results[1].kept == results[0].kept


class Refusing(nn.Module):
    """A model without batch support."""

    def __init__(self, model, how):
        super().__init__()
        self.model, self.how, self.config = model, how, model.config

    def forward(self, input_ids, **inputs):
        if len(input_ids) > 1 and self.how == "raises":
            raise AssertionError("batch must be one\nand more lines")
        if len(input_ids) > 1 and self.how == "mixes":
            inputs["pixel_values"] = inputs["pixel_values"].flip(0)
        return self.model(input_ids=input_ids, **inputs)


@pytest.mark.parametrize(
    ("how", "reason"), [("raises", "batch must be one"), ("mixes", "hidden states in the batch differ by")]
)
def test_a_model_that_cannot_take_several_says_so_and_names_a_batch_of_one(llava, how, reason):
    model, processor = llava
    with torch.no_grad():  # so that a wrong image has an effect
        model.get_input_embeddings().weight.mul_(0.1)
    refusing, tokens = Refusing(model, how), TokenOptions(text_tokens=15, template="plain")
    with pytest.raises(InputError) as refused:
        stream.stream(refusing, processor, samples(4), ModalityIntegrationRate(), tokens, batch_size=4)
    assert reason in str(refused.value)
    assert str(refused.value).startswith("batch-size: ")
    assert str(refused.value).endswith("use --batch-size 1")
    assert "\n" not in str(refused.value)
    stream.stream(refusing, processor, samples(4), ModalityIntegrationRate(), tokens, batch_size=1)


def test_a_run_in_batches_measures_what_one_by_one_does_and_records_the_size(options, tmp_path):
    one, several = quiet_run(options, out=tmp_path / "one"), quiet_run(options, batch_size=5)
    assert several.value == pytest.approx(one.value, rel=1e-5)
    assert several.kept == one.kept
    assert several.error == pytest.approx(one.error, rel=1e-2)
    assert json.loads((options.out / "run.json").read_text())["arguments"]["batch_size"] == 5


@pytest.mark.parametrize("name", ["samples", "layers"])
def test_a_study_in_batches_has_the_rows_of_one_by_one(options, tmp_path, name):
    rows = []
    for batch_size in (1, 4):
        changes = {"samples": 7, "batch_size": batch_size, "out": tmp_path / str(batch_size)}
        rows.append(study.run(name, ComputeOptions(**{**vars(options), **changes}), Console(quiet=True)))
    for row, several in zip(*rows, strict=True):
        assert list(several) == list(row)
        for key, value in row.items():
            assert several[key] == (None if value is None else pytest.approx(value, rel=1e-2))
    assert [row.get("samples") for row in rows[1]] == ([5, 7] if name == "samples" else [None] * 3)


def test_an_interrupted_run_in_batches_goes_on_to_the_same_bits_and_not_with_another_size(
    options, tmp_path, monkeypatch
):
    whole = quiet_run(options, batch_size=5, out=tmp_path / "whole")
    update = streaming.ModalityIntegrationRate.update

    def interrupted(self, *args):
        os.kill(os.getpid(), signal.SIGINT)
        return update(self, *args)

    monkeypatch.setattr(streaming.ModalityIntegrationRate, "update", interrupted)
    with pytest.raises(Interrupted, match=f"after 5 of {SAMPLES} samples"):
        quiet_run(options, batch_size=5)
    monkeypatch.undo()
    with pytest.raises(InputError, match="batch-size was 5, now 4"):
        quiet_run(options, batch_size=4)
    console = Console(record=True, file=io.StringIO())
    resumed = run(ComputeOptions(**{**vars(options), "batch_size": 5}), console)
    assert "resuming after 5 of 12" in console.export_text()
    assert resumed.to_json() == whole.to_json()


@pytest.mark.parametrize(
    ("every", "counts", "expected"), [(5, [4, 8, 12, 16, 20], [8, 12, 16, 20]), (2, [3, 6], [3, 6])]
)
def test_a_checkpoint_is_due_after_each_batch_that_passes_a_multiple(every, counts, expected):
    due = Due(every)
    size = counts[0]
    assert [count for count in counts if due(count, size)] == expected
