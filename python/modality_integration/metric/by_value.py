"""`ByValue`: objects with a `value` that compare, compute and round like that number, also for numpy and loggers."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from numbers import Real
from typing import Any


class ByValue:
    """Behave like the float `value`, with numbers and with other `ByValue` objects; arithmetic returns floats."""

    @property
    def value(self) -> float:
        """The number."""
        raise NotImplementedError

    def __lt__(self, other: object) -> bool:
        return self._by_value(operator.lt, other)

    def __le__(self, other: object) -> bool:
        return self._by_value(operator.le, other)

    def __gt__(self, other: object) -> bool:
        return self._by_value(operator.gt, other)

    def __ge__(self, other: object) -> bool:
        return self._by_value(operator.ge, other)

    def __add__(self, other: Any) -> Any:
        return self._by_value(operator.add, other)

    def __radd__(self, other: Any) -> Any:
        return self._by_value(lambda mine, given: given + mine, other)

    def __sub__(self, other: Any) -> Any:
        return self._by_value(operator.sub, other)

    def __rsub__(self, other: Any) -> Any:
        return self._by_value(lambda mine, given: given - mine, other)

    def __mul__(self, other: Any) -> Any:
        return self._by_value(operator.mul, other)

    def __rmul__(self, other: Any) -> Any:
        return self._by_value(lambda mine, given: given * mine, other)

    def __truediv__(self, other: Any) -> Any:
        return self._by_value(operator.truediv, other)

    def __rtruediv__(self, other: Any) -> Any:
        return self._by_value(lambda mine, given: given / mine, other)

    def __pow__(self, other: Any) -> Any:
        return self._by_value(operator.pow, other)

    def __rpow__(self, other: Any) -> Any:
        return self._by_value(lambda mine, given: given**mine, other)

    def __neg__(self) -> Any:
        return -self.value

    def __pos__(self) -> Any:
        return self.value

    def __abs__(self) -> Any:
        return abs(self.value)

    def __round__(self, ndigits: int | None = None) -> Any:
        return round(self.value, ndigits)

    def __trunc__(self) -> int:
        return math.trunc(self.value)

    def __int__(self) -> int:
        return int(self.value)

    def __float__(self) -> float:
        return float(self.value)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Any:
        """Convert to a numpy scalar, so `np.asarray(results)` is an array of their values."""
        import numpy as np

        if copy is False:
            raise ValueError("copy: a result has no array to share without copying; omit copy=False")
        return np.array(self.value, dtype=dtype)

    def _by_value(self, operation: Callable[[Any, Any], Any], other: object) -> Any:
        if isinstance(other, ByValue):
            return operation(self.value, other.value)
        return operation(self.value, other) if isinstance(other, Real) else NotImplemented


Real.register(ByValue)  # loggers and numpy recognise numbers by this class
