"""A golden table of the resources of every Triton kernel with the shipped block tables. Needs no GPU.

`PYTHONPATH=tests python tests/kernels/test_triton_resources.py` rewrites tests/golden/triton_resources.json; review the
diff before committing. Registers and shared memory depend on the version of Triton. With another version, the
comparison is skipped, but limits that need no table are still checked.
"""

import importlib
import inspect
import json
import re
from functools import cache
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

import triton

import aot
import ptx
from kernels.moca import test_moca_aot as moca
from kernels.moments import test_moments_aot as moments
from kernels.sqrtm import test_sqrtm_aot as sqrtm

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "triton_resources.json"
COMMAND = "PYTHONPATH=tests python tests/kernels/test_triton_resources.py"
# Maximum bytes per program. The sm_80 row is also used for 8.6, 8.9 and 12.x, which have 99 KB.
SHARED = {"sm_80": 99 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "gfx942": 64 << 10}
UNITS = {
    "sm_80": r"mma\.sync",
    "sm_90": r"wgmma\.mma_async|mma\.sync",
    "sm_100": r"tcgen05\.mma|mma\.sync",
    "gfx942": r"v_mfma",
}
BEST = {"sm_80": "mma.sync", "sm_90": "wgmma.mma_async", "sm_100": "tcgen05.mma", "gfx942": "v_mfma"}
ROWS = re.compile(r"moca (forward|backward|add_rms_\w+|row_dot)|token_norms")
LARGE_PRODUCTS = re.compile(r"second moment (?!split_fwd)|polar 1024 bfloat16")
LARGE = re.compile(r"second moment (plain|split) |polar (256|1024) (bfloat16|float32)")


def launches(target):
    """{description: launch} for every kernel: the launches that the *_aot.py files check."""
    found = {}
    for d in (4096, 8200):
        for name, launch in moca.launches(d, torch.bfloat16, target).items():
            found[f"moca {name} {d} bfloat16"] = launch
    for launch in moments.products(target, torch.bfloat16):
        kind = {None: "split_fwd", -1: "plain"}.get(launch.keywords.get("FIRST_PART"), "split")
        found[f"second moment {kind} 4096 bfloat16"] = launch
    split, product = moments.products(target, torch.float32)
    found |= {"second moment split_fwd 4096 float32": split, "second moment split 4096 float32": product}
    found["token_norms 4096 bfloat16"] = moments.norms(target, torch.bfloat16)
    for dtype, d in sqrtm.CASES:
        for launch in sqrtm.launches(d, dtype, target):
            name = launch.kernel.__name__.strip("_").removesuffix("_fwd")
            name += " of columns" if launch.keywords.get("TRANSPOSED") else ""
            found[f"polar {d} {str(dtype)[6:]} {name}"] = launch
    return found


@cache
def resources(target):
    """{description: registers, shared, spills, the matrix instruction or "", widest load and store}."""
    found = {}
    for name, launch in launches(target).items():
        binary = aot.compile_launch(target, launch)
        units = re.findall(UNITS[target], binary.asm)
        found[name] = {
            "registers": binary.registers,
            "shared": binary.shared,
            "spills": binary.spills,
            "unit": BEST[target] if BEST[target] in units else (units or [""])[0],
            "load": max(binary.loads, default=0),
            "store": max(binary.stores, default=0),
        }
        if target == "sm_90" and (loops := ptx.matrix_loops(binary.asm)):
            found[name] |= {"warps": launch.keywords["num_warps"], "loops": [loop._asdict() for loop in loops]}
    return found


def worse(now, golden):
    """Sentences on what became worse in one kernel."""
    found = [f"{k} {golden[k]} -> {now[k]}" for k in ("registers", "shared", "spills") if now[k] > golden[k]]
    found += [f"{k} of {golden[k]} bytes -> {now[k]}" for k in ("load", "store") if now[k] < golden[k]]
    found += [f"unit {golden['unit']} -> {now['unit'] or 'none'}"] * (now["unit"] != golden["unit"])
    loops, before = now.get("loops", []), golden.get("loops", [])
    found += [f"{len(before)} loops -> {len(loops)}"] * (len(loops) != len(before))
    for i, (one, other) in enumerate(zip(loops, before, strict=False)):
        of = f"of the step of loop {i}: "
        found += [f"{of}{k} {other[k]} -> {one[k]}" for k in ("stores", "loads", "lines") if one[k] > other[k]]
        found += [f"{of}{k} {other[k]} -> {one[k]}" for k in ("products", "columns", "in_flight") if one[k] < other[k]]
    return found


@pytest.mark.parametrize("target", aot.TARGETS)
def test_no_kernel_spills_or_outgrows_shared_memory_or_loses_its_matrix_unit_or_its_wide_accesses(target):
    for name, kernel in resources(target).items():
        assert kernel["spills"] <= aot.SPILLS, name
        assert kernel["shared"] <= SHARED[target], name
        if ROWS.match(name):
            assert kernel["load"] == 16, name
        if LARGE_PRODUCTS.match(name):
            assert kernel["unit"] == BEST[target], name


@pytest.mark.parametrize("target", aot.TARGETS)
def test_no_kernel_needs_more_than_the_golden_table_says(target):
    golden = json.loads(GOLDEN.read_text())
    if golden["triton"] != triton.__version__:
        pytest.skip(f"the table was made with triton {golden['triton']}, here is {triton.__version__}: {COMMAND}")
    now, before = resources(target), golden["kernels"][target]
    assert now.keys() == before.keys(), f"kernels were added or removed: {COMMAND}"
    changes = {name: worse(now[name], before[name]) for name in now}
    changes = {name: change for name, change in changes.items() if change}
    assert not changes, f"worse on {target}: {json.dumps(changes, indent=1)}\nIf intended, run {COMMAND}"


@pytest.mark.parametrize("name", sorted(n for n in launches("sm_90") if LARGE.match(n)))
def test_large_products_run_on_while_the_loop_fetches_what_comes_next(name):
    """No product waits for the previous one, and operands are read from shared memory, filled by async copies."""
    kernel = resources("sm_90")[name]
    assert kernel["loops"], name
    for loop in kernel["loops"]:
        assert loop["in_flight"] >= loop["groups"] >= 1
        assert loop["products"] >= 4
        assert loop["columns"] == (256 if name.startswith("polar 1024 bfloat16") else 128)
        assert loop["copies"] >= 2
        assert loop["stores"] == 0
        # From the bytes of a mask, which make the copies write zeros.
        assert loop["loads"] == (4 if name == "second moment plain 4096 bfloat16" else 0)


def test_a_loop_that_waits_for_its_products_is_seen():
    """A 64 x 64 matrix stays in registers, and in every step each product depends on the previous one."""
    for loop in resources("sm_90")["polar 64 bfloat16 small_polar"]["loops"]:
        assert loop["in_flight"] == 0


def launched(module):
    """The kernels of a module that are launched by name[grid](...)."""
    names = set(re.findall(r"\b(\w+)\[", inspect.getsource(module)))
    return {name for name in names if isinstance(getattr(module, name, None), triton.JITFunction)}


@pytest.mark.parametrize("target", aot.TARGETS)
def test_every_kernel_that_is_launched_is_in_the_table(target):
    names = {launch.kernel.__name__ for launch in launches(target).values()}
    names_of_modules = ("moca.triton", "moments.triton", "sqrtm.triton", "sqrtm.triton_products")
    modules = [importlib.import_module(f"mir_kernels.ops.{name}") for name in names_of_modules]
    wanted = set().union(*(launched(module) for module in modules))
    assert len(wanted) >= 10
    assert wanted == names


def test_a_change_for_the_worse_is_named():
    golden = {"registers": 80, "shared": 1024, "spills": 0, "unit": "wgmma.mma_async", "load": 16, "store": 16}
    assert worse(golden, golden) == []
    loop = {"products": 4, "columns": 256, "in_flight": 1, "stores": 0, "loads": 0, "lines": 150}
    slower = loop | {"columns": 128, "in_flight": 0, "stores": 8, "lines": 420}
    assert worse(golden | {"loops": [slower]}, golden | {"loops": [loop]}) == [
        "of the step of loop 0: stores 0 -> 8",
        "of the step of loop 0: lines 150 -> 420",
        "of the step of loop 0: columns 256 -> 128",
        "of the step of loop 0: in_flight 1 -> 0",
    ]
    assert worse(golden, golden | {"loops": [loop]}) == ["1 loops -> 0"]
    assert worse(golden | {"registers": 79, "shared": 0}, golden) == []
    assert worse(golden | {"registers": 96, "load": 2, "unit": ""}, golden) == [
        "registers 80 -> 96",
        "load of 16 bytes -> 2",
        "unit wgmma.mma_async -> none",
    ]


if __name__ == "__main__":
    table = {"triton": triton.__version__, "kernels": {target: resources(target) for target in aot.TARGETS}}
    text = json.dumps(table, indent=1)
    GOLDEN.write_text(
        re.sub(r"\{\n\s+(\"(?:registers|products)\"[^{}]*?)\n\s+\}", lambda m: "{" + " ".join(m[1].split()) + "}", text)
        + "\n"
    )
