"""What is done to a log as a whole: truncating, purging, erasing, and tidying up.

Frames are erased by writing their segment anew without them, under another name: the new file is
made durable, one transaction switches to it, then the old one is deleted. Killed anywhere, the log
has the one or the other; files that no table names go when it is next opened for writing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from efface.errors import LogError, WriteError
from efface.updates.blocks import Blocks
from efface.updates.catalogue import (
    BATCH,
    GIVEN_UP,
    LIVE,
    PURGED,
    STATES,
    Places,
    Segment,
    frames_in,
    put_segment,
    renamed,
    segments,
)
from efface.updates.index import Index
from efface.updates.membership import Ints
from efface.updates.segments import HEADER, Frame, Writer, streamed, unwritten
from efface.updates.writing import Tail, deliver, put_event

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Log:
    """What upkeep works on: a log that is open for writing."""

    index: Index
    blocks: Blocks
    places: Places
    tail: Tail


class Switch(NamedTuple):
    """A segment and what takes its place: its frames as they will lie, and its new row."""

    old: Segment
    new: Segment
    frames: list[Frame]
    missing: bool = False


def prepare(log: Log, old: Segment, keep: Sequence[Frame]) -> Switch:
    """Write a segment anew with some of its frames; nothing counts yet.

    Where the old file is gone there is nothing to erase, and nothing is written. Frames that are
    damaged stay damaged.

    Raises:
        WriteError: If the new segment cannot be written.
    """
    new = renamed(old)
    if not keep:
        return Switch(old, new, [])
    writer, frames = Writer(log.places.path(new.name)), []
    try:
        for frame, data in streamed(log.places.of(old), old.name, keep):
            offset = writer.copy(data.ljust(HEADER.size + frame.length, b"\0"))
            frames.append(frame._replace(offset=offset))
        writer.sync()
        new = new.extended(frames)
        deliver(log.places, new)
    except FileNotFoundError:
        return Switch(old, old, list(keep), missing=True)
    except OSError as error:
        raise unwritten(f"segment {new.name} in place of {old.name}", error) from error
    finally:
        writer.close()
        log.places.open.delete(new.name)
    return Switch(old, new, frames)


def put_switch(index: Index, switch: Switch) -> None:
    """Let the new segment count instead of the old one, inside a transaction."""
    places = [(frame.offset, frame.step, frame.record) for frame in switch.frames]
    index.many("UPDATE steps SET offset=? WHERE step=?", [p[:2] for p in places if p[2] == BATCH])
    index.many(
        "UPDATE shares SET offset=? WHERE step=? AND record=?", [p for p in places if p[2] != BATCH]
    )
    put_segment(index, switch.new)


def dispose(log: Log, switch: Switch) -> None:
    """Delete the file that no table names any more."""
    if switch.new.name == switch.old.name:
        return
    try:
        log.places.of(switch.old).delete(switch.old.name)
    except OSError as error:
        raise unwritten(f"segment {switch.old.name}", error) from error


def truncate(log: Log, step: int) -> None:
    """Forget this step and all later ones, in one transaction."""
    if log.tail.lost is None:
        log.tail.commit()
    log.tail.close()
    index, switches = log.index, []
    for segment in segments(index, "last >= ?", (step,)):
        keep = [frame for frame in frames_in(index, segment) if frame.step < step]
        if segment.sealed:
            switches.append(prepare(log, segment, keep))
        else:
            new = segment._replace(frames=0, bytes=0).extended(keep)
            switches.append(Switch(segment, new, []))
    with index.change():
        for table in ("steps", "shares", "events"):
            index.do(f"DELETE FROM {table} WHERE step >= ?", (step,))
        log.blocks.cut(step)
        for switch in switches:
            put_switch(index, switch)
        failed = index.get("failed")
        if failed is not None and failed["step"] >= step:
            index.put("failed", None)
        index.put("finished", None)
    for switch in switches:
        dispose(log, switch)
    lost = log.tail.lost
    log.tail.restore()
    log.tail.lost = lost if lost is not None and lost < step else None
    sweep(log)


class Doomed(NamedTuple):
    """Frames to be erased: those of whole batches of ``steps``, and single records' shares."""

    steps: Ints
    records: Ints | None
    """Whose shares go, in whatever step; ``None``: all shares of ``steps``."""
    state: int

    def has(self, frame: Frame) -> bool:
        """Whether a frame goes."""
        if frame.record != BATCH and self.records is not None:
            return _contains(self.records, frame.record)
        return _contains(self.steps, frame.step)

    def touches(self, segment: Segment) -> bool:
        """Whether a segment may hold such a frame."""
        low, high = np.searchsorted(self.steps, [segment.first, segment.last + 1])
        return bool(low < high)


def _contains(ascending: Ints, value: int) -> bool:
    at = int(np.searchsorted(ascending, value))
    return at < len(ascending) and int(ascending[at]) == value


def absent(log: Log, doomed: Doomed) -> list[Segment]:
    """Segments that hold frames to be erased, and are not where they should be.

    Raises:
        WriteError: If the place of the segments cannot be reached.
    """
    there = {}
    for sealed, store in enumerate((log.places.open, log.places.store)):
        try:
            there[sealed] = set(store.names())
        except OSError as error:
            raise unwritten(store.where, error) from error
    return [
        segment
        for segment in segments(log.index)
        if segment.name not in there[segment.sealed]
        and doomed.touches(segment)
        and any(map(doomed.has, frames_in(log.index, segment)))
    ]


def _gone(log: Log, lost: Sequence[Segment]) -> WriteError:
    more = "" if len(lost) == 1 else f" and {len(lost) - 1} more"
    return WriteError(
        f"segment {lost[0].name}{more} in {log.places.of(lost[0]).where}, with updates that are "
        "to be erased, cannot be found; bring it back there and give the same command again."
    )


def _give_up(old: Segment, keep: Sequence[Frame]) -> Switch:
    """Do without a missing segment: no table names its file any more, should it come back."""
    return Switch(old, renamed(old).extended(keep), list(keep), missing=True)


def erase(
    log: Log, doomed: Doomed, note: str | None, progress: Progress | None, force: bool = False
) -> dict[str, Any]:
    """Erase frames, segment by segment.

    Args:
        log: The log.
        doomed: Which ones.
        note: Where the index keeps counts while this is under way, so that they are right after a
            kill, too; ``None``: nowhere.
        progress: Told how many of how many segments are done.
        force: Give up segments that are missing, instead of refusing.

    Returns:
        How many steps and frames lost their update, bytes freed, and segments that were missing.

    Raises:
        WriteError: If a segment is missing: what cannot be found cannot be erased.
    """
    lost = absent(log, doomed)  # before sealing, which would make the folder of a mount anew
    if lost and not force:
        raise _gone(log, lost)
    missing = {segment.id for segment in lost}
    log.tail.seal()
    index = log.index
    total = (index.get(note) if note else None) or {}
    total = {"steps": 0, "frames": 0, "bytes": 0, "missing": [], **total}
    todo = [segment for segment in segments(index) if doomed.touches(segment)]
    for done, segment in enumerate(todo):
        frames = frames_in(index, segment)
        gone = [frame for frame in frames if doomed.has(frame)]
        if gone:
            keep = [frame for frame in frames if not doomed.has(frame)]
            if segment.id in missing:
                switch = _give_up(segment, keep)
            elif (switch := prepare(log, segment, keep)).missing:  # it went while this is at work
                raise _gone(log, [segment])
            _count(total, switch, gone)
            with index.change():
                put_switch(index, switch)
                if switch.missing:
                    index.put(GIVEN_UP, [*(index.get(GIVEN_UP) or []), segment.name])
                total["steps"] += _forget(index, gone, doomed.state)
                if note:
                    index.put(note, total)
            dispose(log, switch)
        if progress:
            progress(done + 1, len(todo))
    log.tail.restore()
    return total


def _count(total: dict[str, Any], switch: Switch, gone: Sequence[Frame]) -> None:
    total["frames"] += len(gone)
    if switch.missing:
        total["missing"] += [switch.old.name]
    else:
        total["bytes"] += sum(HEADER.size + frame.length for frame in gone)


def _forget(index: Index, gone: Sequence[Frame], state: int) -> int:
    """Note that frames are gone; how many steps have none left."""
    for frame in gone:
        if frame.record == BATCH:
            index.do(
                "UPDATE steps SET segment=NULL, offset=NULL, length=NULL, digest=NULL WHERE step=?",
                (frame.step,),
            )
        else:
            index.do("DELETE FROM shares WHERE step=? AND record=?", (frame.step, frame.record))
    return sum(
        index.do(
            f"UPDATE steps SET state=? WHERE step=? AND state={LIVE} AND segment IS NULL "
            "AND NOT EXISTS(SELECT 1 FROM shares WHERE shares.step=steps.step)",
            (state, step),
        )
        for step in sorted({frame.step for frame in gone})
    )


def purge(
    log: Log, numbers: Ints, progress: Progress | None, force: bool = False
) -> dict[str, Any]:
    """See ``UpdateLog.purge``."""
    log.tail.commit()
    unfinished = np.array(log.index.get("purging") or [], np.int64)
    with log.index.change():
        log.index.put("purging", np.union1d(numbers, unfinished).tolist())
    return finish_purge(log, progress, force)


def _purging(log: Log) -> Doomed:
    """What the purge that is under way erases."""
    numbers = np.array(log.index.get("purging"), np.int64)
    return Doomed(log.blocks.steps_of(numbers), numbers, PURGED)


def finish_purge(log: Log, progress: Progress | None = None, force: bool = False) -> dict[str, Any]:
    """Do what is left of a purge; its last transaction forgets the records themselves."""
    index = log.index
    numbers = np.array(index.get("purging"), np.int64)
    report = erase(log, _purging(log), "purged", progress, force)
    known = list(
        index.among(
            "SELECT 1 FROM records WHERE tag IS NOT NULL AND number IN ({})", numbers.tolist()
        )
    )
    report["records"] = len(known)
    with index.change():
        log.blocks.drop(numbers)
        index.many(
            # the cohort stays: who shared batches with whom decides the replay of all others
            "UPDATE records SET tag=NULL WHERE number=?",
            ((number,) for number in numbers.tolist()),
        )
        for key in ("purging", "purged"):
            index.put(key, None)
        index.put("vacuum", True)
        if known:
            put_event(index, "purge", report)
    finish_vacuum(index)
    log.tail.restore()
    sweep(log)
    return report


def finish_vacuum(index: Index) -> None:
    """Give back what a purge has freed; when killed, the next opening does it."""
    if index.get("vacuum"):
        index.vacuum()
        with index.change():
            index.put("vacuum", None)


def sweep(log: Log) -> None:
    """Remove files that no table names: of commits, seals and switches that never came.

    Also segments that a purge gave up while they were missing, and that have come back.

    Raises:
        WriteError: If the place of the segments cannot be reached.
    """
    known = segments(log.index)
    for store, sealed in ((log.places.open, False), (log.places.store, True)):
        named = {segment.name for segment in known if bool(segment.sealed) == sealed}
        if not sealed:
            named.add(log.tail.segment.name)
        try:
            for name in store.names():
                if name not in named:
                    store.delete(name)
        except OSError as error:
            raise unwritten(store.where, error) from error


def recover(log: Log) -> dict[str, Any] | None:
    """Finish what a killed writer has begun; the report of a purge if one was under way.

    A purge whose segments are still missing is left for later: the log stays usable.
    """
    sweep(log)
    finish_vacuum(log.index)
    if log.index.get("purging") is None or absent(log, _purging(log)):
        return None
    return finish_purge(log)


def state_of(why: str) -> int:
    """The number of a state that an erasure may give.

    Raises:
        LogError: If there is no such state.
    """
    if why not in ("expired", "thinned"):
        raise LogError(f"steps cannot be erased as {why!r}; give 'expired' or 'thinned'.")
    return STATES.index(why)
