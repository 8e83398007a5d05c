"""Small pictures of samples with the start of their prose, for run.json and the report."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence

from PIL import Image

from modality_integration.app.samples import Sample, open_image

SIDE = 160  # pixels of the longer side
QUALITY = 70  # of the JPEG
CHARACTERS = 200  # of prose


def sample_cards(samples: Sequence[Sample], most: int = 12) -> list[dict[str, str | None]]:
    """The first `most` samples as {"name", "text", "jpeg"}: the first 200 characters of prose, and the picture as a
    base64 JPEG of at most 160 x 160 pixels, rotated according to its EXIF.

    "jpeg" is None if the picture can no longer be opened, so that the record of a finished run never fails.
    """
    return [
        {"name": sample.name, "text": sample.text.content[:CHARACTERS], "jpeg": _jpeg(sample)}
        for sample in samples[:most]
    ]


def _jpeg(sample: Sample) -> str | None:
    try:
        image = open_image(sample.image)
    except Exception:  # a broken file may raise almost anything, depending on its format
        return None
    image.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS, reducing_gap=3.0)
    file = io.BytesIO()
    image.save(file, "JPEG", quality=QUALITY, optimize=True)
    return base64.b64encode(file.getvalue()).decode("ascii")
