"""The 8×8 digits that ship with scikit-learn: real scans, seconds per network."""

from __future__ import annotations

import numpy as np
import torch

from efface.datasets.streaming import Images
from efface.errors import InputError


def digits(seed: int = 0, test: int = 500) -> tuple[Images, Images]:
    """Optical digits (Alpaydin and Kaynak, 1998), split once, stratified by class.

    Args:
        seed: Of the split; the default makes the same 1,297 training and 500 test records always.
        test: Test records, 10 to 1,787.

    Returns:
        Training and test data: float32 ``[N, 1, 8, 8]`` in [0, 1], labels 0…9, and as IDs the row
        numbers of ``sklearn.datasets.load_digits``.

    Raises:
        InputError: If a class would be left without a training or a test record.

    >>> train, test = digits()
    >>> train.images.shape, len(test.labels)
    (torch.Size([1297, 1, 8, 8]), 500)
    """
    from sklearn.datasets import load_digits  # half a second that few who import efface need
    from sklearn.model_selection import train_test_split

    pixels, labels = load_digits(return_X_y=True)
    if not 10 <= test <= len(labels) - 10:
        raise InputError(f"digits cannot keep {test} records for testing; ask for 10 to 1787.")
    rows = train_test_split(
        np.arange(len(labels)), test_size=test, stratify=labels, random_state=seed
    )
    parts = []
    for part in map(np.sort, rows):
        images = torch.from_numpy(pixels[part].astype(np.float32) / 16).view(-1, 1, 8, 8)
        parts.append(Images(images, torch.from_numpy(labels[part]).long(), [str(i) for i in part]))
    return parts[0], parts[1]
