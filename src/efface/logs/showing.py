"""``efface log show``: what an update log holds, and what each way of forgetting would cost."""

from __future__ import annotations

import contextlib
import json
import math
from pathlib import Path
from typing import Any

from efface.checkpoint import read_file
from efface.console import Run
from efface.errors import InputError, MismatchError
from efface.logs.purging import forgetful, is_past, key_of
from efface.logs.words import many, seconds, size
from efface.unlearn.amnesiac import outlook
from efface.unlearn.ledger import kept_epochs, numbers_of
from efface.updates.index import Index
from efface.updates.layout import Layout
from efface.updates.log import UpdateLog
from efface.updates.segments import INSIDE

MOST_ROWS = 20
"""Of the table of epochs; more epochs than that share rows."""


def run_show(
    run: Run,
    folder: Path,
    ids: list[str] | None = None,
    model: Path | None = None,
    data: str | None = None,
) -> None:
    """Print what a log holds; with IDs also what it would cost to forget them.

    Args:
        run: The common options; with ``force`` a model of another training is taken, too.
        folder: The log.
        ids: Of the records that might be forgotten; None: only the log itself.
        model: The model that would be made to forget; steps that were subtracted from it before
            count as done.
        data: ``data_fingerprint`` of the task whose records they are, where there is a task.

    Raises:
        InputError: If there are no IDs in the selection.
        LogError: If it is no log, damaged, or does not know the records.
        MismatchError: If the key, the model or the task is another one than the log's.
    """
    with UpdateLog.open(folder) as log:
        facts = facts_of(log)
        costs = None if ids is None else _costs(log, ids, model, data, run.force)
    text = "\n".join([*_head(facts), *_upkeep(facts)])
    if costs is None:
        text += "\n" + _epoch_text(run, facts)
    else:
        text += "\n\n" + _cost_text(run, costs)
        facts["forgetting"] = costs
    run.result(facts, text)


def facts_of(log: UpdateLog) -> dict[str, Any]:
    """Everything that is said of a log; the index alone is read."""
    info, manifest = log.info(), log.manifest
    dense = 4 * Layout.from_json(manifest["layout"]).total
    epochs = _epochs(log, dense)
    stored, held = info["states"]["live"], sum(epoch["bytes"] for epoch in epochs)
    named = ("task", "seed", "keep", "pick", "values", "attribution", "sensitive", "budget")
    return {
        "log": str(log.folder),
        **{name: manifest[name] for name in named},
        **info,
        "stored": stored,
        "dense_bytes": dense,
        "bytes_per_step": held / stored if stored else None,
        "times_smaller": dense * stored / held if held else None,
        "per_epoch": epochs,
        "cohorts": _cohorts(log),
        "retention_days": manifest["retention_days"],
        "past_retention": stored if is_past(log) else 0,
        "states_kept": kept_epochs(log),
        "segments_at": manifest["segments"],
    }


def _epochs(log: UpdateLog, dense: int) -> list[dict[str, Any]]:
    """Per epoch its steps, the updates stored of them, their bytes, and how much that saves."""
    with contextlib.closing(Index(log.folder)) as index:
        counts = index.rows("SELECT epoch, COUNT(*), SUM(state=0) FROM steps GROUP BY epoch")
    sizes = log.sizes()
    return [
        {
            "epoch": epoch,
            "steps": steps,
            "stored": stored,
            "bytes": sizes[epoch],
            "bytes_per_step": sizes[epoch] / stored if stored else None,
            "times_smaller": dense * stored / sizes[epoch] if sizes[epoch] else None,
        }
        for epoch, steps, stored in counts
    ]


def _cohorts(log: UpdateLog) -> dict[str, int] | None:
    """How many records are in cohorts, in how many, and from which epoch on."""
    members = log.cohorts()
    if not members:
        return None
    since = log.manifest["cohorts_since"]
    return {"records": len(members), "cohorts": len(set(members.values())), "since": since}


# -- as text --------------------------------------------------------------------------------------


def _epoch_text(run: Run, facts: dict[str, Any]) -> str:
    """What is stored of each epoch, as a table."""
    columns = ["epoch", "steps", "stored", "bytes", "a step", "smaller than fp32"]
    every = math.ceil(len(facts["per_epoch"]) / MOST_ROWS)
    found = range(0, len(facts["per_epoch"]), max(1, every))
    rows = [_row(facts["per_epoch"][i : i + every], facts["dense_bytes"]) for i in found]
    return run.table("", columns, rows) if rows else ""


def _row(epochs: list[dict[str, Any]], dense: int) -> list[str]:
    """One or several epochs as a row."""
    first, last = epochs[0]["epoch"] + 1, epochs[-1]["epoch"] + 1
    steps, stored, held = (sum(e[k] for e in epochs) for k in ("steps", "stored", "bytes"))
    name = str(first) if first == last else f"{first} to {last}"
    return [name, f"{steps:,}", f"{stored:,}", size(held), *_saved(stored, held, dense)]


def _saved(stored: int, held: int, dense: int) -> list[str]:
    """Bytes of a stored step, and how many times smaller that is than all of it as fp32."""
    if not held:
        return ["—", "—"]
    return [size(held / stored), f"{dense * stored / held:.1f} ×"]


def _head(facts: dict[str, Any]) -> list[str]:
    """What was recorded, and how."""
    ended = "its training has ended" if facts["finished"] else "its training has not ended"
    if failed := facts["failed"]:
        ended = f"recording ended early, at step {failed['step']}: {failed['reason']}"
    inside = facts["segments_at"] == INSIDE
    where = "" if inside else f" at {facts['segments_at']}"
    held = [
        f"{size(facts['bytes'])} in {many(facts['segments'], 'segment')}{where}",
        f"index {size(facts['index_bytes'])}",
    ]
    if facts["stored"]:
        times = f"{facts['times_smaller']:.1f} × smaller than {size(facts['dense_bytes'])} of fp32"
        held.append(f"{size(facts['bytes_per_step'])} a step, {times}")
    whose = "" if facts["sensitive"] is None else f", {facts['sensitive']:,} of them sensitive"
    share = "the largest" if facts["pick"] == "magnitude" else "random"
    return [
        f"{facts['log']}: log {facts['id']} of {facts['task']}, seed {facts['seed']}, begun "
        f"{facts['created']}; {ended}",
        f"{many(facts['steps'], 'step')} in {many(facts['epochs'], 'epoch')}, "
        f"{facts['stored']:,} stored; {many(facts['records'], 'record')}{whose}",
        ", ".join(held),
        f"of each layer {share} {facts['keep']:.1%} of the changes, as {facts['values']}, by "
        f"{facts['attribution']}",
    ]


def _upkeep(facts: dict[str, Any]) -> list[str]:
    """Cohorts, kept states, retention, what was erased, and what happened."""
    lines = []
    if found := facts["cohorts"]:
        lines.append(
            f"cohorts: {many(found['records'], 'record')} in {many(found['cohorts'], 'cohort')}, "
            f"from epoch {found['since'] + 1} on"
        )
    if facts["states_kept"]:
        kept = ", ".join(str(epoch + 1) for epoch in facts["states_kept"])
        lines.append(f"states kept at the start of epoch {kept}")
    if facts["retention_days"] is not None:
        lines.append(
            f"retention: {many(facts['retention_days'], 'day')}; "
            f"{many(facts['past_retention'], 'update')} past it"
        )
    erased = {why: facts["states"][why] for why in ("purged", "expired", "thinned")}
    records = many(facts["purged"]["records"], "record")
    if any(erased.values()) or facts["purged"]["records"]:
        gone = [f"{count:,} {why}" for why, count in erased.items() if count]
        lines.append(f"erased updates: {', '.join(gone) or 'none'}; {records} purged")
    return lines + [_event(event) for event in facts["events"]]


def _event(event: dict[str, Any]) -> str:
    """What happened to a log, on a line."""
    head = f"{event['date']}, step {event['at']}: " if event["at"] is not None else ""
    head = head or f"{event['date']}: "
    if event["kind"] == "keep":
        return f"{head}keep lowered from {event['old']:.2%} to {event['new']:.2%} (budget)"
    if event["kind"] == "thinned":
        first, last = event["first"] + 1, event["last"] + 1
        return f"{head}the updates of epochs {first} to {last} erased (budget)"
    facts = [_fact(k, v) for k, v in event.items() if k not in ("date", "at", "kind") and v != []]
    return f"{head}{event['kind']} ({', '.join(facts)})" if facts else f"{head}{event['kind']}"


def _fact(name: str, value: Any) -> str:
    """A count of things as people say it, anything else after its name."""
    counted = isinstance(value, int) and not isinstance(value, bool) and name.endswith("s")
    return many(value, name.removesuffix("s")) if counted else f"{name} {value}"


# -- what forgetting would cost -------------------------------------------------------------------


def _costs(
    log: UpdateLog, ids: list[str], model: Path | None, data: str | None, force: bool
) -> dict[str, Any]:
    if not ids:
        raise InputError("the selection holds no record; select at least one that is to go.")
    recorded = log.manifest["data"]["fingerprint"]
    if data is not None and data != recorded:  # the same IDs may be other records there
        raise MismatchError(
            f"the task's data (fingerprint {data[:12]}) is not what {log.folder} was recorded on "
            f"({recorded[:12]}); give the task of that training."
        )
    key_of(log)  # or every record would pass for one that the log has never seen
    numbers = numbers_of(log, list(dict.fromkeys(ids)))
    done = None if model is None else forgetful(model, log, force)
    costs = outlook(log, numbers, None if done is None else done.steps)
    took = None if model is None else _training_seconds(model)
    costs["replay"]["seconds"] = None if took is None else took * costs["replay"]["share"]
    return costs


def _training_seconds(model: Path) -> float | None:
    """Wall seconds of the training that a model file tells of."""
    for step in json.loads(read_file(model)[1]["lineage"]):
        if step["verb"] == "train":
            return float(step["cost"]["wall"])
    return None


WAYS = {
    "go": "goes",
    "warn": "goes with a warning: expect damage",
    "refuse": "refused: take replay, or another method",
}


def _cost_text(run: Run, costs: dict[str, Any]) -> str:
    """The ways of forgetting as a table."""
    replay = costs["replay"]
    before = f", {costs['removed']:,} before" if costs["removed"] else ""
    taken = f"{costs['due']:,} of {many(costs['total'], 'step')}{before}: {costs['share']:.1%}"
    verdict = f"impossible: {why}" if (why := costs["reason"]) else WAYS[costs["verdict"]]
    again = f"{replay['epochs']} of {many(replay['of'], 'epoch')} again: {replay['share']:.0%}"
    took = replay["seconds"]
    after = "" if took is None else f", about {seconds(took)}"
    rows = [
        ["amnesiac", f"subtract {taken}", size(costs["bytes"]), verdict],
        ["replay", f"train {again}{after}", "—", f"exact; from epoch {replay['start'] + 1}"],
    ]
    title = f"To forget {many(costs['records'], 'record')}"
    return run.table(title, ["way", "cost", "read", "outcome"], rows)
