"""The module MoCa: its initial values, training, and the sizes it rejects."""

import pytest
import torch

from kernels.moca.calls import D
from mir_kernels.ops.moca import MoCa


def test_module_starts_as_the_identity_and_learns_scale_and_shift(t):
    module = MoCa(D)
    assert torch.equal(module(t["x"], t["mask"]), t["x"])
    assert {n: tuple(p.shape) for n, p in module.named_parameters()} == {"scale": (D,), "shift": (D,)}
    module(t["x"].requires_grad_() * 1, t["mask"], inplace=True).backward(t["grad"])
    chosen = t["grad"][t["mask"]]
    torch.testing.assert_close(module.shift.grad, chosen.sum(0))
    torch.testing.assert_close(module.scale.grad, (chosen * t["x"][t["mask"]]).sum(0))


def test_module_starts_random_with_a_standard_deviation():
    torch.manual_seed(0)
    module = MoCa(4096, std=0.02, dtype=torch.float64)
    assert abs(module.scale.mean().item() - 1) < 2e-3
    assert abs(module.shift.mean().item()) < 2e-3
    for parameter in module.parameters():
        assert abs(parameter.std().item() - 0.02) < 1e-3
        assert parameter.dtype == torch.float64
    assert MoCa(3, device="meta").scale.is_meta
    assert repr(module) == "MoCa(4096, std=0.02)"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"hidden_size": 0}, "hidden_size: expected an integer >= 1, got 0"),
        ({"hidden_size": 2.0}, "hidden_size: .* got 2.0"),
        ({"hidden_size": 4, "std": -1.0}, "std: expected a standard deviation >= 0, got -1.0"),
        ({"hidden_size": 4, "std": float("nan")}, "std: .* got nan"),
    ],
)
def test_module_refuses_bad_sizes(arguments, message):
    with pytest.raises(ValueError, match=message):
        MoCa(**arguments)
