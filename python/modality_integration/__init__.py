"""The Modality Integration Rate (MIR) of vision-language models, and MoCa inside them, built on `mir_kernels`.

Subpackages, each importing only from those listed after it: `app` (the `mir` command), `training` (MIR during
training), `models` (hidden states, token roles and MoCa of transformers models), `metric` (MIR from features and
hidden states). Names are imported on first use, so `import modality_integration` and `mir --help` do not wait for
transformers.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # for type checkers and editors; a test checks that _HOMES lists the same names
    from modality_integration import official as official
    from modality_integration.app.plots import plot_training as plot_training
    from modality_integration.app.probe import build_probe as build_probe
    from modality_integration.metric.comparison import Comparison as Comparison
    from modality_integration.metric.comparison import Comparisons as Comparisons
    from modality_integration.metric.comparison import compare as compare
    from modality_integration.metric.comparison import compare_several as compare_several
    from modality_integration.metric.comparison import paired_error as paired_error
    from modality_integration.metric.functional import mir as mir
    from modality_integration.metric.result import LayerTerms as LayerTerms
    from modality_integration.metric.result import MIRResult as MIRResult
    from modality_integration.metric.saved_states import mir_of_states as mir_of_states
    from modality_integration.metric.saved_states import save_states as save_states
    from modality_integration.metric.standard_error import jackknife as jackknife
    from modality_integration.metric.streaming import ModalityIntegrationRate as ModalityIntegrationRate
    from modality_integration.metric.tensor_result import MIRTensor as MIRTensor
    from modality_integration.models.capture import Capture as Capture
    from modality_integration.models.capture import capture as capture
    from modality_integration.models.moca import MoCaReport as MoCaReport
    from modality_integration.models.moca import MoCaSite as MoCaSite
    from modality_integration.models.moca import add_moca as add_moca
    from modality_integration.models.moca import moca_parameters as moca_parameters
    from modality_integration.models.moca import remove_moca as remove_moca
    from modality_integration.models.moca import vision_tokens as vision_tokens
    from modality_integration.models.moca_files import load_moca as load_moca
    from modality_integration.models.moca_files import save_moca as save_moca
    from modality_integration.models.token_roles import expanded_placeholders as expanded_placeholders
    from modality_integration.training.callbacks import MIRCallback as MIRCallback
    from modality_integration.training.lightning import lightning_callback as lightning_callback
    from modality_integration.training.measure import measure_mir as measure_mir
    from modality_integration.training.watch import Watch as Watch

# Public name -> module that defines it.
_HOMES = {
    "Capture": "models.capture",
    "Comparison": "metric.comparison",
    "Comparisons": "metric.comparison",
    "LayerTerms": "metric.result",
    "MIRCallback": "training.callbacks",
    "MIRResult": "metric.result",
    "MIRTensor": "metric.tensor_result",
    "MoCaReport": "models.moca",
    "MoCaSite": "models.moca",
    "ModalityIntegrationRate": "metric.streaming",
    "Watch": "training.watch",
    "add_moca": "models.moca",
    "build_probe": "app.probe",
    "capture": "models.capture",
    "compare": "metric.comparison",
    "compare_several": "metric.comparison",
    "expanded_placeholders": "models.token_roles",
    "jackknife": "metric.standard_error",
    "lightning_callback": "training.lightning",
    "load_moca": "models.moca_files",
    "measure_mir": "training.measure",
    "mir": "metric.functional",
    "mir_of_states": "metric.saved_states",
    "moca_parameters": "models.moca",
    "official": "official",
    "paired_error": "metric.comparison",
    "plot_training": "app.plots",
    "remove_moca": "models.moca",
    "save_moca": "models.moca_files",
    "save_states": "metric.saved_states",
    "vision_tokens": "models.moca",
}
__all__ = sorted(_HOMES)


if not TYPE_CHECKING:  # hidden from type checkers, so that they report names not listed above

    def __getattr__(name: str) -> Any:
        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        module = importlib.import_module(f"{__name__}.{_HOMES[name]}")
        return module if name == _HOMES[name] else getattr(module, name)

    def __dir__() -> list[str]:
        return __all__
