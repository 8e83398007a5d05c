"""The compiled module `mir_kernels._C`, or the reason why it is not here.

`_C` takes addresses, sizes and a stream, so it does not depend on torch's C++ ABI and one build serves every torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch  # imported before _C, which then shares its OpenMP runtime instead of starting a second pool

MISSING: str | None = None  # why the module is not here

if TYPE_CHECKING:  # there, to a type checker (_C.pyi): whoever calls it has asked `MISSING` first
    from mir_kernels import _C as C
else:
    try:
        from mir_kernels import _C as C
    except ImportError as error:
        C = None
        MISSING = f"the compiled module does not load: {error}"
        if "cannot import name" in str(error) or isinstance(error, ModuleNotFoundError):
            MISSING = (
                "the compiled module is not built (no C++ compiler was found at install, or MIR_NATIVE=0): "
                "install g++ or clang++ and reinstall mir-kernels"
            )

# What the compiled module calls a dtype.
DTYPE_CODES: dict[torch.dtype, int] = {} if C is None else {getattr(torch, n): code for n, code in C.DTYPES.items()}


def cpu_reason() -> str | None:
    """Why the native CPU kernels cannot run here, or None."""
    return MISSING


def cuda_reason(device: torch.device | None = None) -> str | None:
    """Why the native CUDA kernels cannot run here, or None. Never starts a CUDA context.

    `device`, torch's current one by default, is looked at where CUDA runs already, as it does once a tensor lies there.
    """
    if MISSING is not None:
        return MISSING
    if torch.version.hip is not None:
        return "built for CUDA, and this torch is built for ROCm"
    if not C.CUDA_ARCHS:
        return "built without nvcc: install the CUDA toolkit and reinstall mir-kernels with MIR_CUDA=1"
    if not torch.cuda.is_initialized():
        return None if torch.cuda.is_available() else "torch sees no CUDA device"  # asks the driver on every call
    major, minor = torch.cuda.get_device_capability(device)
    # Machine code runs on later devices of its major version; PTX, of the last architecture, on all later ones.
    binary = any(arch // 10 == major and arch % 10 <= minor for arch in C.CUDA_ARCHS)
    if not binary and 10 * major + minor < C.CUDA_ARCHS[-1]:
        built = ", ".join(f"{arch // 10}.{arch % 10}" for arch in C.CUDA_ARCHS)
        return (
            f"built for compute capability {built}, and the device has {major}.{minor}: reinstall mir-kernels with "
            f"MIR_CUDA_ARCHS={major}{minor}"
        )
    return None
