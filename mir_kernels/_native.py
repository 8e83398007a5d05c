"""The compiled module `mir_kernels._C`, or the reason why it is missing.

`_C` accepts addresses, sizes and a stream. It does not depend on torch's C++ ABI, so one build works with every torch.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch  # imported before _C, which then shares torch's OpenMP runtime instead of starting a second thread pool


def _why_not_built(folder: Path) -> str:
    """The reason and the remedy if there is no compiled module in `folder`, which contains the package."""
    if (folder / "setup.py").exists():  # Python was started here, and this folder hides an installed package
        return (
            f"the compiled module is not built in the source folder {folder}: start Python in another folder, or "
            "install g++ or clang++ and run `pip install -e .`"
        )
    return (
        "the compiled module is not built (no C++ compiler was found at install, or MIR_NATIVE=0): "
        "install g++ or clang++ and reinstall mir-kernels"
    )


MISSING: str | None = None  # why the module is missing

if TYPE_CHECKING:  # type checkers see it as present (_C.pyi), because callers check `MISSING` first
    from mir_kernels import _C as C
else:
    try:
        from mir_kernels import _C as C
    except ImportError as error:
        C = None
        MISSING = f"the compiled module failed to load: {error}"
        if "cannot import name" in str(error) or isinstance(error, ModuleNotFoundError):
            MISSING = _why_not_built(Path(__file__).resolve().parent.parent)

# The compiled module's code of each dtype.
DTYPE_CODES: dict[torch.dtype, int] = {} if C is None else {getattr(torch, n): code for n, code in C.DTYPES.items()}


def cpu_reason() -> str | None:
    """Why the native CPU kernels cannot run here, or None."""
    return MISSING


def cuda_reason(device: torch.device | None = None) -> str | None:
    """Why the native CUDA kernels cannot run here, or None. Never creates a CUDA context.

    `device`, by default torch's current one, is only checked if CUDA is already initialised, as it is once a tensor is
    on the GPU.
    """
    if MISSING is not None:
        return MISSING
    if torch.version.hip is not None:
        return "built for CUDA, but this torch is built for ROCm"
    if not C.CUDA_ARCHS:
        return "built without nvcc: install the CUDA toolkit and reinstall mir-kernels with MIR_CUDA=1"
    if not torch.cuda.is_initialized():
        return None if torch.cuda.is_available() else "torch sees no CUDA device"  # queries the driver on every call
    major, minor = torch.cuda.get_device_capability(device)
    # Machine code runs on devices of its major version with an equal or later minor one. The PTX of the last
    # architecture runs on all later devices.
    binary = any(arch // 10 == major and arch % 10 <= minor for arch in C.CUDA_ARCHS)
    if not binary and 10 * major + minor < C.CUDA_ARCHS[-1]:
        built = ", ".join(f"{arch // 10}.{arch % 10}" for arch in C.CUDA_ARCHS)
        return (
            f"built for compute capability {built}, but the device has {major}.{minor}: reinstall mir-kernels with "
            f"MIR_CUDA_ARCHS={major}{minor}"
        )
    return None
