"""Fuzz targets that read files, driven with bytes. Each check raises only if the promise is broken.

The promise: either a documented error that names the file, with nothing changed, or a correct result.
A changed state of the metric also gets a new checksum; otherwise the old one would reject every change first.
"""

from __future__ import annotations

import io
import json
import math
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load, save

from modality_integration import (
    MIRResult,
    ModalityIntegrationRate,
    add_moca,
    load_moca,
    mir,
    mir_of_states,
    moca_parameters,
    save_moca,
    save_states,
)
from modality_integration.app.checkpoint import Checkpoint, Passage
from modality_integration.app.errors import InputError
from modality_integration.metric import state_file

_FOLDER = tempfile.TemporaryDirectory(prefix="fuzz-")  # deleted when the process ends
FOLDER = Path(_FOLDER.name)
D = 3


class Target(NamedTuple):
    """check(data) raises if a promise is broken; seeds: valid files."""

    check: Callable[[bytes], None]
    seeds: Callable[[], list[bytes]]


def sample(seed: int, tokens: int = 12) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    hidden = [torch.randn(1, tokens, D, generator=generator) + k for k in range(2)]
    vision = torch.zeros(1, tokens, dtype=torch.bool)
    vision[:, : tokens // 2] = True
    return hidden, vision, ~vision


def metric(**options: Any) -> ModalityIntegrationRate:
    """A metric with rows held back and rows accumulated in both modalities."""
    out = ModalityIntegrationRate(hold=4, **options)
    for seed in range(3):
        out.update(*sample(seed))
    return out


def told(error: Exception, *names: str) -> None:
    """The error message names its subject."""
    assert any(name in str(error) for name in names), f"{error!r} names none of {names}"


def unchanged(before: dict[str, Any], after: dict[str, Any]) -> bool:
    """Whether two states have the same entries, bit for bit."""
    return before.keys() == after.keys() and all(same(before[key], after[key]) for key in before)


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    layout = (a.dtype, a.shape) == (b.dtype, b.shape)
    return layout and torch.equal(*(t.contiguous().reshape(-1).view(torch.uint8) for t in (a, b)))


def written(data: bytes, name: str) -> Path:
    path = FOLDER / name
    path.write_bytes(data)
    return path


def check_states(data: bytes) -> None:
    path = written(data, "states.safetensors")
    try:
        value = mir_of_states([path]).value
    except ValueError as error:
        told(error, "states.safetensors", "layer")
        return
    tensors = load(data)
    layers = [tensors[f"layer.{k}"] for k in range(1, len(tensors) - 1)]
    expected = mir(*([layer[tensors[f"{m}_mask"].bool()] for layer in layers] for m in ("vision", "text"))).value
    assert value == expected or math.isclose(value, expected, rel_tol=1e-6, abs_tol=1e-6), (value, expected)


def states_seeds() -> list[bytes]:
    hidden, vision, text = sample(0)
    seeds = []
    for layers, masks in (
        (hidden, (vision, text)),
        ([layer[0].bfloat16() for layer in hidden[:1]], (vision[0].byte(), text[0].byte())),
        ([hidden[0].double(), hidden[1].half()], (vision, text)),
    ):
        save_states(FOLDER / "seed", layers, *masks)
        seeds.append((FOLDER / "seed").read_bytes())
    return seeds


def check_metric_state(data: bytes) -> None:
    path, mine = written(data, "state.safetensors"), metric()
    before = {key: value.clone() for key, value in mine.state_dict().items()}
    try:
        mine.load(path)
    except ValueError as error:
        told(error, "state.safetensors")
        assert unchanged(before, mine.state_dict())
        return
    assert unchanged(load(data), mine.state_dict())
    goes_on(mine)
    try:
        goes_on(ModalityIntegrationRate.from_file(path))
    except ValueError as error:  # unknown options, which load() ignores
        told(error, "state.safetensors")


def goes_on(mine: ModalityIntegrationRate) -> None:
    try:
        assert not math.isnan(mine.compute().value)
    except ValueError as error:
        told(error, "layer", "no hidden states")
    before = {key: value.clone() for key, value in mine.state_dict().items()}
    try:
        mine.update(*sample(9))
    except ValueError as error:
        told(error, "hidden_states")
        assert unchanged(before, mine.state_dict())


def check_signed_state(data: bytes) -> None:
    """`check_metric_state` after recomputing the checksum for the changed data."""
    try:
        size = int.from_bytes(data[:8], "little")
        metadata = json.loads(data[8 : 8 + size])["__metadata__"]
        tensors = load(data)
        metadata["sha256"] = state_file._digest(tensors, metadata["options"])
        signed = save(tensors, metadata)
    except Exception:  # not a file of tensors: covered by check_metric_state
        return
    check_metric_state(signed)


def metric_seeds() -> list[bytes]:
    seeds = []
    for options in ({}, {"groups": 2}, {"outliers": "none"}):
        metric(**options).save(FOLDER / "seed")
        seeds.append((FOLDER / "seed").read_bytes())
    return seeds


ARGUMENTS = {"model": "m", "samples": 3}


def check_run_checkpoint(data: bytes) -> None:
    folder = FOLDER / "run"
    folder.mkdir(exist_ok=True)
    (folder / "rank0.json").write_bytes(data)
    metric().save(folder / "rank0-pass1-000002.safetensors")
    checkpoint, mine = Checkpoint(folder, ARGUMENTS), ModalityIntegrationRate(hold=4)
    try:
        passage = checkpoint.passage()
        checkpoint.load(mine)
    except InputError as error:
        told(error, str(folder))
        assert not mine._layers
        return
    assert passage == Passage(1, 2)
    assert unchanged(metric().state_dict(), mine.state_dict())


def run_checkpoint_seeds() -> list[bytes]:
    saved = {"pass": 1, "done": 2, "state": "rank0-pass1-000002.safetensors", "arguments": ARGUMENTS}
    return [json.dumps(saved).encode(), json.dumps(saved | {"arguments": {}}).encode()]


def check_result(data: bytes) -> None:
    path = written(data, "mir.json")
    try:
        result = MIRResult.from_json(path)
    except ValueError as error:
        told(error, "mir.json")
        return
    assert not math.isnan(result.value)
    assert MIRResult.from_json(result.to_json()) == result
    assert "MIR" in str(result)
    assert result.table().row_count >= len(result.terms)


def result_seeds() -> list[bytes]:
    results = [metric(**options).compute() for options in ({}, {"bounds": True}, {"groups": 3})]
    return [result.to_json().encode() for result in results]


@cache
def calibrated() -> torch.nn.Module:
    from integration.tiny_models import tiny_model  # imports transformers, which most targets do not need

    model = tiny_model("llava")
    add_moca(model, std=0.3, dtype=torch.float32)
    return model


def check_moca(data: bytes, name: str = "moca.safetensors") -> None:
    path, model = written(data, name), calibrated()
    before = [p.detach().clone() for p in moca_parameters(model)]
    try:
        load_moca(model, path)
    except (TypeError, ValueError) as error:
        told(error, "path: ")
        assert all(torch.equal(a, b) for a, b in zip(before, moca_parameters(model), strict=True))
        return
    assert all(bool(p.isfinite().all()) for p in moca_parameters(model))


def check_moca_torch(data: bytes) -> None:
    check_moca(data, "moca.bin")


def moca_seeds() -> list[bytes]:
    return [save_moca(calibrated(), FOLDER / "seed.safetensors").read_bytes()]


def moca_torch_seeds() -> list[bytes]:
    file = io.BytesIO()
    torch.save(load(moca_seeds()[0]), file)
    return [file.getvalue()]


TARGETS = {
    "states": Target(check_states, states_seeds),
    "metric-state": Target(check_metric_state, metric_seeds),
    "signed-metric-state": Target(check_signed_state, metric_seeds),
    "run-checkpoint": Target(check_run_checkpoint, run_checkpoint_seeds),
    "result": Target(check_result, result_seeds),
    "moca": Target(check_moca, moca_seeds),
    "moca-torch": Target(check_moca_torch, moca_torch_seeds),
}
