"""The update log against a slow twin that keeps everything in dictionaries, and against damage."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import resource
import shutil
import signal
import sqlite3
import sys
import tempfile
import tracemalloc
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem

from efface.errors import InputError, LogError, OutputError, WriteError
from efface.journal import Journal, State
from efface.updates import blocks, folder, index, membership, segments, writing
from efface.updates.log import UpdateLog

RECORDS, BATCH, PER_EPOCH = 3000, 40, 25


def tag_of(number: int) -> str:
    return f"{number * 0x9E3779B97F4A7C15 % 2**64:016x}"


def members_of(step: int, records: int = RECORDS, batch: int = BATCH) -> list[int]:
    draw = np.random.default_rng([7, step])
    return sorted(draw.choice(records, batch, replace=False).tolist())


def payload_of(step: int, record: int | None = None) -> bytes:
    """Bytes that occur nowhere else."""
    draw = np.random.default_rng([step, 0 if record is None else record + 1])
    return b"<%d/%d>" % (step, -1 if record is None else record) + draw.bytes(30 + 13 * step % 50)


class Twin:
    """A log as one would keep it in memory: step → (state, members, {record: payload})."""

    def __init__(self) -> None:
        self.steps: dict[int, tuple[str, set[int], dict[int | None, bytes]]] = {}

    def steps_of(self, numbers: list[int]) -> list[int]:
        return [s for s, (_, members, _) in sorted(self.steps.items()) if members & set(numbers)]

    def add(self, log: UpdateLog, step: int, stored: bool = True, shares: int = 0) -> None:
        """One step to both; some have shares of single records instead of one update."""
        members = members_of(step)
        facts = {"epoch": step // PER_EPOCH, "members": members[::-1], "lr": 0.1 / (1 + step)}
        kept: dict[int | None, bytes] = {}
        if shares and stored:
            for record in members[:shares]:
                kept[record] = payload_of(step, record)
                log.append(step, payload=kept[record], record=record, **facts)
        else:
            if stored:
                kept[None] = payload_of(step)
            log.append(step, payload=kept.get(None), **facts)
        self.steps[step] = ("live" if kept else "unrecorded", set(members), kept)

    def check(self, log: UpdateLog) -> None:
        """That the log holds exactly this."""
        steps = sorted(self.steps)
        assert log.info()["steps"] == len(steps)
        assert log.states(steps).tolist() == [self.steps[s][0] for s in steps]
        live = [s for s in steps if self.steps[s][0] == "live"]
        assert log.live().tolist() == live
        kept = {(s, r): p for s in live for r, p in self.steps[s][2].items()}
        got = list(log.frames(live))
        assert {(s, r): p for s, r, p in got} == kept
        assert len(got) == len(kept)
        assert log.bytes_of(steps) == sum(map(len, kept.values()))
        assert [s for s, _, _ in got] == sorted(s for s, _, _ in got)
        for numbers in ([0], [5, 1023, 1024], [2999], list(range(0, 3000, 7)), list(range(3000))):
            assert log.steps_of(numbers).tolist() == self.steps_of(numbers)
        some = [2999, 0, 1024, 0, 77]
        assert log.seen(some).tolist() == [bool(self.steps_of([number])) for number in some]
        assert all(row["ok"] for row in log.verify())


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    """In memory where the system has such a place: these tests make thousands of commits."""
    shared = Path("/dev/shm")
    place = tempfile.mkdtemp(dir=shared if os.access(shared, os.W_OK) else None)
    yield Path(place)
    shutil.rmtree(place)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Folds, merges and commits that come by themselves, all after a few steps."""
    monkeypatch.setattr(blocks, "FOLD_STEPS", 8)
    monkeypatch.setattr(blocks, "FAN", 3)
    monkeypatch.setattr(writing, "MOST_STEPS", 7)


def new_log(place: Path, **options: Any) -> UpdateLog:
    tags = [tag_of(number) for number in range(RECORDS)]
    return UpdateLog.create(place, {"task": "t"}, tags, **{"frames_per_segment": 6, **options})


def filled(place: Path, steps: int = 50, shares: int = 0, **options: Any) -> tuple[UpdateLog, Twin]:
    log, twin = new_log(place, **options), Twin()
    for step in range(steps):
        twin.add(log, step, stored=step % 5 != 3, shares=shares)
    log.commit()
    return log, twin


def segment_files(place: Path) -> list[Path]:
    return sorted([*place.glob("segments/*.seg"), *place.glob("open/*.seg")])


def far(log: UpdateLog) -> str:
    """Where the segments of a log lie that keeps them elsewhere."""
    return f"{log.manifest['segments']}/{log.manifest['segments_folder']}"


def everything(place: Path) -> bytes:
    return b"".join(path.read_bytes() for path in sorted(place.rglob("*")) if path.is_file())


def sentence(error: pytest.ExceptionInfo[Exception]) -> str:
    """The message, which shall be one sentence."""
    text = str(error.value)
    assert text.endswith((".", ")."))
    assert "\n" not in text
    return text


# -- packed step lists ----------------------------------------------------------------------------


@pytest.mark.parametrize("gap", [1, 2, 9, 400, 30_000])
@pytest.mark.parametrize("lists", [1, 40])
def test_packed_lists_come_back(gap: int, lists: int) -> None:
    draw = np.random.default_rng([gap, lists])
    truth = {}
    for number in draw.choice(1024, lists, replace=False):
        steps = np.flatnonzero(draw.random(max(gap * 5, 300)) < 1 / gap)
        truth[int(number)] = steps if len(steps) else np.array([3])
    order = sorted(truth)
    numbers = np.concatenate([np.full(len(truth[n]), n) for n in order])
    steps = np.concatenate([truth[n] for n in order])
    shift, coded = membership.pack(numbers, steps, int(steps.max()) + 1)
    found = list(coded)
    assert [one.number for one in found] == order
    chosen = [one for one in found if one.number % 2] or found
    back = membership.unpack(shift, [c.n for c in chosen], [c.data for c in chosen])
    assert back.tolist() == [s for one in chosen for s in truth[one.number].tolist()]


def test_packed_lists_are_near_their_entropy() -> None:
    """A record in each of 390 steps on average: 10.0 bits by information, at most 11 here."""
    draw = np.random.default_rng(0)
    steps = np.flatnonzero(draw.random(400_000) < 1 / 390)
    shift, coded = membership.pack(np.zeros(len(steps), np.int64), steps, 400_000)
    assert shift == 8
    assert 8 * sum(len(one.data) for one in coded) / len(steps) < 11


# -- writing and reading --------------------------------------------------------------------------


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("shares", [0, 3])
def test_log_equals_its_twin(tmp_path: Path, shares: int) -> None:
    log, twin = filled(tmp_path / "log", 160, shares)
    levels = log._index.rows("SELECT DISTINCT level FROM blocks")
    assert {level for (level,) in levels} >= {0, 1, 2} - {0}
    twin.check(log)
    with UpdateLog.open(tmp_path / "log") as reader:
        twin.check(reader)
    log.close()
    with UpdateLog.open(tmp_path / "log", write=True) as log:
        for step in range(160, 200):
            twin.add(log, step, shares=shares)
        log.commit()
        twin.check(log)


def test_facts_of_a_log(tmp_path: Path) -> None:
    log, twin = filled(tmp_path / "log", 60, cohorts={4: 0, 9: 1})
    log.event("keep", step=30, old=0.1, new=0.05)
    log.finish(weights="abc")
    info = log.info()
    counted = {"live": 48, "unrecorded": 12, "purged": 0, "expired": 0, "thinned": 0}
    assert info["states"] == counted
    assert (info["first_step"], info["last_step"], info["epochs"]) == (0, 59, 3)
    assert info["finished"] == {"weights": "abc"}
    assert (info["failed_at"], info["records"], info["frames"]) == (None, RECORDS, 48)
    assert info["bytes"] == sum(path.stat().st_size for path in segment_files(tmp_path / "log"))
    assert [{k: e[k] for k in ("kind", "step", "new")} for e in info["events"]] == [
        {"kind": "keep", "step": 30, "new": 0.05}
    ]
    per_epoch = dict.fromkeys(range(3), 0)
    for step, (_, _, kept) in twin.steps.items():
        per_epoch[step // PER_EPOCH] += sum(map(len, kept.values()))
    assert log.sizes() == per_epoch
    assert log.cohorts() == {4: 0, 9: 1}
    assert log.tags()[17] == tag_of(17)
    assert log.numbers([tag_of(17), tag_of(3)]).tolist() == [17, 3]
    assert log.rates([7, 2]).tolist() == [0.1 / 8, 0.1 / 3]
    for number in (0, 11, 2500):
        epochs = {step // PER_EPOCH for step in twin.steps_of([number])}
        assert log.epochs_of([number]).tolist() == sorted(epochs)
    assert log.steps_of([]).tolist() == log.epochs_of([]).tolist() == []
    empty = new_log(tmp_path / "empty")
    assert empty.info()["epochs"] == 0
    assert empty.steps_of([1]).tolist() == empty.epochs_of([1]).tolist() == list(empty.frames([]))
    assert empty.verify() == []


def test_only_what_is_committed_counts(tmp_path: Path) -> None:
    log = new_log(tmp_path / "log")
    log.append(0, 0, [1], b"a", lr=0.1)
    log.commit()
    log.append(1, 0, [1], b"b", lr=0.1)
    with UpdateLog.open(tmp_path / "log") as reader:
        assert reader.steps_of([1]).tolist() == [0]
    with contextlib.suppress(ZeroDivisionError), log:
        raise ZeroDivisionError
    with UpdateLog.open(tmp_path / "log", write=True) as log:
        assert log.info()["steps"] == 1
        log.append(1, 0, [1], b"c", lr=0.1)
    assert [p for _, _, p in UpdateLog.open(tmp_path / "log").frames([0, 1])] == [b"a", b"c"]


def test_shares_of_single_records(tmp_path: Path) -> None:
    with new_log(tmp_path / "log") as log:
        log.append(0, 0, [1, 2, 3], b"r1", lr=0.1, record=1)
        log.commit()  # in the middle of a step
        log.append(0, 0, [1, 2, 3], b"r2", lr=0.1, record=2)
        log.append(1, 0, [1, 2], None, lr=0.1)
        log.append(1, 0, [1, 2], b"r1", lr=0.1, record=1)
        log.commit()
        assert list(log.frames([0, 1])) == [(0, 1, b"r1"), (0, 2, b"r2"), (1, 1, b"r1")]
        assert list(log.frames([0, 1], records=[2])) == [(0, 2, b"r2")]
        assert log.bytes_of([0, 1], [2]) == 2
        with pytest.raises(LogError, match="not in the batch"):
            log.append(2, 0, [1, 2], b"r7", lr=0.1, record=7)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("shares", [0, 2])
@pytest.mark.parametrize("step", [0, 1, 23, 24, 49, 50, 70])
def test_truncate_and_go_on(tmp_path: Path, step: int, shares: int) -> None:
    log, twin = filled(tmp_path / "log", 50, shares)
    log.event("keep", step=30)
    log.append(50, 9, [1], b"waits", lr=1.0)
    log.truncate(step)
    kept = dict(list(twin.steps.items())[:step])
    twin.steps = kept if step <= 50 else {**kept, 50: ("live", {1}, {None: b"waits"})}
    twin.check(log)
    assert len(log.info()["events"]) == (step > 30)
    first = len(twin.steps)
    if step <= 50:
        for more in range(first, first + 30):
            twin.add(log, more, shares=shares)
        log.commit()
        twin.check(log)
    log.close()
    known = {
        name
        for (name,) in sqlite3.connect(tmp_path / "log" / "index.sqlite").execute(
            "SELECT name FROM segments"
        )
    }
    assert {path.name for path in segment_files(tmp_path / "log")} == known


def test_steps_come_in_order(tmp_path: Path) -> None:
    log = new_log(tmp_path / "log")
    log.append(3, 1, [1], b"x", lr=0.1)
    log.append(5, 1, [1], b"x", lr=0.1)  # step 4 had no record: no gap
    for step, epoch in ((5, 1), (4, 1), (6, 0)):
        with pytest.raises(LogError, match="cannot follow") as error:
            log.append(step, epoch, [1], b"x", lr=0.1)
        sentence(error)
    with pytest.raises(LogError, match="record number 3000 is not among"):
        log.append(6, 1, [3000], b"x", lr=0.1)
    with pytest.raises(LogError, match="record number -1"):
        log.append(6, 1, [-1, 5], b"x", lr=0.1)
    log.finish()
    with pytest.raises(LogError, match="has ended"):
        log.append(6, 1, [1], b"x", lr=0.1)
    log.truncate(5)
    log.append(5, 1, [2], b"y", lr=0.1)
    log.commit()
    assert log.info()["finished"] is None
    assert list(log.frames([3, 5])) == [(3, None, b"x"), (5, None, b"y")]


def test_what_is_not_there_is_never_skipped(tmp_path: Path) -> None:
    log, _ = filled(tmp_path / "log")
    log.erase([4], why="thinned")
    log.erase(epochs=(1, 1))
    for step, words in ((3, "sensitive"), (4, "budget"), (26, "retention"), (99, "not in")):
        with pytest.raises(LogError, match=words) as error:
            log.frames([0, step])
        assert f"step {step}" in sentence(error)
    with pytest.raises(LogError, match="is not in"):
        log.rates([99])
    with pytest.raises(LogError, match="is not in"):
        log.states([99])
    with pytest.raises(LogError, match="2 of the 3 records") as error:
        log.numbers(["f" * 16, tag_of(1), "e" * 16])
    sentence(error)
    assert log.numbers(["f" * 16, tag_of(1)], known_only=True).tolist() == [1]
    with pytest.raises(LogError, match="record number 3000"):
        log.steps_of([1, 3000])
    with pytest.raises(LogError, match="cannot be erased as 'x'"):
        log.erase([1], why="x")  # type: ignore[arg-type]


def test_memory_stays_small(tmp_path: Path) -> None:
    """A few megabytes, however many steps are appended and whatever is read."""
    chunk = bytes(1 << 20)
    tracemalloc.start()
    with new_log(tmp_path / "log", frames_per_segment=10**6) as log:
        for step in range(4000):
            log.append(step, 0, [step % RECORDS], b"x", lr=0.1)
        assert len(log._writing().pending.steps) <= writing.MOST_STEPS
        small = tracemalloc.get_traced_memory()[1]
        for step in range(4000, 4048):
            log.append(step, 0, [1], chunk, lr=0.1)
        log.seal()
        tracemalloc.reset_peak()
        for _, _, data in log.frames(np.arange(3000, 4048)):
            del data
        assert all(row["ok"] for row in log.verify())
        log.purge([2047])
        large = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert small < 4 << 20
    assert large < 24 << 20


def test_only_the_wanted_ranges_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with new_log(tmp_path / "log", frames_per_segment=64) as log:
        for step in range(64):
            log.append(step, 0, [1], bytes(100_000), lr=0.1)
        log.seal()
        read: list[int] = []
        real = segments.Folder.read

        def spied(self: segments.Folder, name: str, start: int, end: int) -> bytes:
            read.append(end - start)
            return real(self, name, start, end)

        monkeypatch.setattr(segments.Folder, "read", spied)
        assert len(list(log.frames([3, 40, 41]))) == 3
        assert sum(read) < 310_000
        assert len(read) == 2


# -- erasing --------------------------------------------------------------------------------------


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("shares", [0, 3])
@pytest.mark.filterwarnings("ignore:segments at memory")
@pytest.mark.parametrize("url", [None, "memory://purged", "file"])
def test_purge(tmp_path: Path, shares: int, url: str | None) -> None:
    place = tmp_path / "log"
    url = f"file://{tmp_path}/far" if url == "file" else url
    log, twin = filled(place, 90, shares, segments=url, cohorts={11: 3, 12: 3})
    numbers = [11, 1500]
    hit = set(twin.steps_of(numbers))
    gone: list[bytes] = []
    emptied = 0
    for step in hit:
        state, members, kept = twin.steps[step]
        doomed = {r for r in kept if r is None or r in numbers}
        gone += [kept[r] for r in doomed]
        left = {r: p for r, p in kept.items() if r not in doomed}
        purged = state == "live" and not left
        emptied += purged
        twin.steps[step] = ("purged" if purged else state, members - set(numbers), left)
    assert gone or shares
    told: list[tuple[int, int]] = []
    report = log.purge(numbers, progress=lambda done, total: told.append((done, total)))
    assert (report["steps"], report["frames"]) == (emptied, len(gone))
    assert report["bytes"] == sum(map(len, gone)) + len(gone) * segments.HEADER.size
    assert report["records"] == 2
    assert not told or told[-1][0] == told[-1][1]
    twin.check(log)
    assert log.steps_of(numbers).tolist() == []
    assert log.tags()[11] is None
    assert log.cohorts() == {11: 3, 12: 3}  # it decides how the others were batched
    assert log.info()["purged"] == {"records": 2, "steps": emptied}
    with pytest.raises(LogError, match="purged"):
        log.numbers([tag_of(11)])
    assert log.purge(numbers) == {"steps": 0, "frames": 0, "bytes": 0, "missing": [], "records": 0}
    assert [e["frames"] for e in log.info()["events"] if e["kind"] == "purge"] == [len(gone)]
    assert log._index.rows("PRAGMA freelist_count") == [(0,)]
    assert log._index.rows("PRAGMA secure_delete") == [(1,)]
    bytes_left = everything(tmp_path)
    if url and url.startswith("memory"):
        system = fsspec.filesystem("memory")
        bytes_left += b"".join(map(system.cat_file, system.find(far(log))))
    assert not [payload for payload in gone if payload in bytes_left]
    assert tag_of(11).encode() not in bytes_left
    for step in range(90, 100):
        twin.add(log, step, shares=shares)
    log.commit()
    twin.check(log)


def test_erase_is_idempotent(tmp_path: Path) -> None:
    log, twin = filled(tmp_path / "log")
    first = log.erase(epochs=(0, 0))
    assert first["steps"] == sum(state == "live" for state, _, _ in list(twin.steps.values())[:25])
    assert log.erase(epochs=(0, 0))["steps"] == 0
    assert log.info()["states"]["expired"] == first["steps"]
    assert log.sizes()[0] == 0
    assert log.steps_of([11]).tolist() == twin.steps_of([11])
    assert not any(payload_of(step) in everything(tmp_path) for step in range(25))


@pytest.mark.parametrize("far_away", [False, True])
def test_purge_of_a_segment_that_is_gone(tmp_path: Path, far_away: bool) -> None:
    place = tmp_path / "log"
    url = f"file://{tmp_path}/far" if far_away else None
    log, twin = filled(place, segments=url)
    segs, away = tmp_path / "far" if far_away else place / "segments", tmp_path / "away"
    number = members_of(0)[0]
    before = log.info()
    segs.rename(away)
    with pytest.raises(WriteError, match=r"segment 0000000\d\.seg.*bring it back") as error:
        log.purge([number])
    sentence(error)
    with pytest.raises(WriteError, match="bring it back"):
        log.erase([0])
    assert not segs.exists()
    assert log.info()["states"] == before["states"]
    assert log.tags()[number] is not None
    log.close()
    with UpdateLog.open(place, write=True) as log:  # still usable, the purge waits
        assert log.recovered is None
        twin.add(log, 50)
    away.rename(segs)
    with UpdateLog.open(place, write=True) as log:
        assert log.recovered is not None
        assert (log.recovered["records"], log.recovered["missing"]) == (1, [])
        assert all(row["ok"] for row in log.verify())
    assert payload_of(0) not in everything(tmp_path)
    assert tag_of(number).encode() not in everything(tmp_path)


@pytest.mark.parametrize("whole", [False, True])
def test_a_segment_that_was_given_up_does_not_come_back(tmp_path: Path, whole: bool) -> None:
    """``whole``: nothing else was in the segment, which was the last one."""
    place = tmp_path / "log"
    log, twin = filled(place, 6 if whole else 50)
    log.seal()
    path = segment_files(place)[0]
    path.rename(tmp_path / "kept")
    numbers = range(RECORDS) if whole else [members_of(0)[0]]
    report = log.purge(numbers, force=True)
    assert report["missing"] == ["00000000.seg"]
    assert log.states([0])[0] == "purged"
    assert log.tags()[numbers[0]] is None
    twin.add(log, 50)
    log.finish()
    shutil.copy(tmp_path / "kept", path)
    bad = [row["sentence"] for row in log.verify() if not row["ok"]]
    assert any("has come back" in words for words in bad)
    log.close()
    with UpdateLog.open(place, write=True) as log:
        assert not path.exists()
        assert len([row for row in log.verify() if not row["ok"]]) == (0 if whole else 1)
        assert next(iter(log.frames([50])))[2] == payload_of(50)
    path.parent.mkdir(exist_ok=True)
    shutil.copy(tmp_path / "kept", path)
    with UpdateLog.open(place, write=True) as log:
        log.purge([])
    assert not path.exists()


def test_erased_frames_that_are_put_back_are_found(tmp_path: Path) -> None:
    """Also behind all that is left of a segment, where every other frame is as it should be."""
    log, _ = filled(tmp_path / "log")
    log.seal()
    path = segment_files(tmp_path / "log")[0]
    before = path.read_bytes()
    last = max(s for (s,) in log._index.rows("SELECT step FROM steps WHERE segment=0"))
    log.erase([last])
    (now,) = (tmp_path / "log").rglob("00000000-*.seg")
    now.write_bytes(before)
    (row,) = [row for row in log.verify() if not row["ok"]]
    assert "bytes that the index does not name" in row["sentence"]


def test_damaged_states_are_found(tmp_path: Path) -> None:
    log, _ = filled(tmp_path / "log")
    states = Journal(tmp_path / "log" / "checkpoints", {"log": log.id})
    for epoch in (0, 1):
        states.write(f"epoch-{epoch:04d}", State({"w": torch.ones(9)}, {"step": epoch}))
    assert [row["ok"] for row in log.verify()[-2:]] == [True, True]
    path = tmp_path / "log" / "checkpoints" / "epoch-0001.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    (row,) = [row for row in log.verify() if not row["ok"]]
    assert (row["name"], row["frames"], row["bytes"]) == (path.name, 0, path.stat().st_size)
    assert "from an earlier one" in row["sentence"]


def test_purge_keeps_damage_visible(tmp_path: Path) -> None:
    log, _ = filled(tmp_path / "log")
    log.seal()
    path = segment_files(tmp_path / "log")[0]
    frames = list(log._index.rows("SELECT step, offset FROM steps WHERE segment=0"))
    path.write_bytes(path.read_bytes()[: frames[-1][1] + 50])  # the last frame is cut short
    log.purge([members_of(0)[0]])
    bad = [row for row in log.verify() if not row["ok"]]
    assert len(bad) == 1
    assert f"step {frames[-1][0]} " in bad[0]["sentence"]


# -- damage ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("at", [0, 5, 9, 17, 30, 40, 47, 49, -1])
def test_flipped_bits_are_found(tmp_path: Path, at: int) -> None:
    log, twin = filled(tmp_path / "log")
    log.finish()
    path = segment_files(tmp_path / "log")[1]
    data = bytearray(path.read_bytes())
    data[at] ^= 4
    path.write_bytes(data)
    inside = [s for (s,) in log._index.rows("SELECT step FROM steps WHERE segment=1 ORDER BY step")]
    hit = inside[-1] if at == -1 else inside[0]
    rows = log.verify()
    assert [row["ok"] for row in rows] == [i != 1 for i in range(len(rows))]
    assert f"step {hit} " in rows[1]["sentence"]
    assert path.name in rows[1]["sentence"]
    with pytest.raises(LogError, match=path.name) as error:
        list(log.frames(inside))
    assert f"step {hit} " in sentence(error)
    others = [s for s in log.live().tolist() if s != hit]
    assert [p for _, _, p in log.frames(others)] == [twin.steps[s][2][None] for s in others]


@pytest.mark.parametrize("how", ["missing", "short", "longer", "swapped"])
def test_damaged_segments_are_named(tmp_path: Path, how: str) -> None:
    log, twin = filled(tmp_path / "log")
    log.finish()
    files = segment_files(tmp_path / "log")
    inside = [s for (s,) in log._index.rows("SELECT step FROM steps WHERE segment=2")]
    if how == "missing":
        files[2].unlink()
    elif how == "short":
        files[2].write_bytes(files[2].read_bytes()[:100])
    elif how == "longer":
        files[2].write_bytes(files[2].read_bytes() + b"more")
    else:
        files[2].write_bytes(files[3].read_bytes())
    rows = log.verify()
    assert [row["ok"] for row in rows] == [i != 2 for i in range(len(rows))]
    if how == "longer":
        assert "4 bytes" in rows[2]["sentence"]
        twin.check  # noqa: B018 — every frame is still readable
        assert len(list(log.frames(inside))) == len(inside)
        return
    with UpdateLog.open(tmp_path / "log") as reader:
        with pytest.raises(LogError, match=r"00000002\.seg") as error:
            list(reader.frames(inside))
        sentence(error)
        others = [s for s in reader.live().tolist() if s not in inside]
        assert len(list(reader.frames(others))) == len(others)


@pytest.mark.parametrize("how", ["missing", "short"])
def test_a_damaged_open_segment_is_left_alone(tmp_path: Path, how: str) -> None:
    """Recording goes on in another one, and what is missing stays visible."""
    log, twin = filled(tmp_path / "log", 16)
    log.close()
    path = next((tmp_path / "log").glob("open/*.seg"))
    path.unlink() if how == "missing" else path.write_bytes(path.read_bytes()[:-3])
    with UpdateLog.open(tmp_path / "log", write=True) as log:
        for step in range(16, 30):
            twin.add(log, step)
        log.commit()
        bad = [row for row in log.verify() if not row["ok"]]
        assert [row["name"] for row in bad] == [path.name]
        assert next(iter(log.frames([20])))[2] == payload_of(20)


@pytest.mark.parametrize("table", ["lists", "recent"])
@pytest.mark.usefixtures("small")
def test_damaged_step_lists_are_found(tmp_path: Path, table: str) -> None:
    """SQLite has no checksums of its own."""
    log, twin = filled(tmp_path / "log", 40)
    twin.add(log, 40)
    log.close()
    column = "data" if table == "lists" else "members"
    with contextlib.closing(sqlite3.connect(tmp_path / "log" / "index.sqlite")) as raw, raw:
        for row, data in raw.execute(f"SELECT rowid, {column} FROM {table}").fetchall():
            flipped = bytes([data[0] ^ 1]) + data[1:]
            raw.execute(f"UPDATE {table} SET {column}=? WHERE rowid=?", (flipped, row))
    with UpdateLog.open(tmp_path / "log") as log:
        with pytest.raises(LogError, match="differ from what was written") as error:
            log.steps_of(range(200))
        sentence(error)


def test_damaged_index(tmp_path: Path) -> None:
    log, _ = filled(tmp_path / "log")
    log.close()
    path = tmp_path / "log" / "index.sqlite"
    whole = path.read_bytes()
    path.write_bytes(b"\0" * 4096 + whole[4096:])
    with pytest.raises(LogError, match="damaged") as error:
        UpdateLog.open(tmp_path / "log")
    sentence(error)
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(LogError, match="damaged"), UpdateLog.open(tmp_path / "log") as log:
        log.verify()
    path.unlink()
    with pytest.raises(LogError, match="has no index"):
        UpdateLog.open(tmp_path / "log")


def test_index_of_another_log(tmp_path: Path) -> None:
    for name in ("a", "b"):
        filled(tmp_path / name)[0].close()
    shutil.copy(tmp_path / "a" / "index.sqlite", tmp_path / "b" / "index.sqlite")
    with pytest.raises(LogError, match="different logs") as error:
        UpdateLog.open(tmp_path / "b")
    sentence(error)


# -- wrong input ----------------------------------------------------------------------------------


def test_folders_that_are_no_log(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("x")
    for name in ("absent", "file", "other"):
        with pytest.raises(LogError, match="is no update log") as error:
            UpdateLog.open(tmp_path / name)
        sentence(error)
    with pytest.raises(OutputError, match=r"thesis\.tex") as error:
        new_log(tmp_path / "other", force=True)
    sentence(error)
    with pytest.raises(OutputError, match="is a file"):
        new_log(tmp_path / "file")
    with pytest.raises(WriteError):
        new_log(tmp_path / "file" / "below")
    with pytest.raises(LogError, match="cannot lie at nowhere://x"):
        new_log(tmp_path / "log", segments="nowhere://x")


@pytest.mark.filterwarnings("ignore:segments at memory")
def test_an_existing_log_is_replaced_only_by_force(tmp_path: Path) -> None:
    log, _ = filled(tmp_path / "log", segments="memory://replaced")
    with pytest.raises(OutputError, match="--force") as error:
        new_log(tmp_path / "log")
    sentence(error)
    with pytest.raises(LogError, match="being written to"):
        new_log(tmp_path / "log", force=True)
    log.close()
    (tmp_path / "log" / "checkpoints").mkdir()
    again = new_log(tmp_path / "log", force=True)
    assert again.info()["steps"] == 0
    assert again.id != log.id
    assert not fsspec.filesystem("memory").find(far(log))
    assert not (tmp_path / "log" / "checkpoints").exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda text: text[:-20], "damaged"),
        (lambda text: text.replace('"task": "t"', '"task": "u"'), "damaged"),
        (lambda text: "[]", "damaged"),
        (lambda text: "\xff", "damaged"),
        (lambda text: text.replace("updates/1", "updates/2"), "schema efface.updates/2"),
    ],
)
def test_manifests(tmp_path: Path, change: Callable[[str], str], words: str) -> None:
    new_log(tmp_path / "log").close()
    path = tmp_path / "log" / "manifest.json"
    path.write_text(change(path.read_text()), encoding="latin-1")
    with pytest.raises(LogError, match=words) as error:
        UpdateLog.open(tmp_path / "log")
    sentence(error)


def test_manifest_comes_back(tmp_path: Path) -> None:
    given = {"id": "mine", "created": "2026-01-01", "layout": {"a": [1, 2]}, "keep": 0.1}
    UpdateLog.create(tmp_path / "log", given, []).close()
    with UpdateLog.open(tmp_path / "log") as log:
        assert {key: log.manifest[key] for key in given} == given
        assert log.id == "mine"
        assert log.manifest["schema"] == "efface.updates/1"
    assert json.loads((tmp_path / "log" / "manifest.json").read_text())["digest"]


def test_a_creation_that_was_cut_short_is_taken_over(tmp_path: Path) -> None:
    new_log(tmp_path / "log").close()
    (tmp_path / "log" / "manifest.json").unlink()
    (tmp_path / "log" / "open" / "00000000.seg").write_bytes(b"junk")
    (tmp_path / "log" / ".manifest.json.999999999.tmp").write_bytes(b"half")
    log, twin = filled(tmp_path / "log", 4)
    twin.check(log)
    assert not list((tmp_path / "log").glob(".*"))


# -- several processes ----------------------------------------------------------------------------


def in_child(work: Callable[[], object], kill: bool = False) -> int:
    """Run in a forked process; its exit status (0: no exception)."""
    child = os.fork()
    if child == 0:
        status = 1
        with contextlib.suppress(BaseException):
            work()
            status = 0
        if kill:
            os.kill(os.getpid(), signal.SIGKILL)
        os._exit(status)
    return os.waitpid(child, 0)[1]


def test_two_writers(tmp_path: Path) -> None:
    log, _ = filled(tmp_path / "log")
    log.append(np.int64(50), np.int64(9), np.array([1]), b"numpy's numbers", lr=np.float32(0.5))
    log.commit()
    assert log.rates([50]).tolist() == [0.5]
    with pytest.raises(LogError, match="being written to by another process") as error:
        UpdateLog.open(tmp_path / "log", write=True)
    assert str(os.getpid()) in sentence(error)
    assert in_child(lambda: UpdateLog.open(tmp_path / "log", write=True)) != 0
    assert in_child(lambda: UpdateLog.open(tmp_path / "log").verify()) == 0
    log.close()
    assert in_child(lambda: UpdateLog.open(tmp_path / "log", write=True), kill=True) != 0
    UpdateLog.open(tmp_path / "log", write=True).close()
    with pytest.raises(LogError, match="not open for writing"):
        UpdateLog.open(tmp_path / "log").append(99, 9, [1], b"", lr=0.1)


def test_a_killed_writers_children_let_go_in_time(tmp_path: Path) -> None:
    """Workers that were forked while the lock was held keep it for a moment after the kill."""
    new_log(tmp_path / "log").close()

    def forks() -> None:
        UpdateLog.open(tmp_path / "log", write=True)
        if os.fork() == 0:
            import time

            time.sleep(0.5)
            os._exit(0)

    in_child(forks, kill=True)
    UpdateLog.open(tmp_path / "log", write=True).close()


def test_a_lock_that_stays_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log, _ = filled(tmp_path / "log")
    (tmp_path / "log" / "lock").write_text("999999999")
    monkeypatch.setattr(folder, "LINGERING", 0.1)
    with pytest.raises(LogError, match="being written to"):
        UpdateLog.open(tmp_path / "log", write=True)
    log.close()


def _reads(place: Path, stop: Any, failures: Any) -> None:
    numbers = range(0, 3000, 60)
    try:
        while not stop.is_set():
            with UpdateLog.open(place) as log:
                for step in log.live().tolist():
                    try:
                        for s, _, data in log.frames([step]):
                            assert data == payload_of(s)
                    except LogError as error:
                        assert "purged" in str(error)  # noqa: PT017
                found = log.steps_of(numbers).tolist()
                truth = [s for s in range(found[-1] + 1) if set(members_of(s)) & set(numbers)]
                assert found == truth
    except BaseException as error:
        failures.put(repr(error))


@pytest.mark.usefixtures("small")
def test_reading_while_a_writer_is_at_work(tmp_path: Path) -> None:
    log, twin = filled(tmp_path / "log", 20)
    context = multiprocessing.get_context("fork")
    stop, failures = context.Event(), context.SimpleQueue()
    readers = [
        context.Process(target=_reads, args=(tmp_path / "log", stop, failures)) for _ in range(2)
    ]
    for reader in readers:
        reader.start()
    for step in range(20, 110):
        twin.add(log, step, stored=step % 5 != 3)
        log.commit()
        if step % 30 == 0:
            log.purge([number for number in members_of(step) if number % 60][:1])
    stop.set()
    for reader in readers:
        reader.join(30)
    assert failures.empty(), failures.get()


def test_a_locked_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index, "PATIENCE", 0.05)
    log, twin = filled(tmp_path / "log", 10)
    other = sqlite3.connect(tmp_path / "log" / "index.sqlite", isolation_level=None)
    other.execute("BEGIN EXCLUSIVE")
    log.append(10, 0, [1], b"lost", lr=0.1)
    with pytest.raises(LogError, match="is locked") as error:
        log.commit()
    sentence(error)
    with pytest.raises(LogError, match="is locked"):
        UpdateLog.open(tmp_path / "log")
    other.execute("ROLLBACK")
    other.close()
    with pytest.raises(LogError, match="from 10 on could not be written"):
        log.append(11, 0, [1], b"a hole", lr=0.1)
    log.truncate(10)
    for step in range(10, 20):
        twin.add(log, step)
    log.commit()
    twin.check(log)


@contextlib.contextmanager
def as_nobody(place: Path) -> Iterator[None]:
    """Inside a child: without the rights of root, for whom everything is writable."""
    for path in [place, *place.rglob("*")]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    if os.getuid() == 0:
        os.setgid(65534)
        os.setuid(65534)
    yield


@pytest.fixture
def public() -> Iterator[Path]:
    """A folder that other users reach, too."""
    place = Path(tempfile.mkdtemp())
    place.chmod(0o755)
    yield place
    for path in place.rglob("*"):
        path.chmod(0o755)
    shutil.rmtree(place)


def test_reading_from_a_read_only_folder(public: Path) -> None:
    log, twin = filled(public / "log")
    log.finish()
    log.close()
    before = {p: p.read_bytes() for p in (public / "log").rglob("*") if p.is_file()}

    def reads() -> None:
        with as_nobody(public / "log"):
            with UpdateLog.open(public / "log") as reader:
                twin.check(reader)
            with pytest.raises(WriteError):
                UpdateLog.open(public / "log", write=True)

    assert in_child(reads) == 0
    assert before == {p: p.read_bytes() for p in (public / "log").rglob("*") if p.is_file()}


def hot(place: Path) -> None:
    """Leave what a writer leaves that is killed in the middle of a commit."""

    def dies() -> None:
        log = UpdateLog.open(place, write=True)
        with log._index.change():
            log._index.do("PRAGMA cache_size=1")
            log._index.do("UPDATE steps SET lr=-1")
            log._index.do("UPDATE records SET tag='x'")
            os.kill(os.getpid(), signal.SIGKILL)

    in_child(dies)
    assert (place / "index.sqlite-journal").stat().st_size > 0


def test_a_commit_that_was_cut_short_is_undone(public: Path) -> None:
    log, twin = filled(public / "log")
    log.close()
    hot(public / "log")
    with UpdateLog.open(public / "log") as reader:
        twin.check(reader)
        assert reader.rates([1])[0] > 0
    hot(public / "log")

    def reads() -> None:
        with (
            as_nobody(public / "log"),
            pytest.raises(LogError, match="in the middle of a commit"),
        ):
            UpdateLog.open(public / "log")

    assert in_child(reads) == 0


# -- what cannot be written -----------------------------------------------------------------------


def one_more(log: UpdateLog, step: int) -> None:
    log.append(step, 1, members_of(step), payload_of(step), lr=0.1)
    log.commit()


def all_more(log: UpdateLog, steps: Iterable[int]) -> None:
    for step in steps:
        one_more(log, step)


def _full(*_: Any) -> int:
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("call", ["write", "fsync"])
def test_disk_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    log, twin = filled(tmp_path / "log", 12)
    log.append(12, 0, [1], b"waits", lr=0.1)
    with monkeypatch.context() as patch:
        patch.setattr(os, call, _full)
        with pytest.raises(WriteError, match="No space left") as error:
            one_more(log, 13)
        sentence(error)
    twin.check(log)  # as of the last commit
    with pytest.raises(LogError, match="from 12 on"):
        log.append(14, 0, [1], b"a hole", lr=0.1)
    with pytest.raises(LogError, match="from 12 on"):
        log.append(12, 0, [1], b"x", lr=0.1)
    log.fail(14, "disk full")
    assert log.info()["failed_at"] == 12
    with pytest.raises(LogError, match="ended at step 12"):
        log.append(16, 0, [1], b"x", lr=0.1)
    log.close()
    with UpdateLog.open(tmp_path / "log", write=True) as log:
        with pytest.raises(LogError, match="ended at step 12"):
            log.append(16, 0, [1], b"x", lr=0.1)
        log.truncate(12)
        twin.add(log, 12)
        log.commit()
        twin.check(log)
        assert log.info()["failed_at"] is None


def test_a_limit_on_files_hits_index_and_segments(tmp_path: Path) -> None:
    """The system itself refuses: every promise holds, whichever file it strikes."""
    place = tmp_path / "log"
    filled(place, 20)[0].close()

    def limited() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        log = UpdateLog.open(place, write=True)
        size = (place / "index.sqlite").stat().st_size
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
        with pytest.raises(WriteError):
            all_more(log, range(20, 3000))
        steps = log.info()["steps"]
        assert 20 < steps < 3000
        assert all(row["ok"] for row in log.verify())
        (tmp_path / "steps").write_text(str(steps))

    assert in_child(limited) == 0
    steps = int((tmp_path / "steps").read_text())
    with UpdateLog.open(place, write=True) as log:
        assert log.info()["steps"] == steps
        assert [s for s, _, p in log.frames(range(20, steps)) if p == payload_of(s)] == list(
            range(20, steps)
        )
        log.append(steps, 1, [1], b"goes on", lr=0.1)


# -- where segments lie ---------------------------------------------------------------------------


def test_logs_of_one_training_do_not_share_segments(tmp_path: Path) -> None:
    twins = []
    for name in ("a", "b"):
        tags = [tag_of(number) for number in range(RECORDS)]
        options: dict[str, Any] = {"segments": str(tmp_path / "far"), "frames_per_segment": 4}
        log, twin = UpdateLog.create(tmp_path / name, {"id": "same"}, tags, **options), Twin()
        for step in range(20):
            twin.add(log, step)
        log.finish()
        log.close()
        twins.append(twin)
    for name, twin in zip("ab", twins, strict=True):
        with UpdateLog.open(tmp_path / name, write=True) as log:
            twin.check(log)


@pytest.mark.filterwarnings("ignore:segments at memory")
@pytest.mark.parametrize("url", ["memory://far", "file://{}/far", "{}/plain"])
def test_segments_elsewhere(tmp_path: Path, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    url = url.format(tmp_path)
    monkeypatch.setattr(os, "link", _full)  # as between two file systems
    log, twin = filled(tmp_path / "log", segments=url)
    twin.check(log)
    log.close()
    with UpdateLog.open(tmp_path / "log", write=True) as log:
        log.truncate(33)
        twin.steps = {step: row for step, row in twin.steps.items() if step < 33}
        twin.check(log)
        for step in range(33, 60):
            twin.add(log, step)
        log.finish()
        twin.check(log)
    assert not list((tmp_path / "log").glob("open/*"))
    assert not (tmp_path / "log" / "segments").exists()


class Spoiled(MemoryFileSystem):  # type: ignore[misc]
    """A place that loses or changes what it is given."""

    protocol = "spoiled"
    how: str | None = None
    store: dict[str, Any] = {}  # noqa: RUF012 — its base class has one for all, too
    pseudo_dirs = [""]  # noqa: RUF012

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return "/" + path.removeprefix("spoiled://").strip("/")

    def put_file(self, lpath: str, rpath: str, **options: Any) -> None:
        data = Path(lpath).read_bytes()
        if self.how == "down":
            raise RuntimeError("no route")
        if self.how == "short":
            data = data[:-1]
        if self.how == "flip":
            data = data[:-1] + bytes([data[-1] ^ 1])
        self.pipe_file(rpath, data)


@pytest.mark.parametrize(
    ("how", "words"), [("down", "no route"), ("short", "incomplete"), ("flip", "digest")]
)
def test_segments_arrive_whole_or_stay_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str, words: str
) -> None:
    fsspec.register_implementation("spoiled", Spoiled, clobber=True)
    log, twin = filled(tmp_path / "log", 5, segments=f"spoiled://{how}")
    monkeypatch.setattr(Spoiled, "how", how)
    with pytest.raises(WriteError, match=words) as error:
        log.finish()
    sentence(error)
    twin.check(log)
    monkeypatch.setattr(Spoiled, "how", None)
    for step in range(5, 20):
        twin.add(log, step)
    log.finish()
    twin.check(log)
    monkeypatch.setattr(Spoiled, "how", how)
    if how == "down":
        before = [row["name"] for row in log.verify()]
        with pytest.raises(WriteError):
            log.purge([members_of(0)[0]])
        assert [row["name"] for row in log.verify()] == before
        assert all(row["ok"] for row in log.verify())
        monkeypatch.setattr(Spoiled, "how", None)
        log.close()
        with UpdateLog.open(tmp_path / "log", write=True) as log:
            assert log.recovered is not None
            assert log.recovered["records"] == 1
            assert log.states([0])[0] == "purged"


@pytest.mark.parametrize("how", ["down", "short", "flip"])
def test_the_place_of_segments_is_tried_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    fsspec.register_implementation("spoiled", Spoiled, clobber=True)
    monkeypatch.setattr(Spoiled, "how", how)
    with pytest.raises(LogError, match=f"segments cannot lie at spoiled://tried{how}") as error:
        new_log(tmp_path / "log", segments=f"spoiled://tried{how}")
    sentence(error)
    assert not (tmp_path / "log").exists()
    (tmp_path / "file").write_text("x")
    with pytest.raises(LogError, match="cannot lie at"):
        new_log(tmp_path / "log", segments=str(tmp_path / "file"))
    with pytest.warns(UserWarning, match="gone when this process ends"):
        new_log(tmp_path / "log", segments="memory://warned").close()


def test_logs_are_for_their_owner_only(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir(mode=0o755)
    for name in ("a", "b"):
        filled(tmp_path / name, segments=str(tmp_path / "far"))[0].close()
        assert (tmp_path / name).stat().st_mode & 0o777 == 0o700
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "far").iterdir()} == {0o700}


def test_every_error_is_an_input_or_a_write_error() -> None:
    assert issubclass(LogError, InputError)
    assert sys.platform != "win32"
