"""Files of frames: how a frame lies in its segment, the open segment, where sealed ones lie.

A frame is a header and a payload, which is opaque here. Its digest covers step, record and length
as well, so that a frame that ended up in another's place is noticed, too. What belongs to the log
is what the index names: bytes behind it are of a commit that never came.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
import struct
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from efface.errors import LogError, WriteError

MAGIC = b"EFuf"
VERSION = 1
HEADER = struct.Struct("<4sHxxqqQ16s")
"""Magic, version, step, record (−1: of the whole batch), length of the payload, digest."""
NAME = re.compile(r"\d{8}(-\d+)?\.seg")
"""How segments are called: number, and how often it was rewritten."""
INSIDE = "segments"
"""Where sealed segments lie if nothing else was asked for: in this folder of the log."""
RANGE = 4 << 20
"""Bytes that are read at once; a larger frame is read alone."""
GAP = 64 << 10
"""Unwanted bytes that are read along rather than asked for separately."""


class Frame(NamedTuple):
    """Where a frame lies: ``length`` is the payload's, ``offset`` that of its header."""

    step: int
    record: int
    offset: int
    length: int
    digest: bytes

    @property
    def end(self) -> int:
        """The first byte behind it."""
        return self.offset + HEADER.size + self.length


class Damage(Exception):  # noqa: N818 — it never leaves the package; a sentence is made of it
    """What is wrong with a frame or with the file that it should be in."""


def frame_digest(step: int, record: int, payload: bytes) -> bytes:
    """16 bytes that stand for a frame's place in the log and for its payload."""
    head = struct.pack("<qqQ", step, record, len(payload))
    return hashlib.blake2b(payload, digest_size=16, key=head).digest()


def frame_header(frame: Frame) -> bytes:
    """The bytes before a frame's payload."""
    return HEADER.pack(MAGIC, VERSION, frame.step, frame.record, frame.length, frame.digest)


def payload_of(frame: Frame, data: bytes | memoryview) -> bytes:
    """The payload of a frame, checked.

    Args:
        frame: What the index says of it.
        data: Its bytes in the segment, header and payload.

    Raises:
        Damage: If they are not what was written.
    """
    if len(data) < HEADER.size + frame.length:
        raise Damage("cut short")
    payload = bytes(data[HEADER.size :])
    if frame_digest(frame.step, frame.record, payload) != frame.digest:
        raise Damage("not what was written there (its digest differs)")
    if bytes(data[: HEADER.size]) != frame_header(frame):
        raise Damage("not what was written there (its header differs)")
    return payload


class Store(Protocol):
    """Where sealed segments lie. All raise OSError where the place cannot be reached."""

    where: str

    def put(self, name: str, source: Path) -> bool:
        """Bring a local file there, under a name that no index names yet.

        Returns:
            Whether it is the same file, so that it cannot differ.
        """

    def read(self, name: str, start: int, end: int) -> bytes:
        """Bytes of a segment, fewer where it ends before; FileNotFoundError where it is absent."""

    def size(self, name: str) -> int:
        """Bytes of a segment; FileNotFoundError where it is absent."""

    def delete(self, name: str) -> None:
        """Remove a segment; one that is absent is no error."""

    def names(self) -> list[str]:
        """Segments there, also those that no index names."""


class Folder:
    """Segments in a local folder."""

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self.where = str(path)

    def put(self, name: str, source: Path) -> bool:
        """Link the file there, or copy it where the file system has no links."""
        self.path.mkdir(0o700, parents=True, exist_ok=True)
        target = self.path / name
        target.unlink(missing_ok=True)
        try:
            os.link(source, target)
            return True
        except OSError:
            part = target.with_name(f".{name}.part")
            try:
                shutil.copyfile(source, part)
                sync(part)
                os.replace(part, target)
            finally:
                part.unlink(missing_ok=True)
            return False
        finally:
            sync(self.path)

    def read(self, name: str, start: int, end: int) -> bytes:
        """See :class:`Store`."""
        with open(self.path / name, "rb", buffering=0) as file:
            file.seek(start)
            parts = []
            while start < end and (part := file.read(end - start)):
                parts.append(part)
                start += len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def size(self, name: str) -> int:
        """See :class:`Store`."""
        return (self.path / name).stat().st_size

    def delete(self, name: str) -> None:
        """See :class:`Store`."""
        (self.path / name).unlink(missing_ok=True)

    def names(self) -> list[str]:
        """See :class:`Store`; a copy that was cut short is removed here."""
        if not self.path.is_dir():
            return []
        for part in self.path.glob(".*.part"):
            part.unlink()
        return sorted(p.name for p in self.path.iterdir() if NAME.fullmatch(p.name))


class Remote:
    """Segments anywhere that fsspec reaches, below ``url``."""

    def __init__(self, url: str) -> None:
        import fsspec  # type: ignore[import-untyped]

        self.where = url
        self.system: Any
        self.system, self.root = fsspec.core.url_to_fs(url)

    def _path(self, name: str) -> str:
        return f"{self.root.rstrip('/')}/{name}"

    def put(self, name: str, source: Path) -> bool:
        """Upload the file and read back how long it became."""
        with self._reached():
            self.system.makedirs(self.root, exist_ok=True)
            self.system.put_file(str(source), self._path(name))
            self.system.invalidate_cache()
            if self.system.size(self._path(name)) != source.stat().st_size:
                raise OSError("it arrived incomplete")
            return False

    def read(self, name: str, start: int, end: int) -> bytes:
        """See :class:`Store`."""
        with self._reached():
            # Not every file system bears a range that ends behind the file.
            end = min(end, int(self.system.size(self._path(name))))
            if start >= end:
                return b""
            return bytes(self.system.cat_file(self._path(name), start=start, end=end))

    def size(self, name: str) -> int:
        """See :class:`Store`."""
        with self._reached():
            return int(self.system.size(self._path(name)))

    def delete(self, name: str) -> None:
        """See :class:`Store`."""
        with self._reached(), contextlib.suppress(FileNotFoundError):
            self.system.rm_file(self._path(name))

    def names(self) -> list[str]:
        """See :class:`Store`."""
        with self._reached():
            self.system.invalidate_cache()
            try:
                found = self.system.ls(self.root, detail=False)
            except FileNotFoundError:
                return []
        names = (str(path).rsplit("/", 1)[-1] for path in found)
        return sorted(name for name in names if NAME.fullmatch(name))

    @contextlib.contextmanager
    def _reached(self) -> Iterator[None]:
        """Whatever a file system raises becomes an OSError."""
        try:
            yield
        except OSError:
            raise
        except Exception as error:
            raise OSError(f"{type(error).__name__}: {error}") from error


def store_of(manifest: Mapping[str, Any], folder: Path) -> Store:
    """Where a log's sealed segments lie.

    Args:
        manifest: Of the log: ``segments`` is a folder or a URL, and ``segments_folder`` a folder
            below it that no other log has, not even one of the same training.
        folder: The log.

    Raises:
        LogError: If fsspec does not know the place.
    """
    place = str(manifest["segments"])
    if place == INSIDE:
        return Folder(folder / INSIDE)
    whole = f"{place.rstrip('/')}/{manifest['segments_folder']}"
    if "::" not in place and ("://" not in place or place.startswith("file://")):
        return Folder(Path(whole.removeprefix("file://")))
    try:
        return Remote(whole)
    except Exception as error:
        raise LogError(
            f"segments cannot lie at {place}: {error}; give a folder or a URL that fsspec knows."
        ) from None


def probe(store: Store, place: str) -> None:
    """Write, read and delete a small file where segments shall lie, before any is recorded.

    Raises:
        LogError: If that place does not bear it.
    """
    name, data = "99999999.seg", os.urandom(64)  # as a segment is called: if left, it is swept
    try:
        with tempfile.NamedTemporaryFile() as file:
            file.write(data)
            file.flush()
            store.put(name, Path(file.name))
            back = store.read(name, 0, len(data))
        store.delete(name)
        if back != data:
            raise OSError("what was written there reads otherwise")
    except OSError as error:
        why = " ".join((error.strerror or str(error)).split())
        raise LogError(
            f"segments cannot lie at {place}: {why}; see to that place and its permissions, or "
            "give another folder or URL."
        ) from error


def streamed(store: Store, name: str, frames: Sequence[Frame]) -> Iterator[tuple[Frame, bytes]]:
    """Frames with their bytes, header included, read by ranges in bounded memory.

    Frames that are absent come with fewer bytes than they should have.

    Args:
        store: Where the segment lies.
        name: The segment.
        frames: What is wanted of it, in ascending order.
    """
    for group in _ranges(frames):
        start, end = group[0].offset, group[-1].end
        data = memoryview(store.read(name, start, end))
        for frame in group:
            yield frame, bytes(data[frame.offset - start : frame.end - start])


def _ranges(frames: Sequence[Frame]) -> Iterator[list[Frame]]:
    """Frames that are worth reading at once."""
    group: list[Frame] = []
    for frame in frames:
        far = group and (frame.offset - group[-1].end > GAP or frame.end - group[0].offset > RANGE)
        if far:
            yield group
            group = []
        group.append(frame)
    if group:
        yield group


def sync(path: Path) -> None:
    """Make a file, or the names in a folder, durable."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


class Writer:
    """The open segment: frames go to its end, and count once they are committed.

    Args:
        path: The file; made where absent.
        size: Bytes of it that are committed; what lies behind is cut off.
    """

    def __init__(self, path: Path, size: int = 0) -> None:
        self.path = path
        self.size = self.committed = size
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            os.ftruncate(self._handle, size)
            os.lseek(self._handle, size, os.SEEK_SET)
            sync(path.parent)
        except OSError as error:
            raise unwritten(path, error) from error

    def append(self, step: int, record: int, payload: bytes) -> Frame:
        """Write a frame behind the others.

        Raises:
            WriteError: If it cannot be written (disk full).
        """
        digest = frame_digest(step, record, payload)
        frame = Frame(step, record, self.size, len(payload), digest)
        self.copy(frame_header(frame), payload)
        return frame

    def copy(self, *parts: bytes) -> int:
        """Write bytes as they are; where they begin.

        Raises:
            WriteError: If they cannot be written.
        """
        start = self.size
        try:
            for part in parts:
                view = memoryview(part)
                while view:
                    view = view[os.write(self._handle, view) :]
        except OSError as error:
            raise unwritten(self.path, error) from error
        self.size += sum(map(len, parts))
        return start

    def sync(self) -> None:
        """Make durable what was written."""
        try:
            os.fsync(self._handle)
        except OSError as error:
            raise unwritten(self.path, error) from error

    def back(self, size: int | None = None) -> None:
        """Forget what lies behind ``size`` (default: behind what is committed)."""
        if size is not None:
            self.committed = size
        self.size = self.committed
        with contextlib.suppress(OSError):
            os.ftruncate(self._handle, self.size)
            os.lseek(self._handle, self.size, os.SEEK_SET)

    def close(self) -> None:
        """Let go of the file."""
        with contextlib.suppress(OSError):
            os.close(self._handle)


def unwritten(path: Path | str, error: OSError) -> WriteError:
    """The sentence for a place that cannot be written to."""
    return WriteError(
        f"cannot write {path}: {error.strerror or error}; free some space or see to its "
        "permissions (the log holds every step up to its last commit)."
    )
