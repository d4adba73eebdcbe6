"""The end of a log: what was appended and not committed yet, the open segment, commits, sealing.

Payloads go to the open segment at once, rows wait in memory until the commit: first the segment is
made durable, then one transaction makes its frames count. Nothing is ever left half counted.
"""

from __future__ import annotations

import contextlib
import datetime
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from efface.errors import EffaceError, LogError, WriteError
from efface.files import digest
from efface.updates.blocks import Blocks
from efface.updates.catalogue import (
    BATCH,
    LIVE,
    UNRECORDED,
    Places,
    Segment,
    fresh,
    next_segment,
    put_segment,
    segments,
)
from efface.updates.index import Index
from efface.updates.membership import Ints
from efface.updates.segments import RANGE, Frame, Writer, unwritten

MOST_STEPS, MOST_PAIRS = 1024, 1 << 19
"""How much waits in memory at most before a commit comes by itself."""


@dataclass
class Pending:
    """What the next commit will make count."""

    steps: list[tuple[Any, ...]] = field(default_factory=list)
    batches: list[tuple[int, Ints]] = field(default_factory=list)
    shares: list[tuple[Any, ...]] = field(default_factory=list)
    events: list[tuple[str, Mapping[str, Any], int | None]] = field(default_factory=list)
    pairs: int = 0

    def __bool__(self) -> bool:
        return bool(self.steps or self.shares or self.events)


class Tail:
    """Where a log grows.

    Args:
        index: The index, open for writing.
        blocks: Which record was in which step.
        places: Where segments lie.
        per_segment: Frames after which a segment is sealed.
    """

    def __init__(self, index: Index, blocks: Blocks, places: Places, per_segment: int) -> None:
        self.index, self.blocks, self.places = index, blocks, places
        self.per_segment = per_segment
        self.records = int(index.one("SELECT COUNT(*) FROM records")[0])
        self.lost: int | None = None
        self._writer: Writer | None = None
        self.restore()

    def restore(self) -> None:
        """Take up what is committed, and forget the rest."""
        self._stale = True
        self.close()
        self.pending = Pending()
        self._members: Ints | None = None
        self.blocks.count()
        row = self.index.one("SELECT step, epoch FROM steps ORDER BY step DESC LIMIT 1")
        self.last: int = -1 if row is None else row[0]
        self.epoch: int = 0 if row is None else row[1]
        self.failed = self.index.get("failed")
        self.finished = self.index.get("finished") is not None
        known = segments(self.index)
        self.segment = next_segment(self.index)
        if known and not known[-1].sealed and self._whole(known[-1]):
            self.segment = known[-1]
            self._begin()
        self._stale = False

    def _begin(self) -> Writer:
        """Open the segment's file behind what is committed of it."""
        if self._writer is None:
            self._writer = Writer(self.places.path(self.segment.name), self.segment.bytes)
        return self._writer

    def _whole(self, segment: Segment) -> bool:
        """Whether all that was committed of the open segment is still there to be continued."""
        try:
            return self.places.open.size(segment.name) >= segment.bytes
        except FileNotFoundError:
            return False

    def append(
        self,
        step: int,
        epoch: int,
        members: npt.ArrayLike,
        payload: bytes | None,
        lr: float,
        record: int | None,
    ) -> None:
        """See ``UpdateLog.append``."""
        self._check_usable()
        begins = step != self.last or record is None
        batch = self._batch(members if begins or self._members is None else self._members)
        if record is not None and record not in batch:
            raise LogError(
                f"record {record} is not in the batch of step {step}; a share belongs to a record "
                "of the batch."
            )
        if begins:
            self._check_order(step, epoch)
            self._make_room(step)
            self.pending.batches.append((step, batch))
            self.pending.pairs += len(batch)
            frame = None if payload is None or record is not None else self._write(step, payload)
            state = UNRECORDED if frame is None else LIVE
            place = (None,) * 4 if frame is None else self._place(frame)
            self.pending.steps.append((step, epoch, lr, state, *place))
            self.last, self.epoch = step, epoch
            self._members = batch
        if record is not None and payload is not None:
            frame = self._write(step, payload, record)
            self.pending.shares.append((step, record, *self._place(frame)))

    def _place(self, frame: Frame) -> tuple[Any, ...]:
        return (self.segment.id, frame.offset, frame.length, frame.digest)

    def _check_usable(self) -> None:
        """Refuse to go on where that would leave a hole."""
        if self._stale:
            self.restore()
        folder = self.index.path.parent
        if self.failed is not None:
            raise LogError(
                f"recording into {folder} ended at step {self.failed['step']} "
                f"({self.failed['reason']}); truncate it to that step to go on."
            )
        if self.lost is not None:
            raise LogError(
                f"steps from {self.lost} on could not be written to {folder}; truncate it to that "
                "step and train them again, or end the recording."
            )
        if self.finished:
            raise LogError(
                f"{folder} holds a training that has ended; record into another folder, or "
                "truncate it to go on from an earlier step."
            )

    def _check_order(self, step: int, epoch: int) -> None:
        """Refuse a step that is there already."""
        if step <= self.last or epoch < self.epoch:
            raise LogError(
                f"step {step} of epoch {epoch} cannot follow step {self.last} of epoch "
                f"{self.epoch} in {self.index.path.parent}; truncate it to the step to go on from."
            )

    def _batch(self, members: npt.ArrayLike) -> Ints:
        batch = np.unique(np.asarray(members, np.int64))
        if len(batch) and not 0 <= batch[0] <= batch[-1] < self.records:
            raise LogError(
                f"record number {batch[0] if batch[0] < 0 else batch[-1]} is not among the "
                f"{self.records} records of {self.index.path.parent}; give the numbers that they "
                "had when the log was created."
            )
        return batch

    def _make_room(self, step: int) -> None:
        """Commit or seal what has grown large enough, before a step begins."""
        try:
            if self.segment.frames >= self.per_segment:
                self.seal()
            elif len(self.pending.steps) >= MOST_STEPS or self.pending.pairs >= MOST_PAIRS:
                self.commit()
        except BaseException:
            self._lose(step)
            raise

    def _write(self, step: int, payload: bytes, record: int = BATCH) -> Frame:
        try:
            frame = self._begin().append(step, record, payload)
        except WriteError:
            self._lose(step)
            raise
        self.segment = self.segment.extended([frame])
        return frame

    def _lose(self, step: int | None = None) -> None:
        """After a failure: back to the last commit, remembering from where steps are missing."""
        begun = [*self.pending.steps[:1], *self.pending.shares[:1]]
        lost = [row[0] for row in begun] + [s for s in (step, self.lost) if s is not None]
        self.lost = min(lost, default=None)
        # What keeps the commit from succeeding may keep us from reading, too: later, then.
        with contextlib.suppress(EffaceError):
            self.restore()

    def event(self, kind: str, facts: Mapping[str, Any]) -> None:
        """See ``UpdateLog.event``."""
        if self._stale:
            self.restore()
        json.dumps(facts)
        self.pending.events.append((kind, facts, facts.get("step", max(self.last, 0))))

    def commit(self) -> None:
        """Make all that was appended count.

        Raises:
            WriteError: If it cannot be written; the log is then as of the last commit.
        """
        if not self.pending:
            return
        try:
            if self._writer is not None:
                self._writer.sync()
            with self.index.change():
                self._put_pending()
        except BaseException:
            self._lose()
            raise
        if self._writer is not None:
            self._writer.committed = self._writer.size
        self.pending = Pending()
        self.blocks.tidy()

    def _put_pending(self) -> None:
        pending, index = self.pending, self.index
        index.many("INSERT INTO steps VALUES(?,?,?,?,?,?,?,?)", pending.steps)
        index.many("INSERT INTO shares VALUES(?,?,?,?,?,?)", pending.shares)
        shared = sorted({(row[0],) for row in pending.shares})
        index.many(f"UPDATE steps SET state={LIVE} WHERE step=?", shared)
        for kind, facts, step in pending.events:
            put_event(index, kind, facts, step)
        self.blocks.add(pending.batches)
        if self.segment.frames:
            put_segment(index, self.segment)

    def seal(self) -> None:
        """Bring the open segment to where sealed ones lie, and begin another.

        Raises:
            WriteError: If that place cannot be written to; the segment stays open, and whole.
        """
        self.commit()
        if self._writer is None or not self.segment.frames:
            return
        deliver(self.places, self.segment)
        with self.index.change():
            self.index.do("UPDATE segments SET sealed=1 WHERE id=?", (self.segment.id,))
        self._writer.close()
        self._writer = None
        self.places.open.delete(self.segment.name)
        self.segment = fresh(self.segment.id + 1)

    def close(self) -> None:
        """Let go of the open segment; what was not committed is cut off it."""
        if self._writer is not None:
            self._writer.back()
            self._writer.close()
            self._writer = None


def deliver(places: Places, segment: Segment) -> None:
    """Put a local segment into the store, and see that it arrived as it was.

    Raises:
        WriteError: If it did not.
    """
    try:
        same = places.store.put(segment.name, places.path(segment.name))
        for start in range(0, 0 if same else segment.bytes, RANGE):
            here, there = (
                place.read(segment.name, start, min(start + RANGE, segment.bytes))
                for place in (places.open, places.store)
            )
            if digest(here) != digest(there):
                raise OSError("it arrived with another digest")
    except OSError as error:
        raise unwritten(f"segment {segment.name} to {places.store.where}", error) from error


def put_event(index: Index, kind: str, facts: Mapping[str, Any], step: int | None = None) -> None:
    """Write an event's row; with a step it is forgotten when the log is truncated to before it."""
    date = datetime.datetime.now(datetime.UTC).date().isoformat()
    index.do(
        "INSERT INTO events(date, step, kind, facts) VALUES(?,?,?,?)",
        (date, step, kind, json.dumps(dict(facts))),
    )
