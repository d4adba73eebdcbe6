"""What the tests share: one thread, a key, and tiny tasks that train in a fraction of a second.

Everything here is read only: a test that needs something else derives it (``dataclasses.replace``)
or makes its own.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

os.environ.setdefault("EFFACE_KEY", "test key")
torch.set_num_threads(1)

import efface  # noqa: E402 — the key comes first
from efface.fitting import Fit  # noqa: E402
from efface.sparsify import OneShot  # noqa: E402

CLASSES, FEATURES = 3, 6
TRAIN, TEST, VALIDATION = 120, 60, 30


@dataclass(frozen=True)
class Jitter:
    """Scale and shift each record by its own two uniform numbers."""

    draws: int = 2

    def __call__(self, inputs: Tensor, uniform: Tensor, /) -> Tensor:
        rows = (len(inputs), *[1] * (inputs.ndim - 1))
        scale, shift = uniform[:, 0].reshape(rows), uniform[:, 1].reshape(rows)
        return inputs * (0.8 + 0.4 * scale) + 0.2 * (shift - 0.5)


def blobs(n: int, seed: int, shape: tuple[int, ...] = (FEATURES,)) -> tuple[Tensor, Tensor]:
    """Records of three classes that overlap, so that a network can also learn some by heart."""
    draw = torch.Generator().manual_seed(seed)
    targets = torch.arange(n) % CLASSES
    centres = torch.randn(CLASSES, *shape, generator=torch.Generator().manual_seed(99))
    return centres[targets] + 0.9 * torch.randn(n, *shape, generator=draw), targets


def mlp() -> nn.Module:
    return nn.Sequential(
        nn.Linear(FEATURES, 16), nn.ReLU(), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, CLASSES)
    )


def conv_net() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1, bias=False),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(4, 6, 3, padding=1, bias=False),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Flatten(),
        nn.Dropout(0.1),
        nn.Linear(6 * 4 * 4, CLASSES),
    )


def make_task(**changes: Any) -> efface.Task:
    """The task of the ``task`` fixture, with some arguments changed."""
    options: dict[str, Any] = {
        "network": mlp,
        "train": blobs(TRAIN, 0),
        "test": blobs(TEST, 1),
        "validation": blobs(VALIDATION, 2),
        "ids": [f"r{i:03d}" for i in range(TRAIN)],
        "subjects": [f"person-{i // 4:02d}" for i in range(TRAIN)],
        "columns": {
            "age": [20 + (7 * i) % 50 for i in range(TRAIN)],
            "site": ["north" if i % 5 else "south" for i in range(TRAIN)],
        },
        "fit": efface.Settings(epochs=6, batch_size=16, lr=0.1, weight_decay=1e-3),
        "name": "blobs",
    }
    return efface.Task(**options | changes)


def make_conv_task(**changes: Any) -> efface.Task:
    """The task of the ``conv_task`` fixture, with some arguments changed."""
    options: dict[str, Any] = {
        "network": conv_net,
        "train": blobs(48, 3, (1, 8, 8)),
        "test": blobs(30, 4, (1, 8, 8)),
        "ids": [f"c{i:03d}" for i in range(48)],
        "augment": Jitter(),
        "fit": efface.Settings(epochs=2, batch_size=12, lr=0.05),
        "name": "tiny images",
    }
    return efface.Task(**options | changes)


@pytest.fixture(scope="session")
def new_task() -> Callable[..., efface.Task]:
    """Makes a task like ``task``, with some arguments changed."""
    return make_task


@pytest.fixture(scope="session")
def new_conv_task() -> Callable[..., efface.Task]:
    """Makes a task like ``conv_task``, with some arguments changed."""
    return make_conv_task


@pytest.fixture(scope="session")
def task() -> efface.Task:
    """Three overlapping classes, 120 training records, an MLP with 359 weights."""
    return make_task()


@pytest.fixture(scope="session")
def conv_task() -> efface.Task:
    """48 images of 8×8, convolutions with batch norm and dropout, augmented."""
    return make_conv_task()


@pytest.fixture(scope="session")
def trained(task: efface.Task) -> efface.TrainedModel:
    return efface.train(task, seed=0)


@pytest.fixture(scope="session")
def pruned(trained: efface.TrainedModel) -> efface.TrainedModel:
    """``trained`` at 60 % sparsity."""
    return efface.prune(trained, OneShot(sparsity=0.6, recovery=1))


@pytest.fixture(scope="session")
def conv_trained(conv_task: efface.Task) -> efface.TrainedModel:
    return efface.train(conv_task, seed=0)


@pytest.fixture(scope="session")
def split(task: efface.Task) -> efface.Split:
    """24 records of all classes."""
    return efface.Split.random(task, 0.2, seed=3)


@pytest.fixture(scope="session")
def class_split(task: efface.Task) -> efface.Split:
    """The 40 records of class 1."""
    return efface.Split.by_class(task, 1)


@pytest.fixture
def fit(task: efface.Task) -> Fit:
    """A handle on the loop, bound to no model."""
    return Fit(task, seed=5)
