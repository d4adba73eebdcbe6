"""How a payload lies in bytes; :mod:`efface.updates.codec` says what it is.

A payload is a head, a directory of its blocks, a frame of tables, up to four frames a block (for
places, upper bits, lower bits and signs), and a CRC-32 of all that. The tables are how many values
each layer has and, for each *stretch* (what one layer, or 64 dense entries, fill of a block), the
number that its magnitudes are counted from, and its scale. All frames are zstd's. Integers are
little-endian, bits are packed lowest first.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import zstandard

from efface.errors import LogError
from efface.updates.layout import Floats, Ints
from efface.updates.rounding import KINDS, SCALES, Codes, Kind, Scales, to_codes, to_values

Bytes = npt.NDArray[np.uint8]

BLOCK = 1 << 17
"""Most values of a block: as many bytes as zstd compresses at a time."""
STRETCH = 64
"""Entries of the dense part that share a smallest magnitude and a scale."""
RARE = 32
"""Where fewer than one entry in so many is stored, a bitmask is not tried."""

_MARK, _VERSION = b"efUp", 1
_HEAD = struct.Struct("<4sBBxxQQQIII")
_ENTRY = struct.Struct("<BB?xIIQ4I")
_CRC = struct.Struct("<I")
_GAPS, _BITMASK, _WHOLE = range(3)
_MORE = 255
_NOTHING = np.uint32(0xFFFFFFFF)


class _Head(NamedTuple):
    mark: bytes
    version: int
    kind: int
    size: int
    stored: int
    dense: int
    layers: int
    blocks: int
    tables: int


class _Entry(NamedTuple):
    """What the directory says of a block: how it is coded, and the bytes of its four frames."""

    coding: int
    shift: int  # bits below the upper eight
    zeros: bool
    values: int
    symbols: int  # bytes that say where the values lie
    span: int  # entries from the block's begin to its last value
    places: int
    upper: int
    lower: int
    signs: int


class Block(NamedTuple):
    """A block as it was read.

    Attributes:
        first: Entry of the flat vector where it begins.
        span: Entries from there to behind its last value.
        places: Where its values lie, from ``first``; int64 [n]; None in the dense part, where they
            lie one after the other.
        values: Float32 [n], the reader's own.
    """

    first: int
    span: int
    places: Ints | None
    values: Floats


def stretches(cuts: Ints, done: int, values: int) -> Ints:
    """Where the stretches of a block begin: at 0, and wherever another layer does.

    Args:
        cuts: Where layers begin among all values, ascending, each once.
        done: Values before the block.
        values: Values of the block.

    >>> stretches(np.array([0, 3, 5, 9]), 3, 4).tolist()
    [0, 2]
    """
    a, b = np.searchsorted(cuts, [done, done + values])
    inner = cuts[a:b] - done
    return inner if len(inner) and inner[0] == 0 else np.concatenate([[0], inner])


class Packer:
    """Makes blocks of values and puts them together."""

    def __init__(self, kind: Kind, level: int) -> None:
        self.kind = kind
        self.compress = zstandard.ZstdCompressor(level=level).compress
        self.entries: list[_Entry] = []
        self.frames: list[bytes] = []
        self.floors: list[Codes] = []
        self.scales: list[Scales] = []

    def add(self, values: Floats, starts: Ints, places: Ints | None) -> None:
        """Add a block whose values lie at ``places``; None: of the dense part."""
        coding, symbols, span, where = _WHOLE, 0, len(values), b""
        if places is not None:
            span = int(places[-1]) + 1
            coding, symbols, where = self._places(places, span)
        codes, scales = to_codes(values, starts, self.kind)
        floors, zeros = _lower(codes, starts)
        shift = max(0, int(codes.max()).bit_length() - 8)
        upper = self.compress((codes >> np.uint32(shift)).astype(np.uint8).tobytes())
        lower = self.compress(_low(codes, shift)) if shift else b""
        signs = self.compress(_packed(np.signbit(values)).tobytes())
        frames = [where, upper, lower, signs]
        self.entries.append(
            _Entry(coding, shift, zeros, len(values), symbols, span, *map(len, frames))
        )
        self.frames += frames
        self.floors.append(floors)
        self.scales.append(scales)

    def _places(self, places: Ints, span: int) -> tuple[int, int, bytes]:
        """Coding, number of symbols and the frame of a block's places."""
        gaps = np.diff(places, prepend=-1) - 1
        symbols = np.minimum(gaps, _MORE).astype(np.uint8)
        rest = gaps[gaps >= _MORE] - _MORE
        if len(rest):
            symbols = np.concatenate([symbols, _runs(rest)])
        frame = self.compress(symbols.tobytes())
        if span > RARE * len(gaps):
            return _GAPS, len(symbols), frame
        kept = np.zeros(span, np.bool_)
        kept[places] = True
        bits = _packed(kept)
        other = self.compress(bits.tobytes())
        if len(other) < len(frame):
            return _BITMASK, len(bits), other
        return _GAPS, len(symbols), frame

    def payload(self, size: int, counts: Ints) -> bytes:
        """Everything together.

        Args:
            size: Entries of the sparse part.
            counts: How many values each layer has.
        """
        tables = [counts.astype("<i8"), *(f.astype("<u4") for f in self.floors)]
        if self.kind in SCALES:
            tables += [s.astype(SCALES[self.kind]) for s in self.scales]
        frame = self.compress(b"".join(t.tobytes() for t in tables))
        dense = sum(entry.values for entry in self.entries if entry.coding == _WHOLE)
        facts = size, int(counts.sum()), dense, len(counts), len(self.entries), len(frame)
        head = _HEAD.pack(_MARK, _VERSION, KINDS.index(self.kind), *facts)
        entries = [_ENTRY.pack(*entry) for entry in self.entries]
        data = b"".join([head, *entries, frame, *self.frames])
        return data + _CRC.pack(zlib.crc32(data))


def _lower(codes: Codes, starts: Ints) -> tuple[Codes, bool]:
    """Count codes from the smallest of their stretch, which becomes 1, in place; 0 stays 0.

    Returns:
        What was subtracted, by stretch; whether there is a 0.
    """
    zeros = codes == 0
    some = bool(zeros.any())
    least = np.minimum.reduceat(np.where(zeros, _NOTHING, codes) if some else codes, starts)
    floors: Codes = np.where(least == _NOTHING, np.uint32(1), least) - np.uint32(1)
    codes -= np.repeat(floors, np.diff(starts, append=len(codes)))
    if some:
        codes[zeros] = 0
    return floors, some


def _low(codes: Codes, shift: int) -> bytes:
    """The lower bits of codes: whole bytes, lowest first, then single bits."""
    whole = [(codes >> np.uint32(8 * i)).astype(np.uint8) for i in range(shift // 8)]
    single = range(shift - shift % 8, shift)
    bits = [_packed(codes & np.uint32(1 << i) != 0) for i in single]
    return b"".join(part.tobytes() for part in whole + bits)


def _runs(numbers: Ints) -> Bytes:
    """Numbers as bytes: 255 as often as it fits, then what is left."""
    times, rest = np.divmod(numbers, _MORE)
    found = np.full(len(rest) + int(times.sum()), _MORE, np.uint8)
    found[np.cumsum(times + 1) - 1] = rest
    return found


def _of_runs(symbols: Bytes) -> Ints:
    """The numbers again."""
    ends = np.flatnonzero(symbols != _MORE)
    return np.diff(np.cumsum(symbols, dtype=np.int64)[ends], prepend=0)


def _packed(flags: npt.NDArray[np.bool_]) -> Bytes:
    return np.packbits(flags, bitorder="little")


class Payload:
    """Reads a payload.

    Args:
        data: All of its bytes.
        checked: Whether they are known to be whole.

    Raises:
        LogError: If they are damaged: nothing is read before the checksum is seen to fit.
    """

    def __init__(self, data: bytes, checked: bool = False) -> None:
        self.data = memoryview(data)[: -_CRC.size]
        self.decompress = zstandard.ZstdDecompressor().decompress
        if len(self.data) < _HEAD.size:
            raise _damaged("it is too short")
        if not checked and zlib.crc32(self.data) != _CRC.unpack(data[-_CRC.size :])[0]:
            raise _damaged("its checksum does not fit")
        self.head = head = _Head(*_HEAD.unpack_from(data))
        if head.mark != _MARK or head.version != _VERSION or head.kind >= len(KINDS):
            raise _damaged("it does not begin like one")
        self.kind = KINDS[head.kind]
        end = _HEAD.size + head.blocks * _ENTRY.size
        self.start = end + head.tables
        if len(self.data) < self.start:
            raise _damaged("it is too short")
        self.entries = [_Entry(*e) for e in _ENTRY.iter_unpack(data[_HEAD.size : end])]
        if len(self.data) != self.start + sum(sum(entry[6:]) for entry in self.entries):
            raise _damaged("it has another length")
        self._tables(end)

    def _tables(self, at: int) -> None:
        """Cut the tables into where layers end among the values, floors and scales."""
        head, cut = self.head, 8 * self.head.layers
        scaled = np.dtype(SCALES.get(self.kind, "<u1"))
        each = 4 + (scaled.itemsize if self.kind in SCALES else 0)
        most = head.layers + head.blocks + -(-head.dense // STRETCH)
        raw = self._frame(at, head.tables, None, most=cut + each * most)
        stretches, rest = divmod(len(raw) - cut, each)
        if stretches < 0 or rest:
            raise _damaged("its tables have another length")
        ends = np.cumsum(np.frombuffer(raw, "<i8", head.layers))
        self.cuts: Ints = ends[np.flatnonzero(np.diff(ends, append=-1))]
        self.floors: Codes = np.frombuffer(raw, "<u4", stretches, cut)
        self.scales: Scales = np.frombuffer(raw, scaled, offset=cut + 4 * stretches)

    def blocks(self) -> Iterator[Block]:
        """Every block, those of the dense part last.

        Raises:
            LogError: If one is damaged.
        """
        at, stretch, passed, done, end = self.start, 0, 0, 0, self.head.size
        for entry in self.entries:
            dense = entry.coding == _WHOLE
            if dense and end == self.head.size:
                passed, end = self.head.size, self.head.size + self.head.dense
            sane = 0 < entry.values <= BLOCK and 0 < entry.span <= end - passed and entry.shift < 24
            if not sane or entry.coding > _WHOLE or dense < (end > self.head.size):
                raise _damaged("its blocks do not fit its head")
            if dense:
                starts = np.arange(0, entry.values, STRETCH)
            else:
                starts = stretches(self.cuts, done, entry.values)
            lengths = np.diff(starts, append=entry.values)
            yield Block(
                passed,
                entry.span,
                None if dense else self._places(entry, at),
                self._values(entry, at + entry.places, lengths, stretch),
            )
            at += sum(entry[6:])
            stretch += len(lengths)
            passed += entry.span
            done += entry.values

    def _places(self, entry: _Entry, at: int) -> Ints:
        """Where a block's values lie, counted from where the block begins."""
        symbols = self._bytes(at, entry.places, entry.symbols)
        if entry.coding == _BITMASK:
            bits = np.unpackbits(symbols, bitorder="little")
            places = np.flatnonzero(bits.view(np.bool_))
        else:
            places = self._distances(symbols, entry.values)
        if len(places) != entry.values or places[-1] != entry.span - 1:
            raise _damaged("the places of its values do not fit its head")
        return places

    def _distances(self, symbols: Bytes, n: int) -> Ints:
        """Places from the distances between them."""
        gaps, rest = symbols[:n], symbols[n:]
        if len(rest) == 0:
            steps = gaps + np.uint8(1)
            steps[:1] -= 1  # the first distance is from where the block begins
            return np.cumsum(steps, dtype=np.int64)
        far = np.flatnonzero(gaps == _MORE)
        more = _of_runs(rest)
        if len(far) != len(more):
            raise _damaged("the places of its values are cut off")
        places = gaps.astype(np.int64)
        places[1:] += 1
        places[far] += more
        np.cumsum(places, out=places)
        return places

    def _values(self, entry: _Entry, at: int, lengths: Ints, stretch: int) -> Floats:
        """The values of a block."""
        n, shift, bits = entry.values, entry.shift, -(-entry.values // 8)
        floors = self.floors[stretch : stretch + len(lengths)]
        scales = self.scales[stretch : stretch + len(lengths)]
        if len(floors) != len(lengths):
            raise _damaged("its tables do not fit its blocks")
        width = np.uint32 if self.kind == "fp32" else np.uint16
        codes: npt.NDArray[Any] = self._bytes(at, entry.upper, n).astype(width)
        at += entry.upper
        if shift:
            codes <<= shift
            low, whole = self._bytes(at, entry.lower, shift // 8 * n + shift % 8 * bits), shift // 8
            parts = [low[i * n : (i + 1) * n] for i in range(whole)]
            parts += [_unpacked(row, n) for row in low[whole * n :].reshape(shift % 8, bits)]
            at_bit = [*range(0, 8 * whole, 8), *range(8 * whole, shift)]
            for part, place in zip(parts, at_bit, strict=True):
                wide: npt.NDArray[Any] = part.astype(width)
                wide <<= place
                codes |= wide
        at += entry.lower
        zeros = codes == 0 if entry.zeros else None
        codes += np.repeat(floors.astype(width), lengths)
        if zeros is not None:
            codes[zeros] = 0
        negative = _unpacked(self._bytes(at, entry.signs, bits), n)
        return to_values(codes, negative, scales, lengths, self.kind)

    def _bytes(self, at: int, length: int, expected: int) -> Bytes:
        return np.frombuffer(self._frame(at, length, expected), np.uint8)

    def _frame(self, at: int, length: int, expected: int | None, most: int = 0) -> bytes:
        """The content of a frame, whose length is known beforehand, exactly or at most."""
        frame = self.data[at : at + length]
        try:
            size = zstandard.get_frame_parameters(frame).content_size
            if size != expected if expected is not None else size > most:
                raise _damaged("a part of it has another length than its head says")
            return self.decompress(frame)
        except zstandard.ZstdError as error:
            raise _damaged(f"zstd: {error}") from error


def _unpacked(packed: Bytes, n: int) -> Bytes:
    return np.unpackbits(packed, count=n, bitorder="little")


def _damaged(how: str) -> LogError:
    return LogError(f"a stored update is damaged ({how}); take the log from a backup.")
