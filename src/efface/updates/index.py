"""The index of a log: one SQLite file, its tables, transactions, and errors as sentences.

Rollback journal, not a write-ahead log: then readers need no write access, the file is all there
is, and one transaction is one commit. Deleted rows are overwritten (``secure_delete``).
"""

from __future__ import annotations

import contextlib
import json
import os
import sqlite3
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from efface.errors import EffaceError, LogError, WriteError

FILE = "index.sqlite"
PATIENCE = 30.0
"""Seconds to wait for others who read or write before giving up."""
PAGE = 8192
"""Bytes of a page: large enough that step lists of about a kilobyte leave little of it unused."""
CHUNK = 2000
"""Values named in one statement."""

TABLES = """
CREATE TABLE meta(key TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE steps(step INTEGER PRIMARY KEY, epoch INTEGER NOT NULL, lr REAL NOT NULL,
    state INTEGER NOT NULL, segment INTEGER, offset INTEGER, length INTEGER, digest BLOB);
CREATE TABLE shares(step INTEGER, record INTEGER, segment INTEGER NOT NULL,
    offset INTEGER NOT NULL, length INTEGER NOT NULL, digest BLOB NOT NULL,
    PRIMARY KEY(step, record)) WITHOUT ROWID;
CREATE TABLE segments(id INTEGER PRIMARY KEY, name TEXT NOT NULL, sealed INTEGER NOT NULL,
    frames INTEGER NOT NULL, bytes INTEGER NOT NULL, first INTEGER NOT NULL, last INTEGER NOT NULL);
CREATE TABLE records(number INTEGER PRIMARY KEY, tag TEXT, cohort INTEGER);
CREATE INDEX records_by_tag ON records(tag);
CREATE TABLE events(id INTEGER PRIMARY KEY, date TEXT NOT NULL, step INTEGER, kind TEXT NOT NULL,
    facts TEXT NOT NULL);
CREATE TABLE recent(step INTEGER PRIMARY KEY, members BLOB NOT NULL);
CREATE TABLE blocks(id INTEGER PRIMARY KEY, shard INTEGER NOT NULL, level INTEGER NOT NULL,
    first INTEGER NOT NULL, last INTEGER NOT NULL, shift INTEGER NOT NULL, bytes INTEGER NOT NULL);
CREATE TABLE lists(key INTEGER PRIMARY KEY, n INTEGER NOT NULL, data BLOB NOT NULL);
"""


class Index:
    """A connection to ``index.sqlite``.

    Used by one thread at a time, which need not always be the same.

    Args:
        folder: The log.
        write: Whether to change it; a reader never needs write access.

    Raises:
        LogError: If there is no index, or it is damaged or locked.
    """

    def __init__(self, folder: Path, write: bool = False) -> None:
        self.path = Path(folder) / FILE
        if not self.path.is_file():
            raise LogError(f"{folder} has no {FILE}; restore it, or record the training again.")
        with self.guard():
            self._connection = self._writer() if write else self._reader()

    @classmethod
    def create(
        cls, folder: Path, tags: Sequence[str], cohorts: Mapping[int, int], log_id: str
    ) -> Index:
        """Make the tables of a new log; a kill leaves an empty index or a whole one."""
        path = Path(folder) / FILE
        for stale in (path, path.with_name(f"{FILE}-journal")):
            stale.unlink(missing_ok=True)
        path.touch()
        index = cls(folder, write=True)
        with index.guard():
            index._connection.execute(f"PRAGMA page_size={PAGE}")
        with index.change():
            for statement in TABLES.split(";\n"):
                if statement.strip():
                    index.do(statement)
            rows = ((number, tag) for number, tag in enumerate(tags))
            index.many("INSERT INTO records(number, tag) VALUES(?, ?)", rows)
            grouped = ((int(cohort), int(number)) for number, cohort in cohorts.items())
            index.many("UPDATE records SET cohort=? WHERE number=?", grouped)
            index.put("id", log_id)
        return index

    def _connect(self, options: str) -> sqlite3.Connection:
        name = f"file:{quote(str(self.path.absolute()))}?{options}"
        return sqlite3.connect(
            name, PATIENCE, isolation_level=None, check_same_thread=False, uri=True
        )

    def _writer(self) -> sqlite3.Connection:
        connection = self._connect("mode=rw")
        for pragma in ("journal_mode=DELETE", "synchronous=FULL", "secure_delete=ON"):
            connection.execute(f"PRAGMA {pragma}").fetchall()
        connection.execute("PRAGMA cache_size=-8192")
        connection.execute("SELECT COUNT(*) FROM sqlite_master").fetchone()
        return connection

    def _reader(self) -> sqlite3.Connection:
        """A connection that changes nothing, but undoes what a killed writer left half done."""
        connection = self._connect("mode=ro")
        try:
            connection.execute("SELECT COUNT(*) FROM sqlite_master").fetchone()
            return connection
        except sqlite3.OperationalError as error:
            connection.close()
            if "locked" in str(error):
                raise
        journal = self.path.with_name(f"{FILE}-journal")
        if not journal.exists() or not journal.stat().st_size:
            connection = self._connect("mode=ro&immutable=1")
        elif os.access(self.path, os.W_OK) and os.access(self.path.parent, os.W_OK):
            self._writer().close()
            connection = self._connect("mode=ro")
        else:
            raise LogError(
                f"{self.path} was left in the middle of a commit by a writer that was killed; "
                "open the log once where it may be written to, which undoes that commit."
            )
        connection.execute("SELECT COUNT(*) FROM sqlite_master").fetchone()
        return connection

    @contextlib.contextmanager
    def guard(self) -> Iterator[None]:
        """Errors of SQLite as sentences."""
        try:
            yield
        except sqlite3.Error as error:
            raise _sentence(self.path, error) from error

    @contextlib.contextmanager
    def read(self) -> Iterator[None]:
        """Several reads that see one state of the log."""
        with self.guard():
            if self._connection.in_transaction:
                yield
                return
            self._connection.execute("BEGIN")
            try:
                yield
            finally:
                with contextlib.suppress(sqlite3.Error):
                    self._connection.execute("COMMIT")

    @contextlib.contextmanager
    def change(self) -> Iterator[None]:
        """One transaction: all of it, or nothing when it fails or the process dies.

        Raises:
            WriteError: If it cannot be written.
            LogError: If the index is locked or damaged.
        """
        with self.guard():
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield
                self.commit()
            except BaseException:
                with contextlib.suppress(sqlite3.Error):
                    self._connection.execute("ROLLBACK")
                raise

    def commit(self) -> None:
        """The moment at which a change counts."""
        self._connection.execute("COMMIT")

    def rows(self, statement: str, values: Sequence[Any] = ()) -> list[Any]:
        """All rows of a query."""
        with self.guard():
            return self._connection.execute(statement, values).fetchall()

    def one(self, statement: str, values: Sequence[Any] = ()) -> Any:
        """The first row of a query; None if there is none."""
        with self.guard():
            return self._connection.execute(statement, values).fetchone()

    def among(self, statement: str, values: Sequence[int]) -> Iterator[Any]:
        """Rows of a query whose ``{}`` stands for integers, taken a few thousand at a time."""
        for start in range(0, len(values), CHUNK):
            named = ",".join(map(str, values[start : start + CHUNK]))
            yield from self.rows(statement.format(named))

    def do(self, statement: str, values: Sequence[Any] = ()) -> int:
        """Run a statement; how many rows or, of an insert, which row it made."""
        cursor = self._connection.execute(statement, values)
        return int(cursor.lastrowid or 0) if statement.startswith("INSERT") else cursor.rowcount

    def many(self, statement: str, rows: Iterable[Sequence[Any]]) -> None:
        """Run a statement for each of several rows."""
        self._connection.executemany(statement, rows)

    def put(self, key: str, value: Any) -> None:
        """Note a JSON value; None removes it."""
        if value is None:
            self.do("DELETE FROM meta WHERE key=?", (key,))
        else:
            self.do("INSERT OR REPLACE INTO meta VALUES(?, ?)", (key, json.dumps(value)))

    def get(self, key: str) -> Any:
        """A value that was noted; None if there is none."""
        row = self.one("SELECT value FROM meta WHERE key=?", (key,))
        return None if row is None else json.loads(row[0])

    def vacuum(self) -> None:
        """Give unused space back; what was deleted is in no page of the file afterwards."""
        with self.guard():
            self._connection.execute("VACUUM")

    def check(self) -> None:
        """Look at the index as a whole.

        Raises:
            LogError: If SQLite finds damage.
        """
        found = self.rows("PRAGMA quick_check(1)")
        if found != [("ok",)]:
            raise _sentence(self.path, sqlite3.DatabaseError(str(found[0][0])))

    def close(self) -> None:
        """Let go of the file."""
        with contextlib.suppress(sqlite3.Error):
            self._connection.close()


def _sentence(path: Path, error: sqlite3.Error) -> EffaceError:
    """What went wrong with the index, and what to do about it."""
    code = str(getattr(error, "sqlite_errorname", ""))
    if "BUSY" in code or "LOCKED" in code:
        return LogError(
            f"{path} is locked by another process; try again when that has ended "
            "(the log holds every step up to its last commit)."
        )
    if code.startswith(("SQLITE_READONLY", "SQLITE_FULL", "SQLITE_IOERR", "SQLITE_CANTOPEN")):
        return WriteError(
            f"cannot write {path}: {error}; free some space or see to its permissions "
            "(the log holds every step up to its last commit)."
        )
    return LogError(
        f"{path} is damaged ({' '.join(str(error).split())}); restore it from a copy, or record "
        "the training again."
    )
