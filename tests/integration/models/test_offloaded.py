"""MoCa in models offloaded by accelerate: parameters on the meta device, with hooks that fetch them."""

import accelerate
import pytest
import torch
from safetensors.torch import load_file

from integration.tiny_models import HIDDEN, tiny_batch, tiny_model
from modality_integration import add_moca, load_moca, measure_mir, moca_parameters, save_moca

ROWS = ["ttitttt", "tittttt"] * 3


def trained():
    model = tiny_model("llava", dtype=torch.float32)
    torch.manual_seed(0)
    add_moca(model, std=0.5)
    return model


def offload(model, where, folder):
    if where == "cpu":
        return accelerate.cpu_offload(model, execution_device="cpu")
    return accelerate.disk_offload(model, folder, execution_device="cpu")


def logits(model):
    with torch.no_grad():
        return model(**tiny_batch(model, "llava", ROWS).inputs).logits


@pytest.mark.parametrize("order", ["moca first", "offload first"])
@pytest.mark.parametrize("where", ["cpu", "disk"])
def test_values_are_loaded_saved_and_measured_where_the_hooks_keep_them(where, order, tmp_path):
    reference = trained()
    file = save_moca(reference, tmp_path / "reference")
    expected, batch = logits(reference), tiny_batch(reference, "llava", ROWS).inputs
    model = tiny_model("llava", dtype=torch.float32)
    if order == "moca first":
        add_moca(model)
    offload(model, where, str(tmp_path / "weights"))
    if order == "offload first":
        add_moca(model)
        assert not any(parameter.is_meta for parameter in moca_parameters(model))
    load_moca(model, file)
    with torch.no_grad():
        torch.testing.assert_close(model(**batch).logits, expected)
    values = load_file(save_moca(model, tmp_path / "again"))
    assert {tuple(value.shape) for value in values.values()} == {(HIDDEN,)}
    assert all(torch.equal(value, load_file(file)[name]) for name, value in values.items())
    assert measure_mir(model, [batch]).value == pytest.approx(measure_mir(reference, [batch]).value, rel=1e-5)


def test_a_model_without_values_is_refused_by_name():
    with torch.device("meta"):
        model = tiny_model("llava")
    with pytest.raises(ValueError, match=r"is on the meta device, without values, and no accelerate hook"):
        add_moca(model)
