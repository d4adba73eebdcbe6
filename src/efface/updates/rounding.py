"""Values as integers that grow with their magnitude: what is stored of them, and what is lost."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from efface.errors import LogError
from efface.updates.layout import Floats, Ints

Kind = Literal["bf16", "fp16", "int8", "fp32"]
Codes = npt.NDArray[np.uint32]
Short = npt.NDArray[np.uint16] | Codes
Flags = npt.NDArray[np.uint8]
Scales = npt.NDArray[np.int16] | npt.NDArray[np.float32]

KINDS: tuple[Kind, ...] = ("bf16", "fp16", "int8", "fp32")
SCALES: dict[Kind, str] = {"fp16": "<i2", "int8": "<f4"}
"""Type of the scales; the other kinds have none."""

_MAGNITUDE, _INFINITE = np.uint32(0x7FFFFFFF), 0x7F800000
_LEAST = np.float32(2.0**-149)
_TOP = 15
"""Halves are scaled so that the largest lies below 2¹⁵: none overflows, few are subnormal."""


def to_codes(values: Floats, starts: Ints, kind: Kind) -> tuple[Codes, Scales]:
    """Magnitudes, rounded, as integers that grow with them; and a scale for every stretch.

    Args:
        values: Float32 [n], at least one.
        starts: Where the stretches begin that have a scale of their own, none of them empty; the
            first is 0.
        kind: How values are rounded.

    Returns:
        Integers below 2³¹, uint32 [n]; scales, [stretches], or none where the kind has none.

    Raises:
        LogError: If a value is NaN or infinite, or becomes so.

    >>> codes, _ = to_codes(np.array([1.0, -1.0], np.float32), np.array([0]), "bf16")
    >>> [hex(code) for code in codes]
    ['0x3f80', '0x3f80']
    """
    bits: Codes = values.view(np.uint32) & _MAGNITUDE
    if int(bits.max()) >= _INFINITE:
        raise _unfit("NaN or infinite", "the training has diverged, lower its lr")
    none = np.empty(0, np.float32)
    if kind == "fp32":
        return bits, none
    if kind == "bf16":
        bits += np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1))
        bits >>= np.uint32(16)
        if int(bits.max()) >= _INFINITE >> 16:
            raise _unfit("too large for bf16", "store values=fp32")
        return bits, none
    sizes = bits.view(np.float32)
    largest = np.maximum.reduceat(sizes, starts)
    lengths = np.diff(starts, append=len(values))
    if kind == "fp16":
        return _halves(sizes, largest, lengths)
    scales = _steps(largest)
    steps = np.rint(sizes / np.repeat(scales.astype(np.float64), lengths))
    return steps.astype(np.uint32), scales


def _halves(sizes: Floats, largest: Floats, lengths: Ints) -> tuple[Codes, Scales]:
    """Magnitudes as halves, each stretch times a power of two; and the powers."""
    powers = np.frexp(largest)[1].astype(np.int16)
    factors = np.repeat(np.exp2(_TOP - powers.astype(np.float64)), lengths)
    halves = (sizes * factors).astype(np.float32).astype(np.float16)
    above = np.repeat(powers == np.finfo(np.float32).maxexp, lengths)
    if above.any() and float(halves[above].max()) >= 2.0**_TOP:
        raise _unfit("too large for fp16", "store values=fp32")
    return halves.view(np.uint16).astype(np.uint32), powers


def _steps(largest: Floats) -> Floats:
    """A 127th of each, rounded down, so that 127 of them never overflow."""
    steps = (largest.astype(np.float64) / 127).astype(np.float32)
    above = steps.astype(np.float64) * 127 > largest
    return np.maximum(np.where(above, np.nextafter(steps, np.float32(0)), steps), _LEAST)


def to_values(codes: Short, negative: Flags, scales: Scales, lengths: Ints, kind: Kind) -> Floats:
    """The values again, rounded as they are.

    Args:
        codes: From :func:`to_codes`; uint32 [n], or uint16 where the kind is not ``fp32``.
        negative: 1 where the value is negative, else 0; uint8 [n].
        scales: From :func:`to_codes`.
        lengths: Of the stretches.
        kind: As of :func:`to_codes`.

    Returns:
        Float32 [n].
    """
    if kind == "bf16":
        words: Codes = _signed(codes.astype(np.uint16, copy=False), negative).astype(np.uint32)
        words <<= np.uint32(16)
        return words.view(np.float32)
    if kind == "fp32":
        return _signed(codes, negative).view(np.float32)
    if kind == "fp16":
        factors = np.exp2(scales.astype(np.float64) - _TOP)
        sizes = codes.astype(np.uint16, copy=False).view(np.float16).astype(np.float64)
    else:
        factors, sizes = scales.astype(np.float64), codes.astype(np.float64)
    sizes *= np.repeat(factors, lengths)
    return _signed(sizes.astype(np.float32).view(np.uint32), negative).view(np.float32)


def _signed(bits: npt.NDArray[Any], negative: Flags) -> npt.NDArray[Any]:
    """Bit patterns with their sign bit."""
    signs: npt.NDArray[Any] = negative.astype(bits.dtype)
    signs <<= 8 * bits.itemsize - 1
    signs |= bits
    return signs


def _unfit(what: str, cure: str) -> LogError:
    return LogError(f"a change of the weights is {what} and cannot be stored; {cure}.")
