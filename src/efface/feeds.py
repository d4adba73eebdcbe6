"""Batches of a stream: the index stream, cut, gathered, relabelled and augmented."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

import torch
from torch import Tensor

from efface.data import Batch, Stream, chunks, order, uniforms
from efface.task import Task


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
        self.length = len(chunks(stream.positions, self.size))

    def plan(self, turn: int) -> list[Tensor]:
        """The batches of one pass."""
        total = len(self.task.records)
        where = order(self.seed, self.purpose, turn, self.stream.positions, total)
        return chunks(where, self.size)

    def batches(self, step: int, epoch: int | None) -> Iterator[Batch]:
        """Batches from a step of the fit on, without end.

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

    def _pass(self, turn: int, skip: int) -> Iterator[Batch]:
        task, device = self.task, self.device
        plan = islice(self.plan(turn), skip, None)
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
