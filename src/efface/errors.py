"""One exception tree; the class decides the exit code of the command line.

    EffaceError (1: failed at run time)
    ├── DivergedError          the loss became NaN or infinite
    ├── WriteError             a file could not be written (disk full, no permission)
    └── InputError (2: wrong use or bad input)
        ├── TaskError          the task, its data or its IDs
        ├── SelectionError     what is to be forgotten
        ├── MethodError        an unknown method or option, or a value out of range
        ├── NeedsError         a method lacks something that it needs
        ├── CheckpointError    a model file
        ├── MismatchError      models, references and split that do not belong together
        ├── LogError           an update log that is damaged, locked or of another run
        └── OutputError        an output that exists or cannot be made

Every message is one sentence: what was wrong, where, and what to do.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class EffaceError(Exception):
    """Anything that efface itself raises; ``exit_code`` is the command line's."""

    exit_code = 1


class DivergedError(EffaceError):
    """The loss became NaN or infinite."""


class WriteError(EffaceError):
    """A file could not be written."""


class InputError(EffaceError):
    """Wrong use or bad input."""

    exit_code = 2


class TaskError(InputError):
    """The task, its data or its IDs are not usable."""


class SelectionError(InputError):
    """The selection of records to forget is not usable."""


class MethodError(InputError):
    """Unknown method or option, or a value of the wrong type or out of range."""


class NeedsError(InputError):
    """A method lacks something that it needs."""


class CheckpointError(InputError):
    """A model file is damaged, of another network, or no model file at all."""


class MismatchError(InputError):
    """Models, references and split do not belong together."""


class LogError(InputError):
    """An update log is damaged, locked, of another run, or lacks what is asked for."""


class OutputError(InputError):
    """The output exists already, or its folder cannot be used."""


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint that names the nearest known name, for the end of an error sentence.

    >>> nearest("finetun", ["finetune", "retrain"])
    "did you mean 'finetune'?"
    >>> nearest("x", ["finetune", "retrain"])
    'known: finetune, retrain.'
    """
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(known)}."


def listed(items: Iterable[object], limit: int = 10) -> str:
    """Up to ``limit`` items, and how many there are beyond them.

    >>> listed(range(3)), listed(range(12), limit=2)
    ("'0', '1', '2'", "'0', '1' and 10 more")
    """
    items = list(items)
    shown = ", ".join(repr(str(item)) for item in items[:limit])
    return shown if len(items) <= limit else f"{shown} and {len(items) - limit} more"
