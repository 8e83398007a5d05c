"""Fuzz targets beyond values and shapes: memory layouts, process-wide settings, masks rewritten in place, NaN rows.

The promise: the same numbers as for the plain tensor in a plain process, or the same error.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from kernels.edge_calls import CALLS, LAYOUTS, outcome, unwrapped
from kernels.process_defaults import DEFAULTS
from mir_kernels import StreamingMoments, add_moca_rms_norm, moca
from mir_kernels.ops.moments import reference

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
D = 5


def randn(data: st.DataObject, *shape: int) -> torch.Tensor:
    generator = torch.Generator("cpu").manual_seed(data.draw(st.integers(0, 2**20)))
    return torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")


@given(st.data())
def layouts(data: st.DataObject) -> None:
    """Every operation on a tensor of any layout, in a process with changed defaults."""
    call = CALLS[data.draw(st.sampled_from(sorted(CALLS)))]
    tensor = call.tensor.to(data.draw(st.sampled_from(DTYPES))) * data.draw(st.sampled_from([1.0, 2.0**-10, 2.0**6]))
    assume(call.argument != "cov_x" or tensor.dtype in (torch.float32, torch.float64))  # the means are float32
    wanted = outcome(call.function, tensor)
    laid_out = LAYOUTS[data.draw(st.sampled_from(sorted(LAYOUTS)))](tensor)
    with DEFAULTS[data.draw(st.sampled_from(sorted(DEFAULTS)))]():
        found = unwrapped(outcome(call.function, laid_out))
    if not isinstance(wanted, list):
        assert found == wanted
        return
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other)


@given(st.data())
def rewritten_masks(data: st.DataObject) -> None:
    """A few calls of MoCa that share one mask buffer, rewritten in between, with backward passes in any order."""
    rows = data.draw(st.sampled_from([0, 1, 7, 40]))
    mask = torch.zeros(rows, dtype=data.draw(st.sampled_from([torch.bool, torch.uint8])), device="cpu")
    x = randn(data, rows, D).to(data.draw(st.sampled_from(DTYPES)))
    calls = []
    for _ in range(data.draw(st.integers(1, 4))):
        values = randn(data, rows) > data.draw(st.sampled_from([-9.0, 0.0, 9.0]))
        mask.numpy()[...] = values.to(mask.dtype).numpy()
        scale, shift = (torch.ones(D, dtype=torch.float32, device="cpu").requires_grad_() for _ in range(2))
        way = data.draw(st.sampled_from(["new", "in place", "fused"]))
        if way == "fused":
            out = add_moca_rms_norm(x, x, scale, shift, mask, torch.ones(D, dtype=x.dtype, device="cpu"))[1] / 2
        else:
            out = moca(x.clone(), scale, shift, mask, inplace=way == "in place")
        calls.append((out, scale, shift, values, way))
    for out, scale, shift, values, way in data.draw(st.permutations(calls)):
        out.double().sum().backward()
        summed = x[values].double().sum(0)
        tolerance = {"rtol": 2e-2, "atol": 2e-2 * (rows + 1)} if x.element_size() == 2 else {"rtol": 1e-5, "atol": 1e-5}
        torch.testing.assert_close(scale.grad.double(), summed, **tolerance)
        count = torch.full_like(shift, float(values.sum())) / (2 if way == "fused" else 1)
        torch.testing.assert_close(shift.grad, count, rtol=1e-6, atol=0)


@given(st.data())
def not_finite(data: st.DataObject) -> None:
    """Moments with NaN or infinity among their rows: reading them raises and never returns a number."""
    rows = randn(data, data.draw(st.sampled_from([3, 40, 1100])), D).to(data.draw(st.sampled_from(DTYPES)))
    spoilt = data.draw(st.booleans())
    if spoilt:
        place = data.draw(st.integers(0, rows.numel() - 1))
        rows.view(-1)[place] = data.draw(st.sampled_from([torch.nan, torch.inf, -torch.inf]))
    moments = StreamingMoments(D, device="cpu")
    for part in rows.split(data.draw(st.sampled_from([2, 1024, 2000]))):
        moments.update(part)
    assert moments.count == len(rows)
    for read in (lambda: moments.mean, moments.covariance):
        if spoilt:
            with pytest.raises(ValueError, match="NaN"):
                read()
        else:
            assert bool(read().isfinite().all())
    if not spoilt:
        true = reference.covariance(rows)
        sigma = true.diagonal().sqrt()
        assert bool(((moments.covariance() - true).abs() <= 1e-5 * sigma[:, None] * sigma + 1e-30).all())


EDGES = {"layouts": layouts, "rewritten-masks": rewritten_masks, "not-finite": not_finite}
