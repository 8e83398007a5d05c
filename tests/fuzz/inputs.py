"""Fuzz targets with hypothesis: tensors of every shape, dtype and layout as inputs, and states with wrong entries.

The promise: either a documented error that names the argument, with an unchanged state, or the reference result.
"""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from fuzz.edges import EDGES
from fuzz.targets import D, metric, same, sample, told, unchanged
from mir_kernels import moca, trace_sqrt_product
from mir_kernels.ops.moments import StreamingMoments, reference
from modality_integration import ModalityIntegrationRate, mir

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
OTHER_DTYPES = (torch.int64, torch.uint8, torch.bool, torch.complex64, torch.float8_e4m3fn)
LAYOUTS = ("plain", "transposed", "strided", "expanded", "flipped", "offset", "gradient", "inference", "meta", "sparse")


@st.composite
def tensors(draw: st.DrawFn, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...] = DTYPES) -> Tensor:
    """Small and large values, sometimes NaN or infinite, in one of many layouts; rarely of another dtype."""
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
    if layout == "flipped" and plain.dim() and plain.element_size() > 1:  # torch cannot flip float8
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
    """Bool or uint8 (any nonzero byte), rarely another dtype, rarely another shape."""
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
    """ModalityIntegrationRate.update against `mir` on the features gathered by hand."""
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
    """StreamingMoments.update, and the moments it then returns."""
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
    """A state with one or two entries missing, renamed, or of another type, dtype, shape or value."""
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
    """ModalityIntegrationRate.load_state_dict, which raises torch's RuntimeError."""
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
    assert all(same(edited[key], after[key]) for key in after if not key.endswith("bound"))  # used by CUDA only
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


@given(st.data())
def moca_inputs(data: st.DataObject) -> None:
    """mir_kernels.moca against its formula in float64, row by row; its inputs stay unchanged, also after an error."""
    d = data.draw(st.sampled_from([D, D, 1, 0, 8, 65]))
    lead = data.draw(st.sampled_from([(5,), (2, 3), (0,), (40,), ()]))
    width = data.draw(st.sampled_from([d] * 9 + [d + 1]))
    given_ = [data.draw(tensors((*lead, d))), *(data.draw(tensors((width,))) for _ in range(2)), data.draw(masks(lead))]
    inplace = data.draw(st.integers(0, 5)) == 0
    assume(not any(isinstance(t, Tensor) and t.is_sparse for t in given_))  # torch raises its own errors for those
    before = [t.detach().clone() if isinstance(t, Tensor) else t for t in given_]
    try:
        out = moca(*given_, inplace=inplace)
    except (TypeError, ValueError, RuntimeError) as error:  # RuntimeError as in torch, for leaves and inference tensors
        told(error, "x: ", "scale: ", "shift: ", "mask: ", "inplace", "Inference tensors")
        assert all(as_before(now, then) for now, then in zip(given_, before, strict=True))
        return
    x, scale, shift, mask = before
    assert all(as_before(now, then) for now, then in zip(given_[inplace:], before[inplace:], strict=True))
    assert (out.shape, out.dtype, out.device) == (x.shape, x.dtype, x.device)
    if out.is_meta:
        return
    applies = mask.reshape(-1) != 0
    rows, found = x.reshape(-1, d), out.detach().reshape(-1, d)
    assert same(found[~applies], rows[~applies])
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    exact = (scale.to(wide) * rows[applies].to(wide) + shift.to(wide)).to(x.dtype)
    torch.testing.assert_close(found[applies], exact, equal_nan=True)


def as_before(now: Any, then: Any) -> bool:
    if not isinstance(now, Tensor) or now.is_meta:
        return True
    return same(*(t.detach().clone(memory_format=torch.contiguous_format) for t in (now, then)))


@given(st.data())
def trace_inputs(data: st.DataObject) -> None:
    """mir_kernels.trace_sqrt_product: covariances of any rank and scale, and other matrices."""
    d, batch = data.draw(st.sampled_from([1, 2, 3, 7])), data.draw(st.sampled_from([(), (1,), (3,), (0,), (2, 2)]))
    precision, bounds = data.draw(st.sampled_from(["bfloat16", "float32", "float64"])), data.draw(st.booleans())
    pair = []
    for _ in range(2):
        if data.draw(st.integers(0, 3)) == 0:
            shape = data.draw(st.sampled_from([(*batch, d, d), (*batch, d, d), (*batch, d), (*batch, d, d + 1)]))
            pair.append(data.draw(tensors(shape)))
            continue
        generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**20)))
        rank = data.draw(st.integers(0, d + 1))
        factor = torch.randn(*batch, d, rank, generator=generator, dtype=torch.float64)
        factor *= data.draw(st.sampled_from([1.0, 1e-6, 1e6, 1e-150, 1e60]))
        pair.append(factor @ factor.mT)
    backend = data.draw(st.sampled_from([None, None, "eager"]))
    assume(not any(x.is_meta for x in pair))  # torch raises its own errors for tensors without values
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # the precision may be missed at low rank
            found = trace_sqrt_product(*pair, precision=precision, bounds=bounds, backend=backend)
    except (TypeError, ValueError) as error:
        told(error, "a: ", "b: ")
        return
    value = found.value if bounds else found
    assert (value.shape, value.dtype) == (pair[0].shape[:-2], torch.float64)
    if value.is_meta or not value.numel():
        return
    assert bool(torch.isfinite(value).all())
    assert bool((value >= 0).all())
    if bounds:
        assert bool(((found.lower <= value) & (value <= found.upper)).all())
    scales = [x.detach().to(torch.float64).diagonal(dim1=-2, dim2=-1).sum(-1) for x in pair]
    limit = scales[0].clamp(min=0).sqrt() * scales[1].clamp(min=0).sqrt()  # Cauchy-Schwarz
    # If rounding made the inputs indefinite, their negative part is cut off, which can only increase the trace.
    slack = 3e-3 + sum(8 * d * torch.finfo(x.dtype).eps for x in pair)
    assert bool((value <= limit * (1 + slack) + 1e-300).all()), (value, limit)


INPUTS = {
    "moca-inputs": moca_inputs,
    "trace-inputs": trace_inputs,
    "update": update,
    "moments-update": moments_update,
    "metric-edits": metric_state,
    "moments-edits": moments_state,
    **EDGES,
}
