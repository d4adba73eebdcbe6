"""Which record was in which step, packed: ascending step lists of many records, coded together.

A list is coded as Elias (1974) and Fano (1971) did: of every step (counted from the block's first)
the low 0, 8 or 16 bits as they are, and the rest in unary, as a bitmap in which the i-th one stands
at ``high + i``. That costs ``low + 1 + gap / 2^low`` bits a step, 10.5 bits where a record comes
once in 390 steps. Whole bytes of low bits let numpy decode thousands of lists in one go.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]

SHIFTS = (0, 8, 16)
"""How many low bits a block may keep as they are."""
CHECK = 4
"""Bytes of the checksum at the end of every stored list."""


class Coded(NamedTuple):
    """One record's steps within a block: its number in the block, how many, and the bytes."""

    number: int
    n: int
    data: bytes


def best_shift(pairs: int, lists: int, span: int) -> int:
    """The number of low bits with which a block is smallest.

    >>> best_shift(1000, 2, 1000), best_shift(1000, 10, 40_000), best_shift(10, 10, 1_000_000)
    (0, 8, 16)
    """
    return min(SHIFTS, key=lambda shift: pairs * (shift + 1) + lists * ((span - 1) >> shift))


def pack(numbers: Ints, steps: Ints, span: int) -> tuple[int, Iterator[Coded]]:
    """Code the lists of a block.

    Args:
        numbers: Record of every pair, ascending.
        steps: Step of every pair, from 0 to ``span - 1``, strictly ascending within a record.
        span: How many steps the block covers.

    Returns:
        The number of low bits, and a list for every record that occurs, ascending.

    >>> shift, lists = pack(np.array([3, 3, 7]), np.array([0, 300, 299]), 1000)
    >>> [(one.number, one.n) for one in lists]
    [(3, 2), (7, 1)]
    """
    owners, first, counts = np.unique(numbers, return_index=True, return_counts=True)
    shift = best_shift(len(steps), len(owners), span)
    sizes = (counts + ((span - 1) >> shift) + 7) // 8
    starts = np.cumsum(sizes) - sizes
    rank = np.arange(len(steps)) - np.repeat(first, counts)
    ones = np.zeros(int(sizes.sum()) * 8, np.uint8)
    ones[np.repeat(starts * 8, counts) + (steps >> shift) + rank] = 1
    high = np.packbits(ones, bitorder="little").tobytes()
    width = shift // 8
    low = (steps & ((1 << shift) - 1)).astype(f"<u{width}").tobytes() if width else b""
    columns = (owners.tolist(), first.tolist(), counts.tolist(), starts.tolist(), sizes.tolist())
    return shift, (
        Coded(owner, n, low[at * width : (at + n) * width] + high[start : start + size])
        for owner, at, n, start, size in zip(*columns, strict=True)
    )


def unpack(shift: int, counts: Sequence[int], data: Sequence[bytes]) -> Ints:
    """The steps of several lists that were coded with the same shift, one list after the other.

    >>> shift, lists = pack(np.array([3, 3, 7]), np.array([0, 300, 299]), 1000)
    >>> _, counts, data = zip(*lists)
    >>> unpack(shift, counts, data).tolist()
    [0, 300, 299]
    """
    width = shift // 8
    lows = b"".join([part[: n * width] for n, part in zip(counts, data, strict=True)])
    highs = [part[n * width :] for n, part in zip(counts, data, strict=True)]
    many = np.asarray(counts, np.int64)
    ones = np.unpackbits(np.frombuffer(b"".join(highs), np.uint8), bitorder="little")
    sizes = np.array([8 * len(part) for part in highs], np.int64)
    before = (np.cumsum(sizes) - sizes) - (np.cumsum(many) - many)
    steps: Ints = np.flatnonzero(ones.view(np.bool_)) - np.repeat(before, many)
    steps -= np.arange(len(steps))
    steps <<= shift
    if width:
        steps |= np.frombuffer(lows, f"<u{width}")
    return steps


def signed(key: int, data: bytes) -> bytes:
    """Data with a checksum behind it, which also covers the key that it is stored under."""
    return data + _check(key, data)


def opened(key: int, data: bytes) -> bytes | None:
    """What :func:`signed` was given; None if it is damaged, or was stored under another key.

    >>> opened(5, signed(5, b"abc")), opened(6, signed(5, b"abc"))
    (b'abc', None)
    """
    body = data[:-CHECK]
    return body if data[-CHECK:] == _check(key, body) else None


def _check(key: int, data: bytes) -> bytes:
    return zlib.crc32(data, key & 0xFFFFFFFF).to_bytes(CHECK, "little")


def packed_members(members: Ints) -> bytes:
    """Record numbers of one batch as they are kept until they are folded into lists."""
    return members.astype("<u4").tobytes()


def unpacked_members(data: Sequence[bytes]) -> tuple[Ints, Ints]:
    """Numbers of several batches one after the other, and how many belong to each.

    >>> [part.tolist() for part in unpacked_members([packed_members(np.array([4, 9])), b""])]
    [[4, 9], [2, 0]]
    """
    numbers = np.frombuffer(b"".join(data), "<u4").astype(np.int64)
    return numbers, np.array([len(part) // 4 for part in data], np.int64)
