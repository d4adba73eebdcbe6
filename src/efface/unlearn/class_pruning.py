"""Class-discriminative pruning: drop the filters that stand for a class and for few others."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from efface.data import chunks
from efface.errors import MethodError, listed
from efface.fitting import Fit
from efface.placement import placed, preserved
from efface.sparsify.blocks import Blocks, Gate, draw, dropped, find_blocks
from efface.sparsify.blocks.flow import no_fast_path
from efface.sparsify.blocks.scoring import channel_of
from efface.sparsify.units import refreshed_statistics
from efface.task import Split
from efface.trained import TrainedModel
from efface.unlearn.base import Unlearner
from efface.unlearn.dfmu import WRONG_TOOL
from efface.unlearn.finetune import FineTune

Activation = Literal["relu", "square"]
Idf = Literal["paper", "code"]
AMOUNT = 0.1
"""Share of the filters that is pruned where nothing else is said."""

# -- documents, and how much each filter is active in them ---------------------------------------


def documents(split: Split) -> tuple[list[Tensor], int]:
    """The documents of a request: those to forget first, then the classes of D_r.

    A class that D_r has nothing of is a document; what else D_f holds (a part of one class, or of
    several) is one more.

    Args:
        split: The request.

    Returns:
        Positions of each document, and how many of the documents are to be forgotten.
    """
    labels = split.task.records.targets
    mine, rest = labels[split.forget], labels[split.retain]
    shared = torch.isin(mine, rest)
    parts = [split.forget[mine == label] for label in torch.unique(mine[~shared])]
    parts += [split.forget[shared]] if bool(shared.any()) else []
    return [*parts, *(split.retain[rest == label] for label in torch.unique(rest))], len(parts)


def activity(
    network: nn.Module, blocks: Blocks, parts: Sequence[Tensor], kind: Activation, fit: Fit
) -> Tensor:
    """How active every filter is in every document, from one forward pass over all of them.

    Taken where the filter's channel leaves its batch norm (or its layer, where none follows); a
    filter that a network's sums make of several channels has their mean. In evaluation mode,
    un-augmented, in fp32.

    Args:
        network: Left as it is.
        blocks: Its filters.
        parts: Positions of each document.
        kind: What is averaged over positions and records: max(a, 0), or a².
        fit: Supplies records and device; images are counted as ``score``.

    Returns:
        float64 ``[documents, filters]``, on the CPU.

    Raises:
        MethodError: If a value is NaN or infinite, or all are zero.
    """
    where = torch.cat(list(parts))
    part_of = torch.full((len(fit.task.records),), -1)
    for i, positions in enumerate(parts):
        part_of[positions] = i
    total = torch.zeros(len(parts), len(blocks), dtype=torch.float64)
    plan = chunks(where, fit.task.fit.batch_size)
    with (
        preserved(network),
        placed(network, fit.device, train=False),
        no_fast_path(),
        torch.no_grad(),
    ):
        network.eval()
        with _heard(network, blocks, kind) as heard:
            for done, batch in enumerate(fit.task.records.batches(plan, fit.device), 1):
                fit.logits(network, batch)
                total.index_add_(0, part_of[batch.positions.cpu()], _by_block(heard, blocks))
                heard.clear()
                if fit.progress:
                    fit.progress("score", done, len(plan))
    fit.meter.images["score"] = fit.meter.images.get("score", 0) + len(where)
    found = total / torch.tensor([[len(positions)] for positions in parts])
    if not bool(torch.isfinite(found).all()):
        raise MethodError(
            "the activations of filters are not finite; look for NaN in the network's weights and "
            "in the data."
        )
    if not bool((found > 0).any()):
        raise MethodError(
            "no filter is active on any of the scored records, so that none stands for a class; "
            "take activation=square, or another method."
        )
    return found


@contextmanager
def _heard(
    network: nn.Module, blocks: Blocks, kind: Activation
) -> Iterator[list[tuple[Gate, Tensor]]]:
    """What arrives at the gates, for as long as it lasts: gate and size ``[records, channels]``."""
    heard: list[tuple[Gate, Tensor]] = []

    def hook(gate: Gate) -> Any:
        return lambda module, given, out: heard.append((gate, _size(out, channel_of(module), kind)))

    handles = [network.get_submodule(g.module).register_forward_hook(hook(g)) for g in blocks.gates]
    try:
        yield heard
    finally:
        for handle in handles:
            handle.remove()


def _size(x: Tensor, channel: int, kind: Activation) -> Tensor:
    """Mean size over positions: ``[records, channels]``."""
    x = x.float()
    size = x.relu() if kind == "relu" else x.square()
    if size.ndim == 2:
        return size
    return size.flatten(2).mean(2) if channel == 1 else size.flatten(1, -2).mean(1)


def _by_block(heard: Sequence[tuple[Gate, Tensor]], blocks: Blocks) -> Tensor:
    """The mean over a filter's channels: float64 ``[records, filters]``, on the CPU."""
    total = torch.zeros(len(heard[0][1]), len(blocks), dtype=torch.float64)
    width = torch.zeros(len(blocks), dtype=torch.float64)
    for gate, size in heard:
        mine = gate.owner >= 0
        owner = gate.owner[mine]
        total.index_add_(1, owner, size[:, mine.to(size.device)].double().cpu())
        width.index_add_(0, owner, torch.ones(len(owner), dtype=torch.float64))
    return total / width.clamp(min=1)


# -- which filters stand for a document ----------------------------------------------------------


def tf_idf(active: Tensor, document: int, idf: Idf = "paper") -> Tensor:
    """TF·IDF of the filters of one layer (the words) for one document.

    Args:
        active: How active each filter is in each document ``[documents, filters]``.
        document: For which.
        idf: ``paper``: log((1 + C) / (1 + n)) with n the documents in which the filter is at least
            as active as the layer's mean filter; ``code``: log(C / (1 + n)) with n the documents
            in which it is at least as active as on average over documents.

    Returns:
        ``[filters]``; 0 where nothing of the layer is active in the document.

    >>> active = torch.tensor([[6.0, 2.0, 0.0], [0.0, 4.0, 0.0]])
    >>> [round(v, 3) for v in tf_idf(active, 0).tolist()]
    [0.304, 0.101, 0.0]
    """
    count = len(active)
    term = active[document] / active[document].sum().clamp(min=1e-300)
    common = (active >= active.mean(1 if idf == "paper" else 0, keepdim=True)).sum(0)
    above = 1 + count if idf == "paper" else count
    return term * (above / (1 + common).to(active.dtype)).log()


def select(
    scores: Tensor, alive: Tensor, blocks: Blocks, amount: float, scope: str
) -> tuple[Tensor, list[str]]:
    """The filters with the highest scores; at least one that is alive stays in every layer.

    Args:
        scores: ``[documents to forget, filters]``: a share of the filters goes for each of them.
        alive: Filters that are active at all, bool ``[filters]``.
        blocks: Of the network.
        amount: The share.
        scope: Of each ``layer``'s filters, or of all (``global``).

    Returns:
        bool ``[filters]``, and layers in which all were selected, and the one that scored least
        stays.
    """
    rooms = [(blocks.layer == i).nonzero().flatten() for i in range(len(blocks.layers))]
    pools = rooms if scope == "layer" else [torch.arange(len(blocks))]
    chosen = torch.zeros(len(blocks), dtype=torch.bool)
    for row in scores:
        for pool in pools:
            rank = row[pool].sort(descending=True, stable=True).indices
            chosen[pool[rank[: max(1, round(amount * len(pool)))]]] = True
    chosen &= alive & (scores > 0).any(0)
    kept = []
    for name, room in zip(blocks.layers, rooms, strict=True):
        mine = room[alive[room]]
        if len(mine) and bool(chosen[mine].all()):
            chosen[mine[scores[:, mine].amax(0).argmin()]] = False
            kept += [name] if len(room) > 1 else []
    return chosen, kept


@dataclass(frozen=True)
class ClassPruning:
    """Drop the filters that stand for a class and for few others, then fine-tune on D_r.

    Class-discriminative pruning of Wang et al. 2022. Filters are words, classes are documents: TF
    is a filter's activation, averaged over positions and records of the class, as a share of its
    layer's; IDF falls with the number of classes in which the filter is prominent. Where TF·IDF for
    the forgotten class is highest, the filter is pruned, whole: a mask holds it at zero from then
    on. Made for federated learning, where only these averages leave a client; here they are taken
    in one place.

    Random records have no words in common; they are refused without ``force``.

    Args:
        amount: Share of the filters that is pruned, in (0, 1), at least one of each layer; for
            each of several forgotten classes. ``None``: the task's default, else 0.1.
        scope: Share of every ``layer``'s filters, or of all of them (``global``), where narrow
            layers lose most: TF is a share of the layer.
        idf: When a class holds a word: ``paper`` or ``code`` (the released one); see
            :func:`tf_idf`.
        activation: What is averaged: max(a, 0) (``relu``), as in the paper, or a² (``square``),
            for networks with other non-linearities.
        sample: Records of each class that are scored.
        inner: The recovery: any unlearner.
        force: Go on with random records.
    """

    name: ClassVar[str] = "class-pruning"
    title: ClassVar[str] = "Class-discriminative pruning (TF-IDF)"
    paper: ClassVar[str] = "Wang et al. 2022"
    needs: ClassVar[frozenset[str]] = frozenset({"forget", "retain"})

    amount: float | None = None
    scope: Literal["layer", "global"] = "layer"
    idf: Idf = "paper"
    activation: Activation = "relu"
    sample: int = 32
    inner: Unlearner = field(default_factory=lambda: FineTune(epochs=1))
    force: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.share < 1:
            raise MethodError(f"{self.name}: amount must lie in (0, 1), not {self.amount!r}.")
        if self.sample < 1:
            raise MethodError(f"{self.name}: sample must be 1 or more, not {self.sample!r}.")

    @property
    def share(self) -> float:
        """The amount, filled in."""
        return AMOUNT if self.amount is None else self.amount

    def check(self, trained: TrainedModel, split: Split) -> None:
        """Raise for random records."""
        if split.selector.get("kind") == "random" and not self.force:
            raise MethodError(
                f"{self.name} prunes what stands for a class or another trait, and random records "
                f"have none in common: {WRONG_TOOL}; go on all the same with --force."
            )

    def __call__(self, trained: TrainedModel, split: Split, fit: Fit) -> None:
        """Edit ``trained`` in place."""
        blocks = find_blocks(trained.task, trained.network, "filter")
        whole, forgotten = documents(split)
        parts = [draw(fit, part, self.sample, f"scored/{i}") for i, part in enumerate(whole)]
        active = activity(trained.network, blocks, parts, self.activation, fit)
        alive = (active > 0).any(0)
        scores = self._scores(active, alive, forgotten, blocks)
        chosen, kept = select(scores, alive, blocks, self.share, self.scope)
        self._note(blocks, chosen, kept, parts, fit)
        trained.set_mask(dropped(blocks, chosen, trained.network, trained.mask))
        if chosen.any():
            refreshed_statistics(trained, split.retain, fit)
        self.inner(trained, split, fit.at("inner"))

    def _scores(self, active: Tensor, alive: Tensor, forgotten: int, blocks: Blocks) -> Tensor:
        """TF·IDF, layer by layer: ``[documents to forget, filters]``."""
        scores = active.new_zeros(forgotten, len(blocks))
        for i in range(len(blocks.layers)):
            # a filter that was pruned before is no word: it would lower the layer's mean
            room = (blocks.layer == i) & alive
            for document in range(forgotten):
                scores[document, room] = tf_idf(active[:, room], document, self.idf)
        return scores

    def _note(
        self, blocks: Blocks, chosen: Tensor, kept: list[str], parts: Sequence[Tensor], fit: Fit
    ) -> None:
        """Leave in the lineage what was pruned, and say where a layer would have gone."""
        layers = [
            {"layer": name, "filters": int(of.sum()), "pruned": int((chosen & of).sum())}
            for name, of in ((n, blocks.layer == i) for i, n in enumerate(blocks.layers))
        ]
        fit.meter.facts["class_pruning"] = {
            "amount": self.share,
            "filters": len(blocks),
            "pruned": int(chosen.sum()),
            "documents": [len(part) for part in parts],
            "layers": layers,
            "kept": kept,
        }
        if kept:
            warnings.warn(
                f"{self.name} selected every filter of {listed(kept)}; the one with the lowest "
                "score stays: a smaller amount takes fewer.",
                stacklevel=3,
            )
