"""The Modality Integration Rate of real vision-language models, and MoCa inside them, on the kernels of `mir_kernels`.

Names are loaded when first used, so that `import modality_integration` and `mir --help` do not wait for transformers.
"""

import importlib
from typing import Any

# Public name to the module it lives in. No function shares its module's name: importing the module would hide it.
_HOMES = {
    "MIRCallback": "callbacks",
    "MIRResult": "result",
    "ModalityIntegrationRate": "metric",
    "add_moca": "moca",
    "capture": "residual_stream",
    "lightning_callback": "callbacks",
    "load_moca": "moca",
    "measure_mir": "probe",
    "mir": "metric",
    "moca_parameters": "moca",
    "official": "official",
    "remove_moca": "moca",
    "save_moca": "moca",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(f"{__name__}.{_HOMES[name]}")
    return module if name == _HOMES[name] else getattr(module, name)


def __dir__() -> list[str]:
    return __all__
