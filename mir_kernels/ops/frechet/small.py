"""Small pairs on a CPU: the same numbers with as few calls as possible, because call overhead would exceed the
arithmetic."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mir_kernels._checks import asymmetry_allowed
from mir_kernels._symmetry import native_reads
from mir_kernels.ops.frechet import native, standard_form
from mir_kernels.ops.frechet.launch import CHUNK, batch_of
from mir_kernels.ops.frechet.report import TOLERANCE


def trace(a: Tensor, b: Tensor) -> Tensor | None:
    """Tr((AB)^(1/2)) of square matrices of one size, accepted with an error of 1e-8. None if the general path must
    compute it or report what is wrong with the matrices."""
    d, batch = a.shape[-1], batch_of(a, b)
    if d < standard_form.BANDED and a.shape != b.shape and batch.numel() * d * d <= CHUNK:
        a, b = (one.expand(*batch, d, d).contiguous() for one in (a, b))
    if a.shape != b.shape or not (
        d < standard_form.BANDED and a.numel() <= CHUNK and native_reads(a) and native_reads(b)
    ):
        return None
    form = native.checked_standard_form(a, b, asymmetry_allowed(a.dtype), asymmetry_allowed(b.dtype))
    if form is None:
        return None
    sums, errors, _ = standard_form.roots_(standard_form.StandardForm(form[0], d, form[1], form[2], banded=False))
    if not max(errors) <= TOLERANCE["float64"]:
        return None
    found = [math.ldexp(one.total, int(e)) for one, e in zip(sums, form[2].tolist(), strict=True)]
    return torch.tensor(found, dtype=torch.float64, device="cpu").view(batch)
