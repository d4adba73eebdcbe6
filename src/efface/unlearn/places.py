"""Which entries of a network's weights may move: exactly so many, chosen cheaply at every step."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from efface.curvature import gradient
from efface.fitting import Fit
from efface.sparsify.blocks import BlockScore, carried, draw, find_blocks, weigh
from efface.task import Split
from efface.trained import TrainedModel

Pick = Literal["random", "block", "magnitude", "gradient", "saliency", "dfmu"]
Redraw = Literal["step", "fixed"]
Scope = Literal["layer", "global"]
CPU, PLAIN = torch.device("cpu"), (torch.float32, torch.float64)


def top(scores: Tensor, k: int, scratch: Tensor | None = None) -> Tensor:
    """Places of the ``k`` largest of a row of scores ``[n]``, ties to the first.

    What :func:`efface.sparsify.selection.highest` finds, without sorting: cheap enough per step.
    NaN counts as the largest.

    Args:
        scores: The row.
        k: How many, from 1 to n.
        scratch: Room for n scores, written over; fresh memory is half of the time.

    >>> top(torch.tensor([1.0, 3.0, 2.0, 2.0]), 2).tolist()
    [1, 2]
    """
    if scores.device != CPU or scores.dtype not in PLAIN:
        return torch.sort(scores, descending=True, stable=True).indices[:k]
    room = torch.empty_like(scores) if scratch is None else scratch[: len(scores)]
    row, sorting = scores.numpy(), room.copy_(scores).numpy()
    sorting.partition(len(row) - k)
    least = sorting[len(row) - k]
    found = np.flatnonzero(row >= least)
    if len(found) < k:  # NaN compares with nothing
        return top(torch.where(scores.isnan(), math.inf, scores), k)
    if len(found) > k:
        ties = np.flatnonzero(row[found] == least)
        found = np.delete(found, ties[len(ties) - (len(found) - k) :])
    return torch.from_numpy(found)


FEW = 1 << 14
"""Up to so many entries, drawing them one by one costs less than a key for each."""


def some(n: int, k: int, draw: np.random.Generator, device: torch.device) -> Tensor:
    """``k`` different places of ``n``, every set of them as likely as any other.

    Of many, each is taken by a key of its own with a probability a little above k/n; then as many
    as there are too many are given back, by lot.

    >>> len(set(some(10, 4, np.random.default_rng(0), torch.device("cpu")).tolist()))
    4
    """
    if device != CPU:
        seed = int(draw.integers(2**62))
        keys = torch.rand(n, device=device, generator=torch.Generator(device).manual_seed(seed))
        return keys.topk(k).indices
    if n <= FEW:
        return torch.from_numpy(draw.choice(n, k, replace=False, shuffle=False))
    most, taken = k * 256 // n + 1, np.empty(0, dtype=np.intp)
    while len(taken) < k:
        taken = np.flatnonzero(np.frombuffer(draw.bytes(n), dtype=np.uint8) < most)
    back = draw.choice(len(taken), len(taken) - k, replace=False, shuffle=False)
    return torch.from_numpy(np.delete(taken, back))


def around(n: int, k: int, start: int, device: torch.device) -> Tensor:
    """``k`` consecutive places of ``n`` from ``start`` on, going on at the beginning.

    >>> around(5, 3, 4, torch.device("cpu")).tolist()
    [4, 0, 1]
    """
    return (torch.arange(start, start + k, device=device)) % n


@dataclass(frozen=True)
class Row:
    """The entries of a tensor, one after the other.

    Args:
        size: How many there are.
        alive: Places of those to choose from, ascending; ``None``: all.
        counted: Of how many a fraction is taken; ``None``: of those to choose from.
        device: Where places are wanted.
    """

    size: int
    alive: Tensor | None = None
    counted: int | None = None
    device: torch.device = CPU

    @classmethod
    def joined(cls, rows: Sequence[Row]) -> Row:
        """All of them as one."""
        starts = np.cumsum([0, *(row.size for row in rows)]).tolist()
        size, device = starts.pop(), rows[0].device
        counted = None
        if any(row.counted is not None for row in rows):
            counted = sum(row.counted or 0 for row in rows)
        if all(row.alive is None for row in rows):
            return cls(size, None, counted, device)
        kept = [
            start + (torch.arange(row.size, device=device) if row.alive is None else row.alive)
            for start, row in zip(starts, rows, strict=True)
        ]
        return cls(size, torch.cat(kept), counted, device)


@dataclass(frozen=True)
class Rule:
    """How many entries are selected, and which: the options of :class:`LayerwisePartial`."""

    fraction: float
    pick: Pick
    redraw: Redraw
    scope: Scope

    def count(self, n: int) -> int:
        """How many of ``n`` entries may move: one at least.

        >>> [Rule(0.1, "random", "step", "layer").count(n) for n in (0, 3, 20)]
        [0, 1, 2]
        """
        return min(n, max(1, round(self.fraction * n)))

    def scores(self, trained: TrainedModel, split: Split, fit: Fit) -> dict[str, Tensor] | None:
        """Scores of a model as it is, or None where the pick has none."""
        network = trained.network
        if self.pick in ("random", "block"):
            return None
        if self.pick == "magnitude":
            params = network.named_parameters()
            return {n: p.detach().abs() for n, p in params if p.requires_grad}
        if self.pick == "dfmu":
            return ratios(trained, split, fit)
        slope = gradient(fit, network, split.forget, stream="forget")
        found = {name: g.abs() for name, g in slope.items()}
        if self.pick == "gradient":
            return found
        below = floor(trained, split, fit)
        return {name: g / below[name] for name, g in found.items()}

    def choose(
        self,
        rows: Sequence[Row],
        scores: Sequence[Tensor] | None,
        draw: np.random.Generator,
        turn: int = 0,
        scratch: Tensor | None = None,
    ) -> list[Tensor]:
        """Places in every row that may move.

        Args:
            rows: What there is to choose from, on one device.
            scores: A score for each entry, row by row.
            draw: Decides what is left to chance.
            turn: How often blocks have moved on.
            scratch: Room for the scores of a row (of all rows, with ``scope=global``).
        """
        if self.scope == "layer":
            given: Sequence[Tensor | None] = scores or [None] * len(rows)
            groups = zip(rows, given, strict=True)
            return [self._places(row, s, draw, turn, scratch) for row, s in groups]
        whole = Row.joined(rows)
        flat = torch.cat(list(scores)) if scores else None
        places = self._places(whole, flat, draw, turn, scratch).sort().values
        starts = np.cumsum([0, *(row.size for row in rows)]).tolist()
        cuts = torch.searchsorted(places, torch.tensor(starts, device=places.device)).tolist()
        return [places[a:b] - s for a, b, s in zip(cuts, cuts[1:], starts, strict=False)]

    def _places(
        self,
        row: Row,
        scores: Tensor | None,
        draw: np.random.Generator,
        turn: int,
        scratch: Tensor | None,
    ) -> Tensor:
        alive, n = row.alive, row.size if row.alive is None else len(row.alive)
        k = min(n, self.count(n if row.counted is None else row.counted))
        if k == n:
            return torch.arange(n, device=row.device) if alive is None else alive
        if scores is not None:
            places = top(scores if alive is None else scores[alive], k, scratch)
        elif self.pick == "block":
            places = around(n, k, (int(draw.integers(n)) + turn * k) % n, row.device)
        else:
            places = some(n, k, draw, row.device)
        return places if alive is None else alive[places]


def floor(trained: TrainedModel, split: Split, fit: Fit) -> dict[str, Tensor]:
    """What saliency divides by: |∇ CE(D_r)| + ε, with the tensor's own mean of it as ε.

    So a weight that D_r does not feel at all wins by how much D_f feels it, never by a division by
    almost nothing; and a tensor without any slope is compared by D_f's alone.
    """
    slope = gradient(fit, trained.network, split.retain, stream="retain")
    found = {name: g.abs() for name, g in slope.items()}
    return {name: g + (g.mean() or 1.0) for name, g in found.items()}


def ratios(trained: TrainedModel, split: Split, fit: Fit) -> dict[str, Tensor]:
    """What DFMU chooses by: I_f/I_r of its filter, for every parameter's entry.

    Scored as :class:`~efface.sparsify.blocks.BlockScore` has it, on a sample of D_f and of D_r,
    with one forward and one backward pass. What belongs to no filter (the output layer) scores 0.
    """
    network, score = trained.network, BlockScore()
    blocks = find_blocks(trained.task, network, "filter")
    forget = draw(fit, split.forget, score.sample, "scored/forget")
    retain = draw(fit, split.retain, score.sample, "scored/retain")
    ratio = weigh(carried(network, blocks, score, forget, retain, fit), blocks).ratio.float()
    found = {n: torch.zeros(p.shape, device=p.device) for n, p in network.named_parameters()}
    parts = torch.split(ratio, [group.size for group in blocks.groups])
    for group, own in zip(blocks.groups, parts, strict=True):
        for name, rows in group.members:
            whole = found[name].reshape(len(found[name]), -1)  # a view: filters are its rows
            for places in rows.reshape(group.size, -1).T:
                whole[places.to(whole.device)] = own.to(whole)[:, None]
    return found


def selected(
    rule: Rule,
    trained: TrainedModel,
    scores: Mapping[str, Tensor] | None,
    draw: np.random.Generator,
    among: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Where a rule lets a model move: name of every trainable parameter → bool tensor, on the CPU.

    Args:
        rule: How many, and which.
        trained: Its mask decides what is counted.
        scores: From :meth:`Rule.scores`, where the rule has any.
        draw: Decides what is left to chance.
        among: Name → bool tensor: choose from these only, no more than of all; ``None``: from all.
    """
    params = {n: p for n, p in trained.network.named_parameters() if p.requires_grad}
    kept: Mapping[str, Tensor] = trained.mask or {}
    rows = []
    for name, p in params.items():
        alive = kept[name] if name in kept else torch.ones(p.shape, dtype=torch.bool)
        there = alive if among is None else alive & among[name].cpu()
        rows.append(Row(p.numel(), there.reshape(-1).nonzero().flatten(), int(alive.sum())))
    given = [scores[n].cpu().reshape(-1) for n in params] if scores else None
    found = {name: torch.zeros(p.shape, dtype=torch.bool) for name, p in params.items()}
    for where, places in zip(found.values(), rule.choose(rows, given, draw), strict=True):
        where.view(-1)[places] = True
    return found


def lying(tensor: Tensor, like: Tensor) -> Tensor:
    """A tensor's entries in the order in which those of another lie in memory, as one row.

    Of a tensor that lies so itself, the row is a view.

    >>> image = torch.arange(8.0).reshape(1, 2, 2, 2)
    >>> lying(image, image.contiguous(memory_format=torch.channels_last)).tolist()
    [0.0, 4.0, 1.0, 5.0, 2.0, 6.0, 3.0, 7.0]
    """
    strides = like.stride()
    order = sorted(range(like.ndim), key=lambda d: -strides[d])
    return tensor.permute(order).reshape(-1)
