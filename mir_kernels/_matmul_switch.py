"""Keeps the process-wide precision of float32 products at full float32 while any thread needs it, then restores it.

torch has no setting per call or per thread. Up to torch 2.8 there is one value, `torch.set_float32_matmul_precision`.
Since 2.9 there is a tree: `torch.backends.fp32_precision` is the parent of "cuda" and "mkldnn" (the CPU), each of which
is the parent of a "matmul" value; "none" inherits from the parent. The old function sets both "matmul" values and
stores a separate value. The old getters compare it with the tree and raise an error if they contradict each other.
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
    """Compute products of float32 tensors on `device` in float32 inside the context. All threads share the setting.

    If they are computed in float32 already, nothing is set. When the last thread leaves, the previous setting is
    restored, unless other code has changed it meanwhile. (A change to "ieee" or "highest" is only noticed since torch
    2.9, and only if nothing above "matmul" is set.)
    """
    switch, me = switch_of(device), get_ident()
    depth = switch.users.get(me, 0)
    try:
        switch.enter(me, device)
        yield
    finally:
        switch.back_to(me, depth)


class Switch(ABC):
    """One setting and the users that need full float32. The first user sets it, the last one restores it."""

    def __init__(self) -> None:
        self.users: Counter[Hashable] = Counter()  # per thread, because a forked child keeps only one of them

    def enter(self, user: Hashable, device: torch.device) -> None:
        """Require full float32 until `back_to`."""
        with _LOCK:
            reduced = self.is_reduced(device)
            if reduced or self.users:
                self.users[user] += 1
            if reduced:
                self.set()

    def back_to(self, user: Hashable, depth: int) -> None:
        """Reduce the entries of `user` to `depth`. Also correct if an interrupt came in the middle of `enter`."""
        with _LOCK:
            if self.users[user] > depth:
                self.users[user] = depth
                self.users = +self.users  # drops users with a count of 0
                if not self.users:
                    self.restore()

    def keep(self, *users: Hashable) -> None:
        """Remove all users except these."""
        for user in set(self.users) - set(users):
            self.back_to(user, 0)

    @abstractmethod
    def is_reduced(self, device: torch.device) -> bool:
        """Whether float32 products on `device` currently use reduced precision."""

    @abstractmethod
    def set(self) -> None:
        """Save the current setting, which may have changed since the last call, and set full float32."""

    @abstractmethod
    def restore(self) -> None:
        """Restore the saved setting, unless other code has changed it since."""


class OneValue(Switch):
    """`torch.set_float32_matmul_precision`, up to torch 2.8."""

    before = "highest"

    def is_reduced(self, device: torch.device) -> bool:
        # Up to torch 2.8 the CPU has no tf32 products.
        return torch.get_float32_matmul_precision() in (("medium",) if device.type == "cpu" else ("medium", "high"))

    def set(self) -> None:
        self.before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")

    def restore(self) -> None:
        if torch.get_float32_matmul_precision() == "highest":
            torch.set_float32_matmul_precision(self.before)
        self.before = "highest"


class Matmul(Switch):
    """The "matmul" setting of one backend, "cuda" or "mkldnn", since torch 2.9."""

    def __init__(self, backend: str) -> None:
        super().__init__()
        self.backend = backend
        self.before = self.during = "none"

    def is_reduced(self, device: torch.device) -> bool:
        return _get(self.backend, "matmul") in _REDUCED

    def set(self) -> None:
        self.before = own_value(self.backend)
        # Inherit from the parent if its value suffices: an "ieee" found at the end was then set by other code.
        self.during = "ieee" if _get(self.backend, "all") in _REDUCED else "none"
        _set(self.backend, "matmul", self.during)

    def restore(self) -> None:
        if self.is_untouched():
            _set(self.backend, "matmul", self.before)
        self.before = self.during = "none"

    def is_untouched(self) -> bool:
        """Whether the value set by `set` is still in place."""
        return own_value(self.backend) == self.during


class CudaMatmul(Matmul):
    """The "matmul" setting of "cuda", and the old function's value if it allows less, so that the old getters work."""

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
        # "highest" would contradict a reduced precision on the CPU.
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
        elif old_value() is None:  # the value set since is not one of the old function's
            _set_old(self.old, own_value("cuda"))
        self.old, self.before, self.during = "highest", "none", "none"
        SWITCHES["cpu"].back_to(self, 0)


def own_value(backend: str, op: str = "matmul") -> str:
    """The value set at (backend, op) itself; "none" if it inherits its parent's."""
    value = _get(backend, op)
    if value == "none" or backend == "generic":
        return value
    parent = (backend, "all") if op == "matmul" else ("generic", "all")
    if _get(*parent) != value:
        return value
    # Both are equal. To find out whether the value is inherited, change the parent for a moment: to full float32 if
    # possible, which does no harm.
    other = "ieee" if value != "ieee" else "tf32"
    found = _at_once(
        partial(_set, *parent, other), partial(_get, backend, op), partial(_set, *parent, own_value(*parent))
    )
    return value if found[1] == value else "none"


def old_value() -> str | None:
    """The old function's own value; None if it is "highest" and contradicts the tree."""
    try:
        if not torch.backends.cuda.matmul.allow_tf32:
            return "highest"
    except RuntimeError:
        return None
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:  # raised if the CPU's value contradicts it, which determines it
        return "high" if _get("mkldnn", "matmul") == "bf16" else "medium"


def _set_old(precision: str, cuda: str) -> None:
    """Set the old function's own value and `cuda` as the "matmul" of "cuda"; keep the "matmul" of "mkldnn"."""
    _at_once(
        partial(torch._C._set_float32_matmul_precision, precision),
        partial(_set, "cuda", "matmul", cuda),
        partial(_set, "mkldnn", "matmul", own_value("mkldnn")),
    )


def _at_once(*calls: Callable[[], Any]) -> list[Any]:
    """Make several calls into torch without letting another Python thread run in between: no bytecode is executed."""
    return list(map(_call, calls))


SWITCHES: dict[str, Switch]
SWITCHES = {"cuda": CudaMatmul(), "cpu": Matmul("mkldnn")} if HAS_TREE else {"cuda": OneValue()}


def switch_of(device: torch.device) -> Switch:
    """The setting that applies to products on `device`."""
    return SWITCHES["cpu" if HAS_TREE and device.type != "cuda" else "cuda"]


def _after_fork_in_child() -> None:
    _LOCK.release()
    for switch in SWITCHES.values():
        switch.keep(get_ident(), *SWITCHES.values())


if hasattr(os, "register_at_fork"):
    # With the lock held, no thread is between two steps at the fork. Threads inside the context end in the child.
    os.register_at_fork(before=_LOCK.acquire, after_in_parent=_LOCK.release, after_in_child=_after_fork_in_child)
