"""What the index says of steps and segments: states, and where frames lie."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from efface.errors import LogError
from efface.updates.index import Index
from efface.updates.membership import Ints
from efface.updates.segments import Folder, Frame, Store

STATES = ("live", "unrecorded", "purged", "expired", "thinned")
"""What became of a step's update; the index keeps the place in this tuple."""
LIVE, UNRECORDED, PURGED = 0, 1, 2
AT_ONCE = 512
"""Steps whose places are looked up together while frames are read."""
BATCH = -1
"""Stands for the record of a frame that is of a whole batch."""
GIVEN_UP = "given_up"
"""Where the index keeps names of segments that a purge gave up while they were missing."""

WHY = {
    "unrecorded": "was not stored, since no record that was marked as sensitive was in its batch",
    "purged": "was purged with records that it had held",
    "expired": "was erased when its retention ended",
    "thinned": "was erased to keep the log within its budget",
}


class Segment(NamedTuple):
    """A row of the table ``segments``; ``sealed`` says where the file lies."""

    id: int
    name: str
    sealed: int
    frames: int
    bytes: int
    first: int
    last: int

    def extended(self, frames: Iterable[Frame]) -> Segment:
        """With frames behind its own."""
        segment = self
        for frame in frames:
            segment = segment._replace(
                frames=segment.frames + 1,
                bytes=frame.end,
                first=min(segment.first, frame.step) if segment.frames else frame.step,
                last=frame.step,
            )
        return segment


class Places(NamedTuple):
    """Where segments lie: the open one is local, sealed ones are in the store."""

    open: Folder
    store: Store

    def of(self, segment: Segment) -> Store:
        """The place of one segment."""
        return self.store if segment.sealed else self.open

    def path(self, name: str) -> Path:
        """The local file of a segment that is being written."""
        return self.open.path / name


def fresh(number: int) -> Segment:
    """A segment without frames."""
    return Segment(number, f"{number:08d}.seg", 0, 0, 0, 0, 0)


def renamed(segment: Segment) -> Segment:
    """The same number, sealed, without frames, under a name that it never had.

    >>> renamed(renamed(fresh(7))).name
    '00000007-2.seg'
    """
    stem, _, times = segment.name.removesuffix(".seg").partition("-")
    return fresh(segment.id)._replace(name=f"{stem}-{int(times or 0) + 1}.seg", sealed=1)


def segments(index: Index, condition: str = "1", values: Sequence[int] = ()) -> list[Segment]:
    """Segments in the order in which they were written."""
    return [
        Segment(*row)
        for row in index.rows(
            "SELECT id, name, sealed, frames, bytes, first, last FROM segments "
            f"WHERE {condition} ORDER BY id",
            values,
        )
    ]


def next_segment(index: Index) -> Segment:
    """A segment without frames, under a name that no other has or had when it was given up."""
    last = index.one("SELECT MAX(id) FROM segments")[0]
    given_up = [int(name[:8]) for name in index.get(GIVEN_UP) or []]
    return fresh(max([-1 if last is None else int(last), *given_up]) + 1)


def put_segment(index: Index, segment: Segment) -> None:
    """Write a segment's row; one without frames is removed."""
    if segment.frames:
        index.do("INSERT OR REPLACE INTO segments VALUES(?,?,?,?,?,?,?)", segment)
    else:
        index.do("DELETE FROM segments WHERE id=?", (segment.id,))


def frames_in(index: Index, segment: Segment) -> list[Frame]:
    """All frames of a segment, in order."""
    values = (segment.first, segment.last, segment.id)
    condition = "WHERE step BETWEEN ? AND ? AND segment=?"
    rows = index.rows(
        f"SELECT step, {BATCH}, offset, length, digest FROM steps {condition} UNION ALL "
        f"SELECT step, record, offset, length, digest FROM shares {condition} ORDER BY offset",
        values + values,
    )
    return [Frame(*row) for row in rows]


def ascending(index: Index, condition: str, values: Sequence[int] = ()) -> Ints:
    """Steps that meet a condition."""
    rows = index.rows(f"SELECT step FROM steps WHERE {condition} ORDER BY step", values)
    return np.array(rows, np.int64).reshape(-1)


def column(index: Index, name: str, steps: Ints) -> list[Any]:
    """A column of the table ``steps``, for every one of some steps.

    Raises:
        LogError: If a step is not in the log.
    """
    wanted = steps.tolist()
    found = dict(index.among(f"SELECT step, {name} FROM steps WHERE step IN ({{}})", wanted))
    absent = [step for step in wanted if step not in found]
    if absent:
        raise LogError(f"step {absent[0]} is not in {index.path.parent}; give steps that it holds.")
    return [found[step] for step in wanted]


def states(index: Index, steps: Ints) -> npt.NDArray[np.str_]:
    """State of every step.

    Raises:
        LogError: If a step is not in the log.
    """
    found = np.array(column(index, "state", steps), np.int64)
    names: npt.NDArray[np.str_] = np.array(STATES)[found]
    return names


def check_live(index: Index, steps: Ints) -> None:
    """Refuse steps whose update is not there.

    Raises:
        LogError: With the first such step and what became of it.
    """
    for start in range(0, len(steps), 1 << 16):
        part = steps[start : start + (1 << 16)]
        found = states(index, part)
        for at in np.flatnonzero(found != STATES[LIVE])[:1]:
            raise LogError(
                f"the update of step {part[at]} in {index.path.parent} {WHY[str(found[at])]}; "
                "leave such steps out, or retrain."
            )


def located(
    index: Index, steps: Ints, records: frozenset[int] | None
) -> list[tuple[int, list[Frame]]]:
    """Where the frames of steps lie, in storage order.

    Args:
        index: The index.
        steps: Steps, some hundreds.
        records: Leave out frames of other single records; ``None``: all frames.

    Returns:
        Numbers of segments, each with frames in ascending order.
    """
    named = steps.tolist()
    columns = "segment, offset, length, digest"
    rows = list(
        index.among(
            f"SELECT step, {BATCH}, {columns} FROM steps "
            "WHERE segment IS NOT NULL AND step IN ({})",
            named,
        )
    )
    shares = index.among(f"SELECT step, record, {columns} FROM shares WHERE step IN ({{}})", named)
    rows += [row for row in shares if records is None or row[1] in records]
    groups: dict[int, list[Frame]] = {}
    for step, record, segment, offset, length, digest in rows:
        groups.setdefault(segment, []).append(Frame(step, record, offset, length, digest))
    return [(key, sorted(groups[key], key=lambda f: f.offset)) for key in sorted(groups)]


def located_all(
    index: Index, steps: Ints, records: frozenset[int] | None
) -> Iterator[tuple[int, list[Frame]]]:
    """Like :func:`located`, for any number of ascending steps, in bounded memory."""
    for start in range(0, len(steps), AT_ONCE):
        yield from located(index, steps[start : start + AT_ONCE], records)
