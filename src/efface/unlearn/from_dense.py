"""Forget in the dense weights that a sparse model came from, and prune again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor

from efface.fitting import Fit
from efface.mask import Mask
from efface.sparsify.units import Units, refreshed_statistics
from efface.task import Split
from efface.trained import TrainedModel
from efface.unlearn.base import Unlearner
from efface.unlearn.finetune import FineTune
from efface.unlearn.unprune import moved, prune_again, remaker


@dataclass(frozen=True)
class FromDense:
    """Put the dense weights back, forget there, prune again to the old density.

    For models that were pruned with ``--keep-dense``. The criterion that made the mask scores the
    dense weights as the inner method has left them, so that the mask moves as far as they did:

    - with :class:`~efface.unlearn.CheckpointDifference` inside, towards the mask that the retained
      data alone would have made;
    - with any other unlearner inside it is the plain competitor of un-pruning;
    - with ``l1-sparse`` inside and ``weights="dense"``, followed by fine-tuning in a chain, it is
      what the code of Jia et al. did before its method changed to l1-sparse.

    A brief fine-tune afterwards recovers the accuracy that pruning costs: put both in a chain.

    Args:
        inner: Any unlearner; it runs on the dense weights, without a mask.
        weights: What the new mask is laid on. ``moved``: the sparse weights, moved by as much as
            the dense ones were, with the new dense ones where the old mask had dropped them;
            ``new``: the new dense weights; ``sparse``: as ``moved``, but not moved; ``dense``: the
            old dense weights.
        granularity: As many as before in every ``layer``, or altogether (``global``).
        criterion: As for :class:`~efface.unlearn.Unprune`.

    Example:
        ``Chain(FromDense(CheckpointDifference()), FineTune(epochs=1))``
    """

    name: ClassVar[str] = "from-dense"
    title: ClassVar[str] = "Forget in the dense weights, prune again"
    paper: ClassVar[str] = "Jia et al. 2023 (released code, early version)"
    needs: ClassVar[frozenset[str]] = frozenset({"retain", "mask", "dense"})

    inner: Unlearner = field(default_factory=FineTune)
    weights: Literal["moved", "new", "sparse", "dense"] = "moved"
    granularity: Literal["layer", "global"] = "layer"
    criterion: str | None = None

    def __call__(self, trained: TrainedModel, split: Split, fit: Fit) -> None:
        """Edit ``trained`` in place."""
        assert trained.dense is not None
        criterion, old = remaker(self.criterion, trained), Units.of(trained)
        sparse = {n: t.detach().clone() for n, t in trained.network.state_dict().items()}
        mask = trained.mask
        assert mask is not None
        dense = trained.dense
        trained.set_mask(None)
        trained.network.load_state_dict(dict(dense))
        self.inner(trained, split, fit.at("inner"))
        new = {n: t.detach().cpu().clone() for n, t in trained.network.state_dict().items()}
        granularity = "layer" if old.groups is not None else self.granularity
        prune_again(trained, old, criterion, granularity, split, fit)
        if self.weights != "new":
            laid = _laid_on(self.weights, sparse, dense, new, mask)
            trained.network.load_state_dict(laid)
            trained.set_mask(trained.mask)
        refreshed_statistics(trained, split.retain, fit)  # those of the dense weights do not fit
        trained.dense = new
        fit.meter.facts["topology"] = moved(old, trained)


def _laid_on(
    kind: str,
    sparse: Mapping[str, Tensor],
    dense: Mapping[str, Tensor],
    new: Mapping[str, Tensor],
    old: Mask,
) -> dict[str, Tensor]:
    """The state dict that the new mask is laid on."""
    if kind == "dense":
        return dict(dense)
    laid = {}
    for name, here in sparse.items():
        value = here.cpu()
        if kind == "moved" and value.is_floating_point():
            value = value + (new[name] - dense[name].cpu())
        laid[name] = torch.where(old[name], value, new[name]) if name in old else value
    return laid
