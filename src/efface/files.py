"""Files are written whole or not at all, and digests say what was written."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from efface.errors import OutputError, WriteError


def write_atomic(path: Path, data: bytes) -> None:
    """Write a file whole or not at all: temporary file, fsync, rename.

    A reader sees the old file or the new one, never a part, whenever the process is killed.

    Args:
        path: Where the file shall be; its folder is made when absent.
        data: All of its bytes.

    Raises:
        WriteError: If it cannot be written (disk full, no permission); nothing is left behind.
    """
    path = Path(path)
    made = [folder for folder in path.parents if not folder.exists()]
    _sweep(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
            for folder in made:
                folder.rmdir()
        raise WriteError(
            f"cannot write {path}: {error.strerror or error}; free some space or choose another "
            "place (nothing was changed)."
        ) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def _sweep(path: Path) -> None:
    """Remove what processes that were killed while writing this file have left."""
    for stale in path.parent.glob(f".{path.name}.*.tmp"):
        owner = stale.name.split(".")[-2]
        if owner.isdigit() and not _alive(int(owner)):
            with contextlib.suppress(OSError):
                stale.unlink()


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def _sync_folder(folder: Path) -> None:
    """Make the rename itself durable, where the system lets a folder be opened."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def check_output(path: Path, force: bool) -> None:
    """Refuse an output that exists (without ``force``) or that cannot be made, before any work.

    Raises:
        OutputError: With the way out in its sentence.
    """
    path = Path(path)
    if path.is_dir():
        raise OutputError(f"{path} is a folder; give the name of a file.")
    if path.exists() and not force:
        raise OutputError(f"{path} exists already; give --force to replace it, or another name.")
    folder = path.parent
    while not folder.exists():
        folder = folder.parent
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise OutputError(f"{path} cannot be written: {folder} is not a folder you may write to.")


def canonical(value: Any) -> str:
    """JSON with sorted keys, no spaces and no NaN: equal values give equal text.

    >>> canonical({"b": 1, "a": [1.5, None]})
    '{"a":[1.5,null],"b":1}'
    """
    return json.dumps(
        value, sort_keys=True, separators=(",", ":"), allow_nan=False, ensure_ascii=False
    )


def digest(value: bytes | str | Mapping[str, Any] | list[Any]) -> str:
    """SHA-256 in hexadecimal of bytes, text or a JSON value in canonical form."""
    if not isinstance(value, bytes | str):
        value = canonical(value)
    return hashlib.sha256(value.encode() if isinstance(value, str) else value).hexdigest()
