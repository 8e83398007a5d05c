"""The compiled module `mir_kernels._C`, or the reason why it is not here.

`_C` takes addresses, sizes and a stream, so it does not depend on torch's C++ ABI and one build serves every torch.
"""

from __future__ import annotations

import torch  # imported before _C, which then shares its OpenMP runtime instead of starting a second pool

try:
    from mir_kernels import _C as C  # type: ignore[attr-defined]
except ImportError as error:
    C = None
    if "cannot import name" in str(error) or isinstance(error, ModuleNotFoundError):
        MISSING: str | None = (
            "the compiled module is not built (no C++ compiler was found at install, or MIR_NATIVE=0): "
            "install g++ or clang++ and reinstall mir-kernels"
        )
    else:
        MISSING = f"the compiled module does not load: {error}"
else:
    MISSING = None


def cpu_reason() -> str | None:
    """Why the native CPU kernels cannot run here, or None."""
    return MISSING


def cuda_reason() -> str | None:
    """Why the native CUDA kernels cannot run here, or None. Never starts a CUDA context."""
    if MISSING is not None:
        return MISSING
    if not C.CUDA_ARCHS:
        return "built without nvcc: install the CUDA toolkit and reinstall mir-kernels with MIR_CUDA=1"
    if not (torch.cuda.is_initialized() or torch.cuda.is_available()):  # the second asks the driver on every call
        return "torch sees no CUDA device"
    return None
