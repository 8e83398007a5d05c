"""Regressions found by the fuzzers of tests/fuzz, one test each: refused by name, with nothing changed."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from fuzz.targets import ARGUMENTS, calibrated, metric, sample, unchanged
from mir_kernels import StreamingMoments, token_norms
from modality_integration import (
    MIRResult,
    ModalityIntegrationRate,
    load_moca,
    mir_of_states,
    moca_parameters,
    save_moca,
    save_states,
)
from modality_integration.app.checkpoint import Checkpoint, Passage
from modality_integration.app.errors import InputError
from modality_integration.metric import state_file


@pytest.fixture
def saved(tmp_path):
    metric().save(tmp_path / "state.safetensors")
    return tmp_path / "state.safetensors"


@pytest.mark.parametrize("place", [-1, -100, 0.5])
def test_a_flipped_bit_anywhere_in_a_state_is_found(saved, place):
    data = bytearray(saved.read_bytes())
    data[place if isinstance(place, int) else int(place * len(data))] ^= 1
    saved.write_bytes(data)
    with pytest.raises(ValueError, match=r"state\.safetensors"):
        ModalityIntegrationRate.from_file(saved)


OPTIONS = ["{}x", "[]", '{"hold": "many"}', '{"bounds": 1}', '{"hold": 4.5}', "[" * 9999, '{"outliers": "median"}']


@pytest.mark.parametrize("options", OPTIONS)
def test_options_that_are_none_are_refused(saved, options):
    state = load_file(saved)
    words = {"format": state_file.FORMAT, "version": str(state_file.VERSION), "options": options}
    save_file(state, saved, metadata=words | {"sha256": state_file._digest(state, options)})
    with pytest.raises(ValueError, match="its options are invalid"):
        ModalityIntegrationRate.from_file(saved)


def edited(state, **changes):
    named = {key.replace("__", "."): value for key, value in changes.items()}
    return {key: value for key, value in (state | named).items() if value is not None}


WRONG = {
    "a layer is missing": {f"layers__1__{key}": None for key in ("text_norms",)},
    "more layers than numbers": {"layers__7__text_norms": torch.zeros(1, dtype=torch.float64)},
    "a count that is none of its rows": {"layers__0__vision__moments__0__count": torch.tensor(5)},
    "a negative count": {"layers__0__vision__moments__0__count": torch.tensor(-1)},
    "rows gathered that were never released": {"layers__0__text__moments__0__pending": torch.zeros(3, 3)},
    "moments of another size": {"layers__0__vision__moments__0__second": torch.zeros(10**6, dtype=torch.float64)},
    "held rows that are not finite": {"layers__0__text__held": torch.full((4, 3), float("nan"))},
    "held rows without norms": {"layers__0__vision__held_norms": torch.zeros(0)},
    "a group that does not exist": {"layers__0__text__released_groups": torch.full((14,), 9, dtype=torch.uint8)},
    "groups that are complex": {"layers__0__text__held_groups": torch.zeros(4, dtype=torch.complex64)},
    "limits of three": {"layers__0__vision__limits": torch.zeros(3, dtype=torch.float64)},
    "a vector for held rows": {"layers__0__vision__held": torch.zeros(4)},
    "no tensor": {"layers__0__vision__held": 3},
    "a version of two": {"version": torch.tensor([2, 2])},
    "samples below zero": {"samples": torch.tensor(-1)},
    "an unknown key": {"strange": torch.zeros(1)},
    "a layer no number": {"layers__²__text_norms": torch.zeros(1)},
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_state_is_refused_and_changes_nothing(wrong):
    state, mine = metric().state_dict(), ModalityIntegrationRate(hold=4)
    mine.update(*sample(7))
    before = {key: value.clone() for key, value in mine.state_dict().items()}
    with pytest.raises(RuntimeError, match=r"layers\.|version|samples|strange"):
        mine.load_state_dict(edited(state, **WRONG[wrong]))
    assert unchanged(before, mine.state_dict())


@pytest.mark.parametrize("key", ["version", "count", "bound", "mean", "pending"])
@pytest.mark.parametrize("value", [None, torch.tensor(-3), torch.tensor(2**40), torch.zeros(7, 7)], ids=str)
def test_moments_refuse_a_wrong_entry_and_stay(key, value):
    moments = StreamingMoments(3)
    moments.update(torch.arange(12.0).view(4, 3))
    before = {name: tensor.clone() for name, tensor in moments.state_dict().items()}
    if key == "count" and value is not None and value.dim() == 0 and value > 0:
        pytest.skip("a count of any size is one")
    with pytest.raises((TypeError, ValueError), match="state"):
        moments.load_state_dict(before | {key: value})
    assert unchanged(before, moments.state_dict())


@pytest.mark.parametrize(
    "text",
    [
        "[]",
        "{}",
        "[" * 100_000,
        '{"pass": 1, "done": 2, "state": "rank0-pass1-000002.safetensors"}',
        json.dumps({"pass": 1, "done": 2, "state": "../other.safetensors", "arguments": ARGUMENTS}),
        json.dumps({"pass": True, "done": 2, "state": "rank0-pass1-000002.safetensors", "arguments": ARGUMENTS}),
        json.dumps({"pass": 1, "done": -2, "state": "rank0-pass1--00002.safetensors", "arguments": ARGUMENTS}),
    ],
    ids=lambda text: text[:40],
)
def test_a_damaged_run_checkpoint_is_refused_with_the_way_out(tmp_path, text):
    (tmp_path / "rank0.json").write_text(text)
    with pytest.raises(InputError, match=r"rank0\.json is damaged.*--restart"):
        Checkpoint(tmp_path, ARGUMENTS).passage()


KILLED = """
import os, signal, sys
sys.path[:0] = {paths!r}
from pathlib import Path
from fuzz.targets import metric
from modality_integration.metric import state_file
from modality_integration.app.checkpoint import Checkpoint, Passage
write = state_file.save_file
def killed(*arguments, **options):
    write(*arguments, **options)
    os.kill(os.getpid(), signal.SIGKILL)
state_file.save_file = killed
Checkpoint(Path({folder!r}), {{}}).save(metric(), Passage(1, 5))
"""


def test_what_a_killed_process_left_half_written_goes_with_the_next_checkpoint_and_with_the_last(tmp_path):
    folder = tmp_path / "checkpoint"
    code = KILLED.format(paths=sys.path, folder=str(folder))
    for _ in range(2):
        assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == -9
    assert [p.name for p in folder.iterdir()] == [".rank0-pass1-000005.safetensors.partial"]
    Checkpoint(folder, {}, rank=1).save(metric(), Passage(1, 2))  # that of another process stays
    checkpoint = Checkpoint(folder, {})
    checkpoint.save(metric(), Passage(1, 6))
    rank1 = ["rank1-pass1-000002.safetensors", "rank1.json"]
    assert sorted(p.name for p in folder.iterdir()) == ["rank0-pass1-000006.safetensors", "rank0.json", *rank1]
    (folder / ".rank0.json.partial").touch()
    (folder / ".rank0-pass1-000009.safetensors.partial").touch()
    checkpoint.clear()
    assert sorted(p.name for p in folder.iterdir()) == rank1


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"version": 5', '"version": true'),
        ('"version": 5', '"version": 0'),
        ('"mean": ', '"mean": NaN, "_": '),
        ('"mean": ', '"mean": "nan", "_": '),
        ('"trace_root": ', '"trace_root": 1e999, "_": '),
        ('"mean": ', '"mean": ' + "9" * 400 + ', "_": '),
        ('"alpha": ', '"alpha": true, "_": '),
        ('"kept": ', '"kept": {"vision": -1, "text": 2}, "_": '),
        ('"layers": ', '"layers": [], "_": '),
        ('"layers": ', '"layers": [1], "_": '),
        ('"layers": ', '"layers": {"0": 1}, "_": '),
        ('"notes": []', '"notes": "none"'),
        ('"left_out": null', '"left_out": [1.0, 2.0]'),
        ('"without_sinks": null', '"without_sinks": 1.0'),
        ('"massive": ', '"massive": {"vision": true, "text": 2}, "_": '),
        ('"sink_positions": ', '"sink_positions": {"vision": {"first": 1}, "text": {}}, "_": '),
    ],
)
def test_a_damaged_result_is_refused_by_name(tmp_path, old, new):
    text = metric().compute().to_json()
    assert old in text
    path = tmp_path / "mir.json"
    path.write_text(text.replace(old, new, 1))
    with pytest.raises(ValueError, match=r"mir\.json"):
        MIRResult.from_json(path)


@pytest.mark.parametrize("data", [b"\xff\xfe", b"[" * 100_000, b"{" + b"9" * 5000], ids=len)
def test_a_file_that_is_no_json_is_refused_by_name(tmp_path, data):
    (tmp_path / "mir.json").write_bytes(data)
    with pytest.raises(ValueError, match=r"mir\.json is not JSON"):
        MIRResult.from_json(tmp_path / "mir.json")


KEY = "model.layers.0.modality_layernorm.scale"


@pytest.mark.parametrize(
    "change",
    [
        lambda tensors: tensors | {KEY: tensors[KEY].long()},
        lambda tensors: tensors | {KEY: tensors[KEY] * float("nan")},
        lambda tensors: tensors | {KEY: tensors[KEY].double() + 1e300},
        lambda tensors: tensors | {f"other.{KEY}": tensors[KEY] + 1},
    ],
    ids=["integers", "nan", "too large", "two values"],
)
def test_moca_values_that_are_none_are_refused(tmp_path, change):
    path = save_moca(calibrated(), tmp_path / "moca.safetensors")
    before = [p.detach().clone() for p in moca_parameters(calibrated())]
    save_file(change(load_file(path)), path)
    with pytest.raises((TypeError, ValueError), match="path: "):
        load_moca(calibrated(), path)
    assert all(torch.equal(a, b) for a, b in zip(before, moca_parameters(calibrated()), strict=True))


@pytest.mark.parametrize("name", ["moca.safetensors", "moca.bin"])
@pytest.mark.parametrize("data", [b"", b"x" * 100, (2**63).to_bytes(8, "little")], ids=len)
def test_a_file_that_is_no_moca_checkpoint_is_refused_by_name(tmp_path, name, data):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=f"path: .*{name}"):
        load_moca(calibrated(), tmp_path / name)
    torch.save([1], tmp_path / "moca.bin")
    with pytest.raises(ValueError, match="expected a dict"):
        load_moca(calibrated(), tmp_path / "moca.bin")


@pytest.mark.parametrize("name", ["layer.1", "vision_mask"])
def test_states_of_another_dtype_are_refused_by_name(tmp_path, name):
    path = tmp_path / "states.safetensors"
    save_states(path, *sample(0))
    tensors = load_file(path)
    save_file(tensors | {name: 2 * tensors[name].to(torch.int32)}, path)  # integers 0 and 1 are a valid mask
    with pytest.raises(ValueError, match=rf"states\.safetensors: {name}"):
        mir_of_states([path])


def test_no_rows_have_no_norms_whatever_their_strides():
    assert token_norms(torch.zeros(0, 6)[:, ::2]).shape == (0,)


@pytest.mark.parametrize("form", [lambda x: x.to_sparse(), lambda x: x.to("meta")], ids=["sparse", "meta"])
@pytest.mark.parametrize("argument", [0, 1])
def test_tensors_without_rows_in_memory_are_refused_by_name(form, argument):
    mine = metric()
    before = {key: value.clone() for key, value in mine.state_dict().items()}
    hidden, vision, text = sample(0)
    hidden, vision = ([form(h) for h in hidden], vision) if argument == 0 else (hidden, form(vision))
    with pytest.raises((TypeError, ValueError), match=("hidden_states", "vision_mask")[argument]):
        mine.update(hidden, vision, text)
    assert unchanged(before, mine.state_dict())


def test_moments_that_are_no_covariance_name_the_layer():
    mine, state = metric(), metric().state_dict()
    second = torch.tensor([1e-300, 1e306, 1e-300] * 3, dtype=torch.float64)
    mine.load_state_dict(state | {"layers.1.text.moments.0.second": second})
    with pytest.raises(ValueError, match="layer 2: "):
        mine.compute()
