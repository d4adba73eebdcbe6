"""Parquet files of images, in the Hugging Face hub's layout, one or in shards."""

from __future__ import annotations

import glob
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from efface.datasets.pixels import Mode, missing
from efface.datasets.streaming import Encoded, Streamed
from efface.errors import InputError

IMAGE_COLUMNS = ("img", "image")
LABEL_COLUMNS = ("label", "labels", "fine_label", "target")
KEPT_GROUPS = 8
"""Row groups whose encoded images are kept: at the hub's usual hundred rows, a few MB each."""


class ParquetRows:
    """Rows of parquet files. The encoded images of the row groups used last are kept.

    No file stays open, so that a set can be handed to a loader's processes.

    Args:
        paths: The files, in the order of their rows.
        column: The image column.
        sizes: Rows of every row group, file by file.
        keep: Row groups to keep.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        column: str,
        sizes: Sequence[Sequence[int]],
        keep: int = KEPT_GROUPS,
    ) -> None:
        self.paths, self.column, self.keep = paths, column, keep
        self.groups = [(f, g) for f, file in enumerate(sizes) for g in range(len(file))]
        self.starts = np.cumsum([0, *(n for file in sizes for n in file)])
        self.firsts = np.cumsum([0, *(sum(file) for file in sizes)])
        self.cache: OrderedDict[int, Any] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"cache": OrderedDict()}

    def encoded(self, rows: Sequence[int]) -> Iterator[Encoded]:
        """The images' bytes, in the order of ``rows``; each row group is read once.

        A single row group's rows are handed on as they are read; rows of several are collected
        first, still encoded.
        """
        groups = np.searchsorted(self.starts, rows, side="right") - 1
        if (np.diff(groups) >= 0).all():  # in the order of the file: nothing to collect
            for row, group in zip(rows, groups.tolist(), strict=True):
                yield self._cell(row, group)
            return
        found: dict[int, Encoded] = {}
        for place in np.argsort(groups, kind="stable").tolist():
            found[place] = self._cell(rows[place], int(groups[place]))
        for place in range(len(rows)):
            yield found.pop(place)

    def _cell(self, row: int, group: int) -> Encoded:
        file = self.groups[group][0]
        cell = self._group(group)[row - int(self.starts[group])].as_py()
        where = f"row {row - int(self.firsts[file])} of {self.paths[file]}"
        return (cell.get("bytes") if isinstance(cell, dict) else cell), where

    def _group(self, number: int) -> Any:
        if number in self.cache:
            self.cache.move_to_end(number)
            return self.cache[number]
        file, group = self.groups[number]
        while len(self.cache) >= self.keep:  # make room first: never more than ``keep``
            self.cache.popitem(last=False)
        self.cache[number] = read_group(self.paths[file], group, self.column)
        return self.cache[number]


def read_group(path: Path, group: int, column: str) -> Any:
    """The image column of one row group.

    Raises:
        InputError: If the file is no longer what it was, or is damaged.
    """
    import pyarrow as pa
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path, memory_map=True) as file:
            table = file.read_row_group(group, columns=[column], use_threads=False)
        return table[column]
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{path} cannot be read as parquet ({error}); fetch it again.") from error


def open_parquet(
    paths: str | Path | Iterable[str | Path],
    *,
    image: str | None = None,
    label: str | None = None,
    mode: Mode = "RGB",
    size: int | None = None,
    limit: int | None = None,
    keep: int = KEPT_GROUPS,
) -> Streamed:
    """Open parquet files of images; labels and IDs are read, images when they are asked for.

    Args:
        paths: A file; a pattern such as ``train-*.parquet``; or several files, in order.
        image: The image column (see :func:`efface.datasets.read_parquet`).
        label: The label column, e.g. ``coarse_label``.
        mode: ``"RGB"``, or ``"L"`` for one grey channel.
        size: Resize and crop to squares of so many pixels; ``None``: all images have one size.
        limit: Only so many rows, from the start.
        keep: Row groups whose encoded images are kept in memory.

    Returns:
        A data set of N records. IDs are the images' paths where all are given and differ, else
        row numbers, counted over all files.

    Raises:
        InputError: If a file or column cannot be read, a shard is absent, or pyarrow is missing.
    """
    files = shards(paths)
    try:
        import pyarrow as pa
        from pyarrow import parquet
    except ImportError as error:
        raise missing("pyarrow", files[0]) from error
    labels: list[Any] = []
    names: list[Any] = []
    sizes: list[list[int]] = []
    for path in files:
        try:
            with parquet.ParquetFile(path, memory_map=True) as file:
                columns = file.schema_arrow
                pictures = _column(path, columns.names, image, IMAGE_COLUMNS)
                targets = _column(path, columns.names, label, LABEL_COLUMNS)
                labels += file.read(columns=[targets])[targets].to_pylist()
                names += _paths(file, columns.field(pictures).type, pictures)
                groups = range(file.metadata.num_row_groups)
                sizes.append([file.metadata.row_group(g).num_rows for g in groups])
        except (pa.ArrowException, OSError) as error:
            raise InputError(
                f"{path} cannot be read as parquet ({error}); fetch it again."
            ) from error
    where = f"column {targets!r} of {files[0] if len(files) == 1 else f'{len(files)} files'}"
    labels, names = labels[:limit], names[:limit]
    unique = None not in names and len(set(names)) == len(names)
    ids = [str(name) for name in names] if unique else [str(i) for i in range(len(names))]
    source = ParquetRows(files, pictures, sizes, keep)
    return Streamed(source, checked_labels(labels, where), ids, mode, size)


def _paths(file: Any, kind: Any, column: str) -> list[str | None]:
    """The path of every image, without reading the images."""
    fields = {kind.field(i).name for i in range(kind.num_fields)}
    if "path" not in fields:
        return [None] * int(file.metadata.num_rows)
    cells = file.read(columns=[f"{column}.path"])[column].to_pylist()
    return [None if cell is None else cell["path"] for cell in cells]


def shards(paths: str | Path | Iterable[str | Path]) -> list[Path]:
    """The files that are meant, checked to be there and complete.

    Args:
        paths: A file, a pattern, or several files.

    Raises:
        InputError: If there is none, or a pattern finds only some of ``…-00000-of-00005.parquet``.
    """
    if not isinstance(paths, str | Path):
        files = [Path(p) for p in paths]
    elif Path(paths).is_file():
        files = [Path(paths)]
    else:
        files = [Path(p) for p in sorted(glob.glob(str(paths)))]
        total = files[0].stem.rpartition("-of-")[2] if files else ""
        if total.isdigit() and int(total) != len(files):
            raise InputError(
                f"{files[0].parent} holds {len(files)} of {int(total)} parquet files of a set; "
                "fetch the others, too."
            )
    absent = [p for p in files if not p.is_file()]
    if absent or not files:
        what = absent[0] if absent else paths
        raise InputError(f"{what} is not a file; give the path of a parquet file of images.")
    return files


def _column(path: Path, names: list[str], asked: str | None, usual: tuple[str, ...]) -> str:
    for name in (asked,) if asked is not None else usual:
        if name in names:
            return name
    wanted = repr(asked) if asked is not None else " or ".join(map(repr, usual))
    raise InputError(f"{path} has no column {wanted}; it has {', '.join(map(repr, names))}.")


def checked_labels(values: list[Any], where: str) -> Tensor:
    """Labels as a tensor.

    Raises:
        InputError: If one is no whole number, or negative.
    """
    if not all(isinstance(v, int) and v >= 0 for v in values):
        raise InputError(f"{where} holds a label that is no whole number; give classes 0, 1, ….")
    return torch.tensor(values, dtype=torch.int64)
