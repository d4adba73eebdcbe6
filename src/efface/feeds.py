"""Batches of a stream: the index stream, cut, gathered, relabelled and augmented."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from efface.data import Batch, Stream, chunks, order, uniforms
from efface.task import Task


def without_singles(batches: list[Tensor]) -> list[Tensor]:
    """Batches in which a record left alone has joined another (batch norm needs two).

    It joins the nearest batch before that has any, else the nearest after.

    >>> [b.tolist() for b in without_singles([torch.tensor([0, 1]), torch.tensor([2])])]
    [[0, 1, 2], []]
    """
    batches = list(batches)
    for i, batch in enumerate(batches):
        there = [k for k in (*range(i - 1, -1, -1), *range(i + 1, len(batches))) if len(batches[k])]
        if len(batch) == 1 and there:
            batches[there[0]] = torch.cat([batches[there[0]], batch])
            batches[i] = batch[:0]
    return batches


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
        self.length = len(chunks(self.planned, self.size))

    def plan(self, turn: int) -> list[Tensor]:
        """The batches of one pass; one that a stream leaves nothing in is empty."""
        total = len(self.task.records)
        batches = chunks(order(self.seed, self.purpose, turn, self.planned, total), self.size)
        if self.stream.within is None:
            return batches
        wanted = torch.zeros(total, dtype=torch.bool)
        wanted[self.stream.positions] = True
        return without_singles([batch[wanted[batch]] for batch in batches])

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
