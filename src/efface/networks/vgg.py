"""VGG-16 for small images."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from efface.networks.layers import GlobalMeanPool, convolution, normalize


class VGG16BN(nn.Module):
    """VGG-16 with batch norm for 32×32 images, as in Jia et al. (2023) (14,724,042 parameters).

    The thirteen convolutions of Simonyan & Zisserman (2015), each with batch norm and therefore
    without a bias, five poolings, and one linear head instead of three layers.

    Args:
        classes: Outputs.
        channels: Of the images; 1 for grey ones.
        width: Channels of the first block; the others have 2, 4, 8 and 8 times as many.
        mean: For normalisation, per channel (see :mod:`efface.networks`).
        std: The same.

    Shapes: ``[B, channels, H, W]`` (32×32 or more; what is left at the end is averaged) →
    ``[B, classes]``.

    >>> import torch
    >>> VGG16BN(width=4)(torch.rand(2, 3, 32, 32)).shape
    torch.Size([2, 10])
    """

    def __init__(
        self,
        classes: int = 10,
        *,
        channels: int = 3,
        width: int = 64,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        self.normalize = normalize(channels, mean, std)
        layers: list[nn.Module] = []
        inputs = channels
        for times, convolutions in ((1, 2), (2, 2), (4, 3), (8, 3), (8, 3)):
            for _ in range(convolutions):
                outputs = times * width
                layers += [convolution(inputs, outputs), nn.BatchNorm2d(outputs), nn.ReLU()]
                inputs = outputs
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        self.pool = GlobalMeanPool()
        self.classifier = nn.Linear(inputs, classes)

    def forward(self, images: Tensor) -> Tensor:
        """``[B, channels, H, W]`` → ``[B, classes]``."""
        logits: Tensor = self.classifier(self.pool(self.features(self.normalize(images))))
        return logits
