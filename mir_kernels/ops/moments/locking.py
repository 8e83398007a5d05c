"""An object that one thread at a time reads or changes; each copy has a separate lock."""

from __future__ import annotations

import copy
import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Concatenate, ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")
L = TypeVar("L", bound="Locked")


class Locked:
    """Base class whose methods marked by `alone` run one at a time, whichever threads call them."""

    def __init__(self) -> None:
        self._lock = threading.RLock()

    def __getstate__(self) -> dict[str, Any]:
        with self._lock:
            return {name: value for name, value in vars(self).items() if name != "_lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._lock = threading.RLock()
        vars(self).update(state)

    def __deepcopy__(self: L, memo: dict[int, Any]) -> L:
        made = memo[id(self)] = type(self).__new__(type(self))
        with self._lock:
            made.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        return made

    def __copy__(self: L) -> L:
        """A deep copy: the contents are changed in place, so a copy that shared them would change as well."""
        return copy.deepcopy(self)


def alone(method: Callable[Concatenate[L, P], R]) -> Callable[Concatenate[L, P], R]:
    """Make a method of a `Locked` run with exclusive access to it."""

    @functools.wraps(method)
    def run(self: L, *args: P.args, **kwargs: P.kwargs) -> R:
        with self._lock:
            return method(self, *args, **kwargs)

    return run


@contextmanager
def both(one: Locked, other: Locked) -> Iterator[None]:
    """Lock two objects, always in the same order, so that two threads cannot deadlock."""
    first, second = sorted((one, other), key=id)
    with first._lock, second._lock:
        yield
