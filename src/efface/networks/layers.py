"""What the networks share: normalisation, pooling, convolutions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from efface.errors import TaskError

CIFAR_MEAN = (0.4914, 0.4822, 0.4465)
CIFAR_STD = (0.2470, 0.2435, 0.2616)


class Normalize(nn.Module):
    """Subtract a mean and divide by a standard deviation, per channel.

    Args:
        mean: Per channel, of values in [0, 1].
        std: The same.

    Shapes: ``[B, C, H, W]`` → the same. ``uint8`` is read as 0…255, any float as [0, 1].

    >>> grey = torch.full((1, 1, 2, 2), 255, dtype=torch.uint8)
    >>> Normalize([0.5], [0.25])(grey).flatten().tolist()
    [2.0, 2.0, 2.0, 2.0]
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float] = CIFAR_MEAN, std: Sequence[float] = CIFAR_STD):
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        """Normalised images of the network's own float type."""
        if images.dtype == torch.uint8:
            images = images.to(self.mean.dtype) / 255
        return (images - self.mean) / self.std


def normalize(
    channels: int, mean: Sequence[float] | None, std: Sequence[float] | None
) -> Normalize:
    """The first layer of a network for images of so many channels."""
    usual = (CIFAR_MEAN, CIFAR_STD) if channels == 3 else ((0.5,) * channels,) * 2
    given = [
        own if own is not None else other for own, other in zip((mean, std), usual, strict=True)
    ]
    counts = {len(values) for values in given}
    if counts != {channels}:
        raise TaskError(
            f"mean and std have {' and '.join(map(str, sorted(counts)))} values for images of "
            f"{channels} channels; give one per channel."
        )
    return Normalize(*given)


class GlobalMaxPool(nn.Module):
    """The largest value of every channel: ``[B, C, H, W]`` → ``[B, C]``."""

    def forward(self, images: Tensor) -> Tensor:
        """Channels only."""
        return images.amax((2, 3))


class GlobalMeanPool(nn.Module):
    """The mean of every channel: ``[B, C, H, W]`` → ``[B, C]``."""

    def forward(self, images: Tensor) -> Tensor:
        """Channels only."""
        return images.mean((2, 3))


def convolution(inputs: int, outputs: int, size: int = 3, stride: int = 1) -> nn.Conv2d:
    """A convolution that keeps the size (at stride 1), He-initialised; batch norm follows it."""
    conv = nn.Conv2d(inputs, outputs, size, stride, padding=size // 2, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    return conv
