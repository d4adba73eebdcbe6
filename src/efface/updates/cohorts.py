"""Cohorts: deletable records that share batches, so that a request touches few steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from efface.data import Cohorts, as_strings
from efface.errors import MethodError, SelectionError, listed
from efface.task import Task

Members = Mapping[Any, Any] | Sequence[Any]
"""ID → name of its cohort, or IDs that are one cohort."""


def named(members: Members) -> dict[str, str]:
    """ID → name of its cohort, both as strings.

    >>> named(["a", "b"]), named({3: "x"})
    ({'a': '0', 'b': '0'}, {'3': 'x'})
    """
    pairs = members if isinstance(members, Mapping) else dict.fromkeys(members, "0")
    return dict(zip(as_strings(list(pairs)), as_strings(list(pairs.values())), strict=True))


def cohorts_of(task: Task, members: Members, last: int | None = None) -> Cohorts:
    """The cohorts of a training.

    Args:
        task: Whose records they are.
        members: ID → name of its cohort, or the IDs of a single cohort.
        last: They take part in the last so many epochs only; in all of them where it is None.

    Raises:
        SelectionError: If IDs are unknown, no record is left outside, or a cohort has no name.
        MethodError: If ``last`` is not one of the training's epochs.

    Example:
        >>> import torch, efface
        >>> x = torch.randn(8, 4); y = (x[:, 0] > 0).long()
        >>> task = efface.Task(lambda: torch.nn.Linear(4, 2), (x, y), (x, y))
        >>> cohorts_of(task, [2, 5], last=3)
        Cohorts(labels=tensor([-1, -1,  0, -1, -1,  0, -1, -1]), since=7)
    """
    epochs = task.fit.epochs
    if last is not None and not 1 <= last <= epochs:
        raise MethodError(f"cohort epochs must be 1 to {epochs}, as the training has, not {last}.")
    place = {record: i for i, record in enumerate(task.ids_)}
    if isinstance(members, str) or not hasattr(members, "__iter__"):
        raise SelectionError("cohorts must be a list of IDs, or ID → name of its cohort.")
    pairs = named(members)
    if isinstance(members, Mapping) and None in members.values():
        raise SelectionError("every record of a cohort needs the name of its cohort, not None.")
    unknown = [record for record in pairs if record not in place]
    if unknown:
        raise SelectionError(
            f"{len(unknown)} of {len(pairs)} cohort IDs are not in the training data "
            f"({listed(unknown)}); check the list against the task's IDs."
        )
    if not 0 < len(pairs) < len(place):
        raise SelectionError(
            f"the cohorts hold {len(pairs)} of {len(place)} records; name some records, not all."
        )
    number = {name: i for i, name in enumerate(sorted(set(pairs.values())))}
    labels = torch.full((len(place),), -1, dtype=torch.long)
    for record, name in pairs.items():
        labels[place[record]] = number[name]
    return Cohorts(labels, 0 if last is None else epochs - last)


def facts(cohorts: Cohorts) -> dict[str, int]:
    """What the lineage keeps of them: how many, and from which epoch on; never whose."""
    there = cohorts.labels[cohorts.labels >= 0]
    return {
        "records": len(there),
        "cohorts": len(torch.unique(there)),
        "since": cohorts.since,
    }
