"""Tasks made of images, and the built-in ones whose files have to be at hand."""

from __future__ import annotations

import glob
import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from efface.data import MEMORY_LIMIT, LoadedRecords
from efface.datasets.augment import CropFlip
from efface.datasets.images import PLACES, balanced, read_folder, read_npz, read_parquet
from efface.datasets.pixels import Mode
from efface.datasets.streaming import (
    Images,
    Streamed,
    class_folders,
    refuse_pickles,
)
from efface.errors import InputError
from efface.networks import AirNet, ThreeConv
from efface.task import Settings, Task

Network = Callable[[], nn.Module]


def image_task(
    train: Images | Streamed,
    test: Images | Streamed,
    *,
    network: Network,
    validation: Images | Streamed | int | None = None,
    n: int | None = None,
    memory: int = MEMORY_LIMIT,
    workers: int = 0,
    **more: Any,
) -> Task:
    """A task of images; sets that were opened are held in memory when they fit, else streamed.

    Args:
        train: Records from ``read_…`` (in memory) or ``open_…`` (decoded when asked for).
        test: The same, never trained on.
        network: Makes a fresh network, e.g. ``functools.partial(ResNet18, 100)``.
        validation: Records of its own, or how many to hold out of ``train``, evenly by class.
        n: Training records, drawn evenly from the classes of what is left; ``None``: all.
        memory: Bytes of decoded images up to which an opened set is read into memory, each.
        workers: Processes that decode, where a set is streamed.
        more: Further arguments of :class:`efface.Task`, e.g. ``augment``, ``fit``, ``name``.

    Raises:
        InputError: If an image cannot be decoded, or there are too few records.

    Example:
        >>> import efface
        >>> x, y = torch.zeros(6, 1, 28, 28, dtype=torch.uint8), torch.arange(6) % 2
        >>> records = Images(x, y, [f"scan-{i}" for i in range(6)])
        >>> make = partial(efface.networks.ThreeConv, 2, channels=1)
        >>> image_task(records, records, network=make, validation=2).ids_
        ['scan-2', 'scan-3', 'scan-4', 'scan-5']
    """
    if isinstance(validation, int):
        train, validation = _held_out(train, validation)
    if n is not None:
        train = train.take(balanced(_labels(train), n, seed=0))
    place = partial(_placed, memory=memory, workers=workers)
    held = None if validation is None else place(validation)
    return Task(
        network=network,
        train=place(train),
        test=place(test),
        validation=held,
        ids=train.ids,
        workers=workers,
        **more,
    )


def _labels(records: Images | Streamed) -> Tensor:
    return records.labels if isinstance(records, Images) else records.targets


def _held_out(
    records: Images | Streamed, n: int
) -> tuple[Images | Streamed, Images | Streamed | None]:
    if n == 0:
        return records, None
    labels = _labels(records)
    held = torch.zeros(len(labels), dtype=torch.bool)
    held[balanced(labels, n, seed=1)] = True
    return records.take((~held).nonzero().flatten()), records.take(held.nonzero().flatten())


def _placed(records: Images | Streamed, memory: int, workers: int) -> Any:
    """What a task takes: a pair of tensors, or records that are read one by one."""
    if isinstance(records, Streamed):
        if records.nbytes > memory:
            return LoadedRecords(records, workers)
        records = records.load()
    return records.images, records.labels


class _Known(NamedTuple):
    """Where a public data set's files come from, and what the hub calls its folder."""

    title: str
    hub: str
    folder: str


_KNOWN = {
    "cifar100": _Known("CIFAR-100", "uoft-cs/cifar100", "cifar100"),
    "mnist": _Known("MNIST", "ylecun/mnist", "mnist"),
    "svhn": _Known("SVHN", "ufldl-stanford/svhn", "cropped_digits"),
}


def _folders(name: str) -> Iterator[Path]:
    for place in (os.environ.get("EFFACE_DATA"), *PLACES):
        if place:
            yield from (Path(place), Path(place) / name)


def _find(name: str, part: str, label: str | None = None, mode: Mode = "RGB") -> Images:
    """A known set's training or test images, wherever they lie.

    Raises:
        InputError: If they are not found; the sentence names the files.
    """
    known = _KNOWN[name]
    for folder in _folders(name):
        for file in (f"{name}-{part}.parquet", f"{known.folder}/{part}-*-of-*.parquet"):
            pattern = f"{glob.escape(str(folder))}/{file}"
            if glob.glob(pattern):
                return read_parquet(pattern, label=label, mode=mode, cache=True)
        # Only in a folder of its own name: another set's may lie beside it.
        if folder.name == name and class_folders(folder / part):
            if label not in (None, "fine_label"):
                raise InputError(
                    f"{folder / part} is an image folder and has no {label!r}; use the parquet "
                    "files."
                )
            return read_folder(folder / part, mode=mode)
    for folder in _folders(name):
        refuse_pickles(folder)
    raise InputError(
        f"{known.title}'s {part} images are not at hand; put {name}-{part}.parquet, the folder "
        f"{known.folder}/ of https://huggingface.co/datasets/{known.hub}, or an image folder "
        f"{name}/{part}/ into data/ or into what EFFACE_DATA names."
    )


def cifar100(
    n: int | None = None,
    validation: int = 2_000,
    label: Literal["fine_label", "coarse_label"] = "fine_label",
    network: Network | None = None,
) -> Task:
    """CIFAR-100 (Krizhevsky, 2009) from files at hand.

    Args:
        n: Training images, drawn evenly from the classes; ``None``: all but the validation's.
        validation: Images held out of training.
        label: 100 classes, or the 20 coarse ones.
        network: ``None``: an :class:`~efface.networks.AirNet`. The papers' is
            ``partial(ResNet18, 100)``.

    Raises:
        InputError: If the data is not found; the sentence names the files.
    """
    classes = {"fine_label": 100, "coarse_label": 20}.get(label)
    if classes is None:
        raise InputError(f"CIFAR-100 has no {label!r}; ask for 'fine_label' or 'coarse_label'.")
    return image_task(
        _find("cifar100", "train", label),
        _find("cifar100", "test", label),
        network=network or partial(AirNet, classes),
        validation=validation,
        n=n,
        augment=CropFlip(padding=2),
        fit=Settings(epochs=16, batch_size=125, lr=0.1, weight_decay=5e-4, warmup=0.25),
        name=_name("cifar100" if label == "fine_label" else "cifar100-coarse", n),
    )


def svhn(n: int | None = None, validation: int = 2_000, network: Network | None = None) -> Task:
    """SVHN's cropped digits (Netzer et al., 2011) from files at hand.

    Args:
        n: Training images, drawn evenly from the classes; ``None``: all but the validation's.
        validation: Images held out of training.
        network: ``None``: an :class:`~efface.networks.AirNet`; the papers' is ``ResNet18``.

    Raises:
        InputError: If the data is not found; the sentence names the files.
    """
    return image_task(
        _find("svhn", "train"),
        _find("svhn", "test"),
        network=network or AirNet,
        validation=validation,
        n=n,
        augment=CropFlip(padding=2, flip=False),
        fit=Settings(epochs=12, batch_size=125, lr=0.1, weight_decay=5e-4, warmup=0.25),
        name=_name("svhn", n),
    )


def mnist(n: int | None = None, validation: int = 2_000, network: Network | None = None) -> Task:
    """MNIST (LeCun et al., 1998), one grey channel of 28×28, from files at hand.

    Args:
        n: Training images, drawn evenly from the classes; ``None``: all but the validation's.
        validation: Images held out of training.
        network: ``None``: a :class:`~efface.networks.ThreeConv` of one channel.

    Raises:
        InputError: If the data is not found; the sentence names the files.
    """
    return image_task(
        _find("mnist", "train", mode="L"),
        _find("mnist", "test", mode="L"),
        network=network or partial(ThreeConv, channels=1),
        validation=validation,
        n=n,
        fit=Settings(epochs=6, batch_size=125, lr=0.1, weight_decay=5e-4, warmup=0.25),
        name=_name("mnist", n),
    )


def medmnist(name: str = "pathmnist", n: int | None = None, network: Network | None = None) -> Task:
    """One of MedMNIST's 2-d sets with one label per image (Yang et al., 2023), from its npz file.

    ``<name>.npz`` is looked for in ``EFFACE_DATA`` and ``data/``, directly or under
    ``medmnist/``; its own validation part is used.

    Args:
        name: The set, e.g. ``"pathmnist"``, ``"bloodmnist"``, ``"pneumoniamnist"``.
        n: Training images, drawn evenly from the classes; ``None``: all.
        network: ``None``: a :class:`~efface.networks.ThreeConv` of as many classes and channels.

    Raises:
        InputError: If the file is not found, or is none of a 2-d set with one label per image.
    """
    files = [folder / f"{name}.npz" for folder in _folders("medmnist")]
    path = next((file for file in files if file.is_file()), None)
    if path is None:
        raise InputError(
            f"MedMNIST's {name}.npz is not at hand; put the file of https://medmnist.com into "
            "data/ or into what EFFACE_DATA names."
        )
    train, validation, test = (read_npz(path, part) for part in ("train", "val", "test"))
    classes = 1 + max(int(part.labels.max()) for part in (train, validation, test))
    return image_task(
        train,
        test,
        network=network or partial(ThreeConv, classes, channels=train.images.shape[1]),
        validation=validation,
        n=n,
        fit=Settings(epochs=10, batch_size=125, lr=0.1, weight_decay=5e-4, warmup=0.25),
        name=_name(name, n),
    )


def _name(name: str, n: int | None) -> str:
    return name if n is None else f"{name}-{n}"
