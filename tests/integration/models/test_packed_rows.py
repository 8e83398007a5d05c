"""Packed rows: roles, moments and the standard error equal those of the samples one by one."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from integration.tiny_models import tiny_batch, tiny_model
from modality_integration import ModalityIntegrationRate, capture, measure_mir, mir_of_states, save_states
from modality_integration.metric.packing import PackedStates
from modality_integration.models.token_roles import is_packed, packed_samples

ROWS = ("ttitttttt", "tittttt", "tttitttt")


def alone(model, rows=ROWS):
    return [tiny_batch(model, "llava", [row], seed=seed) for seed, row in enumerate(rows)]


def packed(batches, how="position_ids", filling=0):
    """The samples of `batches` in one row, separated by `how` and followed by `filling` tokens of padding."""
    lengths = [b.vision.shape[1] for b in batches]
    tail = torch.zeros(1, filling, dtype=torch.long)
    total = sum(lengths) + filling
    inputs = {
        "input_ids": torch.cat([*(b.inputs["input_ids"] for b in batches), tail], 1),
        "pixel_values": torch.cat([b.inputs["pixel_values"] for b in batches if "pixel_values" in b.inputs]),
        "position_ids": torch.cat([*(torch.arange(n)[None] for n in lengths), tail], 1),
    }
    numbers = torch.cat([torch.full((1, n), i) for i, n in enumerate(lengths)], 1)
    if how == "cu_seq_lens_q":
        ends = torch.tensor([0, *lengths] + [1] * filling).cumsum(0)  # a boundary at every filler token
        inputs |= {"cu_seq_lens_q": ends.int(), "position_ids": torch.arange(total)[None]}
    elif how == "seq_idx":
        inputs |= {"seq_idx": torch.cat([numbers, tail - 1], 1).int(), "position_ids": torch.arange(total)[None]}
    elif how == "attention_mask":
        mask = torch.cat([numbers + 1, tail], 1)
        inputs |= {"attention_mask": mask, "position_ids": torch.arange(total)[None]}
    elif how == "four axes":  # the first axis counts tokens, as 2-D position_ids do
        inputs["position_ids"] = torch.stack([inputs["position_ids"], *torch.zeros(3, 1, total, dtype=torch.long)])
    elif how == "three axes":  # Qwen-VL's first axis is time, which is constant within an image
        time = torch.cat([*(b.inputs["attention_mask"].cumsum(1) - 1 for b in batches), tail], 1)
        inputs["position_ids"] = torch.stack([time, 2 * time, 3 * time])
    return inputs


def expected(batches, filling):
    tail = torch.zeros(1, filling, dtype=torch.bool)
    return [torch.cat([*(getattr(b, name) for b in batches), tail], 1) for name in ("vision", "text_after", "text_all")]


class Layers(torch.nn.Module):
    """A stand-in for a model whose layers ignore the arguments that separate samples."""

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


FORMS = ["position_ids", "four axes", "three axes", "cu_seq_lens_q", "seq_idx", "attention_mask"]


@pytest.mark.parametrize("how", FORMS)
@pytest.mark.parametrize("rows", [("ttitttt", "t", "itttt"), ("t", "itt", "ttitt"), ("ttit", "t", "t", "it", "t")])
def test_a_sample_of_one_token_is_joined_to_no_other(how, rows):
    llava = tiny_model("llava")
    batches = alone(llava, rows)
    lone = torch.cat([torch.full((1, b.vision.shape[1]), row == "t") for b, row in zip(batches, rows, strict=True)], 1)
    with capture(Layers(llava), layers="layers", text="all") as seen:
        seen._watch._path[0](**packed(batches, how))
    vision, _, every = expected(batches, 0)
    assert torch.equal(seen.vision_mask, vision)
    assert torch.equal(seen.text_mask, every & ~lone)
    assert torch.equal(seen.sample_ids < 0, lone)
    assert (seen.samples, seen.image_first) == (2, 1)


def test_filling_on_the_left_without_a_mask_is_in_no_sample():
    llava = tiny_model("llava")
    inputs = packed(alone(llava))
    inputs["input_ids"] = torch.nn.functional.pad(inputs["input_ids"], (3, 0), value=5)
    inputs["position_ids"] = torch.nn.functional.pad(inputs["position_ids"], (3, 0))
    with capture(Layers(llava), layers="layers", text="all") as seen:
        seen._watch._path[0](**inputs)
    assert (seen.sample_ids[0, :3] < 0).all()
    assert not seen.text_mask[0, :3].any()
    assert seen.samples == 3


@pytest.mark.parametrize("positions", [[0, 0, 0, 0, 1, 2, 3], [0] * 7], ids=["vision tokens alone", "all tokens"])
def test_tokens_that_share_a_position_at_the_very_beginning_are_no_samples(positions):
    vision = torch.tensor([[1, 1, 1, 1, 0, 0, 0]]).bool()
    inputs = {"input_ids": torch.full((1, 7), 5), "position_ids": torch.tensor([positions])}
    assert packed_samples(inputs, torch.ones_like(vision), vision) is None


def time_height_width(row):
    """(3, T) positions of a sample in Qwen-VL's numbering, and its vision tokens: an image `i` has 2 x 2, a video `v`
    twice as many, and `f` is two frames within one unit of time."""
    places, vision, start = [], [], 0
    for part in row:
        if part == "t":
            places.append(torch.full((3, 1), start))
            start += 1
        else:
            times = {"i": [0], "v": [0, 1], "f": [0, 0]}[part]
            places += [torch.tensor([[time] * 4, [0, 0, 1, 1], [0, 1, 0, 1]]) + start for time in times]
            start += 2
        vision += [part != "t"] * (sum(p.shape[1] for p in places) - len(vision))
    return torch.cat(places, 1), torch.tensor(vision)


def width_height_number(row):
    """(3, T) positions of a sample in HunYuanVL's numbering, and its vision tokens: an image `i` has 2 x 2, between a
    begin and an end mark."""
    parts = [([1], part) if part == "t" else ([1, 4, 1], part) for part in row]
    count = sum(sum(sizes) for sizes, _ in parts)
    places, vision, column, number = torch.arange(count).expand(3, -1).clone(), torch.zeros(count).bool(), 0, 0
    for sizes, part in parts:
        if part == "i":
            places[:, column + 1 : column + 5] = torch.tensor([[0, 1, 0, 1], [0, 0, 1, 1], [number] * 4])
            vision[column : column + 6] = True
            number += 1
        column += sum(sizes)
    return places, vision


def of_three_axes(samples):
    """The inputs of a row packed from samples [(3, T) positions, vision (T,)], and its vision tokens (1, T)."""
    vision = torch.cat([v for _, v in samples])[None]
    positions = torch.cat([p for p, _ in samples], 1)[:, None]
    return {"input_ids": torch.where(vision, 60, 5), "position_ids": positions}, vision


@pytest.mark.parametrize("positions", [time_height_width, width_height_number])
@pytest.mark.parametrize(
    "rows",
    [
        ("i", "tttiti"),
        ("itttt", "i", "i", "itttt", "ttititt"),
        ("ttitt", "ittit", "tt", "iitt"),
        ("i", "i"),
        ("tit", "i", "tt", "t", "i"),
    ],
)
def test_samples_begin_where_all_three_axes_do(positions, rows):
    samples = [positions(row) for row in rows]
    inputs, vision = of_three_axes(samples)
    names = [-1 if row == "t" else number for number, row in enumerate(rows)]
    numbers = torch.cat([torch.full(v.shape, name) for name, (_, v) in zip(names, samples, strict=True)])
    assert is_packed(inputs)
    assert torch.equal(packed_samples(inputs, torch.ones_like(vision), vision), numbers[None])


@pytest.mark.parametrize("padding", [0, 1, 3])
@pytest.mark.parametrize(
    ("positions", "row"),
    [
        *((time_height_width, row) for row in ("titt", "ittt", "iitt", "vtt", "ftt", "tftitt", "vit")),
        *((width_height_number, row) for row in ("titt", "ittt", "iitt", "ttitittit")),
    ],
)
def test_images_move_no_axis_in_a_way_that_would_begin_a_sample(positions, row, padding):
    inputs, vision = of_three_axes([positions(row)])
    video = vision & torch.tensor(any(part in row for part in "vf"))
    kept = torch.nn.functional.pad(torch.ones_like(vision), (padding, 0))
    inputs = {name: torch.nn.functional.pad(value, (padding, 0)) for name, value in inputs.items()}
    types = torch.nn.functional.pad(vision.long() + video, (padding, 0))
    inputs |= {"attention_mask": kept.long(), "mm_token_type_ids": types}
    assert not is_packed(inputs)
    assert packed_samples(inputs, kept, types > 0) is None


@pytest.mark.parametrize(
    ("how", "change"),
    [
        ("seq_idx", lambda x: {"seq_idx": x["seq_idx"].where(x["seq_idx"] >= 0, -100)}),
        ("seq_idx", lambda x: {"seq_idx": x["seq_idx"].long() * 10**12}),
        ("seq_idx", lambda x: {"seq_idx": x["seq_idx"].long() - (x["seq_idx"] < 0) * 2**62 + 2**61}),
        ("cu_seq_lens_q", lambda x: {"cu_seq_lens_q": x["cu_seq_lens_q"][None]}),
        ("attention_mask", lambda x: {"attention_mask": x["attention_mask"].float()}),
        ("attention_mask", lambda x: {"attention_mask": x["attention_mask"].to(torch.uint8)}),
    ],
    ids=["-100 is padding", "large ids", "very large ids", "boundaries (1, n)", "numbers as floats", "small integers"],
)
def test_other_ways_to_write_the_same_numbers(how, change):
    llava = tiny_model("llava")
    batches = alone(llava)
    inputs = packed(batches, how, 4)
    inputs |= change(inputs)
    assert is_packed(inputs)
    vision, after, _ = expected(batches, 4)
    with capture(Layers(llava), layers="layers") as seen:
        seen._watch._path[0](**inputs)
    assert isinstance(seen.hidden_states, PackedStates)
    assert torch.equal(seen.vision_mask, vision)
    assert torch.equal(seen.text_mask, after)
    assert seen.samples == 3


@pytest.mark.parametrize("mask", [[1.0, 1.0, 0.0], [0.5, 1.5, 0.0], [1.0, float("inf"), 0.0]])
def test_a_mask_of_floats_that_are_no_numbers_of_samples_is_padding(mask):
    assert not is_packed({"input_ids": torch.ones(1, 3).long(), "attention_mask": torch.tensor([mask])})


def test_embeddings_with_positions_that_begin_anew_are_packed_too():
    model = tiny_model("llava")
    batches = alone(model)
    inputs = packed(batches)
    embeds = model.get_input_embeddings()(inputs["input_ids"]).detach()
    with torch.no_grad(), capture(model, vision_mask=expected(batches, 0)[0]) as seen:
        model(inputs_embeds=embeds, position_ids=inputs["position_ids"], use_cache=False)
    assert isinstance(seen.hidden_states, PackedStates)


class Waits(TorchDispatchMode):
    """Counts operations that would wait for a GPU, because the CPU reads a value or a shape."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.__name__.split(".")[0] in ("_local_scalar_dense", "nonzero", "_unique2", "unique_dim")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("how", "most"), [("seq_idx", 0), ("cu_seq_lens_q", 1), ("position_ids", 1)])
def test_samples_are_numbered_with_few_waits(how, most):
    batches = alone(tiny_model("llava"))
    inputs, vision = packed(batches, how, 2), expected(batches, 2)[0]
    with Waits() as waits:
        packed_samples(inputs, torch.ones_like(vision), vision)
    assert waits.count <= most


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


@pytest.mark.parametrize(
    "part",
    [
        lambda states: states[:],
        lambda states: states[:2],
        lambda states: states[::-1],
        lambda states: states.copy(),
        lambda states: states[:1] + states[2:],
        lambda states: states + list(states[:1]),
        lambda states: list(states[:1]) + states,
    ],
    ids=["all", "first", "reversed", "copy", "sum", "list behind", "list before"],
)
def test_parts_of_the_states_know_the_samples(part):
    model = tiny_model("llava")
    with torch.no_grad(), capture(model) as seen:
        model(**packed(alone(model)), use_cache=False)
    of_part, by_ids = ModalityIntegrationRate(groups=3), ModalityIntegrationRate(groups=3)
    states = part(seen.hidden_states)
    of_part.update(states, seen.vision_mask, seen.text_mask)
    by_ids.update(list(states), seen.vision_mask, seen.text_mask, seen.sample_ids)
    assert of_part.compute().error is not None
    assert of_part.compute().to_json() == by_ids.compute().to_json()


@pytest.mark.parametrize("numbers", [(7, 10**12, 2**62), (2**62, 2**62 + 1, 2**63 - 1)])
@pytest.mark.parametrize("outside", [-1, -100, -(2**63)])
def test_any_whole_numbers_name_samples(numbers, outside):
    torch.manual_seed(0)
    states, vision = [torch.randn(1, 40, 8) for _ in range(2)], torch.arange(40)[None] % 10 < 5
    places = torch.arange(40)[None] // 10
    inside = places < 3
    wanted, got = ModalityIntegrationRate(groups=3), ModalityIntegrationRate(groups=3)
    wanted.update(states, vision & inside, ~vision & inside, places.where(inside, -1))
    ids = torch.tensor([*numbers, outside])[places]
    got.update(states, vision & inside, ~vision & inside, ids)
    assert got.compute().to_json() == wanted.compute().to_json()


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
        (torch.zeros(1, 5, dtype=torch.long), ValueError, r"sample_ids: expected one number per token, shape \(1, 6\)"),
        (torch.zeros(1, 6), TypeError, "sample_ids: expected whole numbers, got torch.float32"),
        (torch.tensor([[0, 0, 0, 0, 0, -1]]), ValueError, r"sample_ids: expected a number >= 0 for every .*, got 1"),
    ],
)
def test_wrong_sample_numbers_are_refused_and_change_nothing(ids, error, match):
    metric = ModalityIntegrationRate()
    vision = torch.tensor([[1, 1, 1, 0, 0, 0]]).bool()
    with pytest.raises(error, match=match):
        metric.update([torch.randn(1, 6, 4)], vision, ~vision, ids)
    assert not metric._layers
