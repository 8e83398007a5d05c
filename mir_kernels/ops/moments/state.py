"""The tensors of a saved `StreamingMoments`, and the checks before they are loaded."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from mir_kernels import _checks

VERSION = 1  # of the layout
OWN = ("count", "mean", "second", "owed", "weights")  # tensors of the moments, named like their attributes
REDUCED = "reduced"  # present only after an all_reduce


def number(value: int) -> Tensor:
    """An integer as an entry of a state."""
    return torch.tensor(value, dtype=torch.int64, device="cpu")


def check(state: object, mine: dict[str, Tensor], hidden_size: int, most_rows: int) -> None:
    """Check that `state` has the keys, dtypes and shapes of `mine`.

    Raises:
        ValueError, TypeError: It does not. The message names the entry.
    """
    required = set(mine) - {REDUCED}
    if not isinstance(state, Mapping) or set(state) - {REDUCED} != required:
        got = sorted(map(str, state)) if isinstance(state, Mapping) else type(state).__name__
        raise ValueError(f"state: expected the keys {sorted(required)}, got {got}")
    for name, value in state.items():
        _checks.tensor(f"state[{name!r}]", value)
    version, bound = (_checks.whole_number(f"state[{name!r}]", state[name]) for name in ("version", "bound"))
    if version != VERSION:
        raise ValueError(f"state: expected version {VERSION}, got {version}")
    for name in OWN:
        if state[name].shape != mine[name].shape or state[name].dtype != mine[name].dtype:
            raise ValueError(
                f"state[{name!r}]: expected {mine[name].dtype} of shape {tuple(mine[name].shape)} "
                f"(hidden_size {hidden_size}), got {state[name].dtype} of shape {tuple(state[name].shape)}"
            )
    pending = state["pending"]
    _checks.floating("state['pending']", pending)
    if pending.dim() != 2 or pending.shape[1] != hidden_size:
        raise ValueError(f"state['pending']: expected shape (rows, {hidden_size}), got {tuple(pending.shape)}")
    _checks.whole_number("state['count']", state["count"])
    if bound > max(pending.shape[0], most_rows):
        raise ValueError(f"state['bound']: expected at most {most_rows} rows, got {bound}")
    reduced = state.get(REDUCED)
    if reduced is not None and (reduced.dim() != 1 or reduced.dtype != torch.int64):
        raise ValueError(f"state['{REDUCED}']: expected int64 of (n,), got {reduced.dtype} of {tuple(reduced.shape)}")
