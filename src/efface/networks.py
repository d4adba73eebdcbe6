"""Small reference networks, written anew; any other ``nn.Module`` serves as well.

Images go in as they lie in memory: ``uint8`` in 0…255 or float in [0, 1]. The networks for colour
images normalise as their first layer, so that a checkpoint says by itself what it expects.
Parameters come from the global generator: ``torch.manual_seed`` fixes them.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

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


def _conv(inputs: int, outputs: int, size: int = 3, stride: int = 1) -> nn.Conv2d:
    """A convolution that keeps the size (at stride 1), He-initialised; batch norm follows it."""
    conv = nn.Conv2d(inputs, outputs, size, stride, padding=size // 2, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    return conv


class MLP(nn.Sequential):
    """Linear layers with ReLU between them; inputs are flattened first.

    Args:
        sizes: Inputs, hidden widths, classes; ``[64, 128, 64, 10]`` (17,226 parameters) suits
            the 8×8 digits.

    >>> MLP([64, 16, 10])(torch.rand(2, 1, 8, 8)).shape
    torch.Size([2, 10])
    """

    def __init__(self, sizes: Sequence[int]) -> None:
        layers: list[nn.Module] = [nn.Flatten()]
        for inputs, outputs in pairwise(sizes):
            layers += [nn.Linear(inputs, outputs), nn.ReLU()]
        super().__init__(*layers[:-1])


class DigitsCNN(nn.Sequential):
    """A network for 8×8 digits: three convolutions with batch norm (12,762 parameters).

    Shapes: float in [0, 1] ``[B, 1, 8, 8]`` → ``[B, classes]``.

    >>> DigitsCNN()(torch.rand(2, 1, 8, 8)).shape
    torch.Size([2, 10])
    """

    def __init__(self, classes: int = 10) -> None:
        super().__init__(
            OrderedDict(
                conv1=_conv(1, 16),
                norm1=nn.BatchNorm2d(16),
                act1=nn.ReLU(),
                conv2=_conv(16, 24),
                norm2=nn.BatchNorm2d(24),
                act2=nn.ReLU(),
                pool=nn.MaxPool2d(2),
                conv3=_conv(24, 24),
                norm3=nn.BatchNorm2d(24),
                act3=nn.ReLU(),
                flatten=nn.Flatten(),
                classifier=nn.Linear(24 * 4 * 4, classes),
            )
        )


class ThreeConv(nn.Sequential):
    """Three convolutions with batch norm and pooling (94,762 parameters): the fast one.

    Shapes: ``[B, 3, H, W]`` (16×16 or more, made for 32×32) → ``[B, classes]``.

    >>> ThreeConv()(torch.rand(2, 3, 32, 32)).shape
    torch.Size([2, 10])
    """

    def __init__(self, classes: int = 10) -> None:
        layers: OrderedDict[str, nn.Module] = OrderedDict(normalize=Normalize())
        for i, (inputs, outputs) in enumerate(pairwise((3, 32, 64, 128)), 1):
            layers |= {
                f"conv{i}": _conv(inputs, outputs),
                f"norm{i}": nn.BatchNorm2d(outputs),
                f"act{i}": nn.ReLU(),
                f"pool{i}": nn.MaxPool2d(2),
            }
        layers |= {"pool": GlobalMeanPool(), "classifier": nn.Linear(128, classes)}
        super().__init__(layers)


class AirNet(nn.Sequential):
    """Three conv–pool–conv blocks with global max pooling (295,130 parameters): the default.

    Ideas from Jordan (2024), "94 % on CIFAR-10 in 3.29 seconds" (airbench): few wide layers, early
    pooling, a stem of 2×2 filters with ± pairs, identity-like convolutions, GELU. The stem starts
    from a fixed basis close to the principal components of natural image patches instead of from
    the training data, so that a fresh network needs none, and is trained like any other layer.

    Args:
        classes: Outputs.
        widths: Channels of the three blocks.

    Shapes: ``[B, 3, H, W]`` (16×16 or more, made for 32×32) → ``[B, classes]``.

    >>> AirNet(widths=(8, 16, 16))(torch.rand(2, 3, 32, 32)).shape
    torch.Size([2, 10])
    """

    def __init__(self, classes: int = 10, widths: Sequence[int] = (32, 64, 128)) -> None:
        layers: OrderedDict[str, nn.Module] = OrderedDict(normalize=Normalize())
        layers |= {"stem": _patch_stem(), "stem_norm": _norm(24), "stem_act": nn.GELU()}
        for i, (inputs, outputs) in enumerate(pairwise((24, *widths)), 1):
            layers[f"block{i}"] = _air_block(inputs, outputs)
        layers |= {"pool": GlobalMaxPool(), "classifier": nn.Linear(widths[-1], classes)}
        super().__init__(layers)


def _norm(channels: int) -> nn.BatchNorm2d:
    # Runs are short: running statistics follow within a dozen steps (0.1 to 0.6 do equally well).
    return nn.BatchNorm2d(channels, momentum=0.3)


def _patch_stem() -> nn.Conv2d:
    """2×2 filters: (mean, two edges, diagonal) × (luminance, two opponent colours), each ±."""
    stem = nn.Conv2d(3, 24, 2, bias=False)
    haar = torch.tensor([[1.0, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]]) / 2
    colour = F.normalize(torch.tensor([[1.0, 1, 1], [1, 0, -1], [1, -2, 1]]))
    basis = torch.einsum("kc,sp->kscp", colour, haar).reshape(12, 3, 2, 2)
    with torch.no_grad():
        stem.weight.copy_(torch.cat([basis, -basis]))
    return stem


def _air_block(inputs: int, outputs: int) -> nn.Sequential:
    convs = [nn.Conv2d(a, outputs, 3, padding=1, bias=False) for a in (inputs, outputs)]
    for conv in convs:  # the first output channels pass the input on
        nn.init.dirac_(conv.weight[: conv.in_channels].data)
    return nn.Sequential(
        OrderedDict(
            conv1=convs[0],
            pool=nn.MaxPool2d(2),
            norm1=_norm(outputs),
            act1=nn.GELU(),
            conv2=convs[1],
            norm2=_norm(outputs),
            act2=nn.GELU(),
        )
    )


class BasicBlock(nn.Module):
    """Two 3×3 convolutions and a shortcut (He et al., 2016); a projection where shapes change.

    Args:
        inputs: Input channels.
        outputs: Output channels.
        stride: Of the first convolution.
    """

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = _conv(inputs, outputs, 3, stride)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = _conv(outputs, outputs)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.downsample: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(
                _conv(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs)
            )

    def forward(self, images: Tensor) -> Tensor:
        """``[B, inputs, H, W]`` → ``[B, outputs, H / stride, W / stride]``."""
        hidden = F.relu(self.bn1(self.conv1(images)))
        return F.relu(self.bn2(self.conv2(hidden)) + self.downsample(images))


class ResNet(nn.Module):
    """A residual network of basic blocks with the CIFAR stem: 3×3, stride 1, no max pooling.

    Names follow torchvision's (``conv1``, ``bn1``, ``layer1.0.conv1``, …, ``fc``).

    Args:
        blocks: Blocks per stage; every stage after the first halves the resolution.
        widths: Channels per stage.
        classes: Outputs.
    """

    def __init__(self, blocks: Sequence[int], widths: Sequence[int], classes: int = 10) -> None:
        super().__init__()
        self.normalize = Normalize()
        self.conv1 = _conv(3, widths[0])
        self.bn1 = nn.BatchNorm2d(widths[0])
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
        """``[B, 3, H, W]`` → ``[B, classes]``."""
        hidden = F.relu(self.bn1(self.conv1(self.normalize(images))))
        for name in self.stages:
            hidden = self.get_submodule(name)(hidden)
        logits: Tensor = self.fc(self.pool(hidden))
        return logits


def ResNet20(classes: int = 10) -> ResNet:  # noqa: N802 — named like the network classes
    """ResNet-20 (He et al., 2016, section 4.2), with projections (272,474 parameters).

    >>> ResNet20()(torch.rand(2, 3, 32, 32)).shape
    torch.Size([2, 10])
    """
    return ResNet((3, 3, 3), (16, 32, 64), classes)


def ResNet18(classes: int = 10) -> ResNet:  # noqa: N802
    """ResNet-18 with the CIFAR stem, as in Jia et al. (2023) (11,173,962 parameters).

    >>> sum(p.numel() for p in ResNet18().parameters())
    11173962
    """
    return ResNet((2, 2, 2, 2), (64, 128, 256, 512), classes)
