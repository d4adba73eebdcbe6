"""Counter-based randomness: a seed for every (purpose, counter), so that no state is carried.

Drawing for one purpose never shifts another; a run resumed at epoch 7 draws what an uninterrupted
one draws there; and what a record gets depends on that record, never on who else is in the set.
"""

from __future__ import annotations

import hashlib

import numpy as np
import torch


def seed_for(seed: int, purpose: str, *counters: int) -> int:
    """A 63-bit seed for a purpose and its counters (epoch, step, …).

    >>> seed_for(0, "order", 3) == seed_for(0, "order", 3)
    True
    >>> seed_for(0, "order", 3) == seed_for(0, "order", 4)
    False
    """
    text = f"{seed}/{purpose}/{'/'.join(map(str, counters))}"
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def own_seed(seed: int) -> int:
    """A retrained model's seed: shares nothing with a model trained under the same number."""
    return seed_for(seed, "retrain")


def generator(seed: int, purpose: str, *counters: int) -> torch.Generator:
    """A CPU generator of its own for a purpose and its counters."""
    return torch.Generator().manual_seed(seed_for(seed, purpose, *counters))


def rng(seed: int, purpose: str, *counters: int) -> np.random.Generator:
    """The same for NumPy."""
    return np.random.default_rng(seed_for(seed, purpose, *counters))


def seed_torch(seed: int, device: torch.device) -> None:
    """Seed the global generators that dropout and the like draw from, cheaply enough per step."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.default_generators[device.index or 0].manual_seed(seed)
