"""The recorder: what every optimiser step has changed, pruned, and written down beside training."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from efface.cost import versions
from efface.data import Cohorts, as_strings
from efface.errors import LogError, MethodError, SelectionError, listed
from efface.files import digest
from efface.fitting import Fit
from efface.journal import Journal
from efface.keys import key_fingerprint, load_key, tags
from efface.lineage import data_facts
from efface.trained import weights_digest
from efface.updates.codec import Kind
from efface.updates.layout import Layout
from efface.updates.log import UpdateLog
from efface.updates.recording import Recording


@dataclass(frozen=True)
class Recorder:
    """Keeps, for every optimiser step, the largest changes of each layer's weights.

    Hand it to :func:`efface.train`. What is logged is the whole step (momentum, Adam's scaling,
    weight decay and everybody in the batch included), taken after the mask. Selection and coding
    run beside the training, in one thread.

    Args:
        folder: Where the log goes (see docs/log.md).
        keep: Share of each layer's weights whose change is stored, in (0, 1]; in a pruned layer,
            of those that its mask keeps. Biases, batch norm and tensors of fewer than 1,024 entries
            are stored whole.
        pick: The ``magnitude`` of the change decides, or ``random``, as a control.
        values: How changes are stored: ``bf16``, ``fp16`` and ``int8`` (scaled by layer), ``fp32``.
        attribution: ``batch`` stores the step of the whole batch, as in the papers; ``record`` for
            every sensitive record its own share of the step, at the cost of a backward pass each.
        sensitive: IDs that may have to be deleted: only steps that hold one are stored.
        budget: Bytes, or a size such as ``"2GiB"``: the keep fraction is lowered so that the log
            stays within it, then the oldest epochs are thinned out; both are noted in the log.
        checkpoints: A full state is kept at the start of every so many epochs, for exact replay; 0
            keeps one where the cohorts begin, and none else.
        on_failure: ``stop`` the training when the log cannot be written, or ``go-on`` without it:
            the log then says where it ends.
        segments: URL (of anything that fsspec reaches) for the sealed segments.
        retention: Days after which stored updates are due for ``efface log purge --expired``.
        force: Replace a log that is in the folder.

    Raises:
        MethodError: If a value is out of range.

    Example:
        ``efface.train(task, recorder=Recorder("log/", keep=0.05))``
    """

    folder: str | Path
    keep: float = 0.1
    pick: Literal["magnitude", "random"] = "magnitude"
    values: Kind = "bf16"
    attribution: Literal["batch", "record"] = "batch"
    sensitive: Sequence[Any] | None = None
    budget: int | str | None = None
    checkpoints: int = 0
    on_failure: Literal["stop", "go-on"] = "stop"
    segments: str | None = None
    retention: int | None = None
    force: bool = False

    def __post_init__(self) -> None:
        days, states = self.retention, self.checkpoints
        rules = {
            "keep": ("in (0, 1]", isinstance(self.keep, int | float) and 0 < self.keep <= 1),
            "checkpoints": ("0 or more, whole", isinstance(states, int) and states >= 0),
            "retention": ("1 day or more", days is None or (isinstance(days, int) and days >= 1)),
            "sensitive": ("a list of IDs, not empty", _listed(self.sensitive)),
            "values": (f"one of {', '.join(get_args(Kind))}", self.values in get_args(Kind)),
            "pick": ("magnitude or random", self.pick in ("magnitude", "random")),
            "attribution": ("batch or record", self.attribution in ("batch", "record")),
            "on_failure": ("stop or go-on", self.on_failure in ("stop", "go-on")),
        }
        for option, (rule, holds) in rules.items():
            if not holds:
                raise MethodError(
                    f"recording: {option} must be {rule}, not {getattr(self, option)!r}."
                )
        if self.attribution == "record" and self.sensitive is None:
            raise MethodError(
                "recording: attribution=record needs sensitive, the IDs whose shares are stored."
            )
        in_bytes(self.budget)

    def begin(self, fit: Fit, network: nn.Module, cohorts: Cohorts | None = None) -> Recording:
        """Open the log of a training, or go on with it.

        Args:
            fit: The training's handle; its task, seed and purpose go into the log's identity.
            network: As it is before the first step.
            cohorts: Those of the training.

        Raises:
            LogError: If the folder holds the log of another training, or a finished one.
            SelectionError: If a sensitive ID is unknown.
        """
        task, settings = fit.task, fit.task.fit
        if self.attribution == "record" and settings.micro_batch:
            raise MethodError("recording: attribution=record needs whole batches; micro_batch=0.")
        ids, key = task.ids_, load_key()
        wanted = self._sensitive(ids)
        layout = Layout.of(network)
        facts = {
            "schema": "efface.updates/1",
            "task": task.name,
            "network": layout.fingerprint,
            "layout": layout.to_json(),
            "key": key_fingerprint(key),
            "data": data_facts(task),
            "seed": fit.seed,
            "path": fit.path,
            "settings": settings.to_dict(),
            "n": len(ids),
            "keep": self.keep,
            "pick": self.pick,
            "values": self.values,
            "attribution": self.attribution,
            "sensitive": None if wanted is None else int(wanted.sum()),
            "budget": in_bytes(self.budget),
            "retention_days": self.retention,
            "initial": weights_digest(network.state_dict()),
            "cohorts_since": None if cohorts is None else cohorts.since,
        }
        whose = {
            "sensitive": wanted if wanted is None else wanted.nonzero().flatten().tolist(),
            "cohorts": cohorts and cohorts.labels.tolist(),
        }
        name = digest(facts | {"whose": digest(whose), "versions": versions()})[:16]
        manifest = facts | {"id": name, "versions": versions()}
        log = self._open(name, manifest, tags(ids, key), cohorts, fit.journal)
        return Recording(self, log, fit, layout, wanted, cohorts)

    def _sensitive(self, ids: Sequence[str]) -> Tensor | None:
        if self.sensitive is None:
            return None
        asked = as_strings(list(self.sensitive))
        unknown = sorted(set(asked) - set(ids))
        if unknown:
            raise SelectionError(
                f"{len(unknown)} of {len(asked)} sensitive IDs are not in the training data "
                f"({listed(unknown)}); check the list against the task's IDs."
            )
        there = set(asked)
        return torch.tensor([record in there for record in ids])

    def _open(
        self,
        name: str,
        manifest: Mapping[str, Any],
        hashed: list[str],
        cohorts: Cohorts | None,
        journal: Journal | None,
    ) -> UpdateLog:
        folder = Path(self.folder)
        resumed = journal if journal is not None and journal.start() else None
        if resumed is not None or (folder / "manifest.json").exists():
            log = self._own(folder, name, resumed)
            if log is not None:
                return log
        labels = [] if cohorts is None else cohorts.labels.tolist()
        grouped = {number: label for number, label in enumerate(labels) if label >= 0}
        return UpdateLog.create(
            folder,
            manifest,
            hashed,
            cohorts=grouped or None,
            segments=self.segments,
            force=self.force,
        )

    def _own(self, folder: Path, name: str, resumed: Journal | None) -> UpdateLog | None:
        """The log to go on with; None where there is only one that ``force`` replaces.

        A training that goes on needs the log that it began, with ``force``, too, and even if that
        was finished already (the training was killed before its model was saved): what was trained
        before would be missing from a new one.
        """
        problem = f"{folder} holds the log of another training"
        try:
            log = UpdateLog.open(folder, write=True)
            if log.id == name and (resumed or not log.info()["finished"]):
                return log
            if log.id == name:
                problem = f"{folder} holds the log of a finished training"
            log.close()
        except LogError as error:
            if not self.force and resumed is None:
                raise
            problem = str(error).partition(";")[0]
        if resumed is not None:
            raise LogError(
                f"{problem}, and the training that goes on needs its own; bring that back, or "
                f"delete {resumed.folder} to train from the start."
            )
        if self.force:
            return None
        raise LogError(f"{problem}; give --force to replace it, or another folder.")


def _listed(ids: Any) -> bool:
    return ids is None or (not isinstance(ids, str | bytes) and len(ids) > 0)


_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_UNITS |= {f"{unit}i": 2 ** (10 * i) for i, unit in enumerate("kmgt", 1)}


def in_bytes(size: int | str | None) -> int | None:
    """A size in bytes, from a number or from text such as ``2GiB`` or ``500 MB``.

    Raises:
        MethodError: If it is no size.

    >>> in_bytes("2GiB"), in_bytes("500 MB"), in_bytes(7)
    (2147483648, 500000000, 7)
    """
    if size is None:
        return None
    found = re.fullmatch(r"([0-9.]+) *([kmgt]?i?)b?", str(size).strip().lower())
    try:
        value = int(float(found[1]) * _UNITS[found[2]]) if found else 0
    except (ValueError, KeyError, OverflowError):
        value = 0
    if value <= 0:
        raise MethodError(f"recording: budget must be a size such as 500MB or 2GiB, not {size!r}.")
    return value
