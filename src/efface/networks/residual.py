"""Residual networks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import Tensor, nn
from torch.nn import functional as F

from efface.errors import TaskError
from efface.networks.layers import GlobalMeanPool, convolution, normalize


class BasicBlock(nn.Module):
    """Two 3×3 convolutions and a shortcut (He et al., 2016); a projection where shapes change.

    Args:
        inputs: Input channels.
        outputs: Output channels.
        stride: Of the first convolution.
    """

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = convolution(inputs, outputs, 3, stride)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = convolution(outputs, outputs)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.downsample: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(
                convolution(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs)
            )

    def forward(self, images: Tensor) -> Tensor:
        """``[B, inputs, H, W]`` → ``[B, outputs, H / stride, W / stride]``."""
        hidden = F.relu(self.bn1(self.conv1(images)))
        return F.relu(self.bn2(self.conv2(hidden)) + self.downsample(images))


class ResNet(nn.Module):
    """A residual network of basic blocks.

    Names follow torchvision's (``conv1``, ``bn1``, ``layer1.0.conv1``, …, ``fc``).

    Args:
        blocks: Blocks per stage; every stage after the first halves the resolution.
        widths: Channels per stage.
        classes: Outputs.
        channels: Of the images; 1 for grey ones.
        stem: ``"cifar"``: 3×3 at stride 1, no pooling; ``"imagenet"``: 7×7 at stride 2 and 3×3
            max pooling at stride 2 (He et al., 2016).
        mean: For normalisation, per channel (see :mod:`efface.networks`).
        std: The same.

    Raises:
        TaskError: If the stem is unknown, or mean and std do not fit the channels.
    """

    def __init__(
        self,
        blocks: Sequence[int],
        widths: Sequence[int],
        classes: int = 10,
        *,
        channels: int = 3,
        stem: Literal["cifar", "imagenet"] = "cifar",
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        if stem not in ("cifar", "imagenet"):
            raise TaskError(f"stem {stem!r} is unknown; give 'cifar' or 'imagenet'.")
        large = stem == "imagenet"
        self.normalize = normalize(channels, mean, std)
        self.conv1 = convolution(channels, widths[0], 7 if large else 3, 2 if large else 1)
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.maxpool = nn.MaxPool2d(3, 2, padding=1) if large else nn.Identity()
        self.stages = [f"layer{i}" for i in range(1, len(blocks) + 1)]
        inputs = widths[0]
        for i, (name, n, outputs) in enumerate(zip(self.stages, blocks, widths, strict=True)):
            strides = [1 if i == 0 else 2] + [1] * (n - 1)
            stage = nn.Sequential()
            for stride in strides:
                stage.append(BasicBlock(inputs, outputs, stride))
                inputs = outputs
            self.add_module(name, stage)
        self.pool = GlobalMeanPool()
        self.fc = nn.Linear(inputs, classes)

    def forward(self, images: Tensor) -> Tensor:
        """``[B, channels, H, W]`` → ``[B, classes]``."""
        hidden = self.maxpool(F.relu(self.bn1(self.conv1(self.normalize(images)))))
        for name in self.stages:
            hidden = self.get_submodule(name)(hidden)
        logits: Tensor = self.fc(self.pool(hidden))
        return logits


def ResNet20(  # noqa: N802 — named like the network classes
    classes: int = 10,
    *,
    channels: int = 3,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> ResNet:
    """ResNet-20 (He et al., 2016, section 4.2), with projections (272,474 parameters).

    What Jia et al. (2023) call ResNet-20s; :data:`ResNet20s` is the same function. He et al. pad
    shortcuts with zeros where shapes change; here projections do that, 2,752 parameters more.

    >>> import torch
    >>> ResNet20()(torch.rand(2, 3, 32, 32)).shape
    torch.Size([2, 10])
    """
    return ResNet((3, 3, 3), (16, 32, 64), classes, channels=channels, mean=mean, std=std)


ResNet20s = ResNet20


def ResNet18(  # noqa: N802
    classes: int = 10,
    *,
    channels: int = 3,
    stem: Literal["cifar", "imagenet"] = "cifar",
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> ResNet:
    """ResNet-18 with the CIFAR stem, as in Jia et al. (2023) (11,173,962 parameters).

    Args:
        classes: Outputs.
        channels: Of the images; 1 for grey ones.
        stem: ``"imagenet"`` for large images, torchvision's network (see :class:`ResNet`).
        mean: For normalisation, per channel (see :mod:`efface.networks`).
        std: The same.

    >>> sum(p.numel() for p in ResNet18().parameters())
    11173962
    """
    widths = (64, 128, 256, 512)
    options = {"channels": channels, "stem": stem, "mean": mean, "std": std}
    return ResNet((2, 2, 2, 2), widths, classes, **options)  # type: ignore[arg-type]
