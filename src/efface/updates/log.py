"""The update log: what every step of a training changed, kept so that it can be taken back.

A log is a folder: a manifest, an index, segment files. One process writes it, any number read it,
also while it is written. What a step stored is opaque here; see :mod:`efface.updates.codec`.
"""

from __future__ import annotations

import contextlib
import datetime
import secrets
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import numpy as np
import numpy.typing as npt

from efface.errors import LogError
from efface.updates import upkeep
from efface.updates.catalogue import ascending
from efface.updates.folder import (
    OPEN,
    SCHEMA,
    Lock,
    check_new,
    clear,
    make_private,
    read_manifest,
    write_manifest,
)
from efface.updates.index import Index
from efface.updates.reading import LogReader
from efface.updates.segments import INSIDE, probe, store_of, unwritten
from efface.updates.writing import Tail


class UpdateLog(LogReader):
    """A log that was made or opened; also a context manager.

    Leaving the context commits, unless an exception is the reason for leaving. Reading sees what is
    committed. One thread at a time may use an object; which one may change.

    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp()) / "log"
    >>> with UpdateLog.create(folder, {"created": "2026-01-01"}, ["0a" * 8, "0b" * 8]) as log:
    ...     log.append(0, 0, [0, 1], b"first", lr=0.1)
    ...     log.append(1, 0, [1], b"second", lr=0.1)
    >>> with UpdateLog.open(folder) as log:
    ...     log.steps_of([0]).tolist(), list(log.frames([1]))
    ([0], [(1, None, b'second')])
    """

    def __init__(
        self, folder: Path, manifest: Mapping[str, Any], index: Index, lock: Lock | None
    ) -> None:
        super().__init__(folder, manifest, index)
        self.recovered: dict[str, Any] | None = None
        self._lock = lock
        self._tail: Tail | None = None
        if lock is not None:
            per_segment = int(manifest["frames_per_segment"])
            self._tail = Tail(index, self._blocks, self._places, per_segment)

    @classmethod
    def create(
        cls,
        folder: str | Path,
        manifest: Mapping[str, Any],
        records: Sequence[str],
        *,
        cohorts: Mapping[int, int] | None = None,
        segments: str | None = None,
        frames_per_segment: int = 256,
        force: bool = False,
    ) -> UpdateLog:
        """Make a log and open it for writing.

        Args:
            folder: Where; new or empty.
            manifest: What is known of the training. An ``id`` and the date are added if absent.
            records: Tags of all records (``keys.tags``); the position is a record's number.
            cohorts: Number → cohort, of records that share batches.
            segments: Where sealed segments shall lie: a folder or any fsspec URL, in which the log
                uses a folder of its own name; ``None``: inside the log.
            frames_per_segment: Frames after which a segment is sealed.
            force: Replace a log that is there, its segments included.

        Raises:
            OutputError: If there is a log already, or something else.
            LogError: If another process writes to it, or segments cannot lie at that place.
            WriteError: If it cannot be written.
        """
        folder = Path(folder)
        check_new(folder, force)
        complete: dict[str, Any] = {
            "created": datetime.datetime.now(datetime.UTC).date().isoformat(),
            "id": secrets.token_hex(8),
            **manifest,
            "schema": SCHEMA,
            "segments": INSIDE if segments is None else segments,
            "frames_per_segment": frames_per_segment,
        }
        if segments is not None:
            if "://" not in segments and "::" not in segments:
                complete["segments"] = str(Path(segments).absolute())
            complete["segments_folder"] = f"{complete['id']}-{secrets.token_hex(4)}"
        _check_place(complete, folder)  # before anything is made
        with contextlib.ExitStack() as undo:
            try:
                make_private(folder)
                lock = Lock(folder)
                undo.callback(lock.release)
                check_new(folder, force)
                clear(folder)
                (folder / OPEN).mkdir()
            except OSError as error:
                raise unwritten(folder, error) from error
            index = Index.create(folder, records, cohorts or {}, str(complete["id"]))
            undo.callback(index.close)
            log = cls(folder, complete, index, lock)
            write_manifest(folder, complete)
            undo.pop_all()
        return log

    @classmethod
    def open(cls, folder: str | Path, *, write: bool = False) -> UpdateLog:
        """Open a log; for writing, after what a killed writer has left was put in order.

        A purge that was interrupted is finished then, and ``recovered`` holds its report; while a
        segment that it needs is missing it waits, and ``recovered`` is None.

        Raises:
            LogError: If the folder is no log, or the log is damaged, of a newer efface, or locked.
            WriteError: If it shall be written to and cannot be.
        """
        folder = Path(folder)
        manifest = read_manifest(folder)
        with contextlib.ExitStack() as undo:
            lock = None
            if write:
                lock = Lock(folder)
                undo.callback(lock.release)
            index = Index(folder, write)
            undo.callback(index.close)
            if index.get("id") != manifest["id"]:
                raise LogError(
                    f"index and manifest of {folder} belong to different logs; restore both from "
                    "one copy."
                )
            log = cls(folder, manifest, index, lock)
            if write:
                log.recovered = upkeep.recover(log._upkeep())
            undo.pop_all()
        return log

    def close(self) -> None:
        """Commit what was appended, and give back the lock."""
        try:
            if self._tail is not None and self._tail.lost is None:
                self._tail.commit()
        finally:
            self._release()

    def _release(self) -> None:
        if self._tail is not None:
            self._tail.close()
        self._index.close()
        if self._lock is not None:
            self._lock.release()
        self._tail = self._lock = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None:
            self.close()
        else:
            self._release()

    def _writing(self) -> Tail:
        if self._tail is None:
            raise LogError(f"{self.folder} is not open for writing; open it with write=True, once.")
        return self._tail

    def _upkeep(self) -> upkeep.Log:
        return upkeep.Log(self._index, self._blocks, self._places, self._writing())

    def append(
        self,
        step: int,
        epoch: int,
        members: npt.ArrayLike,
        payload: bytes | None,
        *,
        lr: float,
        record: int | None = None,
    ) -> None:
        """Add an update behind the others; it counts from the next commit on.

        A commit also comes by itself every thousand steps, and before a segment is sealed.

        Args:
            step: Number of the optimiser step; larger than all before, but that several records'
                shares of one step follow each other.
            epoch: The epoch that it belongs to; never smaller than before.
            members: Numbers of the records in its batch.
            payload: What is to be stored; ``None``: only that the step was.
            lr: Learning rate of the step.
            record: The record whose share of the step this is; ``None``: of the whole batch.

        Raises:
            WriteError: If it cannot be written. The log is then as of its last commit, and takes
                no more steps before :meth:`truncate` or :meth:`fail`: there is no silent hole.
            LogError: If the step would be a double, leave a hole, or holds unknown records.
        """
        owner = None if record is None else int(record)
        self._writing().append(int(step), int(epoch), members, payload, float(lr), owner)

    def commit(self) -> None:
        """Make everything appended durable: the segment's bytes first, then one transaction.

        Raises:
            WriteError: If it cannot be written; the log is then as of its last commit.
        """
        self._writing().commit()

    def truncate(self, step: int) -> None:
        """Forget this step and all later ones, which will be trained again."""
        upkeep.truncate(self._upkeep(), int(step))

    def seal(self) -> None:
        """Commit, and bring the open segment to where sealed ones lie."""
        self._writing().seal()

    def finish(self, **facts: Any) -> None:
        """The training has ended: commit, seal and keep these facts (JSON values)."""
        self.seal()
        with self._index.change():
            self._index.put("finished", facts)
        self._writing().finished = True

    def event(self, kind: str, **facts: Any) -> None:
        """Note something that ``log show`` should tell, with the next commit.

        Args:
            kind: What happened, in a word.
            facts: JSON values. With a ``step`` the event is forgotten when the log is truncated to
                that step or before; without, it belongs to the last step appended.
        """
        self._writing().event(kind, facts)

    def fail(self, step: int, reason: str) -> None:
        """Recording has ended early: steps from here on are not in the log."""
        tail = self._writing()
        facts = {"step": int(step) if tail.lost is None else min(step, tail.lost), "reason": reason}
        if tail.lost is None:
            tail.commit()
        with self._index.change():
            self._index.put("failed", facts)
        tail.restore()
        tail.lost = None

    def purge(
        self,
        numbers: npt.ArrayLike,
        progress: upkeep.Progress | None = None,
        *,
        force: bool = False,
    ) -> dict[str, Any]:
        """Erase what was stored of steps that held these records, and the records' own entries.

        Of a step that was stored by single records, only these records' shares go. Tags and step
        lists of the records go at the end, and the index is compacted. Killed half way,
        the log finishes the purge when it is next opened for writing; run again, it ends the same.

        Args:
            numbers: Records.
            progress: Told how many of how many segments are done.
            force: Give up segments that are missing, with all that they hold, instead of refusing;
                should they come back, the next opening for writing deletes them.

        Returns:
            ``steps`` and ``frames`` that lost their update, ``bytes`` freed, ``records`` forgotten,
            and the names of segments that were ``missing`` (with ``force``).

        Raises:
            WriteError: If the disk is full, or segments are missing or cannot be reached; run it
                again then.
        """
        return upkeep.purge(self._upkeep(), self._known(numbers), progress, force)

    def erase(
        self,
        steps: npt.ArrayLike | None = None,
        *,
        epochs: tuple[int, int] | None = None,
        why: Literal["expired", "thinned"] = "expired",
        progress: upkeep.Progress | None = None,
        force: bool = False,
    ) -> dict[str, Any]:
        """Erase what was stored of steps, or of a range of epochs (first, last); rows stay.

        Killed half way, run again: the same end. Missing segments are treated as by :meth:`purge`.
        """
        state = upkeep.state_of(why)
        self.commit()
        wanted = np.unique(np.asarray([] if steps is None else steps, np.int64))
        if epochs is not None:
            inside = ascending(self._index, "epoch BETWEEN ? AND ?", epochs)
            wanted = np.union1d(wanted, inside)
        doomed = upkeep.Doomed(wanted, None, state)
        return upkeep.erase(self._upkeep(), doomed, None, progress, force)


def _check_place(manifest: Mapping[str, Any], folder: Path) -> None:
    """See that segments can lie where they shall, if that is not inside the log."""
    store, place = store_of(manifest, folder), str(manifest["segments"])
    if place == INSIDE:
        return
    if place.startswith("memory:"):
        warnings.warn(f"segments at {place} are gone when this process ends", stacklevel=3)
    probe(store, place)
