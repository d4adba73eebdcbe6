"""Augmentation of whole batches, in which a record's randomness is its own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from efface.errors import InputError


@dataclass(frozen=True)
class CropFlip:
    """Random shift by up to ``padding`` pixels and horizontal flip, as is usual for CIFAR.

    Args:
        padding: Pixels by which an image can move up, down, left or right; 0 only flips.
        flip: Whether half the images are mirrored.
        fill: What lies beyond the border: its reflection (without the edge itself), or zeros.

    Raises:
        InputError: If padding is negative, or no smaller than the image where it is reflected.

    >>> images = torch.arange(3.0).view(1, 1, 1, 3)
    >>> CropFlip(padding=0)(images, torch.tensor([[0.5, 0.5, 0.2]])).flatten().tolist()
    [2.0, 1.0, 0.0]
    """

    padding: int = 4
    flip: bool = True
    fill: Literal["reflect", "zeros"] = "reflect"

    draws: ClassVar[int] = 3
    """Uniform numbers per record: the vertical shift, the horizontal one, the flip."""

    def __post_init__(self) -> None:
        if self.padding < 0:
            raise InputError(f"CropFlip has a padding of {self.padding}; give 0 or more.")

    def __call__(self, images: Tensor, uniform: Tensor) -> Tensor:
        """Augment a batch.

        Args:
            images: ``[B, C, H, W]`` of any type.
            uniform: ``[B, 3]`` in [0, 1); row b is all the randomness of image b. An image is
                mirrored, after the shift, when its third number is below one half.

        Returns:
            A new tensor of the same shape, type and memory format.
        """
        batch, channels, height, width = images.shape
        if self.fill == "reflect" and self.padding >= min(height, width):
            raise InputError(
                f"CropFlip cannot reflect {self.padding} pixels of images of {height}×{width}; "
                "give a smaller padding or fill='zeros'."
            )
        shifts = (uniform[:, :2] * (2 * self.padding + 1)).long() - self.padding
        down = torch.arange(height, device=images.device) + shifts[:, :1]
        across = torch.arange(width, device=images.device) + shifts[:, 1:]
        if self.flip:
            across = torch.where(uniform[:, 2:] < 0.5, across.flip(1), across)
        rows, columns = _reflected(down, height), _reflected(across, width)
        pixels = (rows[:, :, None] * width + columns[:, None, :]).view(batch, 1, -1)
        moved = images.flatten(2).gather(2, pixels.expand(-1, channels, -1)).view(images.shape)
        if self.fill == "zeros":
            outside = (rows != down)[:, None, :, None] | (columns != across)[:, None, None, :]
            moved = moved.masked_fill(outside, 0)
        if images.is_contiguous(memory_format=torch.channels_last) and channels > 1:
            return moved.contiguous(memory_format=torch.channels_last)
        return moved


def _reflected(index: Tensor, size: int) -> Tensor:
    """Positions beyond either border mirrored into [0, size); clamped where that does not do."""
    last = size - 1
    return (last - (last - index.abs()).abs()).clamp(0, last)
