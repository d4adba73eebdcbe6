"""Small reference networks, written anew; any other ``nn.Module`` serves as well.

Images go in as they lie in memory: ``uint8`` in 0…255 or float in [0, 1]. The networks for images
from files normalise as their first layer, so that a checkpoint says by itself what it expects:
with ``mean`` and ``std`` per channel, by default CIFAR-10's for three channels and 0.5 for any
other number. Parameters come from the global generator: ``torch.manual_seed`` fixes them.
"""

from __future__ import annotations

from efface.networks.layers import (
    CIFAR_MEAN,
    CIFAR_STD,
    GlobalMaxPool,
    GlobalMeanPool,
    Normalize,
)
from efface.networks.residual import BasicBlock, ResNet, ResNet18, ResNet20, ResNet20s
from efface.networks.small import MLP, AirNet, DigitsCNN, ThreeConv
from efface.networks.vgg import VGG16BN
from efface.networks.vit import ViT

__all__ = [
    "CIFAR_MEAN",
    "CIFAR_STD",
    "MLP",
    "VGG16BN",
    "AirNet",
    "BasicBlock",
    "DigitsCNN",
    "GlobalMaxPool",
    "GlobalMeanPool",
    "Normalize",
    "ResNet",
    "ResNet18",
    "ResNet20",
    "ResNet20s",
    "ThreeConv",
    "ViT",
]
