"""The process's precision of float32 products, held at full float32 while anyone needs it, then given back exactly.

torch offers it neither per call nor per thread. Up to torch 2.8 it is one value, `torch.set_float32_matmul_precision`.
From 2.9 on it is a tree: `torch.backends.fp32_precision` over one value each for "cuda" and "mkldnn" (the CPU's), each
of those over one for "matmul"; "none" takes the parent's. The old function then sets both "matmul" and a value of its
own, which the old getters compare with them and raise where they contradict each other.
"""

from __future__ import annotations

import contextlib
import os
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Hashable, Iterator
from functools import partial
from threading import RLock, get_ident
from typing import Any

import torch

HAS_TREE = hasattr(torch._C, "_get_fp32_precision_getter")  # torch 2.9
_get: Any = getattr(torch._C, "_get_fp32_precision_getter", None)
_set: Any = getattr(torch._C, "_set_fp32_precision_setter", None)
_call: Any = partial.__call__
_REDUCED = ("tf32", "bf16")
_CPU = torch.device("cpu")
_LOCK = RLock()


@contextlib.contextmanager
def full_float32(device: torch.device) -> Iterator[None]:
    """Products of float32 tensors on `device` are made in float32 inside; all threads share the setting.

    Where they would be anyway, nothing is set. When the last thread leaves, the setting is restored as it was, unless
    someone else has set it meanwhile. (That someone else has set "ieee" or "highest" is seen from torch 2.9 on, and
    only where nothing above "matmul" is set.)
    """
    switch, me = switch_of(device), get_ident()
    depth = switch.users.get(me, 0)
    try:
        switch.enter(me, device)
        yield
    finally:
        switch.back_to(me, depth)


class Switch(ABC):
    """One setting and those who need it at full float32: the first of them sets it, the last restores it."""

    def __init__(self) -> None:
        self.users: Counter[Hashable] = Counter()  # by thread: a forked child has one of them only

    def enter(self, user: Hashable, device: torch.device) -> None:
        """Full float32 from here on, until `back_to`."""
        with _LOCK:
            reduced = self.is_reduced(device)
            if reduced or self.users:
                self.users[user] += 1
            if reduced:
                self.set()

    def back_to(self, user: Hashable, depth: int) -> None:
        """`user` has entered no more than `depth` times; right also where an interrupt came in the midst of `enter`."""
        with _LOCK:
            if self.users[user] > depth:
                self.users[user] = depth
                self.users = +self.users  # only those that are left
                if not self.users:
                    self.restore()

    def keep(self, *users: Hashable) -> None:
        """All but these are gone."""
        for user in set(self.users) - set(users):
            self.back_to(user, 0)

    @abstractmethod
    def is_reduced(self, device: torch.device) -> bool:
        """Whether float32 products on `device` would now be made in less."""

    @abstractmethod
    def set(self) -> None:
        """Remembers what is set, which someone may have changed since the last time, and sets full float32."""

    @abstractmethod
    def restore(self) -> None:
        """What is remembered, unless something else has been set since."""


class OneValue(Switch):
    """`torch.set_float32_matmul_precision`, up to torch 2.8."""

    before = "highest"

    def is_reduced(self, device: torch.device) -> bool:
        # A CPU has no products in tf32 there.
        return torch.get_float32_matmul_precision() in (("medium",) if device.type == "cpu" else ("medium", "high"))

    def set(self) -> None:
        self.before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")

    def restore(self) -> None:
        if torch.get_float32_matmul_precision() == "highest":
            torch.set_float32_matmul_precision(self.before)
        self.before = "highest"


class Matmul(Switch):
    """The "matmul" of one backend, "cuda" or "mkldnn", from torch 2.9 on."""

    def __init__(self, backend: str) -> None:
        super().__init__()
        self.backend = backend
        self.before = self.during = "none"

    def is_reduced(self, device: torch.device) -> bool:
        return _get(self.backend, "matmul") in _REDUCED

    def set(self) -> None:
        self.before = own_value(self.backend)
        # Where the parent's value is as good, that is taken: then an "ieee" found at the end is someone else's.
        self.during = "ieee" if _get(self.backend, "all") in _REDUCED else "none"
        _set(self.backend, "matmul", self.during)

    def restore(self) -> None:
        if self.is_untouched():
            _set(self.backend, "matmul", self.before)
        self.before = self.during = "none"

    def is_untouched(self) -> bool:
        """Whether what `set` has set is still there."""
        return own_value(self.backend) == self.during


class CudaMatmul(Matmul):
    """The "matmul" of "cuda", and the old function's own value where that allows less: its getters work inside, too."""

    def __init__(self) -> None:
        super().__init__("cuda")
        self.old = "highest"

    def set(self) -> None:
        found = old_value()
        if found in ("high", "medium"):
            self.old = found
        if self.old == "highest":
            super().set()
            return
        # "highest" contradicts less than full float32 on the CPU.
        SWITCHES["cpu"].enter(self, _CPU)
        self.before = own_value("cuda")
        self.during = "ieee" if _get("cuda", "all") in _REDUCED else "none"
        _set_old("highest", self.during)

    def restore(self) -> None:
        if self.old == "highest":
            super().restore()
            return
        if self.is_untouched():
            _set_old(self.old, self.before)
        elif old_value() is None:  # what was set since is no value of the old function's
            _set_old(self.old, own_value("cuda"))
        self.old, self.before, self.during = "highest", "none", "none"
        SWITCHES["cpu"].back_to(self, 0)


def own_value(backend: str, op: str = "matmul") -> str:
    """What is set at (backend, op) itself: "none" where its parent's value holds."""
    value = _get(backend, op)
    if value == "none" or backend == "generic":
        return value
    parent = (backend, "all") if op == "matmul" else ("generic", "all")
    if _get(*parent) != value:
        return value
    # Both are the same: inherited if it follows the parent, which is changed for a moment, where it can to full
    # float32, which does no harm.
    other = "ieee" if value != "ieee" else "tf32"
    found = _at_once(
        partial(_set, *parent, other), partial(_get, backend, op), partial(_set, *parent, own_value(*parent))
    )
    return value if found[1] == value else "none"


def old_value() -> str | None:
    """The old function's own value; None where it is "highest" and contradicts the tree."""
    try:
        if not torch.backends.cuda.matmul.allow_tf32:
            return "highest"
    except RuntimeError:
        return None
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:  # the CPU's contradicts it, by which it is known
        return "high" if _get("mkldnn", "matmul") == "bf16" else "medium"


def _set_old(precision: str, cuda: str) -> None:
    """The old function's own value, with `cuda` for the "matmul" of "cuda", and that of "mkldnn" as it is."""
    _at_once(
        partial(torch._C._set_float32_matmul_precision, precision),
        partial(_set, "cuda", "matmul", cuda),
        partial(_set, "mkldnn", "matmul", own_value("mkldnn")),
    )


def _at_once(*calls: Callable[[], Any]) -> list[Any]:
    """The results of calls into torch that no other thread of Python comes between: no bytecode runs."""
    return list(map(_call, calls))


SWITCHES: dict[str, Switch]
SWITCHES = {"cuda": CudaMatmul(), "cpu": Matmul("mkldnn")} if HAS_TREE else {"cuda": OneValue()}


def switch_of(device: torch.device) -> Switch:
    """Which setting holds for products on `device`."""
    return SWITCHES["cpu" if HAS_TREE and device.type != "cuda" else "cuda"]


def _after_fork_in_child() -> None:
    _LOCK.release()
    for switch in SWITCHES.values():
        switch.keep(get_ident(), *SWITCHES.values())


if hasattr(os, "register_at_fork"):
    # Nobody is midway then, and the threads that are inside do not live on in the child.
    os.register_at_fork(before=_LOCK.acquire, after_in_parent=_LOCK.release, after_in_child=_after_fork_in_child)
