"""Characters of all scripts in figures: if matplotlib's own font lacks one, an installed font is used instead."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from matplotlib.text import Text

_LAST_RESORT = "Last Resort High-Efficiency"  # matplotlib's font of placeholder boxes for every character


def with_glyphs(texts: Iterable[Text]) -> None:
    """Add installed fonts to texts that have characters missing from matplotlib's own font."""
    for text in texts:
        if missing := _missing_glyphs(text):
            text.set_fontfamily([*text.get_fontfamily(), *_fonts_with(missing)])


def characters_without_font(figure: Figure) -> str:
    """Characters in a figure that no installed font has; rendered pictures show boxes for them."""
    from matplotlib.text import Text

    missing = frozenset().union(*map(_missing_glyphs, figure.findobj(Text)))
    return "".join(map(chr, sorted(missing - _own_glyphs() - _glyphs_of(*_fonts_with(missing)))))


def _missing_glyphs(text: Text) -> frozenset[int]:
    return frozenset(ord(letter) for letter in text.get_text() if letter.isprintable()) - _own_glyphs()


@functools.cache
def _own_glyphs() -> frozenset[int]:
    return _glyphs_of("DejaVu Sans")


@functools.cache
def _glyphs_of(*families: str) -> frozenset[int]:
    """The characters of these fonts, ignoring the last-resort font, which has only boxes."""
    from matplotlib.font_manager import get_font

    files = _installed()
    return frozenset().union(*(get_font(files[family]).get_charmap() for family in families if family != _LAST_RESORT))


@functools.cache
def _fonts_with(missing: frozenset[int]) -> tuple[str, ...]:
    """Installed fonts that together cover as many of the characters as possible; greedy, largest share first."""
    glyphs = {family: missing & _glyphs_of(family) for family in _installed()} if missing else {}
    found = []
    while missing and glyphs:
        best = max(glyphs, key=lambda family: len(glyphs[family] & missing))
        if not glyphs[best] & missing:
            break
        missing = missing - glyphs.pop(best)
        found.append(best)
    return (*found, *([_LAST_RESORT] if missing and _LAST_RESORT in _installed() else []))


@functools.cache
def _installed() -> dict[str, str]:
    """Font files of upright regular-weight fonts, sorted by family."""
    from matplotlib.font_manager import fontManager

    fonts = [(font.name, font.fname) for font in fontManager.ttflist if font.style == "normal" and font.weight == 400]
    return dict(sorted(fonts))
