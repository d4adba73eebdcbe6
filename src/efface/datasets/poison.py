"""Records with a trigger and a label of somebody's choice: backdoors, made to be removed again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from efface.data import LoadedRecords, Records, Sized, TensorRecords
from efface.errors import TaskError
from efface.seeds import generator
from efface.task import Task

Trigger = Callable[[Any], Any]
"""Inputs of a batch ``[B, …]`` → the same, marked: of the same shapes and types."""


@dataclass(frozen=True)
class Patch:
    """A square of one shade in a corner of every image.

    The default is the trigger of Jia et al. (2023) on CIFAR-10: black, rows and columns 26 to 29
    of 32. It is put on the stored image, before any augmentation (as there), so that a random
    crop moves it and a flip mirrors it.

    Args:
        size: Pixels along an edge.
        corner: Which corner.
        margin: Pixels between the square and the two borders.
        value: Shade of every channel, from 0 (black) to 1 (white).

    Raises:
        TaskError: If size or margin is out of range, or the square does not fit into an image.

    >>> Patch(size=1, margin=0)(torch.ones(1, 1, 2, 2)).tolist()
    [[[[1.0, 1.0], [1.0, 0.0]]]]
    """

    size: int = 4
    corner: Literal["lower-right", "lower-left", "upper-right", "upper-left"] = "lower-right"
    margin: int = 2
    value: float = 0.0

    def __post_init__(self) -> None:
        wrong = {
            "size must be 1 or more": self.size < 1,
            "margin must be 0 or more": self.margin < 0,
            "value must lie in [0, 1]": not 0 <= self.value <= 1,
            "corner must be upper or lower, left or right": self.corner
            not in {f"{a}-{b}" for a in ("upper", "lower") for b in ("left", "right")},
        }
        for sentence, is_wrong in wrong.items():
            if is_wrong:
                raise TaskError(f"{sentence}; correct it in the Patch.")

    def __call__(self, images: Tensor) -> Tensor:
        """Marked copies of images ``[B, C, H, W]``: ``uint8`` in 0…255, or float in [0, 1]."""
        if images.dim() != 4:
            raise TaskError(
                f"a Patch marks images [B, C, H, W], not records of {list(images.shape[1:])}; give "
                "a trigger of your own."
            )
        height, width = images.shape[-2:]
        if self.size + self.margin > min(height, width):
            raise TaskError(
                f"a patch of {self.size} pixels, {self.margin} from the border, does not fit into "
                f"images of {height}×{width}; give a smaller one."
            )
        upper, left = self.corner.startswith("upper"), self.corner.endswith("left")
        top = self.margin if upper else height - self.margin - self.size
        side = self.margin if left else width - self.margin - self.size
        marked = images.clone()
        shade = self.value if images.is_floating_point() else round(255 * self.value)
        marked[..., top : top + self.size, side : side + self.size] = shade
        return marked


def with_trigger(
    task: Task,
    where: Tensor | Sequence[int] | float,
    trigger: Trigger | None = None,
    target: int = 0,
    seed: int = 0,
) -> tuple[Task, Tensor]:
    """The task with a trigger and a target label on some training records; the rest is untouched.

    Works on data in memory and on data that is loaded record by record (marked when read).
    The trigger goes onto stored inputs, so that augmentation acts on marked ones.

    Args:
        task: The clean task.
        where: Positions to poison; or a fraction of all training records, drawn at random from
            all classes, the target's own too (Jia et al. 2023 do so, with a tenth).
        trigger: Marks a batch of inputs; ``None``: a black :class:`Patch`.
        target: The label that all poisoned records get.
        seed: Of the random choice.

    Returns:
        The poisoned task, and the positions of its poisoned records in ascending order.

    Raises:
        TaskError: If a position or the target does not exist, nothing would be poisoned, or the
            trigger changes shape or type.

    Example:
        >>> from efface import Split, networks
        >>> x, y = torch.ones(8, 1, 6, 6), torch.arange(8) % 2
        >>> clean = Task(lambda: networks.MLP([36, 2]), (x, y), (x, y))
        >>> poisoned, positions = with_trigger(clean, 0.5, target=1)
        >>> len(positions), set(poisoned.records.targets[positions].tolist())
        (4, {1})
        >>> split = Split.by_ids(poisoned, [poisoned.ids_[i] for i in positions])
    """
    trigger = trigger or Patch()
    records = task.records
    positions = _positions(where, len(records), seed)
    if not 0 <= target < task.classes:
        raise TaskError(f"target {target} is no class; give one of 0…{task.classes - 1}.")
    name = f"{task.name}, {len(positions)} records with a trigger"
    if not isinstance(records, TensorRecords):
        marked = _loaded(records, trigger, positions, target)
        return replace(task, train=marked, name=name), positions
    part = tree_map(lambda t: t[positions], records.inputs)
    inputs = tree_map(
        lambda old, new: old.index_copy(0, positions, new), records.inputs, _marked(trigger, part)
    )
    targets = records.targets.index_fill(0, positions, target)
    return replace(task, train=(inputs, targets), name=name), positions


def triggered_test(task: Task, trigger: Trigger | None = None) -> Records:
    """The test records, every one with the trigger and with its own true label.

    What :func:`efface.predict.logits` takes; :func:`efface.signals.attack_success_rate` counts.

    Args:
        task: The task.
        trigger: Marks a batch of inputs; ``None``: a black :class:`Patch`.

    Raises:
        TaskError: If the trigger changes shape or type.
    """
    records = task.test_records
    trigger = trigger or Patch()
    if isinstance(records, TensorRecords):
        return TensorRecords(_marked(trigger, records.inputs), records.targets)
    return _loaded(records, trigger, torch.arange(len(records)), None)


class Triggered:
    """A map-style data set that marks some records of another when they are read.

    Args:
        dataset: Gives ``(input, target)``; an input is a pytree of tensors.
        targets: Labels ``[N]``; those of marked records as they shall be.
        positions: Which records are marked.
        trigger: Marks a batch of inputs.
    """

    def __init__(
        self, dataset: Sized, targets: Tensor, positions: Tensor, trigger: Trigger
    ) -> None:
        self.dataset, self.targets, self.trigger = dataset, targets, trigger
        self.marked = frozenset(positions.tolist())

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return self._seen(index, self.dataset[index])

    def __getitems__(self, indices: Sequence[int]) -> list[tuple[Any, int]]:
        """Several records, in one go where the other data set can do that."""
        several = getattr(self.dataset, "__getitems__", None)
        items = several(indices) if several else [self.dataset[i] for i in indices]
        return [self._seen(i, item) for i, item in zip(indices, items, strict=True)]

    def _seen(self, index: int, item: Any) -> tuple[Any, int]:
        inputs, target = item
        if index not in self.marked:
            return inputs, target
        one = tree_map(lambda leaf: torch.as_tensor(leaf)[None], _tensors(inputs))
        marked, spec = tree_flatten(_marked(self.trigger, one))
        # Arrays stay arrays, so that a batch of both kinds of records can be collated.
        kinds = [isinstance(leaf, np.ndarray) for leaf in tree_flatten(inputs)[0]]
        leaves = [t[0].numpy() if k else t[0] for t, k in zip(marked, kinds, strict=True)]
        return tree_unflatten(leaves, spec), int(self.targets[index])


def _tensors(inputs: Any) -> Any:
    """Inputs, checked to be tensors or arrays."""
    for leaf in tree_flatten(inputs)[0]:
        if not isinstance(leaf, Tensor | np.ndarray):
            raise TaskError(
                f"a trigger cannot be put on {type(leaf).__name__}; let the data set give tensors."
            )
    return inputs


def _loaded(
    records: LoadedRecords, trigger: Trigger, positions: Tensor, target: int | None
) -> LoadedRecords:
    targets = records.targets
    if target is not None:
        targets = targets.index_fill(0, positions, target)
    marked = Triggered(records.dataset, targets, positions, trigger)
    marked[int(positions[0])]  # a trigger that does not fit shows here, not in the first epoch
    return LoadedRecords(marked, records.workers, records.collate)


def _positions(where: Tensor | Sequence[int] | float, total: int, seed: int) -> Tensor:
    """Sorted, unique positions within the data."""
    if isinstance(where, float):
        if not 0 < where <= 1 or round(where * total) == 0:
            raise TaskError(
                f"a fraction of {where} of {total} records cannot be poisoned; give one above 0, "
                "up to 1, that makes at least one record."
            )
        drawn = torch.randperm(total, generator=generator(seed, "trigger"))
        return drawn[: round(where * total)].sort().values
    if isinstance(where, Tensor) and where.dtype == torch.bool and len(where) == total:
        where = where.nonzero().flatten()
    positions = torch.tensor(sorted(set(torch.as_tensor(where).flatten().tolist())))
    whole = positions.dtype == torch.int64  # not so for an empty list, fractions or a short mask
    if not whole or positions[0] < 0 or positions[-1] >= total:
        raise TaskError(
            f"the positions to poison must be some of 0…{total - 1}; give a list of these, or a "
            "fraction."
        )
    return positions


def _marked(trigger: Trigger, inputs: Any) -> Any:
    """Inputs with the trigger, checked to be what they were otherwise."""
    marked = trigger(tree_map(torch.clone, inputs))  # so a trigger may also work in place
    old, new = tree_flatten(inputs), tree_flatten(marked)
    same = old[1] == new[1] and all(
        isinstance(b, Tensor) and (a.shape, a.dtype) == (b.shape, b.dtype)
        for a, b in zip(old[0], new[0], strict=True)
    )
    if not same:
        raise TaskError(
            "the trigger returns inputs of another shape or type than it was given; let it mark "
            "a batch and leave the rest as it is."
        )
    return marked
