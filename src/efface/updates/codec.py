"""The bytes of an update: small, quick to read back, and damage to them is found.

A *payload* holds blocks of at most 131,072 values, so that reading one takes little memory. Of a
block it keeps apart, since each compresses best by itself:

* where its values lie: the distances between them, a byte each (255: that and more, of which a
  byte, again of this kind, follows after all of these), or a bitmask, whichever is smaller.
  Distances without a pattern lose nothing by that rule: what is left of one after 255 entries is
  distributed as one from the start;
* the upper 8 bits of their magnitudes, counted from the smallest of the layer. Pruning leaves
  magnitudes of a few octaves, each layer its own: these bytes say much of what there is to say;
* the lower bits of the magnitudes, which are as good as random;
* the signs.

The dense part is coded likewise, without places, counted from the smallest of 64 entries.
How that lies in bytes is written in :mod:`efface.updates.payload`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice

import numpy as np

from efface.errors import LogError, MethodError
from efface.updates.layout import Floats, Ints
from efface.updates.payload import BLOCK, STRETCH, Block, Packer, Payload, stretches
from efface.updates.pruning import Update
from efface.updates.rounding import KINDS, Kind

__all__ = ["KINDS", "LEVEL", "Kind", "add_all", "add_to", "decode", "encode"]

LEVEL = 1
"""Of zstd. These bytes repeat little, and looking harder for repetitions makes them larger."""
TOGETHER = 16 << 20
"""Bytes of payloads that are added side by side."""

Scaled = tuple[Iterator[Block], np.float32]


def encode(update: Update, kind: Kind, bounds: Ints | None = None, level: int = LEVEL) -> bytes:
    """An update as bytes that :func:`decode` and :func:`add_to` read.

    The places are kept exactly. Values, those of the dense part too, are rounded to the nearest
    number of the kind, ties to even:

    * ``"fp32"``: not rounded;
    * ``"bf16"``: 8 bits of precision, a relative error of at most 2⁻⁸ (of what is no denormal);
    * ``"fp16"``: 11 bits, at most 2⁻¹¹, of what is larger than 2⁻²⁸ of the largest value of the
      layer: each layer is scaled by a power of two;
    * ``"int8"``: whole 127ths of the largest value of the layer.

    A scale belongs to the values of a layer within one block, or to 64 dense entries, so a layer of
    many values has several.

    Args:
        update: From :func:`efface.updates.pruning.prune`.
        kind: How values are rounded.
        bounds: ``Layout.bounds``, where the layers begin and end; ``None``: all is one layer.
        level: Of zstd.

    Raises:
        MethodError: If the kind is unknown.
        LogError: If a value is NaN, infinite or too large for the kind, or the parts of the update
            do not fit together.

    Example:
        >>> values, dense = np.array([0.5, -3], np.float32), np.array([1], np.float32)
        >>> update = Update(9, np.array([2, 7]), values, dense)
        >>> decode(encode(update, "bf16")).values.tolist()
        [0.5, -3.0]
    """
    if kind not in KINDS:
        raise MethodError(f"values must be {', '.join(KINDS[:-1])} or {KINDS[-1]}, not {kind!r}.")
    cuts = _cuts(update, bounds)
    packer, inner, last = Packer(kind, level), np.unique(cuts), -1
    for a in range(0, len(update.values), BLOCK):
        indices, values = update.indices[a : a + BLOCK], update.values[a : a + BLOCK]
        packer.add(values, stretches(inner, a, len(values)), indices - (last + 1))
        last = int(indices[-1])
    for a in range(0, len(update.dense), BLOCK):
        values = update.dense[a : a + BLOCK]
        packer.add(values, np.arange(0, len(values), STRETCH), None)
    return packer.payload(update.size, np.diff(cuts))


def decode(data: bytes) -> Update:
    """The update that :func:`encode` wrote.

    Raises:
        LogError: If the bytes are damaged or none of an update.
    """
    payload = Payload(data)
    indices, values, dense = [np.empty(0, np.int64)], [np.empty(0, np.float32)], []
    for block in payload.blocks():
        if block.places is None:
            dense.append(block.values)
        else:
            indices.append(block.places + block.first)
            values.append(block.values)
    whole = np.concatenate([np.empty(0, np.float32), *dense])
    return Update(payload.head.size, np.concatenate(indices), np.concatenate(values), whole)


def add_to(data: bytes, flat: Floats, factor: float = 1.0) -> None:
    """Add an update, times a factor, to a flat vector in place, block by block.

    The memory that it takes beside the vector is that of a block, whatever the update's size. For
    many updates :func:`add_all` is quicker.

    Args:
        data: From :func:`encode`.
        flat: Float32 vector of the layout's ``total`` entries, written in place.
        factor: What the update is multiplied by; −1 undoes the step.

    Raises:
        LogError: If the bytes are damaged, or the vector has another length or type; the vector is
            then what it was.

    Example:
        >>> flat, one = np.zeros(4, np.float32), np.ones(1, np.float32)
        >>> add_to(encode(Update(3, np.array([1]), one, one), "fp32"), flat, -1.0)
        >>> flat.tolist()
        [0.0, -1.0, 0.0, -1.0]
    """
    add_all([(data, factor)], flat)


def add_all(payloads: Iterable[tuple[bytes, float]], flat: Floats, *, checked: bool = False) -> int:
    """Add many updates, each times its factor, to a flat vector in place.

    Some are read side by side, their first blocks first: these change the same region of the
    vector, which then is in the processor's cache. Memory beside the vector: 16 MiB of payloads
    (or one, where that is larger) and a block.

    Args:
        payloads: Payloads and factors, taken as they are needed.
        flat: As of :func:`add_to`.
        checked: Whether the bytes are known to be what was written, as those that a log hands out.

    Returns:
        How many were added.

    Raises:
        LogError: As :func:`add_to`; those before the damaged one may have been added.
    """
    count = waiting = 0
    group: list[Scaled] = []
    for data, factor in payloads:
        payload = Payload(data, checked)
        _check(payload, flat)
        if waiting + len(data) > TOGETHER:
            _add(group, flat)
            group, waiting = [], 0
        group.append((payload.blocks(), np.float32(factor)))
        waiting += len(data)
        count += 1
    _add(group, flat)
    return count


def _add(group: list[Scaled], flat: Floats) -> None:
    """Add the first block of each, then the second of each, and so on."""
    while group:
        left = []
        for blocks, factor in group:
            for block in islice(blocks, 1):
                here, values = flat[block.first : block.first + block.span], block.values
                values *= factor
                if block.places is None:
                    here += values
                else:
                    np.add.at(here, block.places, values)  # here[places] += … takes two passes
                left.append((blocks, factor))
        group = left


def _check(payload: Payload, flat: Floats) -> None:
    """Refuse a vector that is not of the update's layout."""
    total = payload.head.size + payload.head.dense
    if flat.shape != (total,) or flat.dtype != np.float32:
        raise LogError(
            f"an update of {total} entries cannot be added to a vector of shape {flat.shape} and "
            f"type {flat.dtype}; take the log of this very network."
        )


def _cuts(update: Update, bounds: Ints | None) -> Ints:
    """Where each layer's values begin and end, once the update is seen to be one."""
    size, indices, values, _ = update
    ascending = len(indices) == 0 or (
        indices[0] >= 0 and indices[-1] < size and bool((indices[1:] > indices[:-1]).all())
    )
    if len(indices) != len(values) or not ascending:
        raise LogError(
            f"an update must have ascending indices below its size {size} and a value for each; "
            "make it with prune."
        )
    cuts = np.searchsorted(indices, np.array([0, size]) if bounds is None else bounds)
    if len(cuts) == 0 or cuts[0] != 0 or cuts[-1] != len(indices):
        raise LogError("an update has entries outside of all layers; give its layout's bounds.")
    return cuts
