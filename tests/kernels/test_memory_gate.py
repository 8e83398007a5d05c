"""Tensors that are not plain memory: every operation returns correct results or a named error, and reads no garbage."""

import warnings

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

import mir_kernels
from kernels.edge_calls import CALLS, LAYOUTS, D, draw, outcome, same, shapes, unwrapped
from kernels.moca.calls import Wrapped
from mir_kernels import StreamingMoments
from mir_kernels.ops.frechet import frechet_distance_from_features, trace_sqrt_from_features, trace_sqrt_report


@pytest.fixture(autouse=True)
def _nothing_seen():
    Wrapped.seen = []


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", CALLS)
def test_the_numbers_that_a_tensor_means_are_read(name, layout):
    call = CALLS[name]
    found = unwrapped(outcome(call.function, LAYOUTS[layout](call.tensor)))
    assert same(found, outcome(call.function, call.tensor))


@pytest.mark.parametrize("name", CALLS)
def test_zeros_without_memory_are_zeros(name):
    call = CALLS[name]
    zeros = torch._efficientzerotensor(call.tensor.shape)
    assert same(outcome(call.function, zeros), outcome(call.function, torch.zeros_like(call.tensor)))


def fake(function, tensor):
    with FakeTensorMode() as mode:
        return function(mode.from_tensor(tensor), lambda other, *_: mode.from_tensor(other))


WITHOUT_NUMBERS = {
    "fake": fake,
    "meta": lambda function, tensor: function(tensor.to("meta"), lambda other, *_: other.to("meta")),
}


@pytest.mark.parametrize("kind", WITHOUT_NUMBERS)
@pytest.mark.parametrize("name", CALLS)
def test_without_numbers_the_shapes_come_out(name, kind):
    call = CALLS[name]
    assert shapes(WITHOUT_NUMBERS[kind](call.function, call.tensor)) == shapes(call.function(call.tensor))


def scripted(function, tensor):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # tracing is deprecated, and does not record some checks
        return torch.jit.trace(lambda x: tuple(outcome(function, x)), (tensor,), check_trace=False)


TRACED = {
    "jit.trace": scripted,
    "make_fx": lambda function, tensor: make_fx(lambda x: function(x))(tensor),
    "functionalize": lambda function, tensor: torch.func.functionalize(function),
    "aot_eager": lambda function, tensor: torch.compile(function, backend="aot_eager", fullgraph=True),
}


@pytest.mark.parametrize("kind", TRACED)
@pytest.mark.parametrize("name", CALLS)
def test_a_trace_computes_with_what_it_is_given(name, kind):
    call = CALLS[name]
    torch.compiler.reset()
    other = 2 * call.tensor
    found = outcome(TRACED[kind](call.function, call.tensor), other)
    assert same(found, outcome(call.function, other))


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("transform", [torch.func.vmap, lambda f: lambda x: torch.func.jvp(f, (x,), (x,))[0]])
def test_transforms_are_refused_by_name(name, transform):
    call = CALLS[name]
    with pytest.raises(RuntimeError, match=r"torch\.func transforms .* are not supported"):
        transform(lambda x: call.function(x, lambda other, *at: other[0] if at and x.dim() < 3 else other))(call.tensor)


@pytest.mark.parametrize("name", CALLS)
def test_a_nested_tensor_is_refused_by_name(name):
    call = CALLS[name]
    for layout in (torch.strided, torch.jagged):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            nested = torch.nested.nested_tensor(list(call.tensor), layout=layout)
        with pytest.raises(TypeError, match=f"^{call.argument}: expected a dense tensor"):
            call.function(nested)


@pytest.mark.parametrize("name", CALLS)
def test_whoever_listens_to_dispatch_changes_nothing(name):
    call = CALLS[name]
    with FlopCounterMode(display=False):
        found = outcome(call.function, call.tensor)
    assert same(found, outcome(call.function, call.tensor))


# Code without an operator, which keeps state or reports on its computation.


def moments_of(x):
    moments = StreamingMoments(D, device="cpu")
    moments.update(x)
    return moments.mean, moments.covariance()


def masked_moments_of(x):
    moments = StreamingMoments(D, device="cpu")
    mask = torch.ones(30, 50, dtype=torch.bool)
    for _ in range(2):
        moments.update(x, mask)
    return moments.mean, moments.covariance()


FEATURES, COVARIANCES = draw(9, D), CALLS["sqrtm"].tensor
STATEFUL = {
    "moments": (moments_of, draw(1500, D)),
    "moments with a mask": (masked_moments_of, draw(30, 50, D)),
    "trace_sqrt_from_features": (lambda x: (trace_sqrt_from_features(x, FEATURES),), draw(20, D)),
    "frechet_distance_from_features": (lambda x: (frechet_distance_from_features(x, FEATURES),), draw(20, D)),
    "report": (lambda a: (trace_sqrt_report(a, COVARIANCES).value,), CALLS["trace_sqrt_product"].tensor),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", STATEFUL)
def test_what_keeps_numbers_takes_those_that_a_tensor_means(name, layout):
    function, tensor = STATEFUL[name]
    found = outcome(function, LAYOUTS[layout](tensor))
    torch.testing.assert_close(found, outcome(function, tensor), rtol=1e-12, atol=1e-12)  # other order of sums


@pytest.mark.parametrize("name", STATEFUL)
def test_what_keeps_numbers_takes_zeros_without_memory(name):
    function, tensor = STATEFUL[name]
    zeros = torch._efficientzerotensor(tensor.shape)
    assert same(outcome(function, zeros), outcome(function, torch.zeros_like(tensor)))


REFUSING = {
    "fake": lambda function, x: fake(lambda f, _: function(f), x),
    "make_fx": lambda function, x: make_fx(function)(x),
    "jit.trace": scripted,
    "functionalize": lambda function, x: torch.func.functionalize(function)(x),
    "vmap": lambda function, x: torch.func.vmap(function)(x[None]),
    "jvp": lambda function, x: torch.func.jvp(function, (x,), (x,)),
    "nested": lambda function, x: function(torch.nested.as_nested_tensor(list(x), layout=torch.jagged)),
    "meta": lambda function, x: function(x.to("meta")),
}


@pytest.mark.parametrize("kind", REFUSING)
@pytest.mark.parametrize("name", STATEFUL)
def test_what_keeps_numbers_refuses_tensors_that_have_none(name, kind):
    function, tensor = STATEFUL[name]
    with pytest.raises((RuntimeError, TypeError, ValueError), match=r"requires|expected|not supported|is on"):
        REFUSING[kind](function, tensor)


@pytest.mark.parametrize("name", STATEFUL)
def test_compiled_code_leaves_what_keeps_numbers_alone(name):
    function, tensor = STATEFUL[name]
    torch.compiler.reset()
    compiled = torch.compile(lambda x: function(x * 2), backend="eager")
    for factor in (1, 3):
        assert same(outcome(compiled, factor * tensor), outcome(function, factor * tensor * 2))


@pytest.mark.parametrize("name", STATEFUL)
def test_what_keeps_numbers_does_not_mind_who_listens(name):
    function, tensor = STATEFUL[name]
    with FlopCounterMode(display=False):
        found = outcome(function, tensor)
    torch.testing.assert_close(found, outcome(function, tensor), rtol=1e-12, atol=0)  # other products


def test_every_public_function_is_among_the_calls():
    functions = {name for name in mir_kernels.__all__ if name[0].islower()} - {"backends"}
    assert functions == set(CALLS) | {name for name in STATEFUL if name.endswith("_from_features")}
