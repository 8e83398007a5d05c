"""Hidden states in files: the value of mir() over all of them, one layer at a time, and invalid files."""

import math

import pytest
import torch
from safetensors.torch import load_file, save_file

from integration.metric.streams import LAYERS, fed, sample, whole
from modality_integration import mir_of_states, save_states
from modality_integration.metric.accumulator import LayerAccumulator


@pytest.fixture
def files(tmp_path):
    def write(samples):
        paths = [tmp_path / f"{index}.safetensors" for index in range(len(samples))]
        for path, (hidden, vision, text) in zip(paths, samples, strict=True):
            save_states(path, hidden, vision, text)
        return paths

    return write


@pytest.mark.parametrize("outliers", ["remove", "median", "none"])
@pytest.mark.parametrize("hold", [None, 60])
def test_files_give_the_value_of_all_their_tokens(files, outliers, hold):
    samples = [sample(seed) for seed in range(10)]
    seen = []
    result = mir_of_states(
        files(samples), outliers=outliers, hold=hold, precision="exact", progress=lambda k, of: seen.append((k, of))
    )
    expected = whole(samples, outliers=outliers)
    assert result.per_layer == pytest.approx(expected.per_layer, rel=1e-9)
    assert result.removed == expected.removed
    assert result.notes == []
    assert seen == [(1, 3), (2, 3), (3, 3)]


@pytest.mark.parametrize("hold", [None, 60])
def test_the_standard_error_is_that_of_the_metric(files, hold):
    samples = [sample(seed) for seed in range(10)]
    flat = [([h[0] for h in hidden], v[0], t[0]) for hidden, v, t in samples[:3]]
    options = {"hold": hold, "groups": 4, "precision": "exact"}
    result, expected = mir_of_states(files(flat + samples[3:]), **options), fed(flat + samples[3:], **options).compute()
    assert result.left_out == [pytest.approx(distances, rel=1e-9) for distances in expected.left_out]
    with pytest.raises(ValueError, match=r'groups: expected 0 with outliers="median", got 4'):
        mir_of_states(files(samples), groups=4, outliers="median")


def test_layouts_can_be_mixed(files):
    samples = [sample(seed) for seed in range(4)]
    flat = [([h.flatten(0, 1) for h in hidden], v.flatten(), t.flatten()) for hidden, v, t in samples[2:]]
    assert mir_of_states(files(samples[:2] + flat)).to_json() == mir_of_states(files(samples)).to_json()


def test_norms_that_move_along_the_files_are_exact_by_a_second_reading(files):
    samples = [sample(seed) for seed in range(2)] + [sample(seed, scale=30.0) for seed in range(2, 40)]
    for hidden, _, _ in samples:
        for states in hidden:
            states /= states.norm(dim=-1, keepdim=True) ** 0.9
    result = mir_of_states(files(samples), hold=50, precision="exact")
    expected = whole(samples)
    assert result.kept == expected.kept
    assert result.per_layer == pytest.approx(expected.per_layer, rel=1e-9)
    assert result.notes == []


def test_options_reach_the_computation(files):
    samples = [sample(seed) for seed in range(3)]
    result = mir_of_states(files(samples), normalize=False, bounds=True)
    assert result.alpha == [1.0] * LAYERS
    assert result.lower <= whole(samples, normalize=False).value <= result.upper


def test_saved_states_read_back_bit_for_bit(tmp_path):
    hidden, vision, text = sample(0, dtype=torch.bfloat16)
    hidden[1] = hidden[1].mT.contiguous().mT
    save_states(tmp_path / "a.safetensors", hidden, vision, text)
    tensors = load_file(tmp_path / "a.safetensors")
    assert set(tensors) == {"layer.1", "layer.2", "layer.3", "vision_mask", "text_mask"}
    assert all(torch.equal(tensors[f"layer.{k}"], h) for k, h in enumerate(hidden, 1))
    assert torch.equal(tensors["vision_mask"], vision)


def test_only_one_layers_state_lives_at_a_time(files, monkeypatch):
    alive, most = set(), []
    create = LayerAccumulator.__init__

    def counted(self, *args, **kwargs):
        create(self, *args, **kwargs)
        alive.add(id(self))
        most.append(len(alive))

    monkeypatch.setattr(LayerAccumulator, "__init__", counted)
    monkeypatch.setattr(LayerAccumulator, "__del__", lambda self: alive.discard(id(self)), raising=False)
    mir_of_states(files([sample(seed) for seed in range(4)]))
    assert max(most) == 1


def change(path, **tensors):
    state = load_file(path) | tensors
    save_file({name: tensor for name, tensor in state.items() if tensor is not None}, path)


def test_a_token_that_is_not_finite_is_named_with_its_file(files):
    samples = [sample(seed) for seed in range(3)]
    token = samples[1][2].nonzero()[5].tolist()
    samples[1][0][2][tuple(token)] = math.nan
    with pytest.raises(ValueError, match=rf"1\.safetensors: layer 3: text token \({token[0]}, {token[1]}\) is not"):
        mir_of_states(files(samples))


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"text_mask": None}, r"1\.safetensors: expected the tensors .*missing or unexpected: text_mask"),
        ({"layer.2": None}, r"1\.safetensors: expected the tensors .*layer\.2"),
        ({"layer.7": torch.zeros(2, 40, 24)}, r"1\.safetensors: expected the tensors .*layer\.4"),
        ({"extra": torch.zeros(3)}, r"1\.safetensors: expected the tensors .*extra"),
        ({"layer.2": torch.zeros(2, 41, 24)}, r"1\.safetensors: layer\.2: expected \(T, d\) .*got \(2, 41, 24\)"),
        ({"layer.2": torch.zeros(2, 40, 24).long()}, r"1\.safetensors: layer\.2: expected one of the dtypes"),
        ({"layer.2": torch.zeros(2, 40, 20)}, r"1\.safetensors: layer 2 has d = 20"),
        ({"layer.2": torch.zeros(2, 40, 24).double()}, r"1\.safetensors: layer 2 has d = 24, torch\.float64"),
        ({"vision_mask": torch.ones(2, 40)}, r"1\.safetensors: vision_mask: expected one of the dtypes"),
        (
            {"vision_mask": torch.ones(2, 40).bool()},
            r"1\.safetensors: \d+ tokens are in both vision_mask and text_mask",
        ),
        ({"layer.3": None}, r"1\.safetensors has 2 layers, .*0\.safetensors has 3"),
    ],
)
def test_files_that_do_not_fit_are_named(files, tensors, message):
    paths = files([sample(0), sample(1)])
    change(paths[1], **tensors)
    with pytest.raises((ValueError, TypeError), match=message):
        mir_of_states(paths)


def test_no_files_broken_files_and_missing_files_are_told_apart(tmp_path):
    with pytest.raises(ValueError, match="paths: expected at least one file"):
        mir_of_states([])
    (tmp_path / "a.safetensors").write_bytes(b"not at all")
    with pytest.raises(ValueError, match=r"a\.safetensors: is not a readable safetensors file"):
        mir_of_states([tmp_path / "a.safetensors"])
    with pytest.raises(FileNotFoundError, match="missing"):
        mir_of_states([tmp_path / "missing.safetensors"])


def test_a_modality_without_tokens_is_named(files):
    hidden, vision, text = sample(0)
    paths = files([(hidden, torch.zeros_like(vision), text)])
    for outliers in ("remove", "median"):
        with pytest.raises(ValueError, match="layer 1: no token of vision"):
            mir_of_states(paths, outliers=outliers)


@pytest.mark.parametrize("named", ["the same path", "a link", "a copy"])
@pytest.mark.parametrize("groups", [0, 3])
def test_states_that_come_twice_count_once_and_a_note_says_so(files, tmp_path, named, groups):
    paths = files([sample(seed) for seed in range(6)])
    expected = mir_of_states(paths, groups=groups)
    other = tmp_path / "other.safetensors"
    if named == "a link":
        other.symlink_to(paths[1])
    if named == "a copy":
        other.write_bytes(paths[1].read_bytes())
    twice = paths[1] if named == "the same path" else other
    result = mir_of_states([*paths, twice], groups=groups)
    assert result.value == expected.value
    assert result.kept == expected.kept
    assert result.left_out == expected.left_out
    said = "listed twice" if named != "a copy" else f"the same states as {paths[1]}"
    assert [note for note in result.notes if "counts once" in note and said in note and str(twice) in note]
