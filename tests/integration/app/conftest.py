"""A tiny model with images and prose, and options of `mir compute` for them."""

import pytest

from integration.app.compute_runs import SAMPLES
from integration.saved_models import save_tiny_llama, save_tiny_llava, write_images, write_texts
from modality_integration.app.options import ComputeOptions


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("compute")
    save_tiny_llava(root / "model")
    write_images(root / "images", 7)
    write_texts(root / "text", 9)
    return root


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """The folder of a tiny language model."""
    return save_tiny_llama(tmp_path_factory.mktemp("language-model") / "llama")


@pytest.fixture
def options(folders, tmp_path):
    return ComputeOptions(
        model=str(folders / "model"),
        images=folders / "images",
        text=folders / "text",
        samples=SAMPLES,
        out=tmp_path / "out",
        device="cpu",
        text_tokens=20,
        checkpoint_every=5,
    )
