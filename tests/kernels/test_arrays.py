"""NumPy arrays are accepted wherever tensors are, and integer masks wherever masks are, by one rule."""

import re
import warnings

import numpy as np
import pytest
import torch

import mir_kernels
from mir_kernels import StreamingMoments, _arrays
from mir_kernels.ops.moca import VisionMask

N, D = 7, 4


def array(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


X, Y = array(N, D), array(N, D, seed=1)
VECTOR, SQUARE, OTHER = array(D, seed=2), np.cov(X.T), np.cov(Y.T)
MASK = np.array([1, 0, 0, 1, 1, 0, 1], dtype=bool)


def updated(x, mask=None):
    moments = StreamingMoments(D, precision="exact")
    moments.update(x, mask)
    return moments.mean, moments.covariance()


CALLS = {
    "moca": (mir_kernels.moca, (X, VECTOR, VECTOR, MASK)),
    "add_moca_rms_norm": (mir_kernels.add_moca_rms_norm, (X, Y, VECTOR, VECTOR, MASK, VECTOR)),
    "VisionMask": (lambda mask: VisionMask(mask).mask, (MASK,)),
    "MoCa": (mir_kernels.MoCa(D, std=0.1, dtype=torch.float64), (X, MASK)),
    "token_norms": (mir_kernels.token_norms, (X,)),
    "update": (updated, (X, MASK)),
    "update of all": (updated, (X,)),
    "sqrtm": (mir_kernels.sqrtm, (SQUARE,)),
    "inverse_sqrtm": (mir_kernels.inverse_sqrtm, (SQUARE,)),
    "polar": (mir_kernels.polar, (X,)),
    "newton_schulz": (lambda a: mir_kernels.newton_schulz(a, iterations=15), (SQUARE,)),
    "trace_sqrt_product": (mir_kernels.trace_sqrt_product, (SQUARE, OTHER)),
    "frechet_distance": (lambda *g: mir_kernels.frechet_distance(*g, bounds=True), (VECTOR, SQUARE, X[0], OTHER)),
    "trace_sqrt_from_features": (mir_kernels.trace_sqrt_from_features, (X, Y)),
    "frechet_distance_from_features": (mir_kernels.frechet_distance_from_features, (X, Y)),
}
FLOATS = [np.float64, np.float32, np.float16]
WHOLE = [np.int64, np.int32, np.int16, np.int8, np.uint8, np.uint16, np.uint32, np.uint64]
OF_MASKS = [name for name, (_, arguments) in CALLS.items() if any(one is MASK for one in arguments)]


def all_equal(found, expected):
    pairs = [(found, expected)] if isinstance(found, torch.Tensor) else list(zip(found, expected, strict=True))
    return all(isinstance(a, torch.Tensor) and torch.equal(a, b) for a, b in pairs)


def cast(arguments, dtype):
    return [one if one.dtype == bool else one.astype(dtype) for one in arguments]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("name", CALLS)
def test_arrays_give_what_their_tensors_give(name, dtype):
    call, arguments = CALLS[name]
    arguments = cast(arguments, dtype)
    kept = [one.copy() for one in arguments]
    assert all_equal(call(*arguments), call(*map(torch.from_numpy, arguments)))
    assert all(np.array_equal(one, before) for one, before in zip(arguments, kept, strict=True))


def read_only(a):
    a = a.copy()
    a.flags.writeable = False
    return a


def in_a_record(a):
    records = np.zeros(a.shape, dtype=[("x", a.dtype), ("odd", "u1")])
    records["x"] = a
    return records["x"]


LAYOUTS = {
    "read only": read_only,
    "another byte order": lambda a: a.astype(a.dtype.newbyteorder("S")),
    "backwards": lambda a: np.ascontiguousarray(a[::-1])[::-1],
    "every other": lambda a: np.repeat(a, 2, 0)[::2],
    "columns first": np.asfortranarray,
    "in a record": in_a_record,
    "broadcast": lambda a: np.broadcast_to(a[:1], a.shape),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["moca", "add_moca_rms_norm", "update", "sqrtm", "trace_sqrt_from_features"])
def test_arrays_of_any_layout_are_taken_without_a_warning(name, layout):
    call, arguments = CALLS[name]
    if layout == "broadcast" and name == "sqrtm":
        arguments = (np.ones((D, D)),)
    odd = [LAYOUTS[layout](one) for one in arguments]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = call(*odd)
    assert all_equal(found, call(*(torch.tensor(np.array(one, dtype=one.dtype.newbyteorder("="))) for one in odd)))


def test_memory_is_shared_where_torch_can_share_it():
    for a in (X.copy(), X.copy().T, X.copy()[::2], MASK.copy(), np.float16(X)):
        assert _arrays.tensor_of("x", a).data_ptr() == a.ctypes.data
    assert _arrays.tensor_of("x", tensor := torch.ones(2)) is tensor


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (np.array([["a"]]), "x: expected a dtype that torch supports, got an array of <U1"),
        (np.array([[None]]), "x: expected a dtype that torch supports, got an array of object"),
        (np.longdouble(X), r"x: expected a dtype that torch supports, got an array of \w+"),
        (np.ma.masked_array(X), "x: expected a torch.Tensor or an array without a mask, got a MaskedArray"),
        (X.astype(complex), "x: expected one of the dtypes float32, .* got complex128"),
        (X.astype(int), "x: expected one of the dtypes float32, .* got int64"),
        (X.tolist(), "x: expected a torch.Tensor, got list"),
        (memoryview(X), "x: expected a torch.Tensor, got memoryview"),
    ],
)
def test_what_is_no_array_of_numbers_is_refused_by_name(value, message):
    for call in (
        mir_kernels.token_norms,
        lambda x: mir_kernels.moca(x, VECTOR, VECTOR, MASK),
        StreamingMoments(D).update,
    ):
        with pytest.raises(TypeError, match=message):
            call(value)


def test_an_array_is_not_changed_in_place():
    with pytest.raises(TypeError, match=r"x: expected a torch\.Tensor to change in place, got ndarray"):
        mir_kernels.moca(X.copy(), VECTOR, VECTOR, MASK, inplace=True)


@pytest.mark.parametrize("as_given", [lambda m: m, torch.from_numpy], ids=["array", "tensor"])
@pytest.mark.parametrize("dtype", WHOLE)
@pytest.mark.parametrize("name", OF_MASKS)
def test_masks_of_zeros_and_ones_are_those_of_true_and_false(name, dtype, as_given):
    call, arguments = CALLS[name]
    whole = [as_given(MASK.astype(dtype)) if one is MASK else one for one in arguments]
    assert all_equal(call(*whole), call(*arguments))


@pytest.mark.parametrize("wrong", [2, -1, 100])
@pytest.mark.parametrize("dtype", [np.int64, np.int32, np.int16, np.int8])
@pytest.mark.parametrize("name", OF_MASKS)
def test_another_number_in_a_mask_is_refused_by_name(name, dtype, wrong):
    call, arguments = CALLS[name]
    mask = MASK.astype(dtype)
    mask[3] = wrong
    message = f"mask: expected True and False, or 0 and 1, got {wrong} in a mask of {np.dtype(dtype)}"
    with pytest.raises(ValueError, match=re.escape(message)):
        call(*(mask if one is MASK else one for one in arguments))


def test_a_refused_mask_changes_nothing():
    moments = StreamingMoments(D)
    with pytest.raises(ValueError, match=r"mask: .* got 2"):
        moments.update(X, MASK * 2)
    with pytest.raises(TypeError, match=r"mask: expected one of the dtypes bool, uint8, .* got float64"):
        moments.update(X, MASK * 1.0)
    assert moments.count == 0


@pytest.mark.parametrize("shape", [(0,), (2, 0)])
def test_an_empty_mask_of_whole_numbers(shape):
    empty = np.zeros(shape, dtype=int)
    assert mir_kernels.moca(np.zeros((*shape, D)), VECTOR, VECTOR, empty).shape == (*shape, D)


@pytest.mark.parametrize("name", ["moca", "add_moca_rms_norm"])
def test_compiled_code_takes_masks_of_whole_numbers_and_refuses_the_same(name):
    call, arguments = CALLS[name]
    tensors = [torch.from_numpy(one) for one in arguments]
    compiled = torch.compile(lambda *t: call(*t), fullgraph=True, backend="aot_eager")
    whole = [one.long() if one.dtype == torch.bool else one for one in tensors]
    assert all_equal(compiled(*whole), call(*tensors))
    with pytest.raises(ValueError, match="mask: expected True and False, or 0 and 1, got 3"):
        compiled(*(one * 3 if one.dtype == torch.int64 else one for one in whole))


def test_gradients_flow_past_a_mask_of_whole_numbers():
    scale = torch.from_numpy(VECTOR).requires_grad_()
    for mask in (MASK, MASK.astype(int)):
        scale.grad = None
        mir_kernels.moca(X, scale, VECTOR, mask).sum().backward()
        torch.testing.assert_close(scale.grad, torch.from_numpy(X[MASK].sum(0)))
