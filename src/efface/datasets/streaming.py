"""Images that are decoded when they are asked for: sets too large for memory.

A :class:`Streamed` set knows the labels and IDs of all its records without decoding one, and
gives record by record what :meth:`Streamed.load` would give at once. It is a map-style data set;
:func:`efface.datasets.image_task` decides by size whether a task holds it in memory.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from efface.datasets.pixels import Mode, Pixels, decode
from efface.errors import InputError

SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".ppm", ".webp"}

Encoded = tuple[bytes | None, str]
"""An image file's bytes, and what an error calls it."""


class Images(NamedTuple):
    """Records in memory: images ``[N, C, H, W]``, labels ``[N]`` (int64) and N unique IDs."""

    images: Tensor
    labels: Tensor
    ids: list[str]

    def take(self, positions: Tensor) -> Images:
        """The records at some positions, in that order."""
        ids = [self.ids[i] for i in positions.tolist()]
        return Images(self.images[positions], self.labels[positions], ids)


class Source(Protocol):
    """Where encoded images come from."""

    def encoded(self, rows: Sequence[int], /) -> Iterator[Encoded]:
        """The images of some rows, in that order."""
        ...


class Streamed:
    """A map-style data set of ``(uint8 [C, H, W], label)`` that decodes on access.

    Args:
        source: Gives encoded images.
        targets: Labels ``[N]``, int64.
        ids: N unique IDs.
        mode: ``"RGB"`` or ``"L"``.
        size: Images are resized and cropped to squares of this size; ``None``: all have one.
        rows: Rows of the source that the records are; all by default.
    """

    def __init__(
        self,
        source: Source,
        targets: Tensor,
        ids: list[str],
        mode: Mode = "RGB",
        size: int | None = None,
        rows: Tensor | None = None,
    ) -> None:
        if len(targets) == 0:
            raise InputError("there are no images to read; give a source that holds some.")
        if size is not None and size < 1:
            raise InputError(f"images cannot be resized to {size} pixels; give 1 or more.")
        self.source, self.targets, self.ids = source, targets, ids
        self.mode, self.size = mode, size
        self.rows = torch.arange(len(targets)) if rows is None else rows

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[tuple[Tensor, int]]:
        """Several records; a loader asks for whole batches, so that a row group is read once."""
        pixels = map(torch.from_numpy, self._decoded(indices))
        return [(p, int(self.targets[i])) for p, i in zip(pixels, indices, strict=True)]

    @cached_property
    def shape(self) -> tuple[int, ...]:
        """``[C, H, W]`` of every image; decodes the first where no size was given."""
        if self.size is not None:
            return (1 if self.mode == "L" else 3, self.size, self.size)
        encoded, where = next(iter(self.source.encoded([int(self.rows[0])])))
        return tuple(decode(encoded, where, self.mode).shape)

    @property
    def nbytes(self) -> int:
        """Bytes of all images once decoded."""
        return len(self) * math.prod(self.shape)

    def take(self, positions: Tensor) -> Streamed:
        """The records at some positions, in that order; still not decoded."""
        ids = [self.ids[i] for i in positions.tolist()]
        targets, rows = self.targets[positions], self.rows[positions]
        return Streamed(self.source, targets, ids, self.mode, self.size, rows)

    def load(self) -> Images:
        """All records, decoded into one tensor.

        Raises:
            InputError: If an image cannot be decoded, or has another size than the first.
        """
        found = torch.empty(len(self), *self.shape, dtype=torch.uint8)
        whole = found.numpy()
        for i, pixels in enumerate(self._decoded(range(len(self)))):
            whole[i] = pixels
        return Images(found, self.targets, self.ids)

    def _decoded(self, indices: Sequence[int]) -> Iterator[Pixels]:
        rows = self.rows[torch.as_tensor(indices, dtype=torch.int64)].tolist()
        for encoded, where in self.source.encoded(rows):
            pixels = decode(encoded, where, self.mode, self.size)
            if pixels.shape != self.shape:
                size, first = ("×".join(map(str, s[1:])) for s in (pixels.shape, self.shape))
                raise InputError(
                    f"{where} is {size} where others are {first}; resize all to one size (size=)."
                )
            yield pixels


class Files:
    """Image files, opened when they are asked for."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = paths

    def encoded(self, rows: Sequence[int]) -> Iterator[Encoded]:
        """The files' bytes, in the order of ``rows``."""
        for row in rows:
            path = self.paths[row]
            try:
                yield path.read_bytes(), str(path)
            except OSError as error:
                raise InputError(
                    f"{path} cannot be read ({error.strerror}); put it back or open the set anew."
                ) from error


def open_folder(root: str | Path, *, mode: Mode = "RGB", size: int | None = None) -> Streamed:
    """Open an image folder, ``class/anything.png``; a file is read when it is asked for.

    Args:
        root: A folder with one sub-folder per class, e.g. ImageNet's ``train/``; labels follow
            the sorted names.
        mode: ``"RGB"``, or ``"L"`` for one grey channel.
        size: Resize and crop to squares of so many pixels; ``None``: all images have one size.

    Returns:
        A data set of N records; IDs are paths below ``root`` with forward slashes.

    Raises:
        InputError: If there is no class folder or no image.
    """
    root = Path(root)
    files = [
        (path, label)
        for label, name in enumerate(class_folders(root))
        for path in sorted((root / name).rglob("*"))
        if path.suffix.lower() in SUFFIXES
    ]
    if not files:
        refuse_pickles(root)
        raise InputError(f"{root} holds no class/image files; give a folder with one per class.")
    ids = [path.relative_to(root).as_posix() for path, _ in files]
    targets = torch.tensor([label for _, label in files])
    return Streamed(Files([path for path, _ in files]), targets, ids, mode, size)


def class_folders(root: Path) -> list[str]:
    """The names of the folders in a folder, sorted."""
    return sorted(p.name for p in root.iterdir() if p.is_dir()) if root.is_dir() else []


def refuse_pickles(folder: Path) -> None:
    """Say so where a folder holds the original archives of CIFAR, which are pickled.

    Raises:
        InputError: Then.
    """
    names = ("data_batch_1", "cifar-10-batches-py", "cifar-100-python", "cifar-10-python.tar.gz")
    for name in (*names, "cifar-100-python.tar.gz"):
        if (folder / name).exists():
            raise InputError(
                f"{folder / name} is pickled, which can run code and is never read; use the "
                "parquet files of the Hugging Face hub or an image folder."
            )
