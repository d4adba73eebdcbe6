"""What blocks carry: one forward and one backward pass over a few records of D_f and of D_r."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from efface.data import Batch, chunks, queue
from efface.errors import MethodError, listed
from efface.fitting import Fit
from efface.placement import placed, preserved
from efface.sparsify.blocks.finding import Blocks, Gate
from efface.sparsify.blocks.flow import no_fast_path

Kind = Literal["fisher", "taylor", "activation"]
Signal = Literal["margin", "loss", "sampled"]

PIECE = 1 << 20
"""Products that are held at a time: they stay in the cache, and no activation is held twice."""


# -- gates ----------------------------------------------------------------------------------------


class _Open(torch.autograd.Function):
    """An open gate: passes its input on; the gradient of its factors (all 1) is a·∂l/∂a, summed.

    Multiplying by ones would cost a copy of every activation, and gain nothing.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, factors: Tensor, channel: int, copied: bool) -> Tensor:
        """``x`` as it is; ``factors`` are ``[records, channels]``."""
        ctx.save_for_backward(x)
        ctx.channel = channel
        return x.clone() if copied else x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """The gradient as it comes, and that of the factors."""
        (x,), (grad,) = ctx.saved_tensors, grads
        return grad, per_channel(x, grad, ctx.channel), None, None


def per_channel(a: Tensor, b: Tensor, channel: int) -> Tensor:
    """Σ over positions of a·b: ``[records, channels]``, in float32.

    Args:
        a: Activations; records come first.
        b: The same shape.
        channel: Dimension of the channels: 1, or the last (−1).

    >>> per_channel(torch.ones(2, 3, 4, 4), torch.ones(2, 3, 4, 4), 1)[0].tolist()
    [16.0, 16.0, 16.0]
    """
    if a.ndim == 2:
        return (a * b).float()
    first, last, dim = (2, -1, 2) if channel == 1 else (1, -2, 1)
    few = max(1, PIECE // max(1, a[:1].numel()))  # records at a time
    pieces = zip(torch.split(a, few), torch.split(b, few), strict=True)
    found = [(x * y).flatten(first, last).sum(dim, dtype=torch.float32) for x, y in pieces]
    return torch.cat(found)


def channel_of(module: nn.Module) -> int:
    """Which dimension of a module's input and output counts channels."""
    return -1 if isinstance(module, nn.Linear | nn.LayerNorm | nn.MultiheadAttention) else 1


class _Taps:
    """Gates in a network, while it sees one batch after the other.

    Args:
        network: Its forward pass goes through the gates.
        blocks: Its blocks.
        sizes: Whether the size of the activations is wanted.
    """

    def __init__(self, network: nn.Module, blocks: Blocks, sizes: bool) -> None:
        self.network, self.gates, self.sizes, self.count = network, blocks.gates, sizes, len(blocks)
        self.factors: list[Tensor | None] = [None] * len(self.gates)
        self.energy: list[Tensor | None] = [None] * len(self.gates)
        self.slopes = True
        self.called = [False] * len(self.gates)
        self.records = 0

    def begin(self, records: int) -> None:
        """Before a batch of so many records."""
        self.records, self.called = records, [False] * len(self.gates)

    def check(self) -> None:
        """Raise where a gate was not passed: its blocks would go without a score.

        Raises:
            MethodError: Naming it.
        """
        missed = [g.module for g, there in zip(self.gates, self.called, strict=True) if not there]
        if missed:
            raise MethodError(
                f"{listed(missed, 3)} had no part in a forward pass, so that its blocks cannot be "
                "scored; take another score.granularity, or another method."
            )

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Hooks in place, for as long as it lasts."""
        handles = []
        for i, gate in enumerate(self.gates):
            module = self.network.get_submodule(gate.module)
            if gate.side == "in":
                handles.append(module.register_forward_pre_hook(self._before(i, gate)))
            else:
                handles.append(module.register_forward_hook(self._after(i, gate)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _before(self, i: int, gate: Gate) -> Callable[..., Any]:
        return lambda module, given: (self._through(i, gate, module, given[0]), *given[1:])

    def _after(self, i: int, gate: Gate) -> Callable[..., Any]:
        def after(module: nn.Module, given: Any, out: Any) -> Any:
            if isinstance(out, tuple):  # of an attention that gives its weights, too
                return (self._through(i, gate, module, out[0]), *out[1:])
            return self._through(i, gate, module, out)

        return after

    def _through(self, i: int, gate: Gate, module: nn.Module, x: Tensor) -> Tensor:
        channel = channel_of(module)
        if self.called[i]:
            raise MethodError(
                f"{gate.module} is called twice in a forward pass, so that its blocks cannot be "
                "told apart; take another method."
            )
        if len(x) != self.records:
            raise MethodError(
                f"{gate.module} sees {len(x)} rows of {self.records} records, so that its blocks "
                "cannot be scored record by record; take another method."
            )
        self.called[i] = True
        if self.sizes:
            self.energy[i] = _mean_square(x.detach(), channel)
        if not self.slopes:
            return x
        self.factors[i] = torch.ones(len(x), len(gate.owner), device=x.device, requires_grad=True)
        opened = _Open.apply(x, self.factors[i], channel, gate.copied)  # type: ignore[no-untyped-call]
        return cast("Tensor", opened)

    def pull(self, value: Tensor) -> Tensor:
        """The gradient of a sum over records for every block's factor: ``[records, blocks]``."""
        there = [f for f in self.factors if f is not None]
        found = torch.autograd.grad(value, there, materialize_grads=True)
        total = found[0].new_zeros(len(found[0]), self.count)
        for gate, slope in zip(self.gates, found, strict=True):
            _add(total, gate, slope)
        self.factors = [None] * len(self.gates)
        return total

    def squares(self) -> Tensor:
        """Mean squared activation of every block: ``[records, blocks]``."""
        there = [(g, e) for g, e in zip(self.gates, self.energy, strict=True) if e is not None]
        total = there[0][1].new_zeros(len(there[0][1]), self.count)
        width = total.new_zeros(self.count)
        for gate, energy in there:
            _add(total, gate, energy)
            _add(width[None], gate, torch.ones_like(energy[:1]))
        return total / width.clamp(min=1)


def _add(total: Tensor, gate: Gate, values: Tensor) -> None:
    """Add values of channels ``[records, channels]`` to their blocks ``[records, blocks]``."""
    owner, first = gate.owner, int(gate.owner[0])
    if first >= 0 and torch.equal(owner, torch.arange(first, first + len(owner))):
        total[:, first : first + len(owner)] += values  # a block for every channel, in order
        return
    mine = owner >= 0
    if not bool(mine.all()):
        owner, values = owner[mine], values[:, mine.to(values.device)]
    total.index_add_(1, owner.to(total.device), values)


def _mean_square(x: Tensor, channel: int) -> Tensor:
    summed = per_channel(x, x, channel)
    return summed / (x[0].numel() // summed.shape[1])


# -- one pass -------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Carried:
    """What every block carries of every scored record.

    Args:
        values: ``[records, blocks]``, float64, on the CPU: the slope of the signal along the
            block's factor, squared and halved (``fisher``) or absolute (``taylor``), or the mean
            squared activation (``activation``).
        forget: Which of the records are of D_f, bool ``[records]``.
        energy: Mean squared activation ``[records, blocks]``, where it was asked for.
        drop: What the mean margin on D_f loses, to first order, with every block by itself switched
            off: float64 ``[blocks]``; only with ``signal=margin``.
        margin: The mean margin on D_f; only then, too.
    """

    values: Tensor
    forget: Tensor
    energy: Tensor | None = None
    drop: Tensor | None = None
    margin: float | None = None

    def means(self) -> tuple[Tensor, Tensor]:
        """Importance for D_f and for D_r: ``[blocks]`` each."""
        return self.values[self.forget].mean(0), self.values[~self.forget].mean(0)


@dataclass(frozen=True)
class BlockScore:
    """How blocks are scored.

    Args:
        kind: ``fisher``: ½ E[g²], ``taylor``: E[|g|], with g = Σ a·∂l/∂a over the block's
            activations a, squared or taken absolutely record by record; ``activation``: E[a²].
        granularity: What a block is; see :func:`efface.sparsify.blocks.find_blocks`.
        signal: Whose slope: of the label's ``margin`` z_y − log Σ_{c≠y} exp z_c, which does not
            saturate; of the ``loss`` on the label (a task's own must be a mean over records); or of
            the loss on a label ``sampled`` from the model's own answer.
        sample: Records of D_f, and as many of D_r, that are scored.
        preserve: Weight, in [0, 1], of E[a²] on D_r in what D_r needs, beside the score itself;
            each is divided by its mean in the layer first.
    """

    name = "block-score"

    kind: Kind = "fisher"
    granularity: Literal["filter", "branch", "layer"] = "filter"
    signal: Signal = "margin"
    sample: int = 256
    preserve: float = 0.0

    def __post_init__(self) -> None:
        if self.sample < 2:
            raise MethodError(f"score.sample must be 2 records or more, not {self.sample}.")
        if not 0 <= self.preserve <= 1:
            raise MethodError(f"score.preserve must lie in [0, 1], not {self.preserve}.")


def draw(fit: Fit, positions: Tensor, count: int, purpose: str) -> Tensor:
    """Up to so many records, with classes in proportion.

    Args:
        fit: Supplies seed, path and labels.
        positions: What to draw from.
        count: How many at most.
        purpose: Names the draw.

    Returns:
        Positions; every beginning holds the classes in proportion.
    """
    total = len(fit.task.records)
    luck = torch.randperm(total, generator=fit.generator(purpose))[positions]
    return positions[queue(fit.task.records.targets[positions], luck)[:count]]


def carried(
    network: nn.Module, blocks: Blocks, score: BlockScore, forget: Tensor, retain: Tensor, fit: Fit
) -> Carried:
    """Score every block on some records: one forward and one backward pass over them.

    In evaluation mode, un-augmented, in fp32, D_f and D_r in the same batches.

    Args:
        network: Left as it is.
        blocks: Of the network.
        score: What to take.
        forget: Positions of D_f.
        retain: Positions of D_r.
        fit: Supplies records, loss, device and randomness; images are counted as ``score``.

    Raises:
        MethodError: If a score is NaN, infinite, or zero everywhere.
    """
    both = torch.cat([forget, retain])
    mix = torch.randperm(len(both), generator=fit.generator("mixed"))
    mixed, of = both[mix], mix < len(forget)
    taps = _Taps(network, blocks, score.kind == "activation" or score.preserve > 0)
    taps.slopes = score.kind != "activation"
    labels = fit.generator("labels")
    slopes, energy, margins = [], [], []
    with preserved(network), placed(network, fit.device, train=False), _frozen(network):
        network.eval()
        with taps.attached(), no_fast_path(), torch.set_grad_enabled(taps.slopes):
            plan = chunks(mixed, fit.task.fit.batch_size)
            for done, batch in enumerate(fit.task.records.batches(plan, fit.device), 1):
                taps.begin(len(batch.targets))
                value = _signal(fit, network, batch, score.signal, labels)
                taps.check()
                if taps.slopes:
                    slopes.append(taps.pull(value.sum()).cpu())
                    margins.append(value.detach().cpu().reshape(-1))
                if taps.sizes:
                    energy.append(taps.squares().double().cpu())
                if fit.progress:
                    fit.progress("score", done, len(plan))
    fit.meter.images["score"] = fit.meter.images.get("score", 0) + len(mixed)
    sizes = torch.cat(energy) if energy else None
    drop = margin = None
    values = torch.cat(slopes).double() if slopes else cast("Tensor", sizes)
    if slopes and score.signal == "margin":
        drop, margin = values[of].mean(0), float(torch.cat(margins).double()[of].mean())
    if slopes:
        values = values.square_().div_(2) if score.kind == "fisher" else values.abs_()
    found = Carried(values, of, sizes, drop, margin)
    _check(found, score)
    return found


def _signal(fit: Fit, network: nn.Module, batch: Batch, signal: Signal, seed: Any) -> Tensor:
    """What is differentiated, record by record, or their sum."""
    logits = fit.logits(network, batch).float()
    targets = batch.targets
    if signal == "margin":
        own = targets[:, None]
        return logits.gather(1, own)[:, 0] - logits.scatter(1, own, -math.inf).logsumexp(1)
    if signal == "sampled":
        shares = logits.detach().softmax(1).cpu()
        targets = torch.multinomial(shares, 1, generator=seed)[:, 0].to(targets.device)
    return fit.task.loss(logits, targets) * len(targets)


@contextmanager
def _frozen(network: nn.Module) -> Iterator[None]:
    """Weights take no gradients: only those of the gates are computed."""
    asked = {p: p.requires_grad for p in network.parameters()}
    try:
        network.requires_grad_(False)
        yield
    finally:
        for p, wanted in asked.items():
            p.requires_grad_(wanted)


def _check(found: Carried, score: BlockScore) -> None:
    """Raise where the scores say nothing.

    Raises:
        MethodError: Naming the cause, and the score that may do better.
    """
    given = [found.values, *([found.energy] if found.energy is not None else [])]
    if not all(bool(torch.isfinite(values.sum())) for values in given):  # all are 0 or more
        raise MethodError(
            f"the {score.kind} scores of blocks are not finite: the network's answers overflow, or "
            "hold NaN; look for NaN in its weights and in the data."
        )
    for part, values in zip(("D_f", "D_r"), found.means(), strict=True):
        if not bool((values > 0).any()):
            why, other = "every block is dead", "another model: nothing of this one is left"
            if score.kind != "activation" and score.signal != "margin":
                why = "the network is saturated: it is so sure of them that its loss has no slope"
                other = "score.signal=margin"
            elif score.kind != "activation":
                why, other = "its answers do not depend on any", "score.kind=activation"
            raise MethodError(
                f"the {score.kind} score of every block is zero on {part} ({why}); take {other}."
            )
