"""``efface log verify`` and ``efface log purge``: whether a log is whole, and erasing from it."""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from efface.checkpoint import describe_file, read_file
from efface.console import Run, read_ids
from efface.errors import CheckpointError, InputError, LogError, MismatchError, NeedsError
from efface.keys import load_key, tags
from efface.logs.words import many, size
from efface.unlearn.ledger import Steps, check_key, first_epoch, kept_epochs, names, unseal
from efface.updates.log import UpdateLog

# -- verify ---------------------------------------------------------------------------------------


def run_verify(run: Run, folder: Path) -> bool:
    """Check every digest of every segment, and every kept state; a row each.

    Args:
        run: The common options.
        folder: The log.

    Returns:
        Whether all of it is whole.

    Raises:
        LogError: If it is no log, or its index cannot be read.
    """
    with UpdateLog.open(folder) as log:
        found = log.verify()
    damaged = [row for row in found if not row["ok"]]
    rows = [
        [str(s["name"]), f"{s['frames']:,}", size(s["bytes"]), "whole" if s["ok"] else "DAMAGED"]
        for s in found
    ]
    lines = [run.table("", ["file", "updates", "bytes", "state"], rows)] if rows else []
    lines += [row["sentence"] for row in damaged]
    facts: dict[str, Any] = {"log": str(folder), "whole": not damaged}
    facts["states"] = [row for row in found if str(row["name"]).endswith(".safetensors")]
    facts["segments"] = [row for row in found if row not in facts["states"]]
    counted = [
        f"{sum(row['ok'] for row in facts[f'{kind}s'])} of {many(len(facts[f'{kind}s']), kind)}"
        for kind in ("segment", "state")
        if facts[f"{kind}s"] or kind == "segment"
    ]
    lines.append(f"{folder}: {' and '.join(counted)} whole.")
    run.result(facts, "\n".join(lines))
    return not damaged


CONTROLS = frozenset({"amnesiac-control", "logit-off"})
"""Methods that others are compared with: what they leave has not forgotten."""

# -- purge ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Forgetful:
    """What a model file says of its requests, as far as a log is concerned.

    Args:
        path: The file.
        tags: Keyed hashes of the IDs that it was made to forget.
        steps: The log's steps that were subtracted from it.
        controls: The controls among the methods that it was made to forget by.
    """

    path: Path
    tags: frozenset[str]
    steps: Steps
    controls: frozenset[str]


def run_purge(
    run: Run, folder: Path, *, ids: Path | None, forgotten_by: Path | None, expired: bool
) -> None:
    """Erase the updates of records, or of steps past their retention, for good.

    Args:
        run: The common options; with ``force`` records go that no model has forgotten.
        folder: The log.
        ids: A file with the records' IDs.
        forgotten_by: A model; alone, all that it was made to forget.
        expired: Everything that is past the log's retention, instead.

    Raises:
        InputError: If it is not said what to erase.
        LogError: If the log cannot be written to, or knows none of the IDs.
        MismatchError: If the key or the model is another one than the log's.
        NeedsError: If a record was not forgotten yet.
    """
    if expired == (ids is not None or forgotten_by is not None):
        raise InputError(
            "say what to erase: --ids FILE, --forgotten-by MODEL, both (the IDs, if the model has "
            "forgotten them), or --expired."
        )
    asked = None if ids is None else _unique(read_ids(ids), ids)
    with UpdateLog.open(folder, write=True) as log, run.progress() as progress:
        if expired:
            facts = _expire(log, progress)
        else:
            facts = _purge(log, asked, forgotten_by, run.force, progress)
    run.result({"log": str(folder), **facts}, f"{folder}: {_said(facts, expired)}")


def _unique(found: list[str], path: Path) -> list[str]:
    if not found:
        raise InputError(f"--ids {path} holds no ID; nothing is to be erased.")
    return list(dict.fromkeys(found))


def _purge(
    log: UpdateLog, asked: list[str] | None, model: Path | None, force: bool, progress: Any
) -> dict[str, Any]:
    key = key_of(log)
    done = None if model is None else forgetful(model, log, force)
    there = {tag: number for number, tag in enumerate(log.tags()) if tag is not None}
    wanted = sorted(done.tags & there.keys()) if done and asked is None else tags(asked or (), key)
    _check_forgotten(wanted, done, force)
    numbers = np.array(sorted(there[tag] for tag in wanted if tag in there), dtype=np.int64)
    absent = len(set(wanted) - there.keys())
    _check_absent(log, absent, len(wanted))
    steps = log.steps_of(numbers)
    steps = steps[log.states(steps) == "live"]
    left = np.setdiff1d(steps, done.steps) if done else steps
    facts = {"absent": absent, "steps": 0, "frames": 0, "bytes": 0, "records": 0, "missing": []}
    facts |= {"not_subtracted": len(left), "states": 0, "finished_earlier": log.recovered}
    if len(numbers):
        facts["states"] = _drop_states(log, numbers)
        facts |= log.purge(numbers, lambda done, of: progress("purge", done, of), force=force)
    return facts


def key_of(log: UpdateLog) -> bytes:
    """The owner's key, if it is the one of a log.

    Raises:
        MismatchError: If it is another one.
    """
    check_key(log)
    return load_key()


def forgetful(path: Path, log: UpdateLog, force: bool = False) -> Forgetful:
    """What a model was made to forget, and which steps of a log were subtracted from it.

    Args:
        path: A model file; its task is not needed.
        log: The log of its training.
        force: Take a model of another training, too.

    Raises:
        CheckpointError: If it is no model file, or damaged.
        MismatchError: If it is of another training, or was made to forget under another key.
    """
    if not describe_file(path)["intact"]:
        raise CheckpointError(f"{path} is damaged; restore the file from a copy.")
    metadata = read_file(path)[1]
    history = json.loads(metadata["lineage"])
    lineage = [step["detail"] for step in history]
    forgotten = json.loads(metadata["forgotten"])
    if not force and log.id not in {(detail.get("log") or {}).get("id") for detail in lineage}:
        raise MismatchError(
            f"{path} does not come from the training that {log.folder} recorded; give a model that "
            "does, or --force."
        )
    if forgotten["key"] not in (None, log.manifest["key"]):
        raise MismatchError(
            f"{path} was made to forget under another key (fingerprint {forgotten['key']}) than "
            f"the log's ({log.manifest['key']}); its records cannot be told apart there."
        )
    parts = [unseal(e["steps"], log.id) for d in lineage for e in _entries(d, log.id)]
    steps = np.unique(np.concatenate([np.empty(0, dtype=np.int64), *parts]))
    by = set().union(*(names(step.get("method")) for step in history))
    return Forgetful(path, frozenset(forgotten["tags"]), steps, CONTROLS & by)


def _entries(detail: Mapping[str, Any], log_id: str) -> list[Mapping[str, Any]]:
    return [entry for entry in detail.get("removed", ()) if entry.get("log") == log_id]


def _check_forgotten(wanted: list[str], done: Forgetful | None, force: bool) -> None:
    """Deleting the log before the model is edited makes the request impossible to serve."""
    if force:
        return
    if done is not None and done.controls:
        raise NeedsError(
            f"{done.path} was made to forget by a control ({', '.join(sorted(done.controls))}), "
            "which forgets nothing; give --forgotten-by a model that has forgotten these records, "
            "or --force."
        )
    if done is None:
        raise NeedsError(
            "no model was shown that has forgotten these records, and without their updates none "
            "can be made to by subtraction; forget first and give --forgotten-by MODEL, or --force."
        )
    left = len(set(wanted) - done.tags)
    if left:
        raise NeedsError(
            f"{left} of {many(len(wanted), 'record')} {'was' if left == 1 else 'were'} not "
            f"forgotten by {done.path}, and without their updates it cannot be made to by "
            "subtraction; forget them first, or give --force."
        )


def _check_absent(log: UpdateLog, absent: int, asked: int) -> None:
    """IDs that the log does not know may have been purged before, but not more than were."""
    before = int(log.info()["purged"]["records"])
    if absent > before:
        raise LogError(
            f"{absent:,} of {many(asked, 'ID')} {'is' if absent == 1 else 'are'} not in "
            f"{log.folder}, and {many(before, 'record')} {'was' if before == 1 else 'were'} purged "
            "from it before: the others were never recorded; check the list."
        )


def _drop_states(log: UpdateLog, numbers: Steps) -> int:
    """Delete the kept states that have seen a record: a replay from there would bring it back."""
    first = first_epoch(log, numbers)
    late = [epoch for epoch in kept_epochs(log) if epoch > first]
    for epoch in late:
        (log.folder / "checkpoints" / f"epoch-{epoch:04d}.safetensors").unlink(missing_ok=True)
    return len(late)


# -- retention ------------------------------------------------------------------------------------


def is_past(log: UpdateLog) -> bool:
    """Whether a log's updates have outlived its retention, counted from the day it was begun."""
    left = days_left(log)
    return left is not None and left <= 0


def days_left(log: UpdateLog) -> int | None:
    """Days until a log's updates are due to be erased; None: it has no retention limit."""
    days = log.manifest["retention_days"]
    if days is None:
        return None
    begun = datetime.date.fromisoformat(log.manifest["created"])
    return int(days) - (datetime.datetime.now(datetime.UTC).date() - begun).days


def _expire(log: UpdateLog, progress: Any) -> dict[str, Any]:
    left = days_left(log)
    if left is None:
        raise LogError(
            f"{log.folder} has no retention limit; record with --record-set retention=DAYS, or "
            "erase records with --ids or --forgotten-by."
        )
    last = log.info()["last_step"]
    if left > 0 or last is None:
        return {"steps": 0, "frames": 0, "bytes": 0, "missing": [], "days_left": max(left, 0)}
    steps = np.arange(int(last) + 1)
    erased = log.erase(steps, progress=lambda done, of: progress("purge", done, of))
    return {**erased, "days_left": 0}


# -- as text --------------------------------------------------------------------------------------


def _said(facts: Mapping[str, Any], expired: bool) -> str:
    """What a purge did, in sentences."""
    erased = f"{many(facts['steps'], 'update')} erased ({size(facts['bytes'])})"
    if expired:
        due = f"; the rest is due in {many(facts['days_left'], 'day')}"
        return erased + (due if facts["days_left"] else "") + "."
    said = [f"{many(facts['records'], 'record')} and {erased}."]
    if facts["states"]:
        said.append(
            f"{many(facts['states'], 'state')} of the training that had seen them: deleted."
        )
    if facts["absent"]:
        said.append(f"{many(facts['absent'], 'ID')} had been purged before.")
    if facts["not_subtracted"]:
        said.append(
            f"{many(facts['not_subtracted'], 'step')} of these had not been subtracted from the "
            "model: nobody else in them can be served by subtraction any more."
        )
    if before := facts["finished_earlier"]:
        said.append(
            f"First an interrupted purge was finished: {many(before['records'], 'record')}."
        )
    if facts["missing"]:
        said.append(f"Segments that were missing: {', '.join(facts['missing'])}.")
    return " ".join(said)
