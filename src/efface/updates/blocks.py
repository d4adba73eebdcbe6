"""record → steps inside the index: recent batches as they came, older ones folded into step lists.

A row per pair of record and step would be a hundred million rows. So a batch's members are kept as
one row at first; when there are enough of those they are folded into *blocks*: per shard of
records, the packed step list of every record. Four blocks of a level are merged into one of the
next, up to about a kilobyte a list. No commit ever rewrites more than a few megabytes, and a record
is looked up in few places.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from efface.errors import LogError
from efface.updates.index import CHUNK, Index
from efface.updates.membership import (
    Ints,
    opened,
    pack,
    packed_members,
    signed,
    unpack,
    unpacked_members,
)

SHARD = 1024
"""Records whose lists are merged together; part of the keys in the index, so it never changes."""
FOLD_STEPS, FOLD_PAIRS = 4096, 1 << 19
"""Steps, and pairs of record and step, that are kept as they came."""
FAN = 4
"""Blocks that are merged into one."""
LARGEST = SHARD << 10
"""Bytes of a block; larger ones would take no less space, and no less time to look into."""
AT_ONCE = 8 << 20
"""Bytes that one transaction merges."""


class Block(NamedTuple):
    """A row of the table ``blocks``: the steps of one shard's records in a range of steps."""

    id: int
    shard: int
    level: int
    first: int
    shift: int


class Blocks:
    """The memberships of a log; writing methods run inside the caller's transaction.

    Args:
        index: Where they are kept.
    """

    def __init__(self, index: Index) -> None:
        self.index = index
        self._steps = self._pairs = 0

    def add(self, batches: Sequence[tuple[int, Ints]]) -> None:
        """Keep the members of batches: pairs of a step and ascending record numbers."""
        rows = ((step, signed(step, packed_members(members))) for step, members in batches)
        self.index.many("INSERT INTO recent VALUES(?, ?)", rows)
        self._steps += len(batches)
        self._pairs += sum(len(members) for _, members in batches)

    def tidy(self) -> None:
        """Fold and merge what is due, each in transactions of its own."""
        if self._steps >= FOLD_STEPS or self._pairs >= FOLD_PAIRS:
            with self.index.change():
                self._fold()
            self._steps = self._pairs = 0
            while self._merge():
                pass

    def steps_of(self, numbers: Ints) -> Ints:
        """Steps whose batch held any of these records, ascending."""
        numbers = np.unique(numbers)
        with self.index.read():
            last = self.index.one("SELECT MAX(step) FROM steps")[0]
            found = np.zeros(0 if last is None else last + 1, np.bool_)
            blocks = self._blocks(f"shard IN ({_named(np.unique(numbers // SHARD))})")
            keys = _keys(blocks, numbers)
            for start in range(0, len(keys), CHUNK):
                rows = self._rows(f"key IN ({_named(keys[start : start + CHUNK])})")
                found[self._decoded(blocks, rows)[1]] = True
            members, steps = self._recent()
            found[steps[_among(members, numbers)]] = True
        return np.flatnonzero(found)

    def seen(self, numbers: Ints) -> npt.NDArray[np.bool_]:
        """Which of these records were in any step."""
        wanted = np.unique(numbers)
        with self.index.read():
            blocks = self._blocks(f"shard IN ({_named(np.unique(wanted // SHARD))})")
            keys = _keys(blocks, wanted).tolist()
            held = [
                blocks[key // SHARD].shard * SHARD + key % SHARD
                for (key,) in self.index.among("SELECT key FROM lists WHERE key IN ({})", keys)
            ]
            recent, _ = self._recent()
        return _among(numbers, np.concatenate([recent, np.array(held, np.int64)]))

    def drop(self, numbers: Ints) -> None:
        """Forget in which steps these records were."""
        numbers = np.unique(numbers)
        blocks = self._blocks(f"shard IN ({_named(np.unique(numbers // SHARD))})")
        keys = _keys(blocks, numbers)
        self.index.many("DELETE FROM lists WHERE key=?", ((key,) for key in keys.tolist()))
        for step, data in self._batches():
            members, _ = unpacked_members([data])
            if (gone := _among(members, numbers)).any():
                left = signed(step, packed_members(members[~gone]))
                self.index.do("UPDATE recent SET members=? WHERE step=?", (left, step))

    def cut(self, step: int) -> None:
        """Forget the members of this step and of all later ones."""
        for block in self._blocks(f"last >= {step}").values():
            numbers, steps = self._content([block])
            self._delete(block)
            keep = steps < step
            self._insert(block.shard, block.level, numbers[keep], steps[keep])
        self.index.do("DELETE FROM recent WHERE step >= ?", (step,))
        self.count()

    def count(self) -> None:
        """See how much is not folded yet; before the first change, and after one that failed."""
        steps, size = self.index.one(
            "SELECT COUNT(*), COALESCE(SUM(LENGTH(members)), 0) FROM recent"
        )
        self._steps, self._pairs = int(steps), int(size) // 4

    def _batches(self) -> list[tuple[int, bytes]]:
        """Step and packed members of every batch that is not folded yet, in order of steps."""
        batches = []
        for step, members in self.index.rows("SELECT step, members FROM recent ORDER BY step"):
            if (body := opened(step, members)) is None:
                raise self._damaged(f"the members of step {step}")
            batches.append((step, body))
        return batches

    def _recent(self) -> tuple[Ints, Ints]:
        """Record and step of every pair that is not folded yet, in order of steps."""
        batches = self._batches()
        members, counts = unpacked_members([data for _, data in batches])
        return members, np.repeat(np.array([step for step, _ in batches], np.int64), counts)

    def _fold(self) -> None:
        """Turn recent batches into one block per shard."""
        members, steps = self._recent()
        order = np.argsort(members, kind="stable")  # steps stay ascending within a record
        members, steps = members[order], steps[order]
        shards = np.unique(members // SHARD)
        bounds = np.searchsorted(members, np.append(shards * SHARD, np.iinfo(np.int64).max))
        for shard, start, end in zip(shards.tolist(), bounds[:-1], bounds[1:], strict=True):
            self._insert(shard, 0, members[start:end], steps[start:end])
        self.index.do("DELETE FROM recent")

    def _merge(self) -> bool:
        """Merge some megabytes of blocks in one transaction; whether there was anything to do."""
        due = self.index.rows(
            "SELECT shard, level, SUM(bytes) FROM blocks GROUP BY shard, level "
            "HAVING COUNT(*) >= ? AND SUM(bytes) <= ?",
            (FAN, LARGEST),
        )
        if not due:
            return False
        room = AT_ONCE
        with self.index.change():
            for shard, level, size in due:
                if (room := room - size) < 0:
                    break
                blocks = list(self._blocks(f"shard={shard} AND level={level}").values())
                numbers, steps = self._content(blocks)
                for block in blocks:
                    self._delete(block)
                self._insert(shard, level + 1, numbers, steps)
        return True

    def _blocks(self, condition: str) -> dict[int, Block]:
        rows = self.index.rows(
            f"SELECT id, shard, level, first, shift FROM blocks WHERE {condition} ORDER BY id"
        )
        return {row[0]: Block(*row) for row in rows}

    def _rows(self, condition: str) -> list[tuple[int, int, bytes]]:
        return self.index.rows(f"SELECT key, n, data FROM lists WHERE {condition}")

    def _content(self, blocks: Sequence[Block]) -> tuple[Ints, Ints]:
        """Record and step of every pair in blocks of one shard, by record, then by step."""
        rows = []
        for block in blocks:
            rows += self._rows(f"key BETWEEN {block.id * SHARD} AND {block.id * SHARD + SHARD - 1}")
        numbers, steps = self._decoded({block.id: block for block in blocks}, rows)
        order = np.lexsort((steps, numbers))
        return numbers[order], steps[order]

    def _decoded(
        self, blocks: Mapping[int, Block], rows: Sequence[tuple[int, int, bytes]]
    ) -> tuple[Ints, Ints]:
        """Record and step of every pair in some rows of the table ``lists``."""
        groups: dict[int, list[tuple[int, int, int, bytes]]] = defaultdict(list)
        for key, n, data in rows:
            block = blocks[key // SHARD]
            if (body := opened(key, data)) is None:
                raise self._damaged(f"the steps of record {block.shard * SHARD + key % SHARD}")
            number = block.shard * SHARD + key % SHARD
            groups[block.shift].append((number, block.first, n, body))
        numbers, steps = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
        for shift, group in groups.items():
            owners, firsts, counts, bodies = zip(*group, strict=True)
            numbers.append(np.repeat(np.array(owners, np.int64), counts))
            steps.append(unpack(shift, counts, bodies) + np.repeat(np.array(firsts), counts))
        return np.concatenate(numbers), np.concatenate(steps)

    def _insert(self, shard: int, level: int, numbers: Ints, steps: Ints) -> None:
        """Write a block: pairs of one shard, by record, then by step."""
        if not len(steps):
            return
        first, last = int(steps.min()), int(steps.max())
        shift, coded = pack(numbers % SHARD, steps - first, last - first + 1)
        lists = list(coded)
        block = self.index.do(
            "INSERT INTO blocks(shard, level, first, last, shift, bytes) VALUES(?,?,?,?,?,?)",
            (shard, level, first, last, shift, sum(len(one.data) for one in lists)),
        )
        keyed = ((block * SHARD + one.number, one) for one in lists)
        self.index.many(
            "INSERT INTO lists VALUES(?, ?, ?)",
            ((key, one.n, signed(key, one.data)) for key, one in keyed),
        )

    def _delete(self, block: Block) -> None:
        start = block.id * SHARD
        self.index.do("DELETE FROM lists WHERE key BETWEEN ? AND ?", (start, start + SHARD - 1))
        self.index.do("DELETE FROM blocks WHERE id=?", (block.id,))

    def _damaged(self, what: str) -> LogError:
        return LogError(
            f"{self.index.path} is damaged: {what} differ from what was written; restore the index "
            "from a copy."
        )


def _named(values: Ints) -> str:
    """Integers as they stand in a statement."""
    return ",".join(map(str, values.tolist()))


def _keys(blocks: Mapping[int, Block], numbers: Ints) -> Ints:
    """Where in ``lists`` the steps of ascending records would be, ascending."""
    parts = [np.zeros(0, np.int64)]
    for block in blocks.values():
        low, high = np.searchsorted(numbers, [block.shard * SHARD, (block.shard + 1) * SHARD])
        parts.append(block.id * SHARD + numbers[low:high] % SHARD)
    return np.concatenate(parts)


def _among(members: Ints, numbers: Ints) -> npt.NDArray[np.bool_]:
    """Which members are among some numbers."""
    most = max(members.max(initial=-1), numbers.max(initial=-1))
    table = np.zeros(most + 1, np.bool_)
    table[numbers] = True
    found: npt.NDArray[np.bool_] = table[members]
    return found
