"""Results with chosen distances, and the visible contents of a figure, for tests of plots."""

import itertools

from PIL import Image

from modality_integration import LayerTerms, MIRResult


def made(distances, errors=None, without_sinks=None):
    """A result with these distances; each layer's standard error is `errors` times its distance."""
    layers = len(distances)
    counts = {modality: [9] * layers for modality in ("vision", "text")}
    # Two groups with values d (1 - e) and d (1 + e) have a jackknife standard error of d e.
    left_out = errors and [[d * (1 - e), d * (1 + e)] for d, e in zip(distances, errors, strict=True)]
    return MIRResult(
        terms=[LayerTerms(distance, 1.0, 1.0, 1.0) for distance in distances],
        alpha=[1.0] * layers,
        kept=counts,
        removed=counts,
        left_out=left_out,
        without_sinks=without_sinks,
    )


def assert_readable(figure):
    """Check that no text overlaps the axes, leaves the page, or is smaller than 8 points."""
    figure.draw_without_rendering()
    page = figure.bbox
    for legend in figure.legends:
        box = legend.get_window_extent()
        assert page.x0 <= box.x0 < box.x1 <= page.x1
        assert page.y0 - 1 <= box.y0 < box.y1 <= page.y1
        for axes in figure.axes:
            assert not box.overlaps(axes.get_window_extent())
            assert not any(box.overlaps(text.get_window_extent()) for text in marks(axes.xaxis))
            assert not box.overlaps(axes.xaxis.label.get_window_extent()) or not axes.get_xlabel()
    for axes in figure.axes:
        texts = [*marks(axes.xaxis), *marks(axes.yaxis), *shown([axes.xaxis.label, axes.yaxis.label])]
        for text in [*texts, *(text for legend in figure.legends for text in legend.get_texts())]:
            assert text.get_fontsize() >= 8
            box = text.get_window_extent()
            assert page.x0 - 1 <= box.x0
            assert box.x1 <= page.x1 + 1
            assert page.y0 - 1 <= box.y0
            assert box.y1 <= page.y1 + 1
        assert axes.get_window_extent().height > 100
        if not marks(axes.xaxis) or axes.get_xticklabels()[0].get_rotation() in (0, 90):
            boxes = [text.get_window_extent() for text in marks(axes.xaxis)]
            assert not any(a.overlaps(b) for a, b in itertools.pairwise(boxes))


def shown(texts):
    return [text for text in texts if text.get_visible() and text.get_text()]


def marks(axis, minor=False):
    """The visible tick labels of the axis; a panel above another has none."""
    low, high = sorted(axis.get_view_interval())
    labels = axis.get_ticklabels(minor=minor)
    places = axis.get_ticklocs(minor=minor)
    return shown(text for text, place in zip(labels, places, strict=False) if low <= place <= high)


def colours(path):
    with Image.open(path) as image:
        return len(image.convert("RGB").getcolors(1 << 20))
