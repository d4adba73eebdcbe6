"""Lineage: what was done to a model, and what it was made to forget."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from efface.errors import MismatchError
from efface.keys import key_fingerprint, load_key, tags
from efface.task import Split, Task


@dataclass(frozen=True)
class Step:
    """One thing that was done to a model: how it was trained, pruned, made to forget.

    Args:
        verb: ``train``, ``adopt``, ``prune``, ``forget``, ``patch``, ``retrain`` or ``compact``.
        method: The method and its settings as JSON, where there is one.
        settings: How the task trained, as JSON.
        seed: The seed that every other seed derives from.
        parent: Weights digest of the model that it was done to, or None.
        cost: Wall and CPU seconds, images, threads, foreign load.
        data: Number of records, their fingerprint, and whether IDs are positions.
        versions: Of efface, torch, numpy and Python.
        detail: Whatever else is worth keeping (history, precision, kind of reference).
    """

    verb: str
    method: Mapping[str, Any] | None
    settings: Mapping[str, Any]
    seed: int
    parent: str | None
    cost: Mapping[str, Any]
    data: Mapping[str, Any]
    versions: Mapping[str, str]
    detail: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Forgotten:
    """All that a model was made to forget, over all requests; never plain IDs.

    Args:
        key: Fingerprint of the key that hashed the IDs.
        tags: Sorted keyed hashes of the IDs.
        requests: For each request its selector and number of records.
    """

    key: str | None = None
    tags: tuple[str, ...] = ()
    requests: tuple[Mapping[str, Any], ...] = ()

    def adding(self, split: Split) -> Forgotten:
        """With a further request; the split holds only what is new."""
        key = load_key()
        self._check_key(key)
        ids = [split.task.ids_[i] for i in split.forget.tolist()]
        new = sorted({*self.tags, *tags(ids, key)})
        request = {"selector": dict(split.selector), "n": len(ids)}
        return Forgotten(key_fingerprint(key), tuple(new), (*self.requests, request))

    def positions(self, task: Task) -> Tensor:
        """Where the task's data still holds records that were forgotten.

        Raises:
            MismatchError: If another key is set than the one that hashed the IDs.
        """
        if not self.tags:
            return torch.empty(0, dtype=torch.long)
        key = load_key()
        self._check_key(key)
        gone = set(self.tags)
        found = [i for i, tag in enumerate(tags(task.ids_, key)) if tag in gone]
        return torch.tensor(found, dtype=torch.long)

    def _check_key(self, key: bytes) -> None:
        if self.key is not None and self.key != key_fingerprint(key):
            raise MismatchError(
                f"the model's forgotten IDs were hashed with another key (fingerprint {self.key}); "
                "set EFFACE_KEY or EFFACE_KEY_FILE to that key."
            )


def data_facts(task: Task) -> dict[str, Any]:
    """What lineage keeps of the data: its size, fingerprint, and whether IDs are positions."""
    return {
        "n": len(task.records),
        "fingerprint": task.data_fingerprint,
        "positional": task.positional,
    }
