"""Numbers in words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def many(count: int, thing: str) -> str:
    """A number of things.

    >>> many(1, "step"), many(1200, "step")
    ('1 step', '1,200 steps')
    """
    return f"{count:,} {thing}{'' if count == 1 else 's'}"


def told(step: Mapping[str, Any]) -> list[str]:
    """What a step of a lineage has to do with a log of updates, in sentences.

    >>> told({"log": {"id": "0a1b", "steps": 9, "keep": 0.1, "values": "bf16"}})
    ['recorded: log 0a1b, 9 steps, 10% of each layer as bf16']
    """
    found = []
    if log := step.get("log"):
        what = f"{many(log['steps'], 'step')}, {100 * log['keep']:g}% of each layer"
        found.append(f"recorded: log {log['id']}, {what} as {log['values']}")
    if made := step.get("cohorts"):
        whose = f"{many(made['records'], 'record')} in {many(made['cohorts'], 'cohort')}"
        found.append(f"cohorts: {whose}, from epoch {made['since'] + 1} on")
    for gone in step.get("removed", ()):
        control = f", as a control ({gone['control']})" if "control" in gone else ""
        found.append(
            f"taken back: {many(gone['n'], 'step')} of log {gone['log']}{control}; approximate and "
            "behavioural"
        )
    if again := step.get("replayed"):
        epochs = f"{again['epochs']} of {many(again['of'], 'epoch')}"
        found.append(f"replayed: {epochs} of log {again['log']}, without what was forgotten")
    return found


def size(count: float) -> str:
    """Bytes as people read them.

    >>> size(999), size(2**20 * 1.5)
    ('999 B', '1.50 MiB')
    """
    unit = 0
    while count >= 1000 and unit < 4:
        count, unit = count / 1024, unit + 1
    digits = 0 if unit == 0 or count >= 100 else 1 if count >= 10 else 2
    return f"{count:.{digits}f} {('B', 'KiB', 'MiB', 'GiB', 'TiB')[unit]}"


def seconds(count: float) -> str:
    """A duration as people read it.

    >>> seconds(4.2), seconds(600), seconds(9000)
    ('4 s', '10 min', '2.5 h')
    """
    if count < 120:
        return f"{count:.0f} s"
    return f"{count / 60:.0f} min" if count < 7200 else f"{count / 3600:.1f} h"
