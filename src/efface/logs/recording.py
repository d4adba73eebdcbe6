"""The options of ``efface train --record``, from text to a recorder and to cohorts."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from efface.console import read_ids
from efface.errors import InputError, MethodError
from efface.options import changed, parse_sets

if TYPE_CHECKING:
    from efface.updates.recorder import Recorder


@dataclass(frozen=True)
class Recording:
    """What is recorded of a training, and which records share batches.

    Args:
        recorder: Writes the log; None: nothing is recorded.
        cohorts: ID → name of the cohort; None: batches are drawn as ever.
        cohort_epochs: Cohorts appear in so many last epochs only; None: in all.
    """

    recorder: Recorder | None = None
    cohorts: Mapping[str, str] | None = None
    cohort_epochs: int | None = None

    @property
    def options(self) -> dict[str, Any]:
        """Arguments of :func:`efface.train`; only those that were given."""
        return {name: value for name, value in vars(self).items() if value is not None}

    @property
    def key(self) -> dict[str, str]:
        """What a command's journal must know, so that only the same recording goes on."""
        options = self.options
        if self.recorder is not None:
            options["recorder"] = replace(self.recorder, force=False)
        return {name: repr(value) for name, value in options.items()}


def recording(
    folder: Path | None,
    budget: str | None,
    pairs: list[str] | None,
    cohort: Path | None,
    cohort_epochs: int | None,
    force: bool = False,
) -> Recording:
    """The recording that a command line describes.

    Args:
        folder: ``--record``.
        budget: ``--record-budget``.
        pairs: ``--record-set``, other fields of :class:`efface.updates.Recorder` as ``K=V``;
            ``sensitive=FILE`` names a file of IDs.
        cohort: ``--cohort``, a file.
        cohort_epochs: ``--cohort-epochs``.
        force: Whether a log that is there is replaced.

    Raises:
        InputError: If an option lacks the one that it belongs to, or a file cannot be read.
        MethodError: For an unknown field, or a value of the wrong type or out of range.
    """
    if cohort_epochs is not None and cohort is None:
        raise InputError("--cohort-epochs needs --cohort FILE: it says when cohorts appear.")
    cohorts = None if cohort is None else read_cohorts(cohort)
    if folder is not None:
        recorder = _recorder(folder, budget, pairs or [], force)
        return Recording(recorder, cohorts, cohort_epochs)
    for option, given in (("--record-budget", budget), ("--record-set", pairs)):
        if given:
            raise InputError(f"{option} needs --record LOGDIR: nothing is recorded without it.")
    return Recording(None, cohorts, cohort_epochs)


def _recorder(folder: Path, budget: str | None, pairs: list[str], force: bool) -> Recorder:
    from efface.updates.recorder import Recorder

    try:
        options = parse_sets(pairs)
    except MethodError as error:
        raise MethodError(str(error).replace("--set", "--record-set", 1)) from None
    for option, instead in (("folder", "--record LOGDIR"), ("force", "--force")):
        if option in options:
            raise MethodError(f"--record-set takes no {option}; say {instead}.")
    if budget is not None and "budget" in options:
        raise MethodError("the budget is given twice; leave --record-set budget out.")
    if budget is not None:
        options["budget"] = budget
    if "sensitive" in options:
        options["sensitive"] = tuple(named_ids(Path(options["sensitive"]), "sensitive"))
    made: Recorder = changed("the recorder", Recorder(folder, force=force), options)
    return made


def named_ids(path: Path, option: str) -> list[str]:
    """IDs from a file that another option than ``--ids`` names.

    Raises:
        InputError: If it cannot be read, or holds none.
    """
    try:
        ids = read_ids(path)
    except InputError as error:
        raise InputError(str(error).replace("--ids", option, 1)) from None
    if not ids:
        raise InputError(f"{option} {path} holds no ID; give a text file with an ID a line.")
    return ids


def read_cohorts(path: Path) -> dict[str, str]:
    """ID → cohort: CSV or JSON with ``id`` and ``cohort``; a list of IDs is one cohort.

    Raises:
        InputError: If it cannot be read, holds no ID, or puts one into two cohorts.
    """
    pairs = _table(path)
    if pairs is None:
        pairs = [(record, path.stem) for record in named_ids(path, "--cohort")]
    cohorts: dict[str, str] = {}
    for record, name in pairs:
        if cohorts.setdefault(record, name) != name:
            raise InputError(
                f"--cohort {path} puts {record!r} into two cohorts, {cohorts[record]!r} and "
                f"{name!r}; a record belongs to one."
            )
    if not cohorts:
        raise InputError(f"--cohort {path} holds no ID; give id and cohort columns.")
    return cohorts


def _table(path: Path) -> list[tuple[str, str]] | None:
    """(ID, cohort) of a CSV file with both columns, or of JSON objects; None for anything else."""
    if path.suffix not in (".csv", ".json"):
        return None
    try:
        text = path.read_text(encoding="utf-8-sig")
        rows = json.loads(text) if path.suffix == ".json" else list(csv.reader(text.splitlines()))
    except (OSError, ValueError):
        return None  # read_ids says what is wrong with it
    if path.suffix == ".json":
        return _objects(path, rows)
    header = [cell.strip().lower() for cell in rows[0]] if rows else []
    if not {"id", "cohort"} <= set(header):
        if len(header) > 1 and "id" not in header:
            raise InputError(
                f"--cohort {path} has columns, but none called id and cohort; name them so in its "
                "first line, or give a list of IDs."
            )
        return None
    at, to = header.index("id"), header.index("cohort")
    rows = [row for row in rows[1:] if row]
    short = [r for r in rows if len(r) <= max(at, to) or not (r[at].strip() and r[to].strip())]
    if short:
        raise InputError(f"--cohort {path} has a row without an ID or a cohort: {short[0]}.")
    return [(row[at].strip(), row[to].strip()) for row in rows]


def _objects(path: Path, value: Any) -> list[tuple[str, str]] | None:
    """From ``{"id": "cohort"}`` or ``[{"id": …, "cohort": …}]``."""
    if isinstance(value, dict):
        value = [{"id": record, "cohort": name} for record, name in value.items()]
    elif not isinstance(value, list) or not any(isinstance(row, dict) for row in value):
        return None
    for row in value:
        whole = isinstance(row, dict) and {"id", "cohort"} <= row.keys()
        if not whole or not all(isinstance(row[k], str | int) for k in ("id", "cohort")):
            raise InputError(
                f"--cohort {path} must hold objects with id and cohort, or a list of IDs, not "
                f"{row!r}."
            )
    return [(str(row["id"]), str(row["cohort"])) for row in value]
