"""Analyse the inner loops of a kernel on sm_90 from its PTX: products in flight, copies, and the threads' work."""

from __future__ import annotations

import re
from typing import NamedTuple

LABEL = re.compile(r"\s*(\$\w+):")
BRANCH = re.compile(r"\bbra(?:\.uni)?\s+(\$\w+);")
PRODUCT = re.compile(r"\bwgmma\.mma_async\.sync\.aligned\.m(\d+)n(\d+)k(\d+)")
WAIT = re.compile(r"\bwgmma\.wait_group\.sync\.aligned\s+(\d+)")


class Loop(NamedTuple):
    """One step of a loop with matrix products, along its shortest backward path.

    products: `wgmma` instructions.  columns: of the widest, at most 256.  groups: asynchronous groups of products.
    in_flight: groups that may still run while the loop continues, at the strictest wait; 0: the loop waits for all.
    copies: into shared memory by the copy engine or without a register.  stores: into shared memory from registers.
    loads: from global memory into registers.  lines: of PTX.
    """

    products: int
    columns: int
    groups: int
    in_flight: int
    copies: int
    stores: int
    loads: int
    lines: int


def matrix_loops(ptx: str) -> list[Loop]:
    """The innermost loops with matrix products, in order of appearance."""
    lines = ptx.splitlines()
    places = {found[1]: n for n, line in enumerate(lines) if (found := LABEL.match(line))}
    ways = []
    for n, line in enumerate(lines):
        found = BRANCH.search(line)
        start = places.get(found[1], n) if found else n
        if start < n and PRODUCT.search("\n".join(lines[start:n])):
            ways.append(range(start, n + 1))
    # The shortest first: overlapping ranges are longer paths through the same step, or enclosing loops.
    kept: list[range] = []
    for way in sorted(ways, key=len):
        if all(way.stop <= other.start or other.stop <= way.start for other in kept):
            kept.append(way)
    return [_loop(lines[way.start : way.stop]) for way in sorted(kept, key=lambda way: way.start)]


def _loop(body: list[str]) -> Loop:
    text = "\n".join(body)
    shapes = [tuple(map(int, found)) for found in PRODUCT.findall(text)]
    waits = [int(found) for found in WAIT.findall(text)]
    return Loop(
        products=len(shapes),
        columns=max(columns for _, columns, _ in shapes),
        groups=text.count("wgmma.commit_group"),
        in_flight=min(waits, default=0),
        copies=len(re.findall(r"\bcp\.async\.(?:bulk\.tensor|c[ag]\.shared)", text)),
        stores=len(re.findall(r"\bst\.shared", text)),
        loads=len(re.findall(r"\bld\.global", text)),
        lines=len(body),
    )
