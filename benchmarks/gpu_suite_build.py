"""The first stages of gpu_suite.py: the environment of this machine, and the build of the extension."""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import sys
from pathlib import Path

from gpu_suite_processes import GRACE, ROOT, Result, cuda_tool, run, state, words

SETUPTOOLS = 77  # the first major version that reads pyproject.toml's `license`


def environment(out: Path, dry: bool, limit: float) -> Result:
    """Device, driver, versions, commit, and missing optional packages."""
    import torch

    found: Result = {"python": platform.python_version(), "torch": torch.__version__, "cuda": torch.version.cuda}
    optional = ("pytest", "hypothesis", "xdist", "scipy", "torchmetrics", "safetensors", "transformers", "mpmath")
    found["missing"] = [name for name in optional if importlib.util.find_spec(name) is None]
    for name in ("triton", "pybind11", "ninja", "setuptools"):
        module = importlib.util.find_spec(name) and importlib.import_module(name)
        found[name] = getattr(module, "__version__", "here") if module else None
    found["nvcc"] = shutil.which("nvcc")
    found["commit"] = words("git", "rev-parse", "--short", "HEAD") or "unknown"
    found["driver"] = words(
        "nvidia-smi", "--query-gpu=driver_version,name,memory.total", "--format=csv,noheader"
    ).partition("\n")[0]
    if torch.cuda.is_available():
        one = torch.cuda.get_device_properties(0)
        found |= {"device": one.name, "capability": f"{one.major}{one.minor}", "devices": torch.cuda.device_count()}
        found |= {"memory_gb": one.total_memory / 2**30, "multiprocessors": one.multi_processor_count}
    elif not dry:
        return found | {"state": "failed", "note": "torch sees no CUDA device; --dry runs without one"}
    parts = [f"{n} {found[n]}" for n in ("device", "driver", "torch", "triton", "commit") if found.get(n)]
    parts += [f"missing: {', '.join(found['missing'])}"] if found["missing"] else []
    if old := old_setuptools():
        parts.append(f"setuptools {old} cannot read this pyproject.toml: the build omits its license")
    return found | {"state": "passed", "note": "; ".join(parts)}


def build(out: Path, dry: bool, limit: float) -> Result:
    """Build the extension in place for this device, without nvcc only its CPU part; dry: the CPU part, into DIR.

    DIR/module keeps a copy, which a resumed part reuses if the sources are the same.
    """
    nvcc = None if dry else cuda_tool("nvcc")
    env = {"MIR_CUDA": "1" if nvcc else "0", "MIR_NATIVE": "1"}
    if nvcc:
        import torch

        major, minor = torch.cuda.get_device_capability()
        env |= {"MIR_CUDA_ARCHS": f"{major}{minor}", "CUDA_HOME": str(Path(nvcc).parent.parent)}
    what = "with CUDA C++" if nvcc else "the CPU part; CUDA C++ WAS NOT BUILT" + ("" if dry else ": there is no nvcc")
    built, kept, key = out / "built", out / "module", made_of(env)
    shutil.rmtree(built, ignore_errors=True)
    modules = list(kept.glob("_C.*"))
    if modules and (kept / "key.txt").exists() and (kept / "key.txt").read_text() == key:
        how = "reused from the previous part"
        (built / "mir_kernels").mkdir(parents=True)
        for module in modules:
            shutil.copy2(module, built / "mir_kernels" / module.name)
        code = 0
    else:
        tree = source_tree(out) if old_setuptools() else ROOT
        command = [sys.executable, "setup.py", "-q", "build_ext", "--build-temp", str(out / "build")]
        code = run([*command, "--build-lib", str(built)], folder=tree, limit=limit - GRACE - 2, **env)
        how = f"{env}: exit code {code}"
        modules = list(built.rglob("_C.*"))
        if code == 0:
            shutil.rmtree(kept, ignore_errors=True)
            kept.mkdir()
            for module in modules:
                shutil.copy2(module, kept / module.name)
            (kept / "key.txt").write_text(key)
    if code == 0 and not dry:
        for module in modules:
            arriving = ROOT / "mir_kernels" / f"{module.name}.arriving"
            shutil.copy2(module, arriving)
            os.replace(arriving, ROOT / "mir_kernels" / module.name)  # a process may still be using the old one
    return state(code == 0 and bool(modules), f"{what} ({how})") | {"cuda": bool(nvcc)}


def made_of(env: dict[str, str]) -> str:
    """A digest of everything that determines the build: sources, flags, interpreter and processor."""
    digest = hashlib.sha256(repr((env, sys.version, platform.machine())).encode())
    for path in [ROOT / "setup.py", ROOT / "pyproject.toml", *sorted((ROOT / "csrc").rglob("*"))]:
        if path.is_file():
            digest.update(str(path.relative_to(ROOT)).encode() + path.read_bytes())
    return digest.hexdigest()


def old_setuptools() -> str:
    """The version of setuptools if it rejects `license = "Apache-2.0"`, else ""."""
    try:
        version = importlib.metadata.version("setuptools")
    except importlib.metadata.PackageNotFoundError:
        return ""
    return version if int(version.partition(".")[0]) < SETUPTOOLS else ""


def source_tree(out: Path) -> Path:
    """A copy of the sources with a pyproject.toml that older setuptools can read."""
    tree = out / "source"
    shutil.rmtree(tree, ignore_errors=True)
    for name in ("csrc", "mir_kernels", "python"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("*.so", "__pycache__", "*.egg-info"))
    for name in ("setup.py", "README.md"):
        shutil.copy2(ROOT / name, tree / name)
    project = (ROOT / "pyproject.toml").read_text()
    (tree / "pyproject.toml").write_text(re.sub(r"^license.*\n", "", project, flags=re.MULTILINE))
    return tree
