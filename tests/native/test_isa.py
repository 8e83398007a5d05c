"""Every instruction set level computes correct results, and no level's code can leak into another."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tolerances import assert_close

CSRC = Path(__file__).resolve().parents[2] / "csrc"
LEVELS = ("x86-64", "x86-64-v3", "x86-64-v4-vnni")

# Writes the results of each kernel for one fixed input, so that levels can be compared across processes.
SCRIPT = """
import sys, torch
from mir_kernels._native import C, MISSING
if C is None:
    sys.exit(MISSING)
from mir_kernels.ops.moca import native as moca
from mir_kernels.ops.moments import native as moments

results = {"isa": C.CPU_ISA}
for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
    torch.manual_seed(0)
    x, residual, grad = (torch.randn(70, 203).to(dtype) for _ in range(3))
    x[0, :5] = torch.tensor([float("inf"), float("-inf"), float("nan"), 1e-7, 65519.0]).to(dtype)
    scale, shift, mask = torch.randn(203), torch.randn(203), torch.arange(70) % 3 != 1
    out, dx, normed, h = (torch.full_like(x, float("nan")) for _ in range(4))
    rstd = torch.empty(70, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    moca.forward(x, scale, shift, mask, out)
    sums = moca.backward(grad, residual, scale, mask, dx)
    moca.add_rms_forward(grad, residual, scale, shift, mask, shift, 1e-6, normed, h, rstd)
    fused_dx = torch.full_like(x, float("nan"))
    fused = moca.add_rms_backward(grad, x[1:2].expand_as(x), h, grad, residual, scale, mask, shift, rstd, fused_dx)
    results[str(dtype)] = {
        "inputs": [x, residual, grad, scale, shift, mask], "exact": [out, dx], "fused": [normed, fused_dx, *fused],
        "sums": list(sums), "norms": moments.token_norms(residual),
    }
torch.save(results, sys.argv[1])
"""


@pytest.fixture(scope="module")
def results(native_module, tmp_path_factory):
    """{level: results of SCRIPT at that level} for the levels that this CPU supports."""
    folder = tmp_path_factory.mktemp("isa")
    written = {}
    for level in native_module.CPU_ISAS:
        path = folder / f"{level}.pt"
        env = {**os.environ, "MIR_CPU_ISA": level, "PYTHONPATH": str(CSRC.parent)}
        done = subprocess.run([sys.executable, "-c", SCRIPT, str(path)], env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        written[level] = torch.load(path)
        assert written[level]["isa"] == level
    return written


DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_level_is_right(results, dtype):
    for level in results.values():
        got = level[str(dtype)]
        x, residual, grad, scale, shift, mask = got["inputs"]
        out, dx = got["exact"]
        expected = torch.where(mask[:, None], scale.double() * x.double() + shift.double(), x.double()).to(dtype)
        assert torch.equal(out.isnan(), expected.isnan())
        assert_close(out[1:], expected[1:])
        assert torch.equal(out[0].isinf(), expected[0].isinf())
        assert_close(dx, torch.where(mask[:, None], scale.double() * grad.double(), grad.double()))
        assert_close(got["sums"][0], (grad.double() * residual.double())[mask].sum(0))
        assert_close(got["sums"][1], grad.double()[mask].sum(0))
        assert_close(got["norms"], residual.double().norm(dim=1))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_levels_agree(results, dtype):
    first, *others = (level[str(dtype)] for level in results.values())
    if not others:
        pytest.skip("this CPU supports only one level")
    for other in others:
        for a, b in zip(first["exact"], other["exact"], strict=True):
            assert torch.equal(a.isnan(), b.isnan())
            assert torch.equal(a.nan_to_num(), b.nan_to_num())  # rounded once, so the bits are the same at every level
        for a, b in zip(first["fused"], other["fused"], strict=True):
            assert_close(a, b.double())


def test_an_unavailable_level_is_refused(native_module, run_python):
    missing = [level for level in LEVELS if level not in native_module.CPU_ISAS]
    if not missing:
        pytest.skip("this CPU supports every level")
    out = run_python("from mir_kernels import _native; print(_native.MISSING)", MIR_CPU_ISA=missing[-1]).stdout
    assert "MIR_CPU_ISA" in out


def test_the_level_in_use_is_one_that_runs_here(native_module):
    assert native_module.CPU_ISA in native_module.CPU_ISAS
    assert set(native_module.CPU_ISAS) <= {*LEVELS, "baseline"}


@pytest.mark.skipif(not CSRC.exists(), reason="needs the sources")
@pytest.mark.parametrize("source", sorted(CSRC.rglob("*_cpu.cpp")), ids=lambda path: path.stem)
def test_objects_share_no_inline_function_between_levels(source, tmp_path):
    compiler, nm = shutil.which("c++") or shutil.which("g++"), shutil.which("nm")
    if compiler is None or nm is None:
        pytest.skip("needs a C++ compiler and nm")
    output = tmp_path / "object.o"
    flags = ["-std=c++17", "-O1", "-fPIC", "-Wno-psabi", "-fopenmp", "-DMIR_ISA=baseline"]
    subprocess.run([compiler, *flags, "-c", str(source), "-o", str(output)], check=True, capture_output=True)
    lines = subprocess.run([nm, "-C", str(output)], check=True, capture_output=True, text=True).stdout.splitlines()
    defined = [line.split(maxsplit=2)[1:] for line in lines if len(line.split(maxsplit=2)) == 3]
    # Symbols that the linker may merge between objects (weak, unique) or resolve by name must be in the namespace.
    shared = [name for kind, name in defined if kind in "WVuTDRB" and "DW.ref.__gxx_personality" not in name]
    assert any("mir::baseline::" in name for name in shared)
    assert [name for name in shared if "mir::baseline::" not in name] == []
