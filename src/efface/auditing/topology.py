"""How masks overlap, and what belongs beside it: chance, the initial weights, other references.

What follows for D_f is in :mod:`efface.auditing.trace`, findings in
:mod:`efface.auditing.masks`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from efface.mask import Mask


def topology(
    after: Mask,
    before: Mask,
    references: Sequence[Mask],
    initial: Mask | None,
    others: Sequence[Mask],
) -> dict[str, float]:
    """How a mask overlaps with those of retrained models, with what belongs beside it.

    Args:
        after: The mask that is scored.
        before: The un-updated mask of the original.
        references: Masks of models that were retrained and pruned again, from the original's
            initial weights, in another batch order.
        initial: The mask of the largest initial weights (`initial_mask`), which saw no data.
        others: Masks of references with other initial weights.

    Returns:
        Means over the references, each between 0 and 1: ``iou`` and ``iom`` of ``after``;
        ``before`` and ``initial``, the IoU of those two masks; ``chance``, that of random masks
        with as many entries kept in each weight; ``ceiling``, that between two references;
        ``other_init``, that of ``after`` with the others. What cannot be had is left out.

    Raises:
        MismatchError: If the masks name different weights.

    Example:
        >>> masks = [Mask({"w": torch.arange(8) % k == 0}) for k in (1, 2, 4)]
        >>> found = topology(masks[2], masks[0], masks[1:2], None, ())
        >>> found["iou"], found["iom"], found["before"], "ceiling" in found
        (0.5, 1.0, 0.5, False)
    """
    pairs = [a.iou(b) for a, b in combinations(references, 2)]
    measured = {
        "iou": [after.iou(r) for r in references],
        "iom": [after.iom(r) for r in references],
        "before": [before.iou(r) for r in references],
        "chance": [chance(after, r) for r in references],
        "initial": [initial.iou(r) for r in references] if initial else [],
        "ceiling": pairs,
        "other_init": [after.iou(o) for o in others],
    }
    return {name: float(np.mean(values)) for name, values in measured.items() if values}


def overlaps(first: Sequence[Mask], second: Sequence[Mask]) -> npt.NDArray[np.float64]:
    """IoU of every mask of one list with every mask of another, ``[len(first), len(second)]``."""
    return np.array([[a.iou(b) for b in second] for a in first]).reshape(len(first), len(second))


def chance(a: Mask, b: Mask) -> float:
    """The mean IoU of two random masks that keep as many entries of each weight as these two.

    In a weight with n entries, of which random masks keep p and q, the intersection is
    hypergeometric: mean pq/n, variance pq(n − p)(n − q)/(n²(n − 1)). With I their sum over the
    weights and T all entries kept, IoU = T/(T − I) − 1, whose mean is taken to second order around
    the mean of I (exact to 10⁻⁴ from some thirty entries on). Where both masks keep whole rows of a
    weight (filters), rows are drawn; weights whose rows live and die together are drawn together.

    Raises:
        MismatchError: If the masks name different weights.

    Example:
        >>> half = Mask({"w": torch.arange(1000) % 2 == 0})
        >>> round(chance(half, half), 3)
        0.333
    """
    total = sum(part.own + part.theirs for part in a.overlap(b).values())
    mean = variance = 0.0
    for n, p, q, size in _units(a, b):
        mean += size * p * q / n
        variance += size**2 * p * q * (n - p) * (n - q) / (n**2 * max(n - 1, 1))
    union = total - mean
    return mean / union + variance * total / union**3 if union > 0 else 1.0


def _units(a: Mask, b: Mask) -> list[tuple[int, int, int, int]]:
    """What is drawn: (units, kept by a, kept by b, entries of a unit) for each weight or group."""
    found: list[tuple[int, int, int, int]] = []
    groups: dict[tuple[int, bytes, bytes], int] = {}
    for name, counts in a.overlap(b).items():
        rows, others = whole_rows(a[name]), whole_rows(b[name])
        if rows is None or others is None:
            found.append((counts.total, counts.own, counts.theirs, 1))
        elif counts.total:
            key = (len(rows), rows.numpy().tobytes(), others.numpy().tobytes())
            groups[key] = groups.get(key, 0) + counts.total // len(rows)
    kept = [(n, sum(one), sum(two), size) for (n, one, two), size in groups.items()]
    return [part for part in found if part[0]] + kept


def whole_rows(keep: Tensor) -> Tensor | None:
    """Which rows (filters) a weight's mask keeps, or None where it cuts through rows.

    >>> whole_rows(torch.tensor([[True, True], [False, False]])).tolist()
    [True, False]
    """
    rows = keep.reshape(len(keep), -1) if keep.ndim else keep.reshape(1, 1)
    first = rows[:, 0]
    return first.clone() if bool((rows == first[:, None]).all()) else None


def initial_mask(weights: Mapping[str, Tensor], like: Mask) -> Mask:
    """The |θ₀| mask: the largest initial weights, as many of each weight as another mask keeps.

    It saw no data: an overlap that it reaches is no trace of any. Where ``like`` keeps whole rows
    (filters), the rows with the largest L2 norm are kept, over all weights whose rows ``like``
    keeps and drops together; ties go to the entry that comes first.

    Args:
        weights: Initial weights by name, those of the mask among them.
        like: The mask whose density each weight gets.

    Example:
        >>> like = Mask({"w": torch.tensor([True, False, False])})
        >>> initial_mask({"w": torch.tensor([0.1, -0.5, 0.2])}, like)["w"].tolist()
        [False, True, False]
    """
    made: dict[str, Tensor] = {}
    groups: dict[bytes, list[str]] = {}
    for name, keep in like.items():
        rows = whole_rows(keep)
        if rows is None:
            made[name] = _largest(weights[name].abs(), int(keep.sum()))
        else:
            groups.setdefault(rows.numpy().tobytes(), []).append(name)
    for names in groups.values():
        matrices = [name for name in names if weights[name].ndim > 1] or names
        squares = [weights[n].double().square().reshape(len(weights[n]), -1) for n in matrices]
        norms = torch.cat(squares, dim=1).sum(1)
        kept = _largest(norms, int(whole_rows(like[names[0]]).sum()))  # type: ignore[union-attr]
        for name in names:
            shape = (-1, *[1] * (like[name].ndim - 1))
            made[name] = kept.reshape(shape).expand(like[name].shape)
    return Mask({name: made[name] for name in like})


def _largest(scores: Tensor, count: int) -> Tensor:
    keep = torch.zeros(scores.numel(), dtype=torch.bool)
    keep[torch.sort(scores.reshape(-1), descending=True, stable=True).indices[:count]] = True
    return keep.reshape(scores.shape)


def layers(after: Mask, before: Mask, references: Sequence[Mask]) -> list[dict[str, Any]]:
    """Per layer what an update kept, removed and regrew, and how much of it references share.

    Args:
        after: The updated mask.
        before: The un-updated one.
        references: Masks of references, one at least.

    Returns:
        For each weight its ``name``, ``total``, counts of entries ``kept``, ``removed`` and
        ``regrown``, each with ``…_agree``: the mean number of those that a reference decides the
        same way (it keeps what was kept or regrown, drops what was removed); and ``iou_before``,
        ``iou_after`` and ``iou_ceiling`` (None with one reference), means over references.

    Raises:
        MismatchError: If the masks name different weights.
    """
    old, new = before, after
    kept = Mask({n: old[n] & new[n] for n in old})
    removed = Mask({n: old[n] & ~new[n] for n in old})
    regrown = Mask({n: new[n] & ~old[n] for n in old})
    shares = {
        "kept": [kept.overlap(r) for r in references],
        "removed": [removed.overlap(r) for r in references],
        "regrown": [regrown.overlap(r) for r in references],
    }
    beside = {
        "before": [old.overlap(r) for r in references],
        "after": [new.overlap(r) for r in references],
        "ceiling": [a.overlap(b) for i, a in enumerate(references) for b in references[i + 1 :]],
    }
    rows = []
    for name in old:
        row: dict[str, Any] = {"name": name, "total": old[name].numel()}
        for kind, found in shares.items():
            count = found[0][name].own
            both = float(np.mean([f[name].both for f in found]))
            row[kind] = count
            row[f"{kind}_agree"] = count - both if kind == "removed" else both
        for kind, found in beside.items():
            row[f"iou_{kind}"] = float(np.mean([f[name].iou for f in found])) if found else None
        rows.append(row)
    return rows
