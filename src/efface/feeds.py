"""Batches of a stream: the index stream, cut, gathered, relabelled and augmented."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from efface.data import Batch, Stream, chunks, order, uniforms
from efface.seeds import generator
from efface.task import Task


def without_singles(batches: list[Tensor], planned: list[Tensor] | None = None) -> list[Tensor]:
    """Batches in which a record left alone has joined another (batch norm needs two).

    It joins the nearest batch before that has any, else the nearest after.

    Args:
        batches: Positions of each.
        planned: The same batches before some records left them: one that was planned for a single
            record stays.

    >>> [b.tolist() for b in without_singles([torch.tensor([0, 1]), torch.tensor([2])])]
    [[0, 1, 2], []]
    """
    batches = list(batches)
    for i, batch in enumerate(batches):
        there = [k for k in (*range(i - 1, -1, -1), *range(i + 1, len(batches))) if len(batches[k])]
        if len(batch) == 1 and there and (planned is None or len(planned[i]) > 1):
            batches[there[0]] = torch.cat([batches[there[0]], batch])
            batches[i] = batch[:0]
    return batches


def portions(batches: Mapping[str, Batch], most: int) -> list[tuple[dict[str, Batch], float]]:
    """A step's batches in parts of about ``most`` records, none of a single one.

    Returns:
        For each part its batches, and its share of the records of the first of them.

    >>> batch = Batch(torch.zeros(5, 1), torch.zeros(5), torch.arange(5))
    >>> [(part["a"].positions.tolist(), share) for part, share in portions({"a": batch}, 2)]
    [([0, 1, 2], 0.6), ([3, 4], 0.4)]
    """
    sizes = [len(batch.positions) for batch in batches.values()]
    count = min(-(-max(sizes) // most) if most else 1, *(max(1, n // 2) for n in sizes))
    if count == 1:
        return [(dict(batches), 1.0)]
    rows = zip(*(_cut(batch, count) for batch in batches.values()), strict=True)
    return [(dict(zip(batches, row, strict=True)), len(row[0].targets) / sizes[0]) for row in rows]


def _cut(batch: Batch, count: int) -> list[Batch]:
    leaves, shape = tree_flatten(batch.inputs)
    parts = zip(*(leaf.tensor_split(count) for leaf in leaves), strict=True)
    rows = zip(parts, *(t.tensor_split(count) for t in batch[1:3]), strict=True)
    return [Batch(tree_unflatten(list(x), shape), y, p, batch.weight) for x, y, p in rows]


def together(queue: Tensor, labels: Tensor, size: int, shuffle: torch.Generator) -> list[Tensor]:
    """Batches in which the records of a cohort are together, filled up with the others.

    Args:
        queue: Positions in the order of the epoch.
        labels: Cohort of every position of the task, or −1 ``[N]``.
        size: Records per batch.
        shuffle: Decides where in the epoch the batches come.

    >>> labels = torch.tensor([-1, 0, -1, -1, 0, -1])
    >>> made = together(torch.arange(6), labels, 3, torch.Generator().manual_seed(0))
    >>> sorted(sorted(batch.tolist()) for batch in made)
    [[0, 1, 4], [2, 3, 5]]
    """
    mine = labels[queue]
    others, batches = queue[mine < 0], []
    for cohort in torch.unique(mine[mine >= 0]).tolist():
        for part in torch.split(queue[mine == cohort], size):
            room = size - len(part)
            batches.append(torch.cat([part, others[:room]]))
            others = others[room:]
    batches += chunks(others, size) if len(others) else []
    if size > 1:
        batches = [batch for batch in without_singles(batches) if len(batch)]
    order = torch.randperm(len(batches), generator=shuffle).tolist()
    return [batches[i] for i in order]


class Feed:
    """Batches of one stream, on the device that trains.

    Args:
        task: Supplies records and augmentation.
        seed: The fit's.
        purpose: Names the index stream.
        stream: Which records.
        batch_size: Used where the stream has none of its own.
        device: Where the batches go.
    """

    def __init__(
        self,
        task: Task,
        seed: int,
        purpose: str,
        stream: Stream,
        batch_size: int,
        device: torch.device,
    ) -> None:
        self.task, self.seed, self.purpose = task, seed, purpose
        self.stream, self.device = stream, device
        self.size = stream.batch_size or batch_size
        self.planned = stream.positions if stream.within is None else stream.within
        self.length = len(self._whole(0) if stream.cohorts else chunks(self.planned, self.size))

    def plan(self, turn: int) -> list[Tensor]:
        """The batches of one pass; one that a stream leaves nothing in is empty."""
        batches, cohorts = self._whole(turn), self.stream.cohorts
        if self.stream.within is None and cohorts is None:
            return batches
        wanted = torch.zeros(len(self.task.records), dtype=torch.bool)
        wanted[self.stream.positions] = True
        if cohorts is not None and turn < cohorts.since:
            wanted &= cohorts.labels < 0
        return without_singles([batch[wanted[batch]] for batch in batches], batches)

    def _whole(self, turn: int) -> list[Tensor]:
        """The batches of one pass with nothing left out."""
        queue = order(self.seed, self.purpose, turn, self.planned, len(self.task.records))
        cohorts = self.stream.cohorts
        if cohorts is None:
            return chunks(queue, self.size)
        shuffle = generator(self.seed, f"cohorts/{self.purpose}", turn)
        return together(queue, cohorts.labels, self.size, shuffle)

    def batches(self, step: int, epoch: int | None) -> Iterator[Batch | None]:
        """Batches from a step of the fit on, without end; None for one that nothing is left in.

        The first stream's passes are the epochs. Any other (``epoch=None``) counts its own passes
        from the number of batches that it has supplied so far, so that a resumed fit finds its
        place.
        """
        turn, skip = divmod(-(-step // self.stream.period), self.length)
        if epoch is not None:
            turn = epoch
        while True:
            yield from self._pass(turn, skip)
            turn, skip = turn + 1, 0

    def _pass(self, turn: int, skip: int) -> Iterator[Batch | None]:
        plan = self.plan(turn)[skip:]
        batches = self._gathered([positions for positions in plan if len(positions)], turn)
        return (next(batches) if len(positions) else None for positions in plan)

    def _gathered(self, plan: list[Tensor], turn: int) -> Iterator[Batch]:
        task, device = self.task, self.device
        augment = task.augment
        if augment is not None:
            table = uniforms(self.seed, turn, len(task.records), augment.draws).to(device)
        for batch in task.records.batches(plan, device):
            batch = batch._replace(weight=self.stream.weight)
            if self.stream.targets is not None:
                labels = self.stream.targets[batch.positions].to(device)
                batch = batch._replace(targets=labels)
            if augment is not None:
                batch = batch._replace(inputs=augment(batch.inputs, table[batch.positions]))
            yield batch
