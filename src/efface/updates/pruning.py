"""Pruning of an update, layer by layer: which of its entries are worth storing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from efface.errors import LogError, MethodError
from efface.updates.layout import Floats, Ints, Layout

Pick = Literal["magnitude", "random"]
Chooser = Callable[[Floats, int], Ints]
Bits = npt.NDArray[np.int32]


class Update(NamedTuple):
    """The change of the weights in one step, pruned.

    Attributes:
        size: Entries of the sparse part of the layout.
        indices: Which of them are stored, ascending; int64 [k].
        values: Their change; float32 [k].
        dense: Change of everything else, whole; float32 [total − size].
    """

    size: int
    indices: Ints
    values: Floats
    dense: Floats


def prune(
    delta: Floats,
    layout: Layout,
    keep: float,
    pick: Pick = "magnitude",
    *,
    alive: Sequence[int] | None = None,
    generator: np.random.Generator | None = None,
) -> Update:
    """Keep the same fraction of every sparse layer's change; the dense part stays whole.

    Layer l keeps ``k_l = max(1, round(keep · n_l))`` entries, exactly, or all that are not zero
    where these are fewer: an entry that is 0 is never stored. Working memory is that of the largest
    layer, about twice, beside the result.

    Args:
        delta: Change of all weights; float32 [``layout.total``].
        layout: Where the layers lie.
        keep: Fraction in (0, 1].
        pick: ``"magnitude"``: the largest |change|, ties to the lower index; ``"random"``: any
            that are not zero, for comparison.
        alive: ``n_l`` of every layer: the entries that a mask keeps; ``None``: the layer's size.
        generator: Of ``pick="random"``, which needs one.

    Raises:
        MethodError: If an argument is out of range.
        LogError: If the change is not one of this layout.

    Example:
        >>> layout = Layout((("w", (2, 3)),), (("b", (1,)),), ())
        >>> delta = np.array([1, -4, 0, 2, 3, -2, 9], np.float32)
        >>> update = prune(delta, layout, 0.5)
        >>> update.indices.tolist(), update.values.tolist(), update.dense.tolist()
        ([1, 3, 4], [-4.0, 2.0, 3.0], [9.0])
    """
    counts = _counts(layout, keep, alive)
    choose = _chooser(pick, generator)
    if delta.shape != (layout.total,):
        raise LogError(
            f"a change of shape {delta.shape} is none of this layout, which has {layout.total} "
            "entries; take the layout of this very network."
        )
    starts = layout.bounds[:-1].tolist()
    layers = (delta[a:b] for a, b in pairwise(layout.bounds.tolist()))
    kept = [choose(layer, k) + a for layer, k, a in zip(layers, counts, starts, strict=True)]
    indices = np.concatenate([np.empty(0, np.int64), *kept])
    return Update(layout.size, indices, delta[indices], delta[layout.size :].copy())


def prune_update(
    update: Update,
    layout: Layout,
    keep: float,
    pick: Pick = "magnitude",
    *,
    alive: Sequence[int] | None = None,
    generator: np.random.Generator | None = None,
) -> Update:
    """Prune an update further that was stored at a higher ``keep``.

    By magnitude, this gives what :func:`prune` gives on the whole change, as far as the stored
    values were not rounded to equal ones.

    Args:
        update: As it was stored.
        layout: As of :func:`prune`, as are the other arguments.
        keep: Fraction of the layer in (0, 1], not of what is stored of it.
        pick: Which of the stored entries.
        alive: As of :func:`prune`.
        generator: As of :func:`prune`.

    Raises:
        MethodError: If an argument is out of range.
        LogError: If the update is not one of this layout.

    Example:
        >>> layout = Layout((("w", (2, 3)),), (), ())
        >>> update = prune(np.array([1, -4, 0, 2, 3, -2], np.float32), layout, 0.5)
        >>> prune_update(update, layout, 0.2).indices.tolist()
        [1]
    """
    counts = _counts(layout, keep, alive)
    choose = _chooser(pick, generator)
    if (update.size, len(update.dense)) != (layout.size, layout.total - layout.size):
        raise LogError(
            f"an update of {update.size} and {len(update.dense)} entries is none of this layout, "
            f"which has {layout.size} and {layout.total - layout.size}; take the log of this very "
            "network."
        )
    cuts = np.searchsorted(update.indices, layout.bounds).tolist()
    spans = zip(pairwise(cuts), counts, strict=True)
    kept = [choose(update.values[a:b], k) + a for (a, b), k in spans]
    where = np.concatenate([np.empty(0, np.int64), *kept])
    return update._replace(indices=update.indices[where], values=update.values[where])


def _counts(layout: Layout, keep: float, alive: Sequence[int] | None) -> list[int]:
    """How many entries every layer keeps."""
    if not 0 < keep <= 1:
        raise MethodError(f"keep must lie in (0, 1], not {keep}; it is the fraction to store.")
    sizes = np.diff(layout.bounds).tolist()
    if alive is not None:
        paired = zip(alive, sizes, strict=False)
        if len(alive) != len(sizes) or any(not 0 <= n <= size for n, size in paired):
            raise MethodError(
                f"alive must hold a number for each of the {len(sizes)} layers, from 0 to the "
                "layer's size."
            )
        sizes = list(alive)
    return [min(n, max(1, round(keep * n))) for n in sizes]


def _chooser(pick: Pick, generator: np.random.Generator | None) -> Chooser:
    if pick == "magnitude":
        return largest
    if pick != "random":
        raise MethodError(f"pick must be magnitude or random, not {pick!r}.")
    if generator is None:
        raise MethodError("pick=random needs a generator; give generator=….")
    drawn = generator

    def random(values: Floats, k: int) -> Ints:
        some = np.flatnonzero(values != 0)
        if len(some) <= k:
            return some
        return some[np.sort(drawn.choice(len(some), k, replace=False, shuffle=False))]

    return random


def largest(values: Floats, k: int) -> Ints:
    """Indices of the ``k`` entries of largest magnitude that are not 0, ascending.

    Ties go to the lower index. NaN counts as larger than all, so that it is not lost unnoticed.

    >>> largest(np.array([1, -2, 2, 0], np.float32), 2).tolist()
    [1, 2]
    """
    # Without its sign bit, a float's bit pattern is an integer that grows with its magnitude.
    bits: Bits = values.view(np.int32) & np.int32(0x7FFFFFFF)
    some = bits != 0
    count = int(np.count_nonzero(some))
    if count <= k:
        return np.flatnonzero(some)
    if 2 * count > len(bits):
        return _top(bits, k)
    # Under a mask most entries are 0; partitioning that many equal ones takes ten times as long.
    where = np.flatnonzero(some)
    return where[_top(bits[where], k)]


def _top(bits: Bits, k: int) -> Ints:
    """Indices of the ``k`` largest, ascending, ties to the lower index; ``k < len(bits)``."""
    if k == 0:
        return np.empty(0, np.int64)
    least = np.partition(bits, len(bits) - k)[len(bits) - k]
    found = np.flatnonzero(bits >= least)
    if len(found) == k:
        return found
    ties = np.flatnonzero(bits[found] == least)
    return np.delete(found, ties[len(ties) - (len(found) - k) :])
