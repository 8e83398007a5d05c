"""The public names: each resolves correctly whatever was imported before, and is imported only on use."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import modality_integration

HOMES = modality_integration._HOMES


@pytest.mark.parametrize("name", modality_integration.__all__)
def test_public_name_is_documented_and_no_bare_module(name):
    value = getattr(modality_integration, name)
    assert value.__doc__
    assert name == "official" or callable(value)


def test_type_checkers_are_told_the_names_that_there_are():
    source = Path(modality_integration.__file__).read_text()
    told = {
        alias.asname: node.module.removeprefix("modality_integration.")
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("modality_integration")
        for alias in node.names
    }
    assert told == {**HOMES, "official": "modality_integration"}


def test_names_are_functions_after_their_modules_were_imported():
    code = "from modality_integration.models import capture, moca; "
    code += "from modality_integration import capture, mir, add_moca; "
    code += "print([callable(f) for f in (capture, mir, add_moca)])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[True, True, True]"


# Slow imports. torchmetrics is one because it loads transformers and torchvision for its own metrics.
SLOW = ("torchmetrics", "transformers", "torchvision", "matplotlib", "rich", "triton", "torch._dynamo")
WITHOUT_TORCH = (
    *("Comparison", "Comparisons", "LayerTerms", "MIRResult", "compare", "compare_several", "jackknife"),
    *("paired_error", "plot_training"),
)
OF_THE_METRIC = ("MIRCallback", "ModalityIntegrationRate", "Watch", "lightning_callback", "measure_mir")


def loaded(code, *names):
    """Which of the modules `names` are loaded after `code` ran in a separate process."""
    code = f"import sys\n{code}\nprint(*({set(names)} & set(sys.modules)), sep='\\n')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def importing(names):
    return f"from modality_integration import {', '.join(names)}"


def test_import_loads_neither_torch_nor_transformers():
    assert loaded("import modality_integration", "torch", "numpy", *SLOW) == set()


def test_results_are_read_and_compared_without_torch():
    terms = "{'vision': [2], 'text': [2]}"
    code = f"""{importing(WITHOUT_TORCH)}
result = MIRResult([LayerTerms(3.0, 1.0, 1.0, 0.5)], [1.0], {terms}, {terms}, left_out=[[3.9, 4.2]])
again = MIRResult.from_json(result.to_json())
print(compare(result, again), paired_error(result, again), repr(result), round(result, 3), again, file=sys.stderr)"""
    assert loaded(code, "torch", "numpy", *SLOW) == set()


def test_what_needs_no_metric_loads_no_torchmetrics_nor_what_it_loads():
    names = set(modality_integration.__all__) - set(OF_THE_METRIC)
    assert loaded(importing(sorted(names)), "torch", *SLOW) == {"torch"}
    assert loaded("import mir_kernels; mir_kernels.backends", "torch", *SLOW) == {"torch"}


def test_mir_of_features_and_its_result_load_no_torchmetrics_nor_what_it_loads():
    code = """from modality_integration import MIRResult, compare, mir, official
import torch
result = mir([torch.randn(20, 4), torch.randn(20, 4)], [torch.randn(30, 4), torch.randn(30, 4)], bounds=True)
again = MIRResult.from_json(result.to_json())
print(compare(result, again), result, repr(result), float(result), round(result, 2), file=sys.stderr)
print(official.calculate_fid(torch.randn(20, 4), torch.randn(20, 4)), file=sys.stderr)"""
    assert loaded(code, "torch", *SLOW) == {"torch"}


def test_the_names_that_need_the_metric_are_just_these():
    assert loaded(importing(OF_THE_METRIC), "torchmetrics") == {"torchmetrics"}


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = modality_integration.nothing
