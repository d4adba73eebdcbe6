"""efface's default training path against the plain loop that one writes first.

``efface.train`` with random crop and flip, which picks precision and layout by its rule and takes
batches from memory, against fp32, the default layout and a ``DataLoader`` (0 workers) over decoded
arrays that crops and flips image by image. Both train for one epoch with the same network and
optimiser, on CIFAR-10 images where they are at hand (see ``EFFACE_DATA``), else on random ones.

    python benchmarks/default_path.py
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from data import PADDING, OneByOne, Pixels
from measure import compared, one_thread, rounds, write
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

import efface
from efface.datasets import CropFlip, cifar10
from efface.errors import InputError
from efface.networks import AirNet, ResNet20, ThreeConv
from efface.placement import rule

BATCH = 250
PAIRS = 5

CASES: dict[str, tuple[Callable[[], nn.Module], int, float]] = {
    "AirNet": (AirNet, 1000, 3.2),
    "ResNet20": (ResNet20, 750, 2.2),
    "ThreeConv": (ThreeConv, 1000, 2.2),
}
"""Network, images, target."""


def images(n: int) -> tuple[Tensor, Tensor, str]:
    """Images, labels, and what they are."""
    try:
        task = cifar10(10_000)
    except InputError:
        draw = torch.Generator().manual_seed(0)
        pixels = torch.randint(0, 256, (n, 3, 32, 32), dtype=torch.uint8, generator=draw)
        return pixels, torch.arange(n) % 10, "random images"
    pixels, labels = task.train
    return pixels[:n].contiguous(), labels[:n], "CIFAR-10"


def sgd(network: nn.Module, settings: efface.Settings) -> torch.optim.SGD:
    """The optimiser of all arms."""
    return torch.optim.SGD(
        network.parameters(),
        lr=settings.lr,
        momentum=settings.momentum,
        weight_decay=settings.weight_decay,
        nesterov=True,
    )


def plain(
    network: nn.Module, arrays: Pixels, labels: list[int], settings: efface.Settings
) -> Callable[[], None]:
    """One epoch as most people write it."""

    def run() -> None:
        loader = DataLoader(OneByOne(arrays, labels), batch_size=settings.batch_size, shuffle=True)
        optimizer = sgd(network, settings)
        network.train()
        for inputs, targets in loader:
            optimizer.zero_grad()
            F.cross_entropy(network(inputs), targets).backward()  # type: ignore[no-untyped-call]
            optimizer.step()

    return run


def limit(
    network: nn.Module, pixels: Tensor, labels: Tensor, settings: efface.Settings
) -> Callable[[], None]:
    """One epoch as fast as it can be: efface's precision and layout, no augmentation at all."""
    placement = rule(network, torch.device("cpu"), train=True)
    if placement.channels_last:
        network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def run() -> None:
        optimizer = sgd(network, settings)
        network.train()
        for where in torch.split(torch.randperm(len(labels)), settings.batch_size):
            optimizer.zero_grad()
            with placement.autocast():
                loss = F.cross_entropy(network(pixels[where]), labels[where])
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()

    return run


def measure(name: str) -> list[dict[str, Any]]:
    """A network's ratio, and what the processor allows at best."""
    network, n, target = CASES[name]
    pixels, labels, source = images(n)
    settings = efface.Settings(epochs=1, batch_size=BATCH, lr=0.01)
    data = (pixels, labels)
    task = efface.Task(network, data, data, augment=CropFlip(PADDING), fit=settings)
    arrays = np.ascontiguousarray(pixels.permute(0, 2, 3, 1).numpy())
    torch.manual_seed(0)
    arms: dict[str, Callable[[], object]] = {
        "efface": lambda: efface.train(task, device="cpu"),
        "plain": plain(network(), arrays, labels.tolist(), settings),
        "limit": limit(network(), pixels, labels, settings),
    }
    done = rounds(arms, PAIRS)
    facts: dict[str, Any] = {
        "images": n,
        "records": source,
        "batch": BATCH,
        "placement": str(rule(network(), torch.device("cpu"), train=True)),
        "images_per_cpu_second": {
            arm: round(n / statistics.median(each[arm].cpu for each in done)) for arm in arms
        },
    }
    title = f"{name}, images/s of efface.train over a plain fp32 DataLoader loop"
    best = f"{name}, the same of a bare loop in efface's precision and layout (the limit here)"
    return [
        compared(title, done, "plain", "efface", at_least=target, **facts),
        compared(best, done, "plain", "limit"),
    ]


def main() -> None:
    one_thread()
    checks = [check for name in sys.argv[1:] or CASES for check in measure(name)]
    write("default_path", __doc__.split("\n    python")[0], checks)


if __name__ == "__main__":
    main()
