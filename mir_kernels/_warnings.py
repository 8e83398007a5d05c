"""Warnings attributed to the caller of the library, past all frames of this library and of torch."""

from __future__ import annotations

import sys
import warnings

_OURS = ("mir_kernels", "modality_integration", "torch")


def warn(message: str, category: type[Warning] = RuntimeWarning) -> None:
    """Issue a warning that points at the first frame outside this library and torch."""
    level, frame = 2, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in _OURS:
        level, frame = level + 1, frame.f_back
    warnings.warn(message, category, stacklevel=level)
