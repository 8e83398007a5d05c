"""What is fuzzed with hypothesis: tensors of every shape, dtype and layout as inputs, and states with wrong entries.

The promise: a documented error that names the argument, and the state is as before; or the result of the reference.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fuzz.targets import D, metric, same, sample, told, unchanged
from mir_kernels.moments import StreamingMoments, reference
from modality_integration import ModalityIntegrationRate, mir

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
OTHER_DTYPES = (torch.int64, torch.uint8, torch.bool, torch.complex64, torch.float8_e4m3fn)
LAYOUTS = ("plain", "transposed", "strided", "expanded", "flipped", "offset", "gradient", "inference", "meta", "sparse")


@st.composite
def tensors(draw: st.DrawFn, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...] = DTYPES) -> Tensor:
    """Values small and large, sometimes NaN or infinite, in one of many layouts; rarely of another dtype."""
    dtype = draw(st.sampled_from((*dtypes * 6, *OTHER_DTYPES)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    values = torch.randn(shape, generator=generator) * draw(st.sampled_from([1.0, 1.0, 1.0, 0.0, 1e-12, 1e4]))
    values += draw(st.sampled_from([0.0, 0.0, 1.0, 100.0]))
    if values.numel() and draw(st.integers(0, 9)) == 0:
        values.view(-1)[draw(st.integers(0, values.numel() - 1))] = draw(st.sampled_from([math.nan, math.inf, 3e38]))
    plain = values.to(dtype)
    layout = draw(st.sampled_from((*LAYOUTS[:1] * 8, *LAYOUTS)))
    if layout == "transposed" and plain.dim() > 1:
        return plain.mT.contiguous().mT
    if layout == "strided" and plain.dim():
        return plain.repeat_interleave(2, -1)[..., ::2]
    if layout == "expanded" and plain.dim() > 1 and plain.shape[0]:
        return plain[:1].expand(plain.shape)
    if layout == "flipped" and plain.dim() and plain.element_size() > 1:  # torch flips no float8
        return plain.flip(0)
    if layout == "offset":
        return torch.cat([plain.new_zeros(3), plain.reshape(-1)])[3:].view(shape)
    if layout == "gradient" and plain.is_floating_point():
        return plain.requires_grad_()
    if layout == "inference":
        with torch.inference_mode():
            return plain.clone()
    if layout == "meta":
        return plain.to("meta")
    if layout == "sparse" and plain.dim() > 1 and plain.dtype in (torch.float32, torch.float64):
        return plain.to_sparse()
    return plain


@st.composite
def masks(draw: st.DrawFn, shape: tuple[int, ...]) -> Tensor:
    """Bool or uint8 (any nonzero byte), rarely something else, rarely of another shape."""
    if draw(st.integers(0, 11)) == 0:
        shape = draw(st.sampled_from([(), (1,), (*shape, 1), shape[:-1], shape[::-1]]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    mask = torch.rand(shape, generator=generator) < draw(st.sampled_from([0.0, 0.3, 0.5, 1.0]))
    kind = draw(st.sampled_from(["bool"] * 5 + ["uint8"] * 3 + ["strided", "int64", "float32", "list"]))
    if kind == "uint8":
        return mask.byte() * draw(st.sampled_from([1, 2, 255]))
    if kind == "strided" and mask.dim():
        return mask.repeat_interleave(3, -1)[..., ::3]
    return mask.tolist() if kind == "list" else mask if kind in ("bool", "strided") else mask.to(getattr(torch, kind))


def copied(state: dict[str, Any]) -> dict[str, Any]:
    return {key: value.clone() for key, value in state.items()}


@given(st.data())
def update(data: st.DataObject) -> None:
    """ModalityIntegrationRate.update against `mir` of the features gathered by hand."""
    mine = ModalityIntegrationRate(hold=data.draw(st.sampled_from([4, 2048])), precision="exact")
    dtype = data.draw(st.sampled_from(DTYPES))
    counted: list[list[list[Tensor]]] = []
    for _ in range(data.draw(st.integers(1, 3))):
        lead = data.draw(st.sampled_from([(6,), (1, 6), (2, 4), (0,), (1, 0), (20,), ()]))
        d = data.draw(st.sampled_from([D] * 6 + [1, D + 1, 0]))
        layers = [
            data.draw(tensors((*lead, d), (dtype,))) for _ in range(data.draw(st.sampled_from([2] * 8 + [0, 1, 3])))
        ]
        vision, text = data.draw(masks(lead)), data.draw(masks(lead))
        if data.draw(st.integers(0, 3)) and isinstance(vision, Tensor) and isinstance(text, Tensor):
            text = (vision == 0) if vision.shape == text.shape else text
        before = copied(mine.state_dict())
        try:
            mine.update(layers, vision, text)
        except (TypeError, ValueError) as error:
            told(error, "hidden_states", "vision_mask", "text_mask", "layer ")
            assert unchanged(before, mine.state_dict())
            continue
        counted.append([[layer.detach()[mask != 0].clone() for layer in layers] for mask in (vision, text)])
    try:
        value = mine.compute().value
    except ValueError as error:
        told(error, "layer ", "no hidden states")
        value = None
    try:
        features = [[torch.cat(parts) for parts in zip(*side, strict=True)] for side in zip(*counted, strict=True)]
        expected = mir(*features).value if features else None
    except ValueError:
        expected = None
    assert (value is None) == (expected is None), (value, expected)
    assert value == expected or math.isclose(value, expected, rel_tol=1e-5, abs_tol=1e-5), (value, expected)


@given(st.data())
def moments_update(data: st.DataObject) -> None:
    """StreamingMoments.update, and what it then says of the rows."""
    mine, rows = StreamingMoments(D), [torch.zeros(0, D)]
    for _ in range(data.draw(st.integers(1, 3))):
        lead = data.draw(st.sampled_from([(5,), (2, 3), (0,), (1100,), ()]))
        x = data.draw(tensors((*lead, data.draw(st.sampled_from([D] * 8 + [1, 0, D + 1])))))
        mask = data.draw(st.none() | masks(lead))
        before = copied(mine.state_dict())
        try:
            mine.update(x, mask)
        except (TypeError, ValueError) as error:
            told(error, "x: ", "mask: ")
            assert unchanged(before, mine.state_dict())
            continue
        rows.append((x.detach() if mask is None else x.detach()[mask != 0]).reshape(-1, D).double().clone())
    taken = torch.cat(rows)
    assert mine.count == len(taken)
    if len(taken) > 1 and bool(taken.abs().max() < 1e10):
        covariance, true = mine.covariance(), reference.covariance(taken)
        sigma = true.diagonal().sqrt() + 1e-6 * taken.abs().amax(0) + 1e-30
        assert bool(((covariance - true).abs() <= 1e-5 * sigma[:, None] * sigma).all())


@st.composite
def edits(draw: st.DrawFn, state: dict[str, Tensor]) -> dict[str, Any]:
    """A state with one or two entries gone, renamed, or of another type, dtype, shape or value."""
    state = dict(state)
    for _ in range(draw(st.integers(1, 2))):
        key = draw(st.sampled_from(sorted(state)))
        value = state.pop(key)
        kind = draw(st.sampled_from(["gone", "renamed", "other", "dtype", "longer", "flat", "value", "empty"]))
        if not isinstance(value, Tensor) or kind == "renamed":
            state[draw(st.sampled_from(["x", key + "x", key.replace("0", "7"), "layers.²." + key]))] = value
        elif kind == "other":
            state[key] = draw(st.sampled_from([None, 3, "x", [1.0], {}]))
        elif kind == "dtype":
            state[key] = value.to(draw(st.sampled_from([torch.float64, torch.float32, torch.int64, torch.complex64])))
        elif kind == "longer":
            state[key] = torch.cat([value.reshape(1, -1)] * 2, 1).flatten()
        elif kind == "flat":
            state[key] = value.reshape(draw(st.sampled_from([(-1,), (1, -1), (-1, 1)])))
        elif kind == "empty":
            state[key] = value.new_empty(draw(st.sampled_from([(0,), (0, 10**9), ()])))
            state[key] = state[key].zero_()
        elif kind == "value":
            number = draw(st.sampled_from([-1, 0, 1, 200, 2**60, math.nan, math.inf, -math.inf]))
            integer = not value.is_floating_point()
            state[key] = torch.full_like(
                value, (int(number) if math.isfinite(number) else 0) % 200 if integer else number
            )
    return state


@given(st.data())
def metric_state(data: st.DataObject) -> None:
    """ModalityIntegrationRate.load_state_dict, which refuses with torch's RuntimeError."""
    mine, state = metric(groups=2), metric(groups=2).state_dict()
    mine.update(*sample(5))
    before, edited = copied(mine.state_dict()), data.draw(edits(state))
    try:
        mine.load_state_dict(edited)
    except (RuntimeError, TypeError) as error:
        told(error, *state, "layers.", "version", "samples", "groups", "outlier rule", "key")
        assert unchanged(before, mine.state_dict())
        return
    after = mine.state_dict()
    assert all(same(edited[key], after[key]) for key in after if not key.endswith("bound"))  # CUDA's alone
    try:
        assert not math.isnan(mine.compute().value)
    except ValueError as error:
        told(error, "layer ", "no hidden states")


@given(st.data())
def moments_state(data: st.DataObject) -> None:
    """StreamingMoments.load_state_dict."""
    mine = StreamingMoments(D)
    mine.update(torch.randn(1030, D, generator=torch.Generator().manual_seed(0)))
    before = copied(mine.state_dict())
    edited = data.draw(edits(before))
    try:
        mine.load_state_dict(edited)
    except (TypeError, ValueError) as error:
        told(error, "state")
        assert unchanged(before, mine.state_dict())
        return
    after = mine.state_dict()
    assert all(same(edited[key], after[key]) for key in after if key != "bound")
    mine.update(torch.ones(3, D))


INPUTS = {
    "update": update,
    "moments-update": moments_update,
    "metric-edits": metric_state,
    "moments-edits": moments_state,
}
