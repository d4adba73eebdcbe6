"""Criteria for whole filters that look at data: what a filter carries of the records shown.

The scores of DFMU's blocks, of all records alike: no D_f is known where a model is pruned.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from efface.errors import MethodError
from efface.fitting import Fit
from efface.sparsify.blocks.finding import find_blocks
from efface.sparsify.blocks.scoring import BlockScore, carried

if TYPE_CHECKING:
    from efface.sparsify.blocks.scoring import Kind
    from efface.trained import TrainedModel

BLOCK_CRITERIA: dict[str, Kind] = {
    "block-fisher": "fisher",
    "block-taylor": "taylor",
    "block-activation": "activation",
}
"""Every such criterion by its name → how it scores: see :class:`~efface.sparsify.BlockScore`."""


def block_scores(
    name: str, trained: TrainedModel, positions: Tensor, fit: Fit
) -> dict[str, Tensor]:
    """What every filter of a model carries of some records; the higher, the rather it is kept.

    With ``a`` the activations of a filter (behind its batch norm) and ``g = Σ a·∂l/∂a`` of one
    record: ``½ mean g²`` for ``block-fisher``, ``mean |g|`` for ``block-taylor``, ``mean a²`` for
    ``block-activation``; ``l`` is the margin of the label, which a sure network does not flatten.

    Args:
        name: One of :data:`BLOCK_CRITERIA`.
        trained: Left as it is.
        positions: The records to look at: two at least.
        fit: Supplies records, device and randomness; images are counted as ``score``.

    Returns:
        Group name → float64 ``[size]``, on the CPU, for every group of filters of the network.

    Raises:
        MethodError: If there are fewer than two records, or the scores say nothing.

    Example:
        >>> import torch, efface
        >>> from efface.fitting import Fit
        >>> x, y = torch.rand(8, 1, 8, 8), torch.arange(8) % 2
        >>> task = efface.Task(lambda: efface.networks.DigitsCNN(2), (x, y), (x, y))
        >>> model = efface.TrainedModel(task, task.network())
        >>> found = block_scores("block-taylor", model, torch.arange(8), Fit(task))
        >>> {name: len(scores) for name, scores in found.items()}
        {'conv1.weight': 16, 'conv2.weight': 24, 'conv3.weight': 24}
    """
    if len(positions) < 2:
        raise MethodError(
            f"the criterion {name!r} needs data: two records at least; give some, or take l2."
        )
    network, score = trained.network, BlockScore(BLOCK_CRITERIA[name])
    blocks = find_blocks(trained.task, network)
    try:  # two halves, since it compares; here both are wanted
        found = carried(network, blocks, score, positions[::2], positions[1::2], fit.at("blocks"))
    except MethodError as error:
        why = re.sub(r" on D_[fr]", " on the records shown", str(error)).partition("; ")[0]
        raise MethodError(f"criterion {name!r}: {why}; take criterion=l2.") from error
    parts = torch.split(found.values.mean(0), [group.size for group in blocks.groups])
    return {group.name: part for group, part in zip(blocks.groups, parts, strict=True)}
