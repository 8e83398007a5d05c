"""The process-wide settings for float32 products: all their states, and everything that can be read from a state."""

from __future__ import annotations

import itertools

import pytest
import torch

from mir_kernels._matmul_switch import HAS_TREE

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
DEVICES = {"mkldnn": CPU, "cuda": CUDA}  # only settings, so no GPU is needed
NODES = (("generic", "all"), ("cuda", "all"), ("cuda", "matmul"), ("mkldnn", "all"), ("mkldnn", "matmul"))
VALUES = {"generic": ("none", "ieee", "tf32", "bf16"), "cuda": ("none", "ieee", "tf32")}
VALUES["mkldnn"] = VALUES["generic"]
OLD = ("highest", "high", "medium")
FULL = ("none", "ieee")
tree = pytest.mark.skipif(not HAS_TREE, reason="torch has one value for all")

get = getattr(torch._C, "_get_fp32_precision_getter", None)
put = getattr(torch._C, "_set_fp32_precision_setter", None)


def start(old: str = "highest", **own: str) -> None:
    """Set the old function's value and the tree: generic, cuda, cuda_matmul, mkldnn, mkldnn_matmul, or else "none"."""
    torch.set_float32_matmul_precision(old)
    for backend, op in NODES if HAS_TREE else ():
        put(backend, op, own.get(backend if op == "all" else f"{backend}_{op}", "none"))


def readable(read) -> object:
    try:
        return read()
    except RuntimeError:
        return "contradiction"


def old_getters() -> tuple:
    return readable(torch.get_float32_matmul_precision), readable(lambda: torch.backends.cuda.matmul.allow_tf32)


def observe() -> list:
    """Everything that can be read, also after each parent is set to other values. Overwrites the settings."""
    seen: list = [old_getters()]
    if not HAS_TREE:
        return seen
    seen += [get(*node) for node in NODES]
    for value in VALUES["generic"]:
        put("generic", "all", value)
        seen += [get(*node) for node in NODES] + [old_getters()]
    for backend in ("cuda", "mkldnn"):
        for value in VALUES[backend]:
            put(backend, "all", value)
            seen += [get(*node) for node in NODES] + [old_getters()]
    put("cuda", "matmul", "tf32")
    put("mkldnn", "matmul", "ieee")
    return [*seen, old_getters()]


def in_force(backend: str) -> str:
    if HAS_TREE:
        return get(backend, "matmul")
    reduced = ("medium",) if backend == "mkldnn" else ("medium", "high")
    return "tf32" if torch.get_float32_matmul_precision() in reduced else "ieee"


def starts(backend: str) -> list[dict]:
    """Every combination of values at the three levels and in the old function."""
    if not HAS_TREE:
        return [{"old": old} for old in OLD]
    levels = itertools.product(OLD, VALUES["generic"], VALUES[backend], VALUES[backend])
    other = "mkldnn" if backend == "cuda" else "cuda"
    found = [
        {"old": old, "generic": generic, backend: every, f"{backend}_matmul": own}
        for old, generic, every, own in levels
    ]
    # The old function alone sets both backends; these mix values of the two.
    return found + [
        {"old": old, "mkldnn_matmul": m, "cuda_matmul": c, other: "tf32"}
        for old in OLD
        for m in VALUES["mkldnn"]
        for c in VALUES["cuda"]
    ]
