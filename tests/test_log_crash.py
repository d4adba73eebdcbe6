"""Recording and purging that are killed, hundreds of times, at moments that chance chooses.

Forked processes get real SIGKILLs: some from outside, after a random time; the others from
themselves, at a random one of the moments that matter: before or after every write (also half way
through it), fsync, link, rename, removal and commit, of the log's own as of SQLite's transactions.
After each the log is opened as it lies there and every promise is checked against what the steps
were made of; then the same folder goes on being recorded into, or purged.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import random
import shutil
import signal
import sqlite3
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from efface.updates import blocks, writing
from efface.updates.index import Index
from efface.updates.log import UpdateLog

from .test_log import everything, members_of, payload_of, segment_files, tag_of, tmp_path

__all__ = ["tmp_path"]

RECORDS, BATCH, STEPS, PER_EPOCH, CHECKPOINT = 40, 4, 90, 30, 9
DOOMED = [3, 17]
MOMENTS = ("fsync", "link", "replace", "unlink", "ftruncate", "write", "mkdir")


def batch(step: int) -> list[int]:
    return members_of(step, RECORDS, BATCH)


def stored(step: int) -> bool:
    return step % 7 != 5


def shares_of(step: int, kind: str) -> list[int | None]:
    """Whose frames a step has."""
    if not stored(step):
        return []
    return [None] if kind == "batch" else list(batch(step)[:2])


# -- killing --------------------------------------------------------------------------------------


class Fuse:
    """Counts the moments that matter; kills its process at one of them."""

    def __init__(self, moment: int | None, draw: random.Random) -> None:
        self.left, self.draw = moment, draw

    def burn(self) -> bool:
        """Whether this is the moment."""
        if self.left is None:
            return False
        self.left -= 1
        return self.left == 0

    def around(self, real: Callable[..., Any]) -> Callable[..., Any]:
        """A call that dies before or after doing its work, when its time has come."""

        def call(*arguments: Any, **options: Any) -> Any:
            if not self.burn():
                return real(*arguments, **options)
            if self.draw.random() < 0.5:
                if real is WRITE:  # torn: a part of it reaches the file
                    real(arguments[0], arguments[1][: self.draw.randrange(len(arguments[1]) + 1)])
                elif self.draw.random() < 0.8:
                    real(*arguments, **options)
            return os.kill(os.getpid(), signal.SIGKILL)

        return call


WRITE = os.write


def wire(fuse: Fuse, spill: bool) -> None:
    """Put the fuse into a process that was forked for it."""
    for name in MOMENTS:
        setattr(os, name, fuse.around(getattr(os, name)))
    Index.commit = fuse.around(Index.commit)  # type: ignore[method-assign]
    Index.vacuum = fuse.around(Index.vacuum)  # type: ignore[method-assign]
    Index.do = fuse.around(Index.do)  # type: ignore[method-assign]
    Index.many = fuse.around(Index.many)  # type: ignore[method-assign]
    if spill:  # transactions reach the file before their commit, as large ones do
        real = Index._writer

        def spilling(self: Index) -> sqlite3.Connection:
            connection = real(self)
            connection.execute("PRAGMA cache_size=2")
            return connection

        Index._writer = spilling  # type: ignore[method-assign]


def small() -> None:
    """Folds, merges and seals every few steps."""
    blocks.FOLD_STEPS, blocks.FAN, writing.MOST_STEPS = 6, 2, 11


@dataclass
class Tally:
    """What the kills have met."""

    killed: int = 0
    ended: int = 0
    hot: int = 0
    swept: int = 0
    found: set[str] = field(default_factory=set)


def killed_while(
    work: Callable[[], None], draw: random.Random, moments: int, seconds: float
) -> bool:
    """Fork, run and kill; whether it was killed before it had ended."""
    by_clock = draw.random() < 0.35
    few = int(moments ** draw.random()) if draw.random() < 0.4 else moments  # early ones, too
    moment = None if by_clock else draw.randint(1, few)
    spill, seed = draw.random() < 0.5, draw.random()
    child = os.fork()
    if child == 0:
        status = 3
        try:
            small()
            wire(Fuse(moment, random.Random(seed)), spill)
            work()
            status = 0
        except BaseException as error:
            WRITE(2, f"{error!r}\n".encode())
        os._exit(status)
    if by_clock:
        time.sleep(draw.uniform(0, seconds))
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, "the work itself failed"
    return os.WIFSIGNALED(status)


# -- recording ------------------------------------------------------------------------------------


class Training:
    """What survives a kill beside the log: the checkpoint, and which commits had returned."""

    def __init__(self, place: Path, kind: str) -> None:
        self.log, self.checkpoint, self.kind = place / "log", place / "checkpoint", kind
        self.shared = mmap.mmap(-1, 8)
        self.promise(0)

    def promise(self, steps: int) -> None:
        self.shared[:] = steps.to_bytes(8, "little")

    @property
    def promised(self) -> int:
        """Steps that a commit which returned had covered."""
        return int.from_bytes(self.shared[:], "little")

    def start(self) -> int:
        return int(self.checkpoint.read_text()) if self.checkpoint.exists() else 0

    def __call__(self) -> None:
        """Train from the last checkpoint to the end, as the recorder would."""
        draw = random.Random(time.time_ns())
        with self.opened() as log:
            first = self.start()
            self.promise(min(first, self.promised))
            log.truncate(first)
            for step in range(first, STEPS):
                self.record(log, step)
                if draw.random() < 0.3 or step % CHECKPOINT == 0:
                    log.commit()
                    self.promise(step + 1)
                if step % CHECKPOINT == 0:
                    self.keep(step + 1)
            log.finish(weights="w")
            self.promise(STEPS)

    def opened(self) -> UpdateLog:
        if (self.log / "manifest.json").exists():
            return UpdateLog.open(self.log, write=True)
        tags = [tag_of(number) for number in range(RECORDS)]
        return UpdateLog.create(self.log, {"id": "x"}, tags, frames_per_segment=5)

    def record(self, log: UpdateLog, step: int) -> None:
        facts = {"epoch": step // PER_EPOCH, "members": batch(step), "lr": 1.0 / (1 + step)}
        for owner in shares_of(step, self.kind) or [None]:
            payload = payload_of(step, owner) if stored(step) else None
            log.append(step, payload=payload, record=owner, **facts)

    def keep(self, step: int) -> None:
        """A checkpoint: the training will go on from this step."""
        temporary = self.checkpoint.with_suffix(".tmp")
        temporary.write_text(str(step))
        os.replace(temporary, self.checkpoint)


def check_recorded(training: Training, tally: Tally) -> None:
    """Every step up to the last commit is there, whole, once; nothing else is."""
    promised = training.promised
    if not (training.log / "manifest.json").exists():
        assert promised == 0
        tally.found.add("no log yet")
        return
    journal = training.log / "index.sqlite-journal"
    hot = journal.exists() and any(journal.read_bytes()[:8])
    with UpdateLog.open(training.log) as log:
        tally.hot += hot
        steps = int(log.info()["steps"])
        assert steps >= promised
        check_steps(log, range(steps), training.kind)
        tally.found |= {f"{name} at {steps > promised}" for name in ("more",) if steps > promised}
        tally.found |= {
            f"level {level}" for (level,) in log._index.rows("SELECT level FROM blocks")
        }


def check_steps(log: UpdateLog, steps: range, kind: str, doomed: Any = frozenset()) -> None:
    """That the log holds these steps exactly; ``doomed`` may be whole or purged."""
    states = log.states(steps).tolist()
    for step, state in zip(steps, states, strict=True):
        possible = {"live"} if stored(step) else {"unrecorded"}
        assert state in possible | ({"purged"} if step in doomed else set()), step
    live = [step for step, state in zip(steps, states, strict=True) if state == "live"]
    read = list(log.frames(live))
    assert all(data == payload_of(s, r) for s, r, data in read)
    got = {(s, r) for s, r, _ in read}
    want = {(s, r) for s in live for r in shares_of(s, kind)}
    assert len(got) == len(read)
    assert got <= want
    assert {(s, r) for s, r in want - got if s not in doomed or r not in (None, *DOOMED)} == set()
    for number in range(RECORDS):
        if not doomed or number not in DOOMED:
            truth = [step for step in steps if number in batch(step)]
            assert log.steps_of([number]).tolist() == truth
    assert log.rates(steps).tolist() == [1.0 / (1 + step) for step in steps]
    assert all(row["ok"] for row in log.verify())


def check_tidy(place: Path, tally: Tally) -> None:
    """After opening for writing, the folder holds what the tables name and nothing else."""
    before = set(segment_files(place))
    with UpdateLog.open(place, write=True) as log:
        named = {row["name"] for row in log.verify()} | {log._writing().segment.name}
    after = set(segment_files(place))
    tally.swept += before != after
    assert {path.name for path in after} <= named
    assert not list(place.rglob("*.part"))


def torture_recording(place: Path, kills: int, seed: int) -> Tally:
    """Record, be killed, check, go on; a training that has ended makes way for another."""
    draw, tally = random.Random(seed), Tally()
    while tally.killed < kills:
        kind = "record" if tally.ended % 2 else "batch"
        home = place / f"run-{tally.ended}"
        home.mkdir()
        training, died = Training(home, kind), True
        while died:
            died = killed_while(training, draw, 700, 0.2)
            tally.killed += died
            check_recorded(training, tally)
            if draw.random() < 0.3 and (training.log / "manifest.json").exists():
                check_tidy(training.log, tally)
        with UpdateLog.open(training.log) as log:
            assert log.info()["finished"] == {"weights": "w"}
            check_steps(log, range(STEPS), kind)
        check_tidy(training.log, tally)
        shutil.rmtree(home)
        tally.ended += 1
    return tally


# -- purging --------------------------------------------------------------------------------------


def purges(place: Path) -> None:
    with UpdateLog.open(place, write=True) as log:
        log.purge(DOOMED)


def check_purged(place: Path, kind: str) -> None:
    """The same end, whatever happened on the way."""
    hit = {step for step in range(STEPS) if set(batch(step)) & set(DOOMED)}
    with UpdateLog.open(place) as log:
        check_steps(log, range(STEPS), kind, doomed=hit)
        assert log.steps_of(DOOMED).tolist() == []
        assert [log.tags()[number] for number in DOOMED] == [None] * len(DOOMED)
        for step in range(STEPS):
            left = [r for r in shares_of(step, kind) if r is not None and r not in DOOMED]
            gone = step in hit and stored(step) and not left
            want = "purged" if gone else "live" if stored(step) else "unrecorded"
            assert log.states([step]) == [want]
        events = [event for event in log.info()["events"] if event["kind"] == "purge"]
        assert [event["records"] for event in events] == [len(DOOMED)]
        assert events[0]["steps"] == log.info()["purged"]["steps"]
        assert (log._index.get("purging"), log._index.get("vacuum")) == (None, None)
    rest = everything(place)
    for step in sorted(hit):
        for record in shares_of(step, kind):
            assert (payload_of(step, record) in rest) == (
                record is not None and record not in DOOMED
            )
    for number in DOOMED:
        assert tag_of(number).encode() not in rest


def torture_purge(place: Path, kills: int, seed: int) -> Tally:
    """Purge, be killed, check, purge again (to be killed again, now and then)."""
    draw, tally = random.Random(seed), Tally()
    for kind in ("batch", "record"):
        (place / kind).mkdir()
        with contextlib.ExitStack() as undo:
            undo.callback(set_sizes, blocks.FOLD_STEPS, blocks.FAN, writing.MOST_STEPS)
            small()
            Training(place / kind, kind)()
    while tally.killed < kills:
        kind = draw.choice(["batch", "record"])
        log = place / "log"
        shutil.copytree(place / kind / "log", log)
        again = True
        while again:
            died = killed_while(lambda log=log: purges(log), draw, 500, 0.12)  # type: ignore[misc]
            tally.killed += died
            check_half_purged(log, kind, tally)
            again = died and draw.random() < 0.5
        with UpdateLog.open(log, write=True) as after:
            tally.found.add("finished on opening" if after.recovered else "finished before")
            after.purge(DOOMED)
        check_purged(log, kind)
        check_tidy(log, tally)
        shutil.rmtree(log)
    return tally


def set_sizes(fold: int, fan: int, most: int) -> None:
    blocks.FOLD_STEPS, blocks.FAN, writing.MOST_STEPS = fold, fan, most


def check_half_purged(place: Path, kind: str, tally: Tally) -> None:
    """What is not to be purged is whole; what is, is whole or gone, and never half there."""
    journal = place / "index.sqlite-journal"
    tally.hot += journal.exists() and any(journal.read_bytes()[:8])
    hit = {step for step in range(STEPS) if set(batch(step)) & set(DOOMED)}
    with UpdateLog.open(place) as log:
        check_steps(log, range(STEPS), kind, doomed=hit)
        gone = int(log.info()["states"]["purged"])
        named = {name for (name,) in log._index.rows("SELECT name FROM segments")}
        tally.swept += bool({path.name for path in segment_files(place)} - named)
        tally.found.add("none purged" if gone == 0 else "some purged")


# -- tests ----------------------------------------------------------------------------------------


@pytest.fixture
def seed() -> int:
    """Of the moments; shown when a test fails, though by the clock no two runs are alike."""
    value = random.SystemRandom().randrange(10**6)
    print(f"seed {value}")
    return value


def test_recording_survives_some_kills(tmp_path: Path, seed: int) -> None:
    assert torture_recording(tmp_path, 20, seed).killed >= 20


def test_purge_survives_some_kills(tmp_path: Path, seed: int) -> None:
    assert torture_purge(tmp_path, 8, seed).killed >= 8


@pytest.mark.slow
def test_recording_survives_any_kill(tmp_path: Path, seed: int) -> None:
    tally = torture_recording(tmp_path, 250, seed)
    assert tally.ended >= 5
    assert tally.hot >= 5  # commits cut short inside SQLite
    assert tally.swept >= 5  # files that no table named
    assert {"more at True", "level 0", "level 1"} <= tally.found


@pytest.mark.slow
def test_purge_survives_any_kill(tmp_path: Path, seed: int) -> None:
    tally = torture_purge(tmp_path, 80, seed)
    assert tally.hot >= 1
    assert tally.swept >= 1
    assert {"none purged", "some purged", "finished on opening"} <= tally.found
