"""A rich table that fits the console: whole columns are dropped or continued below; numbers are never wrapped."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from rich.cells import cell_len, chop_cells
from rich.console import Console, ConsoleOptions, JustifyMethod, RenderResult
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

GAP = 2  # between columns
# On narrow consoles, words longer than the first value may be broken, but never within a number. If that does not
# suffice, the next value applies.
WORDS = (8, 5, 3)
# A number with sign, point and exponent; letters; anything else. Each with the punctuation mark that follows it.
PIECES = re.compile(r"[+-]?\d+(?:\.\d+)*(?:e[+-]?\d+)?[-_/.]?|[^\W\d_]+[-_/.]?|\s+|.", re.DOTALL)
NUMBER = re.compile(r"[+-]?\d+(?:\.\d+)*(?:e[+-]?\d+)?")


class _Drawn(NamedTuple):
    """A column: header, footer and cells; its minimum width, its width with whole words, and its ideal width."""

    column: int
    header: Text
    footer: Text
    cells: list[Text]
    least: int
    whole: int
    best: int


class FittedTable(Table):
    """A rich table for any width, with three kinds of columns.

    The first `index` columns are always shown. Of the others, columns with a `rank` are dropped on narrow consoles,
    highest rank first, and a line below names them; columns without one continue in a further table below.
    Right-justified columns hold numbers, which are never wrapped; words in other columns and in headers wrap.

    Words are broken only if they are longer than `WORDS` allows. In the header of a number column, that applies only if
    the column is `named`, that is, headed by a user-chosen name such as that of a run.

    elsewhere: where to find the dropped columns, for that line.
    """

    def __init__(self, *, title: str | None, elsewhere: str = "", index: int = 1, **options: Any) -> None:
        super().__init__(title=title, **options)
        self.elsewhere = elsewhere
        self.index = index
        self.ranks: list[int] = []
        self.named: set[int] = set()

    def add_column(self, header: Any = "", *args: Any, rank: int = 0, named: bool = False, **options: Any) -> None:
        """Like rich's `add_column`; for rank and named see the class."""
        if named:
            self.named.add(len(self.columns))
        super().add_column(header, *args, **options)
        self.ranks.append(rank)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        width = options.max_width
        for word in WORDS:
            shown, gone = self._choose(self._columns(console, word), width)
            blocks = list(self._blocks(shown, width))
            if max(map(_least, blocks)) <= width:
                break
        if self.title:
            yield _text(self.title, console, "table.title")
        for block in blocks:
            yield self._table(block, width)
            if not gone or block[-1] is not shown[-1]:
                yield Text()
        if gone:
            names = ", ".join(" ".join(one.header.plain.split()) for one in gone)
            where = f" ({self.elsewhere})" if self.elsewhere else ""
            yield Text(f"not shown at this width: {names}{where}", style="dim")
            yield Text()

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        columns = self._columns(console, WORDS[0])
        least = max(map(_least, self._blocks([one for one in columns if not self.ranks[one.column]], 0)), default=0)
        best = sum(one.best for one in columns) + GAP * max(len(columns) - 1, 0)
        if self.title:
            best = max(best, _text(self.title, console).cell_len)
        return Measurement(least, best).with_maximum(options.max_width)

    def _columns(self, console: Console, word: int) -> list[_Drawn]:
        drawn = []
        for number, column in enumerate(self.columns):
            cells = [_text(cell, console) for cell in column.cells]
            header = _text(column.header, console) if self.show_header else Text()
            footer = _text(column.footer, console) if self.show_footer else Text()
            texts = [text.plain for text in (*cells, footer)]
            best = max(map(_longest_line, [header.plain, *texts]))
            words = column.justify != "right"
            of_cells = [_least_of_words(text, word) if words else _longest_line(text) for text in texts]
            of_header = _least_of_words(header.plain, word if words or number in self.named else best)
            least = max(of_header, *of_cells)
            whole = max(least, *(_least_of_words(text, best) for text in (header.plain, *texts)))
            drawn.append(_Drawn(number, header, footer, cells, least, whole, best))
        return drawn

    def _choose(self, columns: Sequence[_Drawn], width: int) -> tuple[list[_Drawn], list[_Drawn]]:
        """The columns that are shown, and those that are dropped."""
        shown, gone = list(columns), []
        for one in sorted(columns, key=lambda one: -self.ranks[one.column]):
            if not self.ranks[one.column] or _least(shown) <= width:
                break
            shown.remove(one)
            gone.append(one)
        return shown, sorted(gone, key=lambda one: one.column)

    def _blocks(self, columns: Sequence[_Drawn], width: int) -> Iterator[list[_Drawn]]:
        """Split the columns into stacked tables, each with the index columns and at least one more."""
        index, rest = list(columns[: self.index]), list(columns[self.index :])
        if not rest:
            yield index
        while rest:
            block = [*index, rest.pop(0)]
            while rest and _least([*block, rest[0]]) <= width:
                block.append(rest.pop(0))
            yield block

    def _table(self, columns: Sequence[_Drawn], width: int) -> Table:
        table = Table(
            box=self.box,
            show_header=self.show_header,
            show_footer=self.show_footer,
            show_edge=False,
            pad_edge=False,
            # A box adds one column of space.
            padding=(0, GAP - (self.box is not None), 0, 0),
            header_style=self.header_style,
            footer_style=self.footer_style,
        )
        widths = _widths(columns, width)
        for one, wide in zip(columns, widths, strict=True):
            header, footer = _folded(one.header, wide), _folded(one.footer, wide)
            justify: JustifyMethod = self.columns[one.column].justify
            table.add_column(header, footer, justify=justify, width=wide, no_wrap=True, overflow="crop")
        for row in range(self.row_count):
            table.add_row(*(_folded(one.cells[row], wide) for one, wide in zip(columns, widths, strict=True)))
        return table


def _text(cell: Any, console: Console, style: str = "") -> Text:
    if isinstance(cell, Text):
        return cell
    return console.render_str(str(cell), style=style, highlight=False)


def _least(columns: Sequence[_Drawn]) -> int:
    """The minimum width of the columns."""
    return sum(one.least for one in columns) + GAP * max(len(columns) - 1, 0)


def _longest_line(text: str) -> int:
    return max(map(cell_len, text.split("\n")))


def _least_of_words(text: str, most: int) -> int:
    """The width of the longest number in a text and, up to `most`, of its longest word."""
    numbers = [cell_len(number) for number in NUMBER.findall(text)]
    return max([*numbers, *(min(cell_len(word), most) for word in text.split())], default=0)


def _widths(columns: Sequence[_Drawn], width: int) -> list[int]:
    """Column widths: first the minimum, then whole words for as many columns as possible, then the rest shared out."""
    widths = [one.least for one in columns]
    left = width - _least(columns)
    for wanted, k in sorted((one.whole - one.least, k) for k, one in enumerate(columns)):
        if wanted <= left:
            widths[k], left = widths[k] + wanted, left - wanted
    for _ in range(left):
        short = [(one.best / max(wide, 1), -k) for k, (one, wide) in enumerate(zip(columns, widths, strict=True))]
        ratio, where = max(short, default=(0.0, 0))
        if ratio <= 1.0:
            break
        widths[-where] += 1
    return widths


def _folded(text: Text, width: int) -> Text:
    """Wrap the text to `width`: at spaces, in long words after punctuation, and elsewhere only if unavoidable."""
    lines = []
    for line in text.split("\n", allow_blank=True):
        places = _breaks(line.plain, width)
        for part in line.divide(places):
            part.rstrip()
            lines.append(part)
    return Text("\n").join(lines)


def _breaks(text: str, width: int) -> list[int]:
    places, place, used = [], 0, 0
    for piece in _pieces(text, width):
        long = cell_len(piece.rstrip())
        if used and used + long > width:
            places.append(place)
            used = 0
        used += cell_len(piece)
        place += len(piece)
    return places


def _pieces(text: str, width: int) -> Iterator[str]:
    """Unbreakable pieces: words with the space after them, parts of words that are too long, single characters."""
    for word in re.findall(r"\S+\s*|\s+", text):
        if cell_len(word.rstrip()) <= width:
            yield word
            continue
        for part in PIECES.findall(word):
            yield from [part] if cell_len(part.rstrip()) <= width else chop_cells(part, width)
