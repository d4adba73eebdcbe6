"""Retraining: the references, trained from fresh weights on D_r only."""

from __future__ import annotations

import typing
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from efface.errors import MethodError, NeedsError, nearest
from efface.fitting import Progress
from efface.journal import Journal
from efface.lineage import Forgotten
from efface.mask import Mask
from efface.seeds import own_seed
from efface.shapes import plan_of, with_plan
from efface.sparsify import Pruner, made_by, rewind_epoch
from efface.task import Split, Task
from efface.trained import TrainedModel
from efface.unlearn import to_json
from efface.work import How, Work, from_scratch

Like = Literal["dense", "same-mask", "rewound", "repruned"]
Initial = Literal["own", "model"]


def retrain(
    task: Task,
    split: Split,
    *,
    model: TrainedModel | None = None,
    like: Like = "dense",
    initial: Initial = "own",
    seed: int = 1,
    device: str = "auto",
    progress: Progress | None = None,
    journal: Journal | None = None,
) -> TrainedModel:
    """Train a reference from fresh weights on D_r only.

    Args:
        task: The task.
        split: What it must never have seen.
        model: The model that the reference is for; what it had forgotten before stays out, and its
            mask, rewind weights or pruner are what ``like`` refers to.
        like: ``dense``; ``same-mask``: under the model's mask (which D_f has shaped); ``rewound``:
            the same from its rewind weights; ``repruned``: dense, then pruned as the model was.
        initial: Begin with initial weights of its ``own``, or with those of the ``model``: the
            order of the batches is another in any case.
        seed: Another than the model's, so that the two share no randomness.
        device: Where to compute.
        progress: Called after every step.
        journal: Where to keep the state, so that a killed run goes on.

    Raises:
        NeedsError: If ``like`` asks for what the model does not have.

    Example:
        >>> import torch, efface
        >>> x = torch.randn(64, 4); y = (x[:, 0] > 0).long()
        >>> task = efface.Task(lambda: torch.nn.Linear(4, 2), (x, y), (x, y))
        >>> split = efface.Split.by_ids(task, [3, 5, 8])
        >>> reference = efface.retrain(task, split, seed=1)
        >>> len(reference.forgotten.tags)
        3
    """
    before = model.forgotten if model is not None else Forgotten()
    earlier = before.positions(task)
    split = split.without(earlier[~torch.isin(earlier, split.forget)])
    forgotten = before.adding(split)
    if initial == "model" and (model is None or like == "rewound"):
        raise NeedsError(
            "to begin with a model's initial weights, give it as --model, and another --like than "
            "rewound."
        )
    if model is not None and like == "same-mask":
        task = with_plan(task, plan_of(model.task))  # the topology of a compacted model
    mask, start = _likeness(model, like)
    how = How(device, progress, journal)
    options: dict[str, Any] = {"forgotten": forgotten, "mask": mask, "start": start, "like": like}
    if like == "repruned" and model is not None and "rewind" in _pruner_of(model).requires:
        options["rewind"] = rewind_epoch(model)  # it goes back to early weights of its own
    if initial == "model":
        options |= {"origin": model, "initial": initial}
    fresh = from_scratch(task, split.retain, "retrain", seed, how, **options)
    if like != "repruned":
        return fresh
    work = Work(fresh, "prune", seed, replace(how, journal=_later(journal)))
    work.fit = replace(work.fit, seed=own_seed(seed))  # another order than the original's, too
    pruner = _pruner_of(model)
    pruner(fresh, split.retain, work.fit)
    return work.close(to_json(pruner), like=like, order_seed=own_seed(seed))


def _later(journal: Journal | None) -> Journal | None:
    """A journal of its own for the second command in one."""
    return journal and Journal(journal.folder / "prune", {"key": journal.key}, journal.seconds)


def _likeness(
    model: TrainedModel | None, like: Like
) -> tuple[Mask | None, Mapping[str, Tensor] | None]:
    if like == "dense":
        return None, None
    if like not in typing.get_args(Like):
        raise MethodError(f"like {like!r} is unknown; {nearest(like, typing.get_args(Like))}")
    if model is None or (model.mask is None and plan_of(model.task) is None):
        raise NeedsError(f"--like {like} needs a pruned model to be like; give it as --model.")
    if like == "same-mask":
        return model.mask, None
    if like == "repruned":
        _pruner_of(model)
        return None, None
    if model.rewind is None:
        raise NeedsError("--like rewound needs rewind weights; train with --rewind EPOCH.")
    return model.mask, model.rewind


def _pruner_of(model: TrainedModel | None) -> Pruner:
    """The pruner that made a model's mask, from its lineage."""
    pruner = made_by(model) if model is not None else None
    if pruner is None:
        raise NeedsError(
            "--like repruned needs a model that efface pruned; none is in its lineage."
        )
    return pruner
