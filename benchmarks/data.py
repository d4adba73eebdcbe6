"""The data side alone: batches from memory against a DataLoader, one pass, no network.

efface's side is its real loop, with random crop and flip, around an objective that costs nothing.
The other side is a map-style data set that does the same to one image at a time, read through a
``DataLoader`` with 0 workers: from JPEG bytes through PIL, or from decoded arrays. Both yield
``uint8`` batches. The crop of single images is the faster of two ways tried: indexing with
reflected rows and columns, not padding first.

    python benchmarks/data.py
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from measure import compared, one_thread, rounds, write
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import efface
from efface.datasets import CropFlip

IMAGES = 5_000
BATCH = 250
PADDING = 4
QUALITY = 75

Pixels = npt.NDArray[np.uint8]
Images = Sequence[bytes] | Pixels


def reflected(start: int, size: int) -> npt.NDArray[np.int64]:
    """Rows or columns that a crop at an offset shows, mirrored at the borders."""
    where = np.abs(np.arange(start, start + size))
    return np.where(where >= size, 2 * (size - 1) - where, where)


def crop_flip(image: Pixels, draw: np.random.Generator) -> Tensor:
    """One image ``[H, W, 3]``, shifted by up to 4 pixels and flipped or not, as ``[3, H, W]``."""
    down, across = draw.integers(-PADDING, PADDING + 1, 2)
    rows, columns = reflected(int(down), image.shape[0]), reflected(int(across), image.shape[1])
    if draw.random() < 0.5:
        columns = columns[::-1]
    moved = image[rows[:, None], columns]
    return torch.from_numpy(np.ascontiguousarray(moved.transpose(2, 0, 1)))


class OneByOne(Dataset[tuple[Tensor, int]]):
    """A data set as one writes it: decodes where needed, augments, an image at a time."""

    def __init__(self, images: Images, labels: Sequence[int]) -> None:
        self.images, self.labels = images, labels
        self.draw = np.random.default_rng(0)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image = self.images[index]
        if isinstance(image, bytes):
            image = np.asarray(Image.open(io.BytesIO(image)).convert("RGB"))
        return crop_flip(image, self.draw), self.labels[index]


def jpeg(image: Pixels) -> bytes:
    """An image as JPEG bytes."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=QUALITY)
    return file.getvalue()


def natural(n: int) -> Pixels:
    """Smooth random images ``[n, 32, 32, 3]``: JPEGs of noise would be unusually slow to decode."""
    coarse = np.random.default_rng(0).integers(0, 256, (n, 8, 8, 3), dtype=np.uint8)
    resized = [
        np.asarray(Image.fromarray(c).resize((32, 32), Image.Resampling.BICUBIC)) for c in coarse
    ]
    return np.stack(resized)


class Nothing(nn.Module):
    """One weight, so that there is something to step."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))


def main() -> None:
    one_thread()
    arrays = natural(IMAGES)
    labels = [i % 10 for i in range(IMAGES)]
    files = [jpeg(image) for image in arrays]
    pixels = torch.from_numpy(arrays).permute(0, 3, 1, 2).contiguous()
    pair = (pixels, torch.tensor(labels))
    settings = efface.Settings(epochs=1, batch_size=BATCH)
    task = efface.Task(Nothing, pair, pair, augment=CropFlip(PADDING), fit=settings)
    stream = {"retain": efface.Stream(torch.arange(IMAGES))}
    network = Nothing()

    def in_memory() -> None:
        efface.Fit(task)(network, lambda net, _b, _c: net.weight.sum(), stream, settings)

    def loaded(images: Images) -> None:
        loader = DataLoader(OneByOne(images, labels), batch_size=BATCH, shuffle=True)
        for _inputs, _targets in loader:
            pass

    arms = {
        "efface": in_memory,
        "DataLoader, JPEG": lambda: loaded(files),
        "DataLoader, arrays": lambda: loaded(arrays),
    }
    done = rounds(arms, 7)
    facts: dict[str, Any] = {
        "images": IMAGES,
        "batch": BATCH,
        "augmentation": f"shift by up to {PADDING} pixels (reflected) and flip",
        "jpeg_quality": QUALITY,
        "mean_jpeg_bytes": round(sum(map(len, files)) / IMAGES),
    }
    checks = [
        compared(f"images/s in memory over {arm}", done, arm, "efface", at_least=target, **facts)
        for arm, target in (("DataLoader, JPEG", 6.0), ("DataLoader, arrays", 3.0))
    ]
    write("data", __doc__.split("\n    python")[0], checks)


if __name__ == "__main__":
    main()
