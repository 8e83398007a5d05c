"""Selects the backend of an operation: one ordered tuple per device type, and a reason for each that cannot run.

An operation lists its backends once. `backend=None` selects the first that can run on the tensors' device. A backend
requested by name either runs or raises an error with the reason. There is no silent fallback.
"""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch

from mir_kernels import _native

Reason = Callable[[torch.device], "str | None"]
OLDEST_TRITON = (3, 4)  # ships with torch 2.8; `make test-versions` runs the kernels' tests with it


@dataclass(frozen=True)
class Operation:
    """One operation: the order in which its backends are tried per device type, and why each may be unable to run.

    orders: device type to backend names, best first. "reference" may be requested by name but is never in an order.
    reasons: backend name to a function of the device that returns None (can run) or a sentence that says why not.
    """

    name: str
    orders: Mapping[str, tuple[str, ...]]
    reasons: Mapping[str, Reason] = field(default_factory=dict)

    def reason(self, backend: str, device: torch.device) -> str | None:
        """Why `backend` cannot run on `device`, or None."""
        check = self.reasons.get(backend, REASONS.get(backend))
        if check is None:
            raise ValueError(f"backend: {self.name} has no backend {backend!r}, expected one of {self.names()}")
        return check(device)

    def choose(self, backend: str | None, device: torch.device) -> str:
        """The backend to run: the one named, or the first in the device's order that can run."""
        if backend is not None:
            if backend not in self.names():
                raise ValueError(f"backend: {self.name} has no backend {backend!r}, expected one of {self.names()}")
            why = self.reason(backend, device)
            if why is not None:
                raise RuntimeError(f"backend {backend!r} of {self.name} cannot run on {device}: {why}")
            return backend
        for name in self.orders.get(device.type, ("eager",)):
            if self.reason(name, device) is None:
                return name
        raise RuntimeError(f"{self.name} has no backend that runs on {device}")

    def names(self) -> tuple[str, ...]:
        """Every backend that may be requested by name."""
        seen = dict.fromkeys(name for order in self.orders.values() for name in order)
        return (*seen, "reference")


def _triton_reason(device: torch.device) -> str | None:
    try:
        import triton
    except ImportError as error:
        return f"triton is not installed ({error})"
    if (why := _too_old(getattr(triton, "__version__", ""))) is not None:
        return why
    if device.type == "cpu":
        if os.environ.get("TRITON_INTERPRET") != "1":
            return "a CPU tensor needs Triton's interpreter: set TRITON_INTERPRET=1 before the first import"
        return None
    if not (torch.cuda.is_initialized() or torch.cuda.is_available()):  # the second queries the driver on every call
        return "torch sees no CUDA device"
    return None


@functools.cache
def _too_old(version: str) -> str | None:
    numbers = re.match(r"(\d+)\.(\d+)", version)
    if numbers is None:  # such as a folder named triton
        return f"triton is not installed (the imported module named triton has version {version!r})"
    if (int(numbers[1]), int(numbers[2])) < OLDEST_TRITON:
        return f"triton {version} is older than {'.'.join(map(str, OLDEST_TRITON))}, which the kernels require"
    return None


def _native_reason(device: torch.device) -> str | None:
    return _native.cpu_reason() if device.type == "cpu" else f"the native kernels do not support {device.type} tensors"


def _cuda_reason(device: torch.device) -> str | None:
    return (
        _native.cuda_reason(device) if device.type == "cuda" else f"CUDA kernels do not support {device.type} tensors"
    )


def _anywhere(device: torch.device) -> None:
    return None


# Checks that apply to every operation. An operation overrides an entry through `reasons`.
REASONS: dict[str, Reason] = {
    "native": _native_reason,
    "cuda": _cuda_reason,
    "triton": _triton_reason,
    "eager": _anywhere,
    "reference": _anywhere,
}


class BackendTable(dict):
    """{operation: {device: {backend: None or the reason why it cannot run}}}, printed as a table."""

    def __str__(self) -> str:
        rows = [("operation", "device", "backend", "here")]
        for operation, devices in self.items():
            for device, backends in devices.items():
                chosen = next((name for name, why in backends.items() if why is None), None)
                for name, why in backends.items():
                    state = "default" if name == chosen else "available" if why is None else f"no: {why}"
                    if name == "native" and why is None:
                        state += f" (instruction set {_native.C.CPU_ISA})"
                    rows.append((operation, device, name, state))
        widths = [max(len(row[i]) for row in rows) for i in range(3)]
        return "\n".join("  ".join([*(c.ljust(w) for c, w in zip(row, widths, strict=False)), row[3]]) for row in rows)

    __repr__ = __str__


def table(operations: tuple[Operation, ...]) -> BackendTable:
    """The backends of each operation that can run here, on the CPU and on CUDA."""
    devices = {"cpu": torch.device("cpu"), "cuda": torch.device("cuda")}
    return BackendTable(
        {
            op.name: {
                kind: {
                    name: op.reason(name, device)
                    if kind == "cpu" or torch.cuda.is_available()
                    else (op.reason(name, device) or "torch sees no CUDA device")
                    for name in op.orders[kind]
                }
                for kind, device in devices.items()
                if kind in op.orders
            }
            for op in operations
        }
    )
