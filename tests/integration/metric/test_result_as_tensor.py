"""The result of `compute` is both a `MIRResult` and a torch.Tensor and behaves like either."""

import copy
import dataclasses
import json
import math
import operator
import pickle

import pytest
import torch

from integration.metric.streams import fed, sample, whole
from modality_integration import LayerTerms, MIRResult, ModalityIntegrationRate

SAMPLES = [sample(seed) for seed in range(2)]


def computed(seed=0):
    return fed([sample(seed)]).compute()


def as_computed(result):
    return result


def read(result):
    """The same result read from JSON, which is not a tensor."""
    return MIRResult.from_json(result.to_json())


@pytest.mark.parametrize("take", [lambda m: m.compute(), lambda m: m(*SAMPLES[1])], ids=["compute", "forward"])
@pytest.mark.parametrize("inference", [False, True])
def test_the_value_is_a_result_and_a_tensor_of_no_dimensions(take, inference):
    with torch.inference_mode(inference):
        result = take(fed(SAMPLES[:1]))
    assert isinstance(result, MIRResult)
    assert isinstance(result, torch.Tensor)
    assert (result.shape, result.dtype, result.device.type) == ((), torch.float64, "cpu")
    assert not result.requires_grad
    assert not result.is_inference()
    assert result.item() == result.value == float(result)
    assert len(result.terms) == len(result.per_layer) == 3
    assert result.table().row_count == 3


OPERATIONS = {
    "detach": lambda r: r.detach(),
    "plus": lambda r: r + 1,
    "from": lambda r: 1 - r,
    "negative": lambda r: -r,
    "times a tensor": lambda r: torch.ones(3) * r,
    "stack": lambda r: torch.stack([r, r]),
    "mean": lambda r: r.mean(),
    "float": lambda r: r.to(torch.float32),
    "less": lambda r: r < torch.tensor(9.0),
    "abs": lambda r: abs(r),
    "isnan": lambda r: torch.isnan(r),
}


@pytest.mark.parametrize("operation", OPERATIONS)
def test_operations_on_the_value_give_plain_tensors_of_it(operation):
    result = computed()
    made = OPERATIONS[operation](result)
    assert type(made) is torch.Tensor
    expected = OPERATIONS[operation](torch.tensor(result.value, dtype=torch.float64))
    assert torch.equal(made, expected)
    assert made.dtype == expected.dtype


def test_arithmetic_in_place_leaves_the_result_alone():
    metric = fed(SAMPLES[:1])
    before = metric.compute().value
    for name in ("iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow"):
        total = getattr(operator, name)(metric.compute(), 3)
        assert type(total) is torch.Tensor
    alone = metric.compute().detach()
    alone += 1
    assert metric.compute().item() == metric.compute().value == before


def test_a_gradient_flows_through_an_expression_with_it():
    with torch.inference_mode():
        result = computed()
    weight = torch.ones((), dtype=torch.float64, requires_grad=True)
    (weight * result).backward()
    assert weight.grad.item() == result.value


@pytest.mark.parametrize(
    "travel",
    [
        copy.copy,
        copy.deepcopy,
        lambda r: pickle.loads(pickle.dumps(r)),
        lambda r: r.clone(),
        lambda r: r.squeeze(),
        lambda r: r.cpu(),
        dataclasses.replace,
        lambda r: type(r).from_json(r.to_json()),
    ],
)
def test_copies_of_a_result_are_results_and_tensors(travel):
    result = computed()
    other = travel(result)
    assert type(other) is type(result)
    assert other == result
    assert other.item() == other.value == result.value


def test_a_result_that_changes_leaves_its_clone():
    result = computed()
    others = [result.clone(), copy.deepcopy(result), pickle.loads(pickle.dumps(result))]
    result.notes.append("changed")
    assert all(other.notes == [] and other != result for other in others)


def test_what_is_computed_equals_what_is_read_from_json_and_the_other_way_round():
    result, other = computed(), computed(1)
    for one, same in ((result, read(result)), (read(result), result), (result, result.clone())):
        assert (one == same) is True
        assert (one != same) is False
        assert hash(one) == hash(same)
    for one, another in ((result, other), (read(result), other), (result, read(other))):
        assert (one == another) is False
        assert (one != another) is True
    assert len({result, read(result), other}) == 2
    assert result == whole(SAMPLES[:1])
    assert result in [read(result)]
    assert result != "MIR"
    assert result is not None


def test_against_a_number_or_a_tensor_it_compares_as_a_tensor():
    result = computed()
    for other in (result.value, torch.tensor(result.value, dtype=torch.float64)):
        assert (result == other).item() is (other == result).item() is True
        assert (result != other).item() is False


@pytest.mark.parametrize(
    ("as_first", "as_second"),
    [
        *((read, other) for other in (read, as_computed, float)),
        *((as_computed, other) for other in (read, as_computed, float, torch.Tensor.detach)),
    ],
)
def test_results_are_in_the_order_of_their_values(as_first, as_second):
    low, high = sorted([computed(0), computed(1)], key=float)
    first, second = as_first(low), as_second(high)
    assert first < second
    assert first <= second
    assert second > first
    assert not second <= first
    assert first <= as_second(low)
    assert first >= as_second(low)
    assert not first < as_second(low)
    assert min([second, first]) is first
    assert max([second, first]) is second
    assert sorted([second, first])[0] is first


def test_order_is_not_defined_against_anything_else():
    for result in (computed(), read(computed())):
        with pytest.raises(TypeError):
            _ = result < "3"


@pytest.mark.parametrize("as_given", [read, as_computed])
def test_text_numbers_and_fields_are_those_of_a_result(as_given):
    result = as_given(computed())
    assert str(result) == f"{result}" == str(read(result))
    assert f"{result:.3f}" == f"{result.value:.3f}"
    assert repr(result) == f"<{type(result).__name__} {result.value:.4f}, 3 layers>"
    assert dataclasses.asdict(result) == dataclasses.asdict(read(result))
    assert json.loads(result.to_json())["mir"] == result.value
    assert float(result) == math.fsum([result.value])


def test_a_result_is_true_whatever_its_value():
    zero = type(computed())([LayerTerms(1.0, 0.0, 0.0, 0.0)], [1.0], *({"vision": [2], "text": [2]},) * 2)
    assert zero.item() == 0.0
    assert zero
    assert read(zero)


def test_minus_infinity_is_its_value_as_a_tensor_too():
    equal = type(computed())([LayerTerms(0.0, 1.0, 1.0, 1.0)], [1.0], *({"vision": [2], "text": [2]},) * 2)
    assert equal.item() == equal.value == -math.inf
    assert equal < computed()


def test_loggers_find_a_tensor_that_they_can_detach():
    # Lightning's `log` of a metric uses these two attributes if they are tensors.
    metric = ModalityIntegrationRate()
    metric(*SAMPLES[0])
    metric.compute()
    for logged in (metric._forward_cache, metric._computed):
        assert isinstance(logged, torch.Tensor)
        assert logged.numel() == 1
        assert logged.clone().detach().item() == logged.value
    with pytest.warns(UserWarning, match="To copy construct from a tensor"):
        assert torch.tensor(metric.compute()).item() == metric.compute().value
    assert torch.as_tensor(metric.compute(), dtype=torch.float32).dtype == torch.float32
