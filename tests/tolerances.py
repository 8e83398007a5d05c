"""The tolerance table of all tests: relative errors ||out - ref|| / ||ref|| against float64 on the same inputs."""

import torch

# A few units in the last place of each dtype, enough for correct rounding in a short chain of operations.
RELATIVE = {torch.float64: 1e-14, torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}


def relative_error(out: torch.Tensor, ref: torch.Tensor) -> float:
    """||out - ref|| / ||ref|| in float64; infinite if `out` is not finite, absolute if ref is zero."""
    out, ref = out.detach().double(), ref.detach().double()
    assert out.shape == ref.shape, f"shape {tuple(out.shape)}, expected {tuple(ref.shape)}"
    if not torch.isfinite(out).all():
        return float("inf")
    scale = ref.norm().item()
    return (out - ref).norm().item() / (scale or 1.0)


def assert_close(
    out: torch.Tensor, ref: torch.Tensor, *, dtype: torch.dtype | None = None, factor: float = 1.0
) -> None:
    """Assert a relative error of at most factor times the table's entry for `dtype` (by default out's)."""
    limit = factor * RELATIVE[dtype or out.dtype]
    error = relative_error(out, ref)
    assert error <= limit, f"relative error {error:.3e} > {limit:.3e}"
