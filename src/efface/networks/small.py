"""Plain networks that train in seconds to minutes on a CPU."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import nn
from torch.nn import functional as F

from efface.errors import TaskError
from efface.networks.layers import GlobalMaxPool, GlobalMeanPool, convolution, normalize


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

    Args:
        classes: Outputs.
        norm: Batch norm after every convolution; without it they have biases instead.

    Shapes: float in [0, 1] ``[B, 1, 8, 8]`` → ``[B, classes]``.

    >>> DigitsCNN()(torch.rand(2, 1, 8, 8)).shape
    torch.Size([2, 10])
    """

    def __init__(self, classes: int = 10, *, norm: bool = True) -> None:
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        for i, (inputs, outputs) in enumerate(pairwise((1, 16, 24, 24)), 1):
            layers |= {f"conv{i}": convolution(inputs, outputs)}
            layers |= {f"norm{i}": nn.BatchNorm2d(outputs)} if norm else {}
            layers |= {f"act{i}": nn.ReLU()}
            layers |= {"pool": nn.MaxPool2d(2)} if i == 2 else {}
        layers |= {"flatten": nn.Flatten(), "classifier": nn.Linear(24 * 4 * 4, classes)}
        super().__init__(layers)
        if not norm:
            _biases(self)


class ThreeConv(nn.Sequential):
    """Three convolutions with batch norm and pooling (94,762 parameters): the fast one.

    Args:
        classes: Outputs.
        channels: Of the images; 1 for grey ones.
        mean: For normalisation, per channel (see :mod:`efface.networks`).
        std: The same.

    Shapes: ``[B, channels, H, W]`` (8×8 or more, made for 32×32) → ``[B, classes]``.

    >>> ThreeConv(channels=1)(torch.rand(2, 1, 28, 28)).shape
    torch.Size([2, 10])
    """

    def __init__(
        self,
        classes: int = 10,
        *,
        channels: int = 3,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        layers: OrderedDict[str, nn.Module] = OrderedDict(normalize=normalize(channels, mean, std))
        for i, (inputs, outputs) in enumerate(pairwise((channels, 32, 64, 128)), 1):
            layers |= {
                f"conv{i}": convolution(inputs, outputs),
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
        channels: Of the images: 3, or 1 for grey ones (whose stem has 8 filters instead of 24).
        mean: For normalisation, per channel (see :mod:`efface.networks`).
        std: The same.
        norm: Batch norm; without it the convolutions have biases instead.

    Raises:
        TaskError: If channels are neither 1 nor 3.

    Shapes: ``[B, channels, H, W]`` (16×16 or more, made for 32×32) → ``[B, classes]``.

    >>> AirNet(widths=(8, 16, 16))(torch.rand(2, 3, 32, 32)).shape
    torch.Size([2, 10])
    """

    def __init__(
        self,
        classes: int = 10,
        widths: Sequence[int] = (32, 64, 128),
        *,
        channels: int = 3,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        norm: bool = True,
    ) -> None:
        stem = _patch_stem(channels)
        filters = stem.out_channels
        layers: OrderedDict[str, nn.Module] = OrderedDict(normalize=normalize(channels, mean, std))
        layers |= {"stem": stem, "stem_norm": _norm(filters), "stem_act": nn.GELU()}
        for i, (inputs, outputs) in enumerate(pairwise((filters, *widths)), 1):
            layers[f"block{i}"] = _air_block(inputs, outputs)
        layers |= {"pool": GlobalMaxPool(), "classifier": nn.Linear(widths[-1], classes)}
        super().__init__(layers)
        if not norm:
            _without_norm(self)
            _biases(self)


def _without_norm(network: nn.Sequential) -> None:
    """Take the batch norms out of a network and its blocks."""
    for name, layer in list(network.named_children()):
        if isinstance(layer, nn.BatchNorm2d):
            delattr(network, name)
        elif isinstance(layer, nn.Sequential):
            _without_norm(layer)


def _biases(network: nn.Module) -> None:
    """Give the convolutions the biases that batch norm would have brought."""
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d):
            layer.bias = nn.Parameter(torch.zeros(layer.out_channels))


def _norm(channels: int) -> nn.BatchNorm2d:
    # Runs are short: running statistics follow within a dozen steps (0.1 to 0.6 do equally well).
    return nn.BatchNorm2d(channels, momentum=0.3)


def _patch_stem(channels: int) -> nn.Conv2d:
    """2×2 filters: (mean, two edges, diagonal) × (luminance, two opponent colours), each ±."""
    colours = {1: [[1.0]], 3: [[1.0, 1, 1], [1, 0, -1], [1, -2, 1]]}
    if channels not in colours:
        raise TaskError(f"AirNet takes images of 1 or 3 channels, not {channels}; use ThreeConv.")
    stem = nn.Conv2d(channels, 8 * channels, 2, bias=False)
    haar = torch.tensor([[1.0, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]]) / 2
    colour = F.normalize(torch.tensor(colours[channels]))
    basis = torch.einsum("kc,sp->kscp", colour, haar).reshape(4 * channels, channels, 2, 2)
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
