"""`MIRTensor`: a `MIRResult` that is also a torch.Tensor, as wrappers and loggers expect of a metric."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from modality_integration.metric.result import LayerTerms, MIRResult, mir_value


def _not_in_place(self: Any, other: Any) -> Any:
    return NotImplemented  # so that `result += 1` is `result = result + 1`


class MIRTensor(MIRResult, Tensor):
    """A `MIRResult` that is also its value as a 0-d float64 CPU tensor without gradient.

    Operations return plain tensors, including in-place operators; `clone`, `squeeze`, copies and pickles stay results.
    Equality with results, hash and text are those of `MIRResult`, and its truth value is always True, even if MIR is 0.
    Compared with a tensor or a number, == is that of a tensor.
    """

    # Operations return plain tensors, not results.
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    def __new__(cls, terms: Sequence[LayerTerms], *args: Any, **fields: Any) -> MIRTensor:
        with torch.inference_mode(False):  # it outlives inference mode
            value = torch.tensor(mir_value(layer.distance for layer in terms), dtype=torch.float64, device="cpu")
            return Tensor._make_subclass(cls, value)

    def clone(self, **options: Any) -> MIRTensor:
        """An independent copy; torchmetrics clones the result of `compute`."""
        return copy.deepcopy(self)

    def squeeze(self, *dim: Any) -> Tensor:
        """The result itself, which has no dimensions; torchmetrics squeezes the result of `compute`."""
        return Tensor.squeeze(self, *dim) if dim else self

    def detach(self) -> Tensor:
        """The value as an independent plain tensor; changing it does not change the result."""
        return super().detach().clone()

    def __repr__(self) -> str:  # type: ignore[override]
        return MIRResult.__repr__(self)

    def __bool__(self) -> bool:
        return True

    __hash__ = MIRResult.__hash__

    def __eq__(self, other: object) -> Any:
        return MIRResult.__eq__(self, other) if isinstance(other, MIRResult) else Tensor.__eq__(self, other)

    def __ne__(self, other: object) -> Any:
        return not MIRResult.__eq__(self, other) if isinstance(other, MIRResult) else Tensor.__ne__(self, other)

    def __lt__(self, other: object) -> Any:
        return Tensor.__lt__(self, _as_operand(other))

    def __le__(self, other: object) -> Any:
        return Tensor.__le__(self, _as_operand(other))

    def __gt__(self, other: object) -> Any:
        return Tensor.__gt__(self, _as_operand(other))

    def __ge__(self, other: object) -> Any:
        return Tensor.__ge__(self, _as_operand(other))

    # Arithmetic is that of a tensor.
    __add__, __sub__, __mul__, __truediv__ = Tensor.__add__, Tensor.__sub__, Tensor.__mul__, Tensor.__truediv__
    __radd__, __rsub__, __rmul__, __rtruediv__ = Tensor.__radd__, Tensor.__rsub__, Tensor.__rmul__, Tensor.__rtruediv__
    __pow__, __rpow__, __neg__, __pos__ = Tensor.__pow__, Tensor.__rpow__, Tensor.__neg__, Tensor.__pos__
    __abs__ = Tensor.__abs__
    __array__ = Tensor.__array__  # type: ignore[assignment]
    __iadd__ = __isub__ = __imul__ = __itruediv__ = __ifloordiv__ = __imod__ = _not_in_place
    __ipow__ = _not_in_place  # type: ignore[assignment]

    def __deepcopy__(self, memo: dict[int, Any]) -> MIRTensor:
        made = memo[id(self)] = _with_attributes(type(self), copy.deepcopy(vars(self), memo))
        return made

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return _with_attributes, (type(self), dict(vars(self)))


def as_tensor(result: MIRResult) -> Tensor:
    """The result itself if it is a tensor, else its value as one."""
    if isinstance(result, Tensor):
        return result
    return torch.tensor(result.value, dtype=torch.float64, device="cpu")


def _with_attributes(cls: type[MIRTensor], attributes: dict[str, Any]) -> MIRTensor:
    made = cls.__new__(cls, attributes["terms"])
    vars(made).update(attributes)
    return made


def _as_operand(other: Any) -> Any:
    return other if isinstance(other, Tensor) or not isinstance(other, MIRResult) else other.value
