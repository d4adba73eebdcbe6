"""Images from parquet files, folders and npz files, decoded once into one tensor."""

from __future__ import annotations

import hashlib
import json
import os
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from efface.datasets.parquet import checked_labels, open_parquet, shards
from efface.datasets.pixels import Mode
from efface.datasets.streaming import Images, class_folders, open_folder, refuse_pickles
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


def read_parquet(
    path: str | Path,
    *,
    image: str | None = None,
    label: str | None = None,
    limit: int | None = None,
    cache: bool = False,
    mode: Mode = "RGB",
    size: int | None = None,
) -> Images:
    """Read images from parquet files in the layout of the Hugging Face hub.

    Args:
        path: The file, or a pattern such as ``train-*.parquet``; images are ``struct<bytes, path>``
            or plain bytes of any format that PIL reads.
        image: The image column; by default ``img`` or ``image``.
        label: The label column; by default ``label``, ``labels``, ``fine_label`` or ``target``.
        limit: Read only so many rows, from the start.
        cache: Keep the decoded pixels in ``EFFACE_CACHE`` or ``~/.cache/efface`` (one file per
            content of ``path``). Off by default: a copy of training data outlives a deletion.
        mode: ``"RGB"``, or ``"L"`` for one grey channel.
        size: Resize and crop to squares of so many pixels; ``None``: all images have one size.

    Returns:
        ``uint8`` images ``[N, C, H, W]``. IDs are the images' paths where all are given and
        differ, else row numbers.

    Raises:
        InputError: If the file, a column or an image cannot be read, or pyarrow or PIL is missing.
    """
    files = shards(path)

    def decoded() -> Images:
        return _decode_parquet(files, image, label, limit, mode, size)

    if not cache:
        return decoded()
    options: list[Any] = [image, label, limit]
    plain = (mode, size) == ("RGB", None)
    return _cached(files, options if plain else [*options, mode, size], decoded)


def _decode_parquet(
    files: list[Path],
    image: str | None,
    label: str | None,
    limit: int | None,
    mode: Mode,
    size: int | None,
) -> Images:
    opened = open_parquet(files, image=image, label=label, mode=mode, size=size, limit=limit)
    return opened.load()


def read_folder(root: str | Path, *, mode: Mode = "RGB", size: int | None = None) -> Images:
    """Read an image folder in torchvision's layout, ``class/anything.png``.

    Args:
        root: A folder with one sub-folder per class; labels follow the sorted names.
        mode: ``"RGB"``, or ``"L"`` for one grey channel.
        size: Resize and crop to squares of so many pixels; ``None``: all images have one size.

    Returns:
        ``uint8`` images ``[N, C, H, W]``; IDs are paths below ``root`` with forward slashes.

    Raises:
        InputError: If there is no class folder or no image, or an image cannot be read.
    """
    return open_folder(root, mode=mode, size=size).load()


def read_npz(path: str | Path, part: str = "train") -> Images:
    """Read one part of a MedMNIST file (Yang et al., 2023): 2-d images with one label each.

    Args:
        path: An ``npz`` file that holds ``train_images`` ``[N, H, W]`` or ``[N, H, W, 3]`` (uint8)
            and ``train_labels`` ``[N, 1]`` or ``[N]``, likewise ``val`` and ``test``.
        part: ``"train"``, ``"val"`` or ``"test"``.

    Returns:
        ``uint8`` images ``[N, 1 or 3, H, W]``; IDs are row numbers.

    Raises:
        InputError: If the file or the part cannot be read, or its records are volumes or have
            several labels.
    """
    path = Path(path)
    try:
        with path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
            images, labels = file[f"{part}_images"], file[f"{part}_labels"]
    except KeyError as error:
        raise InputError(
            f"{path} has no {part}_images with {part}_labels; name another part or file."
        ) from error
    except (OSError, ValueError, TypeError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise InputError(
            f"{path} cannot be read as an npz file of plain arrays ({type(error).__name__}); fetch "
            "it again."
        ) from error
    if images.dtype != np.uint8 or not (
        images.ndim == 3 or (images.ndim == 4 and images.shape[3] == 3)
    ):
        raise InputError(
            f"{part}_images of {path} are {images.dtype} of shape {images.shape}; only 8-bit 2-d "
            "images [N, H, W] or [N, H, W, 3] can be read."
        )
    if labels.size != len(images) or len(images) == 0:
        raise InputError(
            f"{part}_labels of {path} have shape {labels.shape} for {len(images)} images; only "
            "sets with one label per image can be read."
        )
    grey = images.ndim == 3
    pixels = torch.from_numpy(images[:, None] if grey else images.transpose(0, 3, 1, 2).copy())
    targets = checked_labels(labels.ravel().tolist(), f"{part}_labels of {path}")
    return Images(pixels, targets, [str(i) for i in range(len(images))])


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
        if tuple(class_folders(folder / part)) == CIFAR10:
            return _limited(read_folder(folder / part), limit, seed)
    for folder in (base for place in places for base in (place, place / "cifar10")):
        refuse_pickles(folder)
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


def _cached(paths: list[Path], options: list[Any], decode: Callable[[], Images]) -> Images:
    """The records of source files, from a copy of the decoded pixels where there is a good one."""
    digests = [hashlib.sha256(path.read_bytes()).hexdigest() for path in paths]
    source = [*digests, *options, 1]
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
