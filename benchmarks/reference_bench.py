"""What the comparisons with public reference code share: data, networks, and how efface runs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from default_path import images as cifar_images
from reference_code import BATCH, loader
from torch import Tensor, nn

import efface

Check = dict[str, Any]


@dataclass(frozen=True)
class Bench:
    """Equal data and one network for both sides.

    Args:
        make: Makes the network.
        retain: Records of D_r.
        forget: Records of D_f.
        test: Test records.
    """

    make: Callable[[], nn.Module]
    retain: int
    forget: int
    test: int = 10

    def task(self) -> efface.Task:
        """The task; D_f is spread evenly over the records."""
        pixels, labels, name = cifar_images(self.retain + self.forget + self.test)
        inputs = pixels.float() / 255
        n = self.retain + self.forget
        settings = efface.Settings(epochs=1, batch_size=BATCH, lr=0.01, schedule="constant")
        return efface.Task(
            self.make, (inputs[:n], labels[:n]), (inputs[n:], labels[n:]), fit=settings, name=name
        )

    def split(self, task: efface.Task) -> efface.Split:
        """D_f and D_r."""
        n = self.retain + self.forget
        chosen = torch.zeros(n, dtype=torch.bool)
        chosen[torch.linspace(0, n - 1, self.forget).long()] = True
        return efface.Split.of(task, chosen, {"kind": "ids", "n": self.forget})


def trained(task: efface.Task) -> efface.TrainedModel:
    """A model after an epoch, so that gradients are those of a network that knows something."""
    torch.manual_seed(0)
    return efface.train(task, device="cpu")


def part(task: efface.Task, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Inputs and targets of some training records."""
    inputs, targets = task.train
    return inputs[positions], targets[positions]


def loaders(split: efface.Split) -> dict[str, Any]:
    """What the released functions take."""
    named = {"retain": split.retain, "forget": split.forget}
    return {name: loader(*part(split.task, where)) for name, where in named.items()}


def flat(network: nn.Module) -> Tensor:
    """All parameters as one float64 vector."""
    return torch.cat([p.detach().double().flatten() for p in network.parameters()])


def relative(mine: Tensor, theirs: Tensor) -> float:
    """Norm of the difference over the norm of the other."""
    return float((mine.double() - theirs.double()).norm() / theirs.double().norm())


def stacked(values: Mapping[str, Tensor]) -> Tensor:
    """Named tensors as one vector, in the order of the names."""
    return torch.cat([t.detach().flatten() for t in values.values()])


@contextlib.contextmanager
def in_fp32() -> Iterator[None]:
    """Training as on a processor without bf16."""
    with patch("efface.placement._bf16_is_fast", lambda _device: False):
        yield


def ours(method: Any, network: nn.Module, split: efface.Split, *, fp32: bool = False) -> None:
    """A method as ``efface.forget`` runs it, without the copy and the lineage."""
    model = efface.TrainedModel(split.task, network)
    with in_fp32() if fp32 else contextlib.nullcontext():
        method(model, split, efface.Fit(split.task, subject=model))
