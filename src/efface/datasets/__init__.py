"""Built-in tasks, the import of a user's own, and what makes random forgetting visible."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from efface.datasets.augment import CropFlip
from efface.datasets.digits import digits as _digits
from efface.datasets.images import balanced, read_folder, read_npz, read_parquet
from efface.datasets.images import cifar10 as _cifar10
from efface.datasets.parquet import open_parquet
from efface.datasets.poison import Patch, triggered_test, with_trigger
from efface.datasets.sets import cifar100, image_task, medmnist, mnist, svhn
from efface.datasets.streaming import Images, Streamed, open_folder
from efface.errors import InputError, TaskError, nearest
from efface.networks import AirNet, DigitsCNN
from efface.seeds import generator
from efface.task import Settings, Task

__all__ = [
    "BUILT_IN",
    "CropFlip",
    "Images",
    "Patch",
    "Streamed",
    "cifar10",
    "cifar100",
    "digits",
    "image_task",
    "load_task",
    "medmnist",
    "mnist",
    "open_folder",
    "open_parquet",
    "read_folder",
    "read_npz",
    "read_parquet",
    "svhn",
    "triggered_test",
    "with_trigger",
    "with_wrong_labels",
]

# Chosen on proxy forget sets (classes and records other than the demo's), never on the demo's own
# references: benchmarks/proxy_defaults.py, results in docs/results/proxy-defaults/.
DIGITS_DEFAULTS: dict[str, dict[str, Any]] = {
    "finetune": {"epochs": 3, "lr": 0.1},
    "l1-sparse": {"alpha": 1e-2, "epochs": 4, "lr": 0.1},
    "gradient-ascent": {"epochs": 5, "lr": 0.015},
    "neggrad-plus": {"epochs": 3, "lr": 0.1},
    "random-label": {"epochs": 2, "lr": 0.1},
    "salun": {"epochs": 2, "lr": 0.1},
    "ssd": {"alpha": 20.0, "batched": 32},
    "scrub": {"epochs": 3, "lr": 0.05},
    "sfron": {"alpha": 50.0, "epochs": 3, "lr": 0.2},
    "proximal-l1": {"alpha": 0.1, "epochs": 4, "lr": 0.1},
}
CIFAR10_DEFAULTS: dict[str, dict[str, Any]] = {
    "finetune": {"epochs": 1, "lr": 0.1},
    "l1-sparse": {"alpha": 1e-4, "epochs": 1, "lr": 0.1},
    "gradient-ascent": {"epochs": 3, "lr": 1e-3},
    "neggrad-plus": {"epochs": 1, "lr": 0.03},
    "random-label": {"epochs": 1, "lr": 0.1},
    "salun": {"epochs": 1, "lr": 0.1},
    "sfron": {"alpha": 25.0, "epochs": 1, "lr": 0.03},
}


def _task(train: Images, validation: Images, test: Images, **more: Any) -> Task:
    return Task(
        train=(train.images, train.labels),
        validation=(validation.images, validation.labels),
        test=(test.images, test.labels),
        ids=train.ids,
        **more,
    )


def digits() -> Task:
    """Optical digits, a small convolutional network, about half a second of training.

    1,147 training, 150 validation and 500 test records; IDs are row numbers of
    ``sklearn.datasets.load_digits``.
    """
    train, test = _digits()
    held = torch.zeros(len(train.labels), dtype=torch.bool)
    held[balanced(train.labels, 150, seed=1)] = True
    return _task(
        train.take((~held).nonzero().flatten()),
        train.take(held.nonzero().flatten()),
        test,
        network=DigitsCNN,
        fit=Settings(epochs=15, batch_size=64, lr=0.1, weight_decay=5e-4),
        defaults=DIGITS_DEFAULTS,
        name="digits",
    )


def cifar10(n: int | None = 20_000, validation: int = 2_000) -> Task:
    """Real CIFAR-10 and a small convolutional network.

    Args:
        n: Training images, drawn evenly from the classes; ``None`` takes all but the validation's.
        validation: Images held out of training.

    Raises:
        InputError: If the data is not found; the sentence says where it was looked for.
    """
    pool, test = _cifar10(train=True), _cifar10(train=False)
    held = torch.zeros(len(pool.labels), dtype=torch.bool)
    held[balanced(pool.labels, validation, seed=1)] = True
    rest = pool.take((~held).nonzero().flatten())
    train = rest if n is None else rest.take(balanced(rest.labels, n, seed=0))
    return _task(
        train,
        pool.take(held.nonzero().flatten()),
        test,
        network=AirNet,
        augment=CropFlip(padding=2),
        fit=Settings(epochs=12, batch_size=125, lr=0.1, weight_decay=5e-4, warmup=0.25),
        defaults=CIFAR10_DEFAULTS,
        name="cifar10" if n is None else f"cifar10-{n // 1000}k",
    )


BUILT_IN: dict[str, Callable[[], Task]] = {
    "digits": digits,
    "cifar10": cifar10,
    "cifar100": cifar100,
    "mnist": mnist,
    "svhn": svhn,
}


def load_task(spec: str) -> Task:
    """A built-in task by name, or the user's own from ``module:attribute``.

    The attribute is a :class:`Task`, or a function without arguments that returns one. Modules are
    looked for in the working directory, too.

    Raises:
        TaskError: If the name is unknown, the module cannot be imported, or it is no task.
    """
    if ":" not in spec:
        if spec not in BUILT_IN:
            raise TaskError(
                f"task {spec!r} is unknown; {nearest(spec, BUILT_IN)} A task of your own is given "
                "as module:attribute."
            )
        return BUILT_IN[spec]()
    module_name, _, attribute = spec.partition(":")
    value = _attribute(module_name, attribute, spec)
    try:
        task = value() if callable(value) and not isinstance(value, Task) else value
    except InputError:
        raise
    except (Exception, SystemExit) as error:
        raise TaskError(
            f"task {spec} failed ({type(error).__name__}: {error}); mend it."
        ) from error
    if not isinstance(task, Task):
        raise TaskError(f"{spec} is {type(task).__name__}, not an efface.Task (or makes none).")
    return task


def _attribute(module_name: str, attribute: str, spec: str) -> Any:
    if "" not in sys.path:
        sys.path.insert(0, "")
    try:
        module = importlib.import_module(module_name)
    except InputError:
        raise
    except (Exception, SystemExit) as error:
        raise TaskError(
            f"module {module_name!r} of task {spec!r} cannot be imported "
            f"({type(error).__name__}: {error}); run from its folder, or install it."
        ) from error
    if not hasattr(module, attribute):
        public = [name for name in vars(module) if not name.startswith("_")]
        raise TaskError(f"{module_name} has no {attribute!r}; {nearest(attribute, public)}")
    return getattr(module, attribute)


def with_wrong_labels(task: Task, positions: Tensor, fraction: float, seed: int = 0) -> Task:
    """The task with the labels of some records replaced by wrong ones.

    A small network hardly remembers single records, so that after deleting random ones there is
    nothing to see. A record with a wrong label can only be got "right" by remembering it: this
    makes random forgetting measurable, and must be said wherever results are shown.

    Args:
        task: A task whose data lies in memory.
        positions: Candidates, e.g. D_f.
        fraction: Share of the candidates that gets a wrong label.
        seed: Which, and which label.
    """
    inputs, targets = task.records.inputs, task.records.targets  # type: ignore[union-attr]
    draw = generator(seed, "wrong-labels")
    chosen = positions[torch.randperm(len(positions), generator=draw)]
    chosen = chosen[: round(fraction * len(positions))]
    shift = torch.randint(1, task.classes, (len(chosen),), generator=draw)
    noisy = targets.clone()
    noisy[chosen] = (targets[chosen] + shift) % task.classes
    return replace(task, train=(inputs, noisy), name=f"{task.name}, some labels wrong")
