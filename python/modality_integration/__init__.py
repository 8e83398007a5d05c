"""The Modality Integration Rate of real vision-language models, and MoCa inside them, on the kernels of `mir_kernels`.

Names are loaded when first used, so that `import modality_integration` and `mir --help` do not wait for transformers.
"""

import importlib

_HOMES = {
    "MIRCallback": "callbacks",
    "MIRResult": "result",
    "ModalityIntegrationRate": "metric",
    "add_moca": "moca",
    "capture": "capture",
    "load_moca": "moca",
    "mir": "metric",
    "moca_parameters": "moca",
    "official": "official",
    "remove_moca": "moca",
    "save_moca": "moca",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(f"{__name__}.{_HOMES[name]}")
    value = module if name == _HOMES[name] and name == "official" else getattr(module, name)
    globals()[name] = value  # also puts a name such as `capture` back in front of the submodule that carries it
    return value


def __dir__() -> list[str]:
    return __all__
