"""Computational blocks: what they carry of D_f and of D_r, and turning them down.

After DFMU (Sajith U and Keserwani 2026): one forward and one backward pass score every block.
"""

from __future__ import annotations

from efface.sparsify.blocks.choosing import (
    BlockChoice,
    Chosen,
    Weighed,
    choose,
    contrast,
    described,
    factors,
    layer_mean,
    reach,
    strength_for,
    weigh,
)
from efface.sparsify.blocks.editing import Patch, Rescaling, rescalings, turn_down_
from efface.sparsify.blocks.finding import Blocks, Gate, Granularity, dropped, find_blocks
from efface.sparsify.blocks.scoring import BlockScore, Carried, carried, draw

__all__ = [
    "BlockChoice",
    "BlockScore",
    "Blocks",
    "Carried",
    "Chosen",
    "Gate",
    "Granularity",
    "Patch",
    "Rescaling",
    "Weighed",
    "carried",
    "choose",
    "contrast",
    "described",
    "draw",
    "dropped",
    "factors",
    "find_blocks",
    "layer_mean",
    "reach",
    "rescalings",
    "strength_for",
    "turn_down_",
    "weigh",
]
