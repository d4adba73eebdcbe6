"""Partial updates: only a fraction of each layer's weights may move, around any unlearner.

What was not selected is put back after the step rather than its gradient zeroed before it, so that
neither momentum, nor Adam's moments, nor weight decay move it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from efface.data import Batch, Stream
from efface.errors import MethodError
from efface.fitting import Clock, Fit, History, Objective, Params
from efface.seeds import rng
from efface.task import Settings, Split
from efface.trained import TrainedModel
from efface.unlearn.base import Unlearner, needs_of
from efface.unlearn.places import CPU, PLAIN, Pick, Redraw, Row, Rule, Scope, floor, lying, selected
from efface.unlearn.relabel import RandomLabel


class Frozen:
    """A step constraint: entries that are not selected keep their values, bit for bit.

    Args:
        network: Its present weights are the ones kept.
        selected: Parameter name → bool tensor: which entries may move. Parameters that are not
            named do not move.

    Example:
        >>> net = torch.nn.Linear(2, 1, bias=False)
        >>> old = net.weight.detach().clone()
        >>> keep = Frozen(net, {"weight": torch.tensor([[True, False]])})
        >>> with torch.no_grad():
        ...     _ = net.weight.add_(1.0)
        >>> keep.end(dict(net.named_parameters()))
        >>> torch.equal(net.weight, old + torch.tensor([[1.0, 0.0]]))
        True
    """

    def __init__(self, network: nn.Module, selected: Mapping[str, Tensor]) -> None:
        self.kept = {n: p.detach().clone() for n, p in network.named_parameters()}
        self.selected = dict(selected)
        self._placed: dict[str, tuple[Tensor, Tensor]] = {}

    def begin(self, params: Params) -> None:
        """Nothing: the values are known."""

    def end(self, params: Params) -> None:
        """Put back what was not selected."""
        with torch.no_grad():
            for name, param in params.items():
                still, value = self._on(name, param)
                torch.where(still, value, param, out=param)

    def _on(self, name: str, param: Tensor) -> tuple[Tensor, Tensor]:
        """What stays and its value, on the parameter's device and in its layout."""
        if name not in self._placed or self._placed[name][0].device != param.device:
            some = self.selected.get(name, torch.zeros(param.shape, dtype=torch.bool))
            still = torch.empty_like(param, dtype=torch.bool).copy_(~some)
            self._placed[name] = still, torch.empty_like(param).copy_(self.kept[name])
        return self._placed[name]


class Guard:
    """A step constraint on one model by a rule, which also holds what is edited around the steps.

    Args:
        rule: How many entries may move, and which.
        trained: The model; steps of other networks are let be.
        split: What to score with.
        fit: The same, and the seed.
    """

    def __init__(self, rule: Rule, trained: TrainedModel, split: Split, fit: Fit) -> None:
        self.rule, self.trained, self.split, self.fit = rule, trained, split, fit
        self.path = f"{fit.path}/partial-{len(fit.constraints)}"
        self.active, self.call, self.step = True, 0, 0
        self.frozen: Frozen | None = None
        self.below: dict[str, Tensor] = {}
        if rule.redraw == "fixed":
            self.frozen = Frozen(trained.network, self._selected("fixed", 0))
        else:
            if rule.pick == "saliency":
                self.below = floor(trained, split, fit)
            self.last = self._values()
        self._rows: _Rows | None = None

    # -- around steps

    def begin(self, params: Params) -> None:
        """Keep the old values and choose what may move."""
        if self.frozen or not self.active:
            return
        if self._rows is None or self._rows.mask is not self.trained.mask:
            self._rows = _Rows(params, self.trained, self.below)
        rows, turning = self._rows, self.rule.pick == "block"
        rows.keep()
        rows.places = self.rule.choose(
            rows.rows,
            rows.scores(self.rule.pick, params),
            self._draw("block" if turning else "step", self.call, 0 if turning else self.step),
            self.step,
            rows.scratch,
        )

    def end(self, params: Params) -> None:
        """Put back what was not chosen."""
        if not self.active:
            return
        if self.frozen:
            self.frozen.end(params)
        elif self._rows:
            self._rows.put_back()

    # -- around fits

    def enter(self, network: nn.Module, call: int) -> None:
        """Before a fit: what was edited since the last one counts as a step of its own."""
        self.settle(call)
        self.active, self.call, self._rows = network is self.trained.network, call, None

    def leave(self) -> None:
        """After a fit: this is what later edits are measured against."""
        self._rows = None
        if self.frozen is None and self.active:
            self.last = self._values()

    def settle(self, call: int) -> None:
        """Confine what was edited outside of the loop; what the mask drops is zero all the same."""
        own, mask = dict(self.trained.network.named_parameters()), self.trained.mask
        if self.frozen:
            self.frozen.end(own)
            if mask is not None:
                mask.apply_(own)
            return
        if mask is not None:
            mask.apply_(self.last)
        if all(torch.equal(own[name], old) for name, old in self.last.items()):
            return
        edited = self._values()
        changed = {name: edited[name] != old for name, old in self.last.items()}
        with torch.no_grad():
            for name, param in own.items():
                param.copy_(self.last[name])
            for name, some in self._selected("edit", call, changed).items():
                own[name].copy_(torch.where(some.to(own[name].device), edited[name], own[name]))
        self.last = self._values()

    def size(self) -> dict[str, int]:
        """How many entries may move at once, and of how many."""
        mask = self.trained.mask
        alive = [
            int(mask[name].sum()) if mask and name in mask else p.numel()
            for name, p in self.trained.network.named_parameters()
            if p.requires_grad
        ]
        groups = alive if self.rule.scope == "layer" else [sum(alive)]
        return {"selected": sum(map(self.rule.count, groups)), "of": sum(alive)}

    def _values(self) -> dict[str, Tensor]:
        return {n: p.detach().clone() for n, p in self.trained.network.named_parameters()}

    def _selected(
        self, purpose: str, call: int, among: Mapping[str, Tensor] | None = None
    ) -> dict[str, Tensor]:
        """What may move in the model as it is."""
        scores = self.rule.scores(self.trained, self.split, self.fit)
        return selected(self.rule, self.trained, scores, self._draw(purpose, call), among)

    def _draw(self, purpose: str, *counters: int) -> np.random.Generator:
        return rng(self.fit.seed, f"{self.path}/{purpose}", *counters)


class _Rows:
    """The weights of one fit as rows, as they lie in memory, and what a step needs beside them."""

    def __init__(self, params: Params, trained: TrainedModel, below: Mapping[str, Tensor]) -> None:
        self.mask = trained.mask
        kept: Mapping[str, Tensor] = self.mask or {}
        self.now = [lying(p.detach(), p) for p in params.values()]
        self.old = [torch.empty_like(row) for row in self.now]
        self.fast = all(row.device == CPU and row.dtype in PLAIN for row in self.now)
        self.pairs: list[tuple[Any, Any]] = list(zip(self.now, self.old, strict=True))
        if self.fast:  # the same memory: NumPy takes a third of the time where there is little
            self.pairs = [(now.numpy(), old.numpy()) for now, old in self.pairs]
        alive = [
            lying(kept[n].to(p.device), p).nonzero().flatten() if n in kept else None
            for n, p in params.items()
        ]
        pairs = zip(self.now, alive, strict=True)
        self.rows = [Row(len(row), some, device=row.device) for row, some in pairs]
        self.below = [lying(below[n].to(p), p) for n, p in params.items() if n in below]
        self.places: list[Tensor] = []
        self._scores: list[Tensor] = []
        self.scratch: Tensor | None = None

    def scores(self, pick: Pick, params: Params) -> list[Tensor] | None:
        """Scores of this step, row by row."""
        if pick in ("random", "block"):
            return None
        if not self._scores:
            self._scores = [torch.zeros_like(row) for row in self.now]
            self.scratch = torch.empty_like(torch.cat(self.now))
        values = self.now
        if pick != "magnitude":  # a weight that had no part in this step's loss scores 0
            values = [
                torch.zeros_like(row) if p.grad is None else lying(p.grad, p)
                for row, p in zip(self.now, params.values(), strict=True)
            ]
        for score, value in zip(self._scores, values, strict=True):
            torch.abs(value, out=score)
        if pick == "saliency":
            torch._foreach_div_(self._scores, self.below)
        return self._scores

    def keep(self) -> None:
        """The values before the step."""
        for now, old in self.pairs:
            old[:] = now

    def put_back(self) -> None:
        """Everything but the chosen places."""
        for (now, old), places in zip(self.pairs, self.places, strict=True):
            if len(places) < len(now):
                chosen = places.numpy() if self.fast else places
                moved = now[chosen]
                now[:] = old
                now[chosen] = moved


@dataclass(frozen=True)
class Confined(Fit):
    """A handle on the loop that tells guards which step is taken, and when a fit begins and ends.

    Args:
        guards: Step constraints that also hold what is edited outside of the loop.
    """

    guards: tuple[Guard, ...] = ()

    def __call__(
        self,
        network: nn.Module,
        objective: Objective,
        streams: Mapping[str, Stream],
        settings: Settings,
        *,
        label: str | None = None,
    ) -> History:
        """Train as :class:`efface.fitting.Fit` does."""
        for guard in self.guards:
            guard.enter(network, self.meter.calls)

        def timed(net: nn.Module, batches: dict[str, Batch], clock: Clock) -> Tensor:
            for guard in self.guards:
                guard.step = clock.step
            return objective(net, batches, clock)

        history = super().__call__(network, timed, streams, settings, label=label)
        for guard in self.guards:
            guard.leave()
        return history


def confine(rule: Rule, trained: TrainedModel, split: Split, fit: Fit) -> tuple[Confined, Guard]:
    """A handle under which only a part of the weights moves, and its guard, to be settled at last.

    Example:
        ``held, guard = confine(rule, trained, split, fit)``; ``inner(trained, split, held)``;
        ``guard.settle(fit.meter.calls)``
    """
    guard = Guard(rule, trained, split, fit)
    held: dict[str, Any] = {f.name: getattr(fit, f.name) for f in fields(fit)}
    held["guards"] = (*held.get("guards", ()), guard)
    held["constraints"] = (*fit.constraints, guard)
    return Confined(**held), guard


@dataclass(frozen=True)
class LayerwisePartial:
    """Only a part of each layer may move, whatever the inner method does.

    Layer-wise partial updates of Gogineni and Nadimi 2024.

    In every parameter tensor (biases and batch-norm's scale and shift are tensors like any other)
    exactly max(1, round(fraction · n)) of the n entries that the mask keeps may move; all others
    keep their values, bit for bit, under momentum, Adam and weight decay. What the inner method
    edits outside of the training loop counts as one step. Batch-norm statistics are no weights:
    they follow the inner method's ``bn``.

    The paper's text was not at hand: the abstract says that a part of each layer is updated, not
    which, nor how often it is chosen anew. So these are options.

    Args:
        inner: Any unlearner but those that read the training's log: what is half taken back
            would be noted as gone.
        fraction: Share of the entries that may move, in (0, 1].
        pick: Which: ``random`` ones; a ``block`` of neighbours, which moves on from step to step;
            the largest by ``magnitude``, by ``gradient`` (|∇| on D_f), by ``saliency`` (that
            over |∇ CE(D_r)| + ε, where ε is the tensor's mean of the latter), or by ``dfmu`` (how
            much more their filter carries of D_f than of D_r; with ``redraw=fixed`` only).
        redraw: Anew at every ``step`` (by gradient or saliency: of the gradient of that very step;
            by magnitude: of the weights as they are), or once (``fixed``), in the trained model.
            The first reaches every weight in the end, the second changes no more than the fraction.
        scope: Count in every ``layer`` by itself, or over all of them together (``global``).
    """

    name: ClassVar[str] = "layerwise-partial"
    title: ClassVar[str] = "Layer-wise partial updates"
    paper: ClassVar[str] = "Gogineni and Nadimi 2024"

    inner: Unlearner = field(default_factory=RandomLabel)
    fraction: float = 0.1
    pick: Pick = "random"
    redraw: Redraw = "step"
    scope: Scope = "layer"

    def __post_init__(self) -> None:
        if not 0 < self.fraction <= 1:
            raise MethodError(f"{self.name}: fraction must be in (0, 1], not {self.fraction!r}.")
        if self.pick == "dfmu" and self.redraw != "fixed":
            raise MethodError(
                f"{self.name}: pick=dfmu scores the filters of the trained model, once; take "
                "redraw=fixed with it."
            )

    @property
    def needs(self) -> frozenset[str]:
        """What the choice looks at."""
        both = {"forget", "retain"}
        read = {"gradient": {"forget"}, "saliency": both, "dfmu": both}
        return frozenset(read.get(self.pick, ()))

    def check(self, trained: TrainedModel, split: Split) -> None:
        """Raise for an inner method that cannot be done in part."""
        if "log" in needs_of(self.inner):
            raise MethodError(
                f"{self.name} cannot go around {self.inner.name}, which reads the training's log: "
                "amnesiac has keep= for a part of each layer, and a replay is whole or not at all; "
                f"take {self.inner.name} without {self.name}."
            )

    def __call__(self, trained: TrainedModel, split: Split, fit: Fit) -> None:
        """Edit ``trained`` in place."""
        rule = Rule(self.fraction, self.pick, self.redraw, self.scope)
        held, guard = confine(rule, trained, split, fit)
        fit.meter.facts["partial"] = guard.size()
        self.inner(trained, split, held)
        guard.settle(fit.meter.calls)
