"""Images from parquet files and folders, decoded once into one tensor."""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from efface.errors import InputError, WriteError
from efface.files import write_atomic
from efface.seeds import generator

CIFAR10 = (
    *("airplane", "automobile", "bird", "cat", "deer"),
    *("dog", "frog", "horse", "ship", "truck"),
)
"""The class names of CIFAR-10 in the order of its labels."""

PLACES = ("data", "../shared/data")
"""Where data is looked for after ``EFFACE_DATA``; relative to the working directory."""

IMAGE_COLUMNS = ("img", "image")
LABEL_COLUMNS = ("label", "labels", "fine_label", "target")
SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".ppm", ".webp"}


class Images(NamedTuple):
    """Records in memory: images ``[N, C, H, W]``, labels ``[N]`` (int64) and N unique IDs."""

    images: Tensor
    labels: Tensor
    ids: list[str]

    def take(self, positions: Tensor) -> Images:
        """The records at some positions, in that order."""
        ids = [self.ids[i] for i in positions.tolist()]
        return Images(self.images[positions], self.labels[positions], ids)


def read_parquet(
    path: str | Path,
    *,
    image: str | None = None,
    label: str | None = None,
    limit: int | None = None,
    cache: bool = False,
) -> Images:
    """Read images from a parquet file in the layout of the Hugging Face hub.

    Args:
        path: The file; images are ``struct<bytes, path>`` or plain bytes of any format that PIL
            reads, all of one size.
        image: The image column; by default ``img`` or ``image``.
        label: The label column; by default ``label``, ``labels``, ``fine_label`` or ``target``.
        limit: Read only so many rows, from the start.
        cache: Keep the decoded pixels in ``EFFACE_CACHE`` or ``~/.cache/efface`` (one file per
            content of ``path``). Off by default: a copy of training data outlives a deletion.

    Returns:
        ``uint8`` images ``[N, 3, H, W]``. IDs are the images' paths where all are given and
        differ, else row numbers.

    Raises:
        InputError: If the file, a column or an image cannot be read, or pyarrow or PIL is missing.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path} is not a file; give the path of a parquet file of images.")
    if not cache:
        return _decode_parquet(path, image, label, limit)
    return _cached(path, [image, label, limit], lambda: _decode_parquet(path, image, label, limit))


def _decode_parquet(path: Path, image: str | None, label: str | None, limit: int | None) -> Images:
    try:
        import pyarrow as pa
        from pyarrow import parquet
    except ImportError as error:
        raise _missing("pyarrow", path) from error
    try:
        file = parquet.ParquetFile(path)
        image = _column(path, file.schema_arrow.names, image, IMAGE_COLUMNS)
        label = _column(path, file.schema_arrow.names, label, LABEL_COLUMNS)
        table = file.read(columns=[image, label])
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{path} cannot be read as parquet ({error}); fetch it again.") from error
    table = table.slice(0, limit)
    cells = [c if isinstance(c, dict) else {"bytes": c} for c in table[image].to_pylist()]
    labels = _labels(table[label].to_pylist(), f"column {label!r} of {path}")
    names = [cell.get("path") for cell in cells]
    unique = None not in names and len(set(names)) == len(names)
    ids = [str(name) for name in names] if unique else [str(i) for i in range(len(names))]
    pixels = _decode((cell["bytes"], f"row {i} of {path}") for i, cell in enumerate(cells))
    return Images(pixels, labels, ids)


def _column(path: Path, names: list[str], asked: str | None, usual: tuple[str, ...]) -> str:
    for name in (asked,) if asked is not None else usual:
        if name in names:
            return name
    wanted = repr(asked) if asked is not None else " or ".join(map(repr, usual))
    raise InputError(f"{path} has no column {wanted}; it has {', '.join(map(repr, names))}.")


def _labels(values: list[Any], where: str) -> Tensor:
    if not all(isinstance(v, int) and v >= 0 for v in values):
        raise InputError(f"{where} holds a label that is no whole number; give classes 0, 1, ….")
    return torch.tensor(values, dtype=torch.int64)


def _decode(files: Iterable[tuple[bytes | None, str]]) -> Tensor:
    """Pixels ``[N, 3, H, W]`` of (encoded image, where it comes from)."""
    try:
        from PIL import Image
    except ImportError as error:
        raise _missing("pillow") from error
    arrays: list[np.ndarray[Any, np.dtype[np.uint8]]] = []
    for data, where in files:
        if data is None:
            raise InputError(f"{where} holds no image bytes; embed the images in the file.")
        try:
            with Image.open(io.BytesIO(data)) as opened:
                array = np.asarray(opened.convert("RGB"))
        except (OSError, ValueError) as error:
            raise InputError(f"{where} is no readable image; replace or leave it out.") from error
        if arrays and array.shape != arrays[0].shape:
            size, first = ("×".join(map(str, a.shape[:2])) for a in (array, arrays[0]))
            raise InputError(f"{where} is {size} where others are {first}; resize all to one size.")
        arrays.append(array)
    if not arrays:
        raise InputError("there are no images to read; give a source that holds some.")
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).contiguous()


def _missing(library: str, path: Path | None = None) -> InputError:
    what = f"to read {path}" if path else "to decode images"
    return InputError(f"{library} is needed {what}; run `pip install efface[parquet]`.")


def read_folder(root: str | Path) -> Images:
    """Read an image folder in torchvision's layout, ``class/anything.png``.

    Args:
        root: A folder with one sub-folder per class; labels follow the sorted names.

    Returns:
        ``uint8`` images ``[N, 3, H, W]``; IDs are paths below ``root`` with forward slashes.

    Raises:
        InputError: If there is no class folder or no image, or an image cannot be read.
    """
    root = Path(root)
    classes = _classes(root)
    files = [
        (path, label)
        for label, name in enumerate(classes)
        for path in sorted((root / name).rglob("*"))
        if path.suffix.lower() in SUFFIXES
    ]
    if not files:
        raise InputError(f"{root} holds no class/image files; give a folder with one per class.")
    pixels = _decode((path.read_bytes(), str(path)) for path, _ in files)
    ids = [path.relative_to(root).as_posix() for path, _ in files]
    return Images(pixels, torch.tensor([label for _, label in files]), ids)


def _classes(root: Path) -> list[str]:
    return sorted(p.name for p in root.iterdir() if p.is_dir()) if root.is_dir() else []


def cifar10(train: bool, limit: int | None = None, seed: int = 0) -> Images:
    """CIFAR-10 (Krizhevsky, 2009) from files at hand; nothing is downloaded.

    Looked for in ``EFFACE_DATA``, ``data/`` and ``../shared/data/``, directly or under
    ``cifar10/``: ``cifar10-train.parquet``, the Hugging Face hub's
    ``plain_text/train-00000-of-00001.parquet``, or an image folder ``train/`` with a folder per
    class; likewise ``test``. Decoded pixels are cached (see :func:`read_parquet`).

    Args:
        train: The 50,000 training images, or else the 10,000 test images.
        limit: Only so many records, the same number of each class (to within one).
        seed: Which ones.

    Raises:
        InputError: If it is not found, or ``limit`` is not 10 to the number of records.
    """
    part = "train" if train else "test"
    places = [Path(p) for p in (os.environ.get("EFFACE_DATA"), *PLACES) if p]
    for folder in (base for place in places for base in (place, place / "cifar10")):
        for name in (f"cifar10-{part}.parquet", f"plain_text/{part}-00000-of-00001.parquet"):
            if (folder / name).is_file():
                return _limited(read_parquet(folder / name, cache=True), limit, seed)
        if tuple(_classes(folder / part)) == CIFAR10:
            return _limited(read_folder(folder / part), limit, seed)
    raise InputError(
        f"CIFAR-10's {part} images are not in {', '.join(map(str, places))}; put the parquet files "
        "of https://huggingface.co/datasets/uoft-cs/cifar10 into data/ or name their folder in "
        "EFFACE_DATA."
    )


def _limited(records: Images, limit: int | None, seed: int) -> Images:
    return records if limit is None else records.take(balanced(records.labels, limit, seed))


def balanced(labels: Tensor, limit: int, seed: int = 0) -> Tensor:
    """Positions of a random subset with the same number of each class, to within one.

    Args:
        labels: Class indices ``[N]``.
        limit: How many positions; the lowest classes get one more where it does not divide.
        seed: Which ones. At the same seed, a larger limit's subset contains a smaller one's.

    Returns:
        Positions ``[limit]`` in ascending order.

    Raises:
        InputError: If ``limit`` is below the number of classes, or a class has too few records.

    >>> balanced(torch.tensor([0, 0, 0, 1, 1, 1]), 4).shape
    torch.Size([4])
    """
    classes = sorted(set(labels.tolist()))
    mixed = torch.randperm(len(labels), generator=generator(seed, "subset"))
    quota, more = divmod(limit, len(classes))
    chosen = [mixed[labels[mixed] == c][: quota + (i < more)] for i, c in enumerate(classes)]
    if quota < 1 or sum(map(len, chosen)) < limit:
        raise InputError(
            f"a balanced subset of {limit} out of {len(labels)} records in {len(classes)} classes "
            f"cannot be made; ask for {len(classes)} or more, and no more than the classes hold."
        )
    return torch.cat(chosen).sort().values


def _cached(path: Path, options: list[Any], decode: Callable[[], Images]) -> Images:
    """The records of a source file, from a copy of the decoded pixels where there is a good one."""
    source = [hashlib.sha256(path.read_bytes()).hexdigest(), *options, 1]
    key = hashlib.sha256(json.dumps(source).encode()).hexdigest()
    home = os.environ.get("EFFACE_CACHE") or Path.home() / ".cache" / "efface"
    copy = Path(home) / f"images-{key[:32]}.safetensors"
    found = _load(copy)
    if found is None:
        found = decode()
        _store(copy, found)
    return found


def _tensors(records: Images) -> dict[str, Tensor]:
    ids = torch.frombuffer(bytearray(json.dumps(records.ids).encode()), dtype=torch.uint8)
    return {"images": records.images, "labels": records.labels, "ids": ids}


def _digest(tensors: dict[str, Tensor]) -> str:
    total = hashlib.sha256()
    for name in sorted(tensors):
        total.update(tensors[name].numpy().data)
    return total.hexdigest()


def _store(path: Path, records: Images) -> None:
    tensors = _tensors(records)
    try:
        write_atomic(path, save(tensors, {"digest": _digest(tensors)}))
    except WriteError:
        return  # a cache that cannot be written is no reason to stop


def _load(path: Path) -> Images | None:
    """What a cache file holds, or nothing when it is absent or damaged."""
    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            digest = (file.metadata() or {}).get("digest")
    except (OSError, SafetensorError):
        return None
    if digest != _digest(tensors):
        return None
    ids = json.loads(tensors["ids"].numpy().tobytes())
    return Images(tensors["images"], tensors["labels"], ids)
