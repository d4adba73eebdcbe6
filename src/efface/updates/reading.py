"""Reading a log: never needs a lock or write access, and works while a writer is at work."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from efface.errors import LogError
from efface.updates.blocks import Blocks
from efface.updates.catalogue import (
    BATCH,
    GIVEN_UP,
    LIVE,
    STATES,
    Places,
    Segment,
    ascending,
    check_live,
    column,
    frames_in,
    located,
    located_all,
    segments,
    states,
)
from efface.updates.folder import CHECKPOINTS, OPEN
from efface.updates.index import Index
from efface.updates.membership import Ints
from efface.updates.segments import (
    HEADER,
    Damage,
    Folder,
    Frame,
    payload_of,
    store_of,
    streamed,
)


class LogReader:
    """What can be read of a log: see :class:`efface.updates.log.UpdateLog`.

    Args:
        folder: The log.
        manifest: Its manifest.
        index: Its index.
    """

    def __init__(self, folder: Path, manifest: Mapping[str, Any], index: Index) -> None:
        self.folder = folder
        self.manifest: dict[str, Any] = dict(manifest)
        self.id = str(manifest["id"])
        self._index = index
        self._blocks = Blocks(index)
        store = store_of(manifest, folder)
        self._places = Places(Folder(folder / OPEN), store)

    def info(self) -> dict[str, Any]:
        """What there is: counts of steps (also by state), bytes, segments, records, and events.

        ``bytes`` and ``frames`` are of the segments, ``index_bytes`` of the index beside them.
        ``finished`` holds what ``finish`` was given, ``failed`` step and reason of ``fail``; None
        where there was none.
        """
        index = self._index
        with index.read():
            found = dict(index.rows("SELECT state, COUNT(*) FROM steps GROUP BY state"))
            counts = {state: found.get(place, 0) for place, state in enumerate(STATES)}
            ends = index.one("SELECT MIN(step), MAX(step) FROM steps")
            epochs = [index.one("SELECT epoch FROM steps WHERE step=?", (end,)) for end in ends]
            known = segments(index)
            records, tagged = index.one("SELECT COUNT(*), COUNT(tag) FROM records")
            failed = index.get("failed")
            return {
                "id": self.id,
                "created": self.manifest.get("created"),
                "steps": sum(counts.values()),
                "first_step": ends[0],
                "last_step": ends[1],
                "epochs": epochs[1][0] - epochs[0][0] + 1 if epochs[0] else 0,
                "states": counts,
                "purged": {"records": records - tagged, "steps": counts["purged"]},
                "bytes": sum(segment.bytes for segment in known),
                "frames": sum(segment.frames for segment in known),
                "segments": len(known),
                "index_bytes": index.path.stat().st_size,
                "records": records,
                "events": self._events(),
                "finished": index.get("finished"),
                "failed": failed,
                "failed_at": None if failed is None else failed["step"],
            }

    def _events(self) -> list[dict[str, Any]]:
        rows = self._index.rows("SELECT date, step, kind, facts FROM events ORDER BY id")
        return [
            {"date": date, "at": step, "kind": kind, **json.loads(facts)}
            for date, step, kind, facts in rows
        ]

    def numbers(self, tags: Sequence[str], *, known_only: bool = False) -> Ints:
        """Numbers of records, in the order of their tags.

        Args:
            tags: From ``keys.tags``, with the key of the log.
            known_only: Leave out unknown tags instead of refusing them.

        Raises:
            LogError: If tags are not in the log, with how many.
        """
        found: dict[str, int] = {}
        for start in range(0, len(tags), 500):
            part = list(tags[start : start + 500])
            marks = ",".join("?" * len(part))
            query = f"SELECT tag, number FROM records WHERE tag IN ({marks})"
            found.update(self._index.rows(query, part))
        unknown = len([tag for tag in tags if tag not in found])
        if unknown and not known_only:
            raise LogError(
                f"{unknown} of the {len(tags)} records are not in {self.folder}: never seen in "
                "this training, purged, or tagged with another key; leave them out."
            )
        return np.array([found[tag] for tag in tags if tag in found], np.int64)

    def tags(self) -> list[str | None]:
        """Tag of every record by number; None where it was purged."""
        return [tag for (tag,) in self._index.rows("SELECT tag FROM records ORDER BY number")]

    def cohorts(self) -> dict[int, int]:
        """Number → cohort, of the records that have one."""
        query = "SELECT number, cohort FROM records WHERE cohort IS NOT NULL ORDER BY number"
        return dict(self._index.rows(query))

    def steps_of(self, numbers: npt.ArrayLike) -> Ints:
        """Steps whose batch held any of these records, ascending, whatever became of them.

        Raises:
            LogError: If a number is not of a record of this log.
        """
        return self._blocks.steps_of(self._known(numbers))

    def seen(self, numbers: npt.ArrayLike) -> npt.NDArray[np.bool_]:
        """Which of these records were in any step's batch, in the order given."""
        self._known(numbers)
        return self._blocks.seen(_steps(numbers))

    def _known(self, numbers: npt.ArrayLike) -> Ints:
        wanted = np.unique(np.asarray(numbers, np.int64))
        n = int(self._index.one("SELECT COUNT(*) FROM records")[0])
        if len(wanted) and not 0 <= wanted[0] <= wanted[-1] < n:
            raise LogError(
                f"record number {wanted[0] if wanted[0] < 0 else wanted[-1]} is not among the {n} "
                f"records of {self.folder}; give numbers that it knows."
            )
        return wanted

    def epochs_of(self, numbers: npt.ArrayLike) -> Ints:
        """Epochs in which any of these records was in a batch, ascending."""
        with self._index.read():
            steps = self.steps_of(numbers)
            rows = self._index.rows("SELECT epoch, MIN(step) FROM steps GROUP BY epoch")
        if not rows:
            return np.zeros(0, np.int64)
        epochs, starts = np.array(rows, np.int64).T
        return np.unique(epochs[np.searchsorted(starts, steps, side="right") - 1])

    def states(self, steps: npt.ArrayLike) -> npt.NDArray[np.str_]:
        """What became of each step: live, unrecorded, purged, expired or thinned.

        Raises:
            LogError: If a step is not in the log.
        """
        return states(self._index, _steps(steps))

    def live(self) -> Ints:
        """All steps whose update is there, ascending."""
        return ascending(self._index, f"state={LIVE}")

    def bytes_of(self, steps: npt.ArrayLike, records: Iterable[int] | None = None) -> int:
        """Bytes of payload that :meth:`frames` would read; steps without an update count 0."""
        own = None if records is None else frozenset(map(int, records))
        groups = located_all(self._index, np.unique(_steps(steps)), own)
        return sum(frame.length for _, frames in groups for frame in frames)

    def rates(self, steps: npt.ArrayLike) -> npt.NDArray[np.float64]:
        """Learning rate of each step.

        Raises:
            LogError: If a step is not in the log.
        """
        return np.array(column(self._index, "lr", _steps(steps)), np.float64)

    def sizes(self) -> dict[int, int]:
        """Bytes of payload stored for each epoch."""
        total = dict(
            self._index.rows("SELECT epoch, COALESCE(SUM(length), 0) FROM steps GROUP BY epoch")
        )
        shares = self._index.rows(
            "SELECT epoch, SUM(shares.length) FROM shares JOIN steps USING(step) GROUP BY epoch"
        )
        for epoch, size in shares:
            total[epoch] += size
        return total

    def frames(
        self, steps: npt.ArrayLike, records: Iterable[int] | None = None
    ) -> Iterator[tuple[int, int | None, bytes]]:
        """What was stored for some steps, in storage order, in bounded memory.

        Args:
            steps: Steps, each once.
            records: Leave out what belongs to other single records; ``None``: all frames.

        Yields:
            Step, record (None: of the whole batch) and payload, its digest checked.

        Raises:
            LogError: At once, if a step is not in the log or its update is gone; when it comes to
                them, if frames are damaged or missing, with their segment.
        """
        wanted = np.unique(_steps(steps))
        check_live(self._index, wanted)
        own = None if records is None else frozenset(map(int, records))
        groups = located_all(self._index, wanted, own)
        return (found for number, frames in groups for found in self._read(number, frames, own))

    def _read(
        self, number: int, frames: list[Frame], records: frozenset[int] | None
    ) -> Iterator[tuple[int, int | None, bytes]]:
        """Frames of one segment; where a writer moved it meanwhile, from where it is now."""
        found = segments(self._index, "id=?", (number,))
        done = 0
        try:
            if not found:
                raise FileNotFoundError
            for frame, data in streamed(self._places.of(found[0]), found[0].name, frames):
                payload = payload_of(frame, data)
                yield frame.step, None if frame.record == BATCH else frame.record, payload
                done += 1
            return
        except FileNotFoundError:
            problem = "missing"
        except OSError as error:
            problem = f"not readable ({error.strerror or error})"
        except Damage as error:
            problem = str(error)
        left = {(frame.step, frame.record) for frame in frames[done:]}
        steps = np.unique([step for step, _ in left])
        check_live(self._index, steps)
        now = [
            (segment, [f for f in moved if (f.step, f.record) in left])
            for segment, moved in located(self._index, steps, records)
        ]
        if now == [(number, frames[done:])] and segments(self._index, "id=?", (number,)) == found:
            raise self._unread(
                found[0].name, self._places.of(found[0]).where, frames[done], problem
            )
        for segment, moved in now:
            yield from self._read(segment, moved, records)

    def _unread(self, name: str, where: str, frame: Frame, problem: str) -> LogError:
        return LogError(
            f"the update of step {frame.step} in segment {name} of {where} is {problem}; restore "
            "that file from a copy, or leave its steps out (all other segments stay usable)."
        )

    def verify(self) -> list[dict[str, Any]]:
        """Read everything: per segment its name, frames, bytes, whether it is ok, and a sentence.

        Behind the segments come the states that are kept for replaying, a row each, with 0 frames.

        Raises:
            LogError: If the index itself is damaged.
        """
        self._index.check()
        return [
            *_verified_all(self._index, self._places),
            *_returned(self._index, self._places),
            *_verified_states(self.folder, self.id),
        ]


def _steps(steps: npt.ArrayLike) -> Ints:
    return np.atleast_1d(np.asarray(steps, np.int64))


def _verified_all(index: Index, places: Places) -> Iterator[dict[str, Any]]:
    """Read all segments, one at a time; see ``LogReader.verify``."""
    for number in [segment.id for segment in segments(index)]:
        now = segments(index, "id=?", (number,))
        while now:
            row = _verified(index, places, now[0])
            before, now = now, segments(index, "id=?", (number,))
            if row["ok"] or now == before:  # else a writer has moved it meanwhile
                yield row
                break


def _verified(index: Index, places: Places, segment: Segment) -> dict[str, Any]:
    place, problem = places.of(segment), None
    try:
        frames = frames_in(index, segment)
        named = sum(HEADER.size + frame.length for frame in frames)
        last = index.one("SELECT MAX(id) FROM segments")[0]
        growing = not segment.sealed and segment.id == last  # bytes behind wait for their commit
        extra = (segment.bytes if growing else place.size(segment.name)) - named
        damaged = list(_damaged(places, segment, frames))
        if damaged:
            more = "" if len(damaged) == 1 else f" and {len(damaged) - 1} more frames"
            problem = f"the update of {damaged[0]}{more}"
        elif extra > 0:
            problem = f"it holds {extra} bytes that the index does not name"
    except FileNotFoundError:
        problem = "it is missing"
    except OSError as error:
        problem = f"it cannot be read: {error.strerror or error}"
    sentence = (
        f"segment {segment.name} in {place.where} (steps {segment.first} to {segment.last}) is "
        f"damaged, {problem}; restore it from a copy, or do without these steps."
    )
    return {
        "name": segment.name,
        "frames": segment.frames,
        "bytes": segment.bytes,
        "ok": problem is None,
        "sentence": sentence if problem else "every frame is as it was written.",
    }


def _damaged(places: Places, segment: Segment, frames: Sequence[Frame]) -> Iterator[str]:
    for frame, data in streamed(places.of(segment), segment.name, frames):
        try:
            payload_of(frame, data)
        except Damage as problem:
            yield f"step {frame.step} is {problem}"


def _returned(index: Index, places: Places) -> Iterator[dict[str, Any]]:
    """Segments that a purge gave up while they were missing, and that have come back."""
    for name in index.get(GIVEN_UP) or []:
        for place in (places.open, places.store):
            with contextlib.suppress(OSError):
                yield {
                    "name": name,
                    "frames": 0,
                    "bytes": place.size(name),
                    "ok": False,
                    "sentence": f"segment {name} has come back to {place.where} after a purge gave "
                    "it up as missing; open the log for writing, which deletes it.",
                }


def _verified_states(folder: Path, log: str) -> Iterator[dict[str, Any]]:
    """Read the states that a replay can begin with, one at a time."""
    from efface.journal import Journal  # it loads torch, which no other reading of a log needs

    journal = Journal(folder / CHECKPOINTS, {"log": log})
    for path in sorted((folder / CHECKPOINTS).glob("epoch-*.safetensors")):
        whole = journal.read(path.stem) is not None
        try:
            size = path.stat().st_size
        except FileNotFoundError:  # a purge has dropped it meanwhile
            continue
        sentence = (
            f"state {path.name} in {path.parent} is damaged; restore it from a copy, or do without "
            "it (a replay then goes on from an earlier one, and takes longer)."
        )
        yield {
            "name": path.name,
            "frames": 0,
            "bytes": size,
            "ok": whole,
            "sentence": "it is as it was written." if whole else sentence,
        }
