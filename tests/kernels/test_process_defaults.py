"""No result or state depends on process-wide settings: default dtype and device, autocast, autograd modes."""

import copy
import warnings

import pytest
import torch

from kernels.edge_calls import CALLS, D, draw, outcome, same
from kernels.process_defaults import DEFAULTS
from mir_kernels import MoCa, StreamingMoments, trace_sqrt_product
from mir_kernels.ops.frechet import trace_sqrt_from_features

pytestmark = pytest.mark.filterwarnings("ignore:Anomaly Detection")
ROWS, MASK = draw(1300, D), torch.arange(1300, dtype=torch.int64, device="cpu") % 3 != 0
WIDE = draw(400, 400)
LARGE = WIDE @ WIDE.T + torch.eye(400, dtype=torch.float32, device="cpu")


def moments_of(dtype):
    moments, others = (StreamingMoments(D, device="cpu") for _ in range(2))
    moments.update(ROWS.to(dtype), MASK)
    others.update(ROWS[:50].to(dtype))
    again = StreamingMoments(D, device="cpu")
    again.load_state_dict(copy.deepcopy(moments.state_dict()))
    again.merge(others)
    state = dict(sorted(again.state_dict().items()))
    return [again.mean, again.covariance(), *state.values(), again.to("cpu").covariance()]


MORE = {
    "moments of bfloat16": lambda: moments_of(torch.bfloat16),
    "moments of float32": lambda: moments_of(torch.float32),
    "moments of float64": lambda: moments_of(torch.float64),
    "features": lambda: list(trace_sqrt_from_features(ROWS[:20], ROWS[20:50], bounds=True)),
    "tall features": lambda: list(trace_sqrt_from_features(ROWS[:200], ROWS[200:500], bounds=True)),
    **{
        f"large trace, {backend}": lambda backend=backend: trace_sqrt_product(
            LARGE, LARGE.flip(0).flip(1), bounds=True, backend=backend
        )
        for backend in ("linalg", "eager", "reference")
    },
    "module": lambda: MoCa(D, device="cpu", dtype=torch.float32)(ROWS, MASK).detach(),
}
RESULTS = {**{name: lambda call=call: call.function(call.tensor) for name, call in CALLS.items()}, **MORE}


@pytest.mark.parametrize("default", DEFAULTS)
@pytest.mark.parametrize("name", RESULTS)
def test_a_result_does_not_depend_on_the_process(name, default):
    wanted = outcome(RESULTS[name])
    with DEFAULTS[default]():
        found = outcome(RESULTS[name])
    assert same(found, wanted)


@pytest.mark.parametrize("default", [d for d in DEFAULTS if d not in ("inference mode", "no gradients")])
@pytest.mark.parametrize("name", ["moca", "add_moca_rms_norm", "sqrtm", "inverse_sqrtm", "polar", "newton_schulz"])
def test_a_gradient_does_not_depend_on_the_process(name, default):
    call, results = CALLS[name], []
    for context in (DEFAULTS[default], warnings.catch_warnings):
        x = call.tensor.clone().requires_grad_()
        with context(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            out = call.function(x)
            first = out if isinstance(out, torch.Tensor) else out[0]
            results.append(torch.autograd.grad(first, x, torch.ones_like(first))[0])
    assert torch.equal(*results)
