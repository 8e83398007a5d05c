"""Damaged variants of valid files, deterministic for a given seed."""

from __future__ import annotations

import random
from collections.abc import Iterator

# Values that occur in headers and JSON, and values that a hostile writer would use.
WORDS = (b"F32", b"F64", b"BF16", b"I64", b"BOOL", b"U8", b"null", b"-1", b"0", b"1e999", b"NaN", b"[]", b"{}", b'""')
WORDS += (b"true", b"layer.1", b"layer.3", b"99999999999999999999", b"18446744073709551615", b"\xff", b"9" * 5000)


def damaged(whole: bytes, count: int, seed: int = 0) -> Iterator[bytes]:
    """The file itself, the file truncated at several places, then `count` random changes of it."""
    yield whole
    for size in (0, 1, 7, 8, 9, 100, len(whole) // 2, len(whole) - 1):
        yield whole[:size]
    yield (2**63).to_bytes(8, "little") + whole[8:]
    yield b"[" * 100_000
    draw = random.Random(seed)
    for _ in range(count):
        data = bytearray(whole)
        for _ in range(draw.choice((1, 1, 1, 2, 5))):
            place = draw.randrange(len(data)) if draw.random() < 0.5 else draw.randrange(min(len(data), 2000))
            kind = draw.randrange(5)
            if kind == 0:
                data[place] ^= 1 << draw.randrange(8)
            elif kind == 1:
                data[place] = draw.randrange(256)
            elif kind == 2:
                del data[place : place + draw.randrange(1, 16)]
            elif kind == 3:
                word = draw.choice(WORDS)
                data[place : place + len(word)] = word
            else:
                data[place:place] = draw.choice(WORDS)
            if not data:
                break
        yield bytes(data)
