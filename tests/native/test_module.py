"""The compiled module loads on every machine and reports its build options."""

import importlib.metadata
import re
import shutil
import subprocess

import pytest
import torch

from mir_kernels import _native
from mir_kernels.ops.moca import OPERATIONS


def test_constants_say_what_was_built(native_module):
    assert native_module.CPU_ISA in native_module.CPU_ISAS
    assert isinstance(native_module.OPENMP, bool)
    assert all(isinstance(arch, int) and arch >= 50 for arch in native_module.CUDA_ARCHS)
    assert set(native_module.DTYPES) == {"float32", "bfloat16", "float16", "float64"}
    assert hasattr(native_module, "moca_forward_cuda") == bool(native_module.CUDA_ARCHS)


def test_version_is_the_package_version(native_module):
    try:
        installed = importlib.metadata.version("mir-kernels")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("mir-kernels is not installed here, only built in place")
    assert installed == native_module.VERSION


def test_module_needs_no_cuda_library_to_load(native_module):
    if shutil.which("readelf") is None:
        pytest.skip("readelf not found")
    text = subprocess.run(["readelf", "-d", native_module.__file__], capture_output=True, text=True, check=True).stdout
    needed = [line for line in text.splitlines() if "NEEDED" in line]
    assert needed
    assert not [line for line in needed if "cuda" in line or "torch" in line]


def test_unknown_instruction_set_is_refused_with_the_choices(run_python):
    script = "from mir_kernels import _native; print(_native.MISSING)"
    if run_python(script).stdout.strip() != "None":
        pytest.skip("no compiled module")
    out = run_python(script, MIR_CPU_ISA="x86-64-v9").stdout
    assert "MIR_CPU_ISA: expected one of" in out
    assert "x86-64-v9" in out


def test_unknown_dtype_code_is_refused(native_module):
    with pytest.raises(ValueError, match="dtype"):
        native_module.token_norms(0, 0, 0, 0, 0, 7, 1)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is here")
def test_cuda_launch_without_a_driver_raises_with_cudas_message(native_module):
    if not native_module.CUDA_ARCHS:
        pytest.skip("built without nvcc")
    with pytest.raises(RuntimeError, match=r"CUDA|driver"):
        native_module.moca_forward_cuda(0, 0, 0, 0, 0, 0, 0, 1, 8, 0, 0, 0)


ARCHITECTURES = [
    ((90,), (8, 0), "built for compute capability 9.0, but the device has 8.0.*MIR_CUDA_ARCHS=80"),
    ((90,), (10, 0), None),  # PTX
    ((80, 90), (8, 9), None),  # machine code of 8.0 runs on all of 8.x
    ((86, 90), (8, 0), "built for compute capability 8.6, 9.0, but the device has 8.0"),
    ((80, 120), (9, 0), "the device has 9.0"),  # PTX only for the last architecture
    ((80, 86, 89, 90, 100, 120), (10, 3), None),
]


@pytest.mark.parametrize(("built", "device", "reason"), ARCHITECTURES)
def test_a_device_that_the_build_has_no_code_for_takes_triton_and_says_why(monkeypatch, built, device, reason):
    monkeypatch.setattr(_native, "C", type("C", (), {"CUDA_ARCHS": built}))
    monkeypatch.setattr(_native, "MISSING", None)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    capability, gpu = device, torch.device("cuda", 0)
    found = OPERATIONS[0].reason("cuda", gpu)
    assert found is None if reason is None else re.search(reason, found)
    if reason and OPERATIONS[0].reason("triton", gpu) is None:
        assert OPERATIONS[0].choose(None, gpu) == "triton"
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert "ROCm" in OPERATIONS[0].reason("cuda", gpu)
