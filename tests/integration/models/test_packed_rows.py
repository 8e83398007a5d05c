"""Rows that are several samples: roles, moments and the standard error are those of the samples one by one."""

import pytest
import torch

from integration.tiny_models import tiny_batch, tiny_model
from modality_integration import ModalityIntegrationRate, capture, measure_mir, mir_of_states, save_states

ROWS = ("ttitttttt", "tittttt", "tttitttt")


def alone(model):
    return [tiny_batch(model, "llava", [row], seed=seed) for seed, row in enumerate(ROWS)]


def packed(batches, how="position_ids", filling=0):
    """The samples of `batches` in one row, told apart by `how`, with `filling` tokens of padding behind."""
    lengths = [b.vision.shape[1] for b in batches]
    tail = torch.zeros(1, filling, dtype=torch.long)
    total = sum(lengths) + filling
    inputs = {
        "input_ids": torch.cat([*(b.inputs["input_ids"] for b in batches), tail], 1),
        "pixel_values": torch.cat([b.inputs["pixel_values"] for b in batches]),
        "position_ids": torch.cat([*(torch.arange(n)[None] for n in lengths), tail], 1),
    }
    numbers = torch.cat([torch.full((1, n), i) for i, n in enumerate(lengths)], 1)
    if how == "cu_seq_lens_q":
        ends = torch.tensor([0, *lengths] + [1] * filling).cumsum(0)  # a boundary at every token of filling
        inputs |= {"cu_seq_lens_q": ends.int(), "position_ids": torch.arange(total)[None]}
    elif how == "seq_idx":
        inputs |= {"seq_idx": torch.cat([numbers, tail - 1], 1).int(), "position_ids": torch.arange(total)[None]}
    elif how == "attention_mask":
        mask = torch.cat([numbers + 1, tail], 1)
        inputs |= {"attention_mask": mask, "position_ids": torch.arange(total)[None]}
    elif how == "three axes":  # of Qwen-VL's positions the first is time, which stands still in an image
        time = torch.cat([*(b.inputs["attention_mask"].cumsum(1) - 1 for b in batches), tail], 1)
        inputs["position_ids"] = torch.stack([time, 2 * time, 3 * time])
    return inputs


def expected(batches, filling):
    tail = torch.zeros(1, filling, dtype=torch.bool)
    return [torch.cat([*(getattr(b, name) for b in batches), tail], 1) for name in ("vision", "text_after", "text_all")]


class Layers(torch.nn.Module):
    """Stands in for a model: what tells samples apart reaches no layer that would have to go by it."""

    def __init__(self, model):
        super().__init__()
        self.layers, self.norm = torch.nn.ModuleList([torch.nn.Identity() for _ in range(2)]), torch.nn.LayerNorm(4)
        self.config = model.config

    def forward(self, input_ids, **_):
        x = torch.nn.functional.one_hot(input_ids % 4, 4).double()
        for layer in self.layers:
            x = layer(x)
        return self.norm.double()(x)


@pytest.mark.parametrize("filling", [0, 5])
@pytest.mark.parametrize("how", ["position_ids", "cu_seq_lens_q", "seq_idx", "attention_mask", "three axes"])
def test_roles_are_those_of_each_sample(how, filling):
    llava = tiny_model("llava")
    batches = alone(llava)
    inputs = packed(batches, how, filling)
    vision, after, every = expected(batches, filling)
    for text, wanted in (("after", after), ("all", every)):
        with capture(Layers(llava), layers="layers", text=text) as seen:
            seen._watch._path[0](**inputs)
        assert torch.equal(seen.vision_mask, vision)
        assert torch.equal(seen.text_mask, wanted)
        assert seen.samples == 3
        assert (seen.sample_ids[0, -filling:] < 0).all() or not filling


@pytest.mark.parametrize("filling", [0, 3])
def test_mir_and_its_standard_error_are_those_of_the_samples_one_by_one(filling, tmp_path):
    model = tiny_model("llava")
    batches = alone(model)
    together, singly = ModalityIntegrationRate(groups=3), ModalityIntegrationRate(groups=3)
    with torch.no_grad(), capture(model) as seen:
        model(**packed(batches, filling=filling), use_cache=False)
        together.update(seen.hidden_states, seen.vision_mask, seen.text_mask)
        save_states(tmp_path / "packed.safetensors", seen.hidden_states, seen.vision_mask, seen.text_mask)
        for batch in batches:
            model(**batch.inputs, use_cache=False)
            singly.update(seen.hidden_states, seen.vision_mask, seen.text_mask)
    got, wanted = together.compute(), singly.compute()
    assert got.error is not None
    assert got.value == pytest.approx(wanted.value, rel=1e-9)
    assert got.error == pytest.approx(wanted.error, rel=1e-6)
    saved = mir_of_states([tmp_path / "packed.safetensors"], groups=3)
    assert (saved.value, saved.error) == pytest.approx((wanted.value, wanted.error), rel=1e-6)


def test_measure_mir_deals_the_samples_of_packed_probes():
    model = tiny_model("llava")
    batches = alone(model)
    got = measure_mir(model, [packed(batches)], metric={"groups": 3})
    wanted = measure_mir(model, [b.inputs for b in batches], metric={"groups": 3, "samples": None})
    assert got.value == pytest.approx(wanted.value, rel=1e-9)
    assert got.error == pytest.approx(wanted.error, rel=1e-6)


def test_sinks_are_told_by_their_own_sample_and_its_positions():
    torch.manual_seed(0)
    states = torch.randn(1, 60, 32)
    states[0, [0, 30]] = 0
    states[0, [0, 30], 3] = 500.0
    vision, text = torch.zeros(1, 60, dtype=torch.bool), torch.zeros(1, 60, dtype=torch.bool)
    for start in (0, 30):
        vision[0, start : start + 10], text[0, start + 10 : start + 30] = True, True
    ids = torch.arange(60)[None] // 30
    one, two = ModalityIntegrationRate(), ModalityIntegrationRate()
    one.update([states], vision, text, ids)
    two.update([states.view(2, 30, 32)], vision.view(2, 30), text.view(2, 30))
    assert one.compute().sink_positions == two.compute().sink_positions == {"vision": {0: 2}, "text": {}}


def test_left_padding_with_the_positions_that_generate_gives_it_is_no_packed_row():
    model = tiny_model("llava")
    batch = tiny_batch(model, "llava", ["titttt", "titt"], padding="left")
    mask = batch.inputs["attention_mask"]
    for fill in (0, 1):
        positions = (mask.cumsum(1) - 1).masked_fill(mask == 0, fill)
        with torch.no_grad(), capture(model) as seen:
            model(**batch.inputs, position_ids=positions)
        assert seen.sample_ids is None
        assert torch.equal(seen.text_mask, batch.text_after)


def test_a_sample_without_an_image_is_named():
    model = tiny_model("llava")
    batches = [*alone(model)[:1], tiny_batch(model, "llava", ["tttt"]), *alone(model)[2:]]
    inputs = packed([b for b in batches if "pixel_values" in b.inputs])
    lengths = [b.vision.shape[1] for b in batches]
    inputs["input_ids"] = torch.cat([b.inputs["input_ids"] for b in batches], 1)
    inputs["position_ids"] = torch.cat([torch.arange(n) for n in lengths])[None]
    with torch.no_grad(), capture(model) as seen:
        model(**inputs)
    with pytest.raises(ValueError, match="no vision token in sample 1 of row 0 of the packed batch"):
        _ = seen.vision_mask


@pytest.mark.parametrize(
    ("ids", "error", "match"),
    [
        (torch.zeros(1, 5, dtype=torch.long), ValueError, r"sample_ids: takes one number per token, shape \(1, 6\)"),
        (torch.zeros(1, 6), TypeError, "sample_ids: takes whole numbers, got torch.float32"),
        (torch.tensor([[0, 0, 0, 0, 0, -1]]), ValueError, "sample_ids: 1 tokens of the masks are in no sample"),
    ],
)
def test_wrong_sample_numbers_are_refused_and_change_nothing(ids, error, match):
    metric = ModalityIntegrationRate()
    vision = torch.tensor([[1, 1, 1, 0, 0, 0]]).bool()
    with pytest.raises(error, match=match):
        metric.update([torch.randn(1, 6, 4)], vision, ~vision, ids)
    assert not metric._layers
