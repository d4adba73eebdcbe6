"""Which blocks carry D_f and not the rest, and how far they are turned down."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from efface.errors import MethodError
from efface.sparsify.blocks.finding import Blocks
from efface.sparsify.blocks.scoring import Carried

FLOOR = 1e-3
"""What is added below the ratio, as a share of the layer's mean: dead blocks do not win."""
TINY = 1e-300
BEYOND = 3.0
"""How many times its mean margin D_f should lose."""
DRAWS = 200
"""Random re-assignments of a permutation test."""


@dataclass(frozen=True)
class BlockChoice:
    """Which blocks are turned down.

    Args:
        by: ``ratio``: I_f/I_r above ``amount``; ``difference``: I_f − I_r, over the mean of I_r in
            the layer, above it; ``budget``: that share of all blocks, those with the largest ratio.
        amount: ``None``: 1, or 0.05 for a budget.
        cap: At most this share of a layer's blocks, in (0, 1], but one at least; of a layer with
            several one always stays, and of the network. What a cap leaves of a budget goes to no
            other layer.
    """

    name = "block-choice"

    by: Literal["ratio", "difference", "budget"] = "ratio"
    amount: float | None = None
    cap: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.cap <= 1:
            raise MethodError(f"select.cap must lie in (0, 1], not {self.cap}.")
        amount = self.limit
        if not 0 <= amount < math.inf or (self.by == "budget" and not 0 < amount <= 1):
            rule = "in (0, 1]" if self.by == "budget" else "0 or more"
            raise MethodError(f"select.amount must be {rule} for by={self.by}, not {amount}.")

    @property
    def limit(self) -> float:
        """The amount, filled in."""
        if self.amount is None:
            return 0.05 if self.by == "budget" else 1.0
        return self.amount


@dataclass(frozen=True, eq=False)
class Weighed:
    """How much more blocks matter to D_f than to D_r.

    Args:
        ratio: I_f / (I_r + ε), float64 ``[blocks]``.
        difference: (I_f − I_r) over the layer's mean of I_r.
        alive: Blocks that carry anything at all, bool ``[blocks]``; ``None``: all.
    """

    ratio: Tensor
    difference: Tensor
    alive: Tensor | None = None


def weigh(found: Carried, blocks: Blocks, preserve: float = 0.0) -> Weighed:
    """Compare what blocks carry of D_f and of D_r, within each layer.

    Layers differ by orders of magnitude in the size of their scores, so that only ratios can be
    compared across layers.

    Args:
        found: What was scored.
        blocks: Of the network.
        preserve: Weight of E[a²] on D_r in what D_r needs.
    """
    mine, rest = found.means()
    if preserve:
        assert found.energy is not None
        energy, level = found.energy[~found.forget].mean(0), layer_mean(rest, blocks)
        known = energy / layer_mean(energy, blocks).clamp(min=TINY)
        rest = ((1 - preserve) * rest / level.clamp(min=TINY) + preserve * known) * level
    level = layer_mean(rest, blocks)
    difference = torch.where(mine > rest, math.inf, 0.0).to(mine)
    difference = torch.where(level > 0, (mine - rest) / level, difference)
    return Weighed(_over(mine, rest + FLOOR * level), difference, mine + rest > 0)


def _over(above: Tensor, below: Tensor) -> Tensor:
    """A ratio; 0 where nothing is above, infinite where something is, and nothing below."""
    return torch.where(above > 0, above / below, torch.zeros_like(above))


def layer_mean(values: Tensor, blocks: Blocks) -> Tensor:
    """For every block the mean over its layer: ``[…, blocks]``."""
    layer = blocks.layer
    count = torch.bincount(layer, minlength=len(blocks.layers)).to(values.dtype)
    total = values.new_zeros(*values.shape[:-1], len(blocks.layers))
    total.index_add_(-1, layer, values)
    return (total / count)[..., layer]


@dataclass(frozen=True, eq=False)
class Chosen:
    """The blocks that are turned down.

    Args:
        blocks: bool ``[blocks]``.
        capped: Layers of which more were selected than the cap allows.
        kept: Layers of which all were selected: the one that carries least of D_f stays.
    """

    blocks: Tensor
    capped: tuple[str, ...] = ()
    kept: tuple[str, ...] = ()


def choose(weighed: Weighed, blocks: Blocks, choice: BlockChoice) -> Chosen:
    """Select blocks; ties go to the block that comes first.

    Args:
        weighed: Of :func:`weigh`.
        blocks: Of the network.
        choice: The rule.
    """
    value = weighed.difference if choice.by == "difference" else weighed.ratio
    rank = value.sort(descending=True, stable=True).indices
    if choice.by == "budget":
        wanted = torch.zeros(len(blocks), dtype=torch.bool)
        wanted[rank[: max(1, round(choice.limit * len(blocks)))]] = True
    else:
        wanted = value > choice.limit
    capped, kept = [], []
    alive = torch.ones_like(wanted) if weighed.alive is None else weighed.alive
    for i, name in enumerate(blocks.layers):
        mine = rank[blocks.layer[rank] == i]
        most = max(1, math.floor(choice.cap * len(mine) + 1e-9))
        if int(wanted[mine].sum()) > most:
            capped.append(name)
            wanted[mine[most:]] = False
        living = mine[alive[mine]]
        if len(mine) > 1 and len(living) and bool(wanted[living].all()):
            kept.append(name)
            wanted[living[-1]] = False
    if bool(wanted[alive].all()):
        last = rank[alive[rank]][-1]
        wanted[last] = False
        kept.append(blocks.names[int(last)])
    return Chosen(wanted, tuple(capped), tuple(kept))


def factors(weighed: Weighed, chosen: Tensor, strength: float) -> Tensor:
    """β = min(1, λ/ratio) of the chosen blocks, 1 of all others: float64 ``[blocks]``.

    >>> w = Weighed(torch.tensor([4.0, 0.5, 8.0]), torch.zeros(3))
    >>> factors(w, torch.tensor([True, True, False]), 1.0).tolist()
    [0.25, 1.0, 1.0]
    """
    limit = torch.full_like(weighed.ratio, strength)
    down = torch.where(weighed.ratio > limit, limit / weighed.ratio, 1.0)
    down = torch.where(limit == 0, 0.0, down)  # what is dead, too: 0 / 0
    return torch.where(chosen, down, 1.0)


def strength_for(found: Carried, weighed: Weighed, chosen: Tensor) -> float:
    """The gentlest λ at which the mean margin on D_f should lose three times what it is.

    Out of 1, 0.9, …, 0.1, 0.

    Judged by the slopes that the score rests on, to first order: a network that is sure of D_f has
    to be turned down harder than one that is not. Margins lose a third to a half of what their
    slope promises, which is why it is three times.

    Returns:
        λ in [0, 1]; 0 where not even that would do; 1 where no margins were scored.
    """
    for tenths in range(10, 0, -1):
        lost = reach(found, factors(weighed, chosen, tenths / 10))
        if lost is None or lost >= BEYOND:
            return tenths / 10
    return 0.0


def reach(found: Carried, beta: Tensor) -> float | None:
    """How many times its mean margin D_f loses under some factors, to first order.

    Args:
        found: What was scored.
        beta: Factors ``[blocks]``.

    Returns:
        None where no margins were scored, or D_f has none to lose.
    """
    if found.drop is None or found.margin is None or found.margin <= 0:
        return None
    return float(((1 - beta) * found.drop).sum()) / found.margin


# -- can blocks tell D_f from the rest? -----------------------------------------------------------


def contrast(found: Carried, blocks: Blocks, generator: torch.Generator) -> dict[str, Any]:
    """Whether blocks tell D_f from D_r better than they tell random records apart.

    The mean over blocks of the size of ln(I_f / I_r), and the same for random re-assignments of the
    scored records (a permutation test). A thousandth of the layer's mean is added to both.

    Args:
        found: What was scored.
        blocks: Of the network.
        generator: Draws the re-assignments.

    Returns:
        ``contrast``, ``chance`` (its mean and 95 % point under re-assignment), ``p``, ``draws``.
    """
    values, n = found.values, len(found.forget)
    parts = torch.zeros(DRAWS + 1, n, dtype=values.dtype)
    parts[0] = found.forget.to(values.dtype)
    for row in parts[1:]:
        row[torch.randperm(n, generator=generator)[: int(found.forget.sum())]] = 1
    own = parts.sum(1, keepdim=True)
    inside = parts @ values
    mine, rest = inside / own, (values.sum(0) - inside) / (n - own)
    alive = values.sum(0) > 0
    floor = FLOOR * layer_mean(values.mean(0), blocks)
    apart = ((mine + floor) / (rest + floor))[:, alive].log().abs().mean(1)
    chance = apart[1:].sort().values
    above = int((chance >= apart[0]).sum())
    return {
        "contrast": float(apart[0]),
        "chance": [float(chance.mean()), float(chance[math.ceil(0.95 * DRAWS) - 1])],
        "p": (1 + above) / (1 + DRAWS),
        "draws": DRAWS,
    }


def described(blocks: Blocks, weighed: Weighed, chosen: Chosen, beta: Tensor) -> dict[str, Any]:
    """What was chosen, for the lineage: counts, ratios as a histogram, factors; JSON."""
    logs = weighed.ratio.clamp(1e-3, 1e3).log10()
    edges = torch.linspace(-3, 3, 49, dtype=torch.float64)
    counts = torch.histogram(logs, edges).hist
    of = [blocks.layer == i for i in range(len(blocks.layers))]
    down = beta[chosen.blocks]
    return {
        "granularity": blocks.granularity,
        "blocks": len(blocks),
        "selected": int(chosen.blocks.sum()),
        "factor": float(down.mean()) if len(down) else None,
        "ratios": {"edges": _rounded(edges), "counts": [int(c) for c in counts]},
        "layers": [
            {"layer": name, "blocks": int(o.sum()), "selected": int((chosen.blocks & o).sum())}
            for name, o in zip(blocks.layers, of, strict=True)
        ],
        "capped": list(chosen.capped),
        "kept": list(chosen.kept),
    }


def _rounded(values: Tensor) -> Sequence[float]:
    return [round(float(v), 4) for v in values]
