"""The folder of a log: what belongs in it, its manifest, and the lock of its one writer."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from efface.errors import LogError, OutputError
from efface.files import digest, write_atomic
from efface.updates.index import FILE
from efface.updates.segments import INSIDE, store_of, unwritten

SCHEMA = "efface.updates/1"
MANIFEST, LOCK, OPEN, CHECKPOINTS = "manifest.json", "lock", "open", "checkpoints"
OWN = {MANIFEST, LOCK, OPEN, CHECKPOINTS, INSIDE, FILE, f"{FILE}-journal"}
"""All names in the folder of a log."""
LINGERING = 10.0
"""Seconds in which the children of a killed writer, which hold its lock, end as well."""


class Lock:
    """The right to write to a log; the system takes it back when the process ends.

    Raises:
        LogError: If another process has it.
        WriteError: If the folder cannot be written to.
    """

    def __init__(self, folder: Path) -> None:
        path = folder / LOCK
        try:
            self._handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise unwritten(path, error) from error
        try:
            self._take(folder)
            os.ftruncate(self._handle, 0)
            os.pwrite(self._handle, str(os.getpid()).encode(), 0)
        except OSError as error:
            os.close(self._handle)
            raise unwritten(path, error) from error
        except BaseException:
            os.close(self._handle)
            raise

    def _take(self, folder: Path) -> None:
        until = time.monotonic() + LINGERING
        while True:
            try:
                fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                holder = os.pread(self._handle, 20, 0).decode(errors="replace")
            # A killed writer's workers may have inherited its lock; they notice in a moment.
            if _alive(holder) or time.monotonic() > until:
                raise LogError(
                    f"{folder} is being written to by another process ({holder or 'unknown'}); "
                    "wait until that has ended, or record into another folder."
                )
            time.sleep(0.05)

    def release(self) -> None:
        """Give it back, also where processes that were forked meanwhile still have the file."""
        with contextlib.suppress(OSError):
            fcntl.flock(self._handle, fcntl.LOCK_UN)
        os.close(self._handle)


def _alive(process: str) -> bool:
    try:
        os.kill(int(process), 0)
    except (ValueError, ProcessLookupError):
        return False
    except OSError:
        return True
    return True


def write_manifest(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Write the manifest whole, with a digest of itself; from then on the folder is a log."""
    signed = {**manifest, "digest": digest(dict(manifest))}
    write_atomic(folder / MANIFEST, (json.dumps(signed, indent=1) + "\n").encode())


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a log.

    Raises:
        LogError: If the folder is no log, or of a newer efface, or the manifest is damaged.
    """
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        raise LogError(
            f"{folder} is no update log (it has no {MANIFEST}); give the folder that a training "
            "with --record wrote."
        ) from None
    except OSError as error:
        raise LogError(
            f"{path} cannot be read: {error.strerror or error}; see to its permissions."
        ) from None
    except ValueError:
        manifest = None
    schema = manifest.get("schema") if isinstance(manifest, dict) else None
    if isinstance(schema, str) and schema.startswith("efface.updates/") and schema != SCHEMA:
        raise LogError(
            f"{folder} is of schema {schema}, and this efface reads {SCHEMA}; use the efface that "
            "wrote it, or a newer one."
        )
    if not isinstance(manifest, dict) or manifest.pop("digest", None) != digest(manifest):
        raise LogError(f"{path} is damaged; restore it from a copy, or record the training again.")
    return manifest


def check_new(folder: Path, force: bool) -> None:
    """Refuse a folder in which no new log may be made.

    Raises:
        OutputError: With the way out in its sentence.
    """
    if not folder.is_dir():
        if folder.exists() or folder.is_symlink():
            raise OutputError(f"{folder} is a file; give the name of a folder.")
        return
    if (folder / MANIFEST).exists():
        if not force:
            raise OutputError(
                f"{folder} holds an update log already; give --force to replace it, or another "
                "name."
            )
        return
    half = {path.name for path in folder.glob(f".{MANIFEST}.*.tmp")}  # a creation was killed
    if foreign := sorted({path.name for path in folder.iterdir()} - OWN - half):
        raise OutputError(
            f"{folder} holds other files ({foreign[0]}); give the name of an empty or new folder."
        )


def make_private(folder: Path) -> None:
    """Make the folder of a log, for its owner only; a log that is replaced keeps its permissions.

    Raises:
        OSError: If it cannot be made.
    """
    folder.mkdir(0o700, parents=True, exist_ok=True)
    if not (folder / MANIFEST).exists():
        with contextlib.suppress(PermissionError):  # of another owner, who gave us the right
            folder.chmod(0o700)


def clear(folder: Path) -> None:
    """Erase an old log, or what an interrupted creation left; the lock is held, and stays."""
    if (folder / MANIFEST).exists():
        with contextlib.suppress(LogError, OSError, KeyError):
            old = read_manifest(folder)
            store = store_of(old, folder)
            for name in store.names():
                store.delete(name)
        (folder / MANIFEST).unlink()
    for name in (FILE, f"{FILE}-journal"):
        (folder / name).unlink(missing_ok=True)
    for name in (OPEN, INSIDE, CHECKPOINTS):
        if (folder / name).exists():
            shutil.rmtree(folder / name)
