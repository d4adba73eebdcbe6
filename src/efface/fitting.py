"""THE loop, and Fit: the handle on it that methods are given.

Everything that must always hold lives here once: the mask, step constraints, finite losses, seeds
by (purpose, epoch, step), counting, devices and precision, commits and resume. A method says what
to minimise and on which records; nothing else in the package takes an optimiser step.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Protocol

import torch
from torch import Tensor, nn

from efface.cost import Meter
from efface.data import Batch, Stream
from efface.errors import DivergedError
from efface.feeds import Feed, portions
from efface.journal import Journal, State
from efface.mask import Mask
from efface.placement import Placement, placed, preserved
from efface.seeds import generator, seed_for, seed_torch
from efface.steps import (
    StepRecorder,
    capture,
    make_optimizer,
    rate,
    recalibrate_bn,
    restore,
    train_mode,
)
from efface.task import Settings, Task
from efface.trained import TrainedModel

History = list[dict[str, float]]
Params = Mapping[str, nn.Parameter]


@dataclass(frozen=True)
class Clock:
    """Where a fit stands: epoch and step count from 0, ``progress`` is in [0, 1)."""

    epoch: int
    epochs: int
    step: int
    steps: int

    @property
    def progress(self) -> float:
        """Fraction of all steps done."""
        return self.step / self.steps


class Objective(Protocol):
    """What a fit minimises: (network, named batches, clock) → scalar."""

    def __call__(self, network: nn.Module, batches: dict[str, Batch], clock: Clock, /) -> Tensor:
        """The loss of a step."""
        ...


class Constraint(Protocol):
    """Runs around every optimiser step: ``begin`` before it, ``end`` after it."""

    def begin(self, params: Params, /) -> None:
        """Before the step: gradients are there, weights are old."""

    def end(self, params: Params, /) -> None:
        """After the step."""


Hook = Callable[[nn.Module, Clock, History], None]
"""Called after every epoch."""

Progress = Callable[[str, int, int], None]
"""Called after every step with the label, steps done and all steps."""


@dataclass(frozen=True)
class Fit:
    """An immutable handle on the loop, bound to a model and a seed.

    Args:
        task: Supplies data, loss, augmentation and the batch adapter.
        seed: Every other seed derives from it.
        device: Where to train.
        subject: The model whose mask always holds, or None.
        path: Purpose of this handle; wrappers give each inner method its own.
        constraints: Run around every step, in order; the mask comes last.
        hooks: Called after every epoch.
        journal: Where commits go, or None.
        progress: Called after every step, or None.
        meter: Counts what is spent.
        recorder: Sees every step, or None.
        start: A recorded state to go on from, where the journal has none.

    Example:
        ``fit(network, objective, {"retain": Stream(split.retain)}, settings)``
    """

    task: Task
    seed: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    subject: TrainedModel | None = None
    path: str = "fit"
    constraints: tuple[Constraint, ...] = ()
    hooks: tuple[Hook, ...] = ()
    journal: Journal | None = None
    progress: Progress | None = None
    meter: Meter = field(default_factory=Meter)
    recorder: StepRecorder | None = None
    start: State | None = None

    def with_(self, constraint: Constraint | None = None, hook: Hook | None = None) -> Fit:
        """A new handle with a further constraint or hook."""
        more = (constraint,) if constraint else ()
        hooks = (hook,) if hook else ()
        return replace(self, constraints=self.constraints + more, hooks=self.hooks + hooks)

    def at(self, purpose: str) -> Fit:
        """A new handle whose randomness is that of a purpose of its own."""
        return replace(self, path=f"{self.path}/{purpose}")

    def fresh(self) -> nn.Module:
        """A newly initialised network: a function of the seed alone, the global state is kept."""
        with torch.random.fork_rng(devices=[]):
            seed_torch(seed_for(self.seed, "init"), torch.device("cpu"))
            return self.task.network()

    def generator(self, purpose: str) -> torch.Generator:
        """A generator of its own for a purpose."""
        return generator(self.seed, f"{self.path}/{purpose}")

    def teacher(self, trained: TrainedModel) -> nn.Module:
        """A deep, frozen copy in eval mode, on this fit's device: never shares parameters."""
        network = copy.deepcopy(trained.network).to(self.device).eval()
        return network.requires_grad_(False)

    def logits(self, network: nn.Module, batch: Batch) -> Tensor:
        """Logits ``[B, C]`` of a batch, through the task's adapter."""
        return self.task.forward(network, batch.inputs)

    def loss(self, network: nn.Module, batch: Batch) -> Tensor:
        """The task's loss on a batch."""
        return self.task.loss(self.logits(network, batch).float(), batch.targets)

    def descend(self, network: nn.Module, batches: dict[str, Batch], clock: Clock) -> Tensor:
        """The plain objective: the task's loss on every stream, weighted."""
        losses = [batch.weight * self.loss(network, batch) for batch in batches.values()]
        return torch.stack(losses).sum() if len(losses) > 1 else losses[0]

    def __call__(
        self,
        network: nn.Module,
        objective: Objective,
        streams: Mapping[str, Stream],
        settings: Settings,
        *,
        label: str | None = None,
    ) -> History:
        """Train ``network`` in place.

        One epoch is one pass over the *first* stream; the others start again as often as needed.

        Args:
            network: Trained in place; modes, ``requires_grad``, device and layout are left as
                found, and so is the global random state.
            objective: What to minimise.
            streams: Name → stream; the batches reach the objective under these names.
            settings: Epochs, batch size, optimiser and so on; ``epochs=0`` changes nothing.
            label: What progress calls it.

        Returns:
            For each epoch its number, mean loss and number of steps.

        Raises:
            DivergedError: When a loss is NaN or infinite, naming epoch and step.
        """
        label, call = label or self.path, self.meter.calls
        self.meter.calls += 1
        if settings.epochs == 0:
            return []
        with preserved(network), placed(network, self.device, train=True) as placement:
            self.meter.placement = str(placement)
            run = _Run(self, network, objective, streams, settings, placement, label, call)
            history = run.all_epochs()
            if settings.bn == "recalibrate":
                where, size = run.first.stream.positions, run.first.size
                recalibrate_bn(network, self.task, where, size, self.device)
        self.meter.fits.append({"label": label, **settings.to_dict(), "history": history})
        return history


@cache
def warm_up() -> None:
    """Take one step with nothing, so that no timing holds what PyTorch loads at the first one."""
    weight = nn.Parameter(torch.zeros(1))
    optimizer = make_optimizer({"w": weight}, Settings())
    weight.sum().backward()  # type: ignore[no-untyped-call]
    optimizer.step()


class _Run:
    """One call of a fit: the state that changes while it runs."""

    def __init__(
        self,
        fit: Fit,
        network: nn.Module,
        objective: Objective,
        streams: Mapping[str, Stream],
        settings: Settings,
        placement: Placement,
        label: str,
        call: int,
    ) -> None:
        self.fit, self.network, self.objective = fit, network, objective
        self.settings, self.placement, self.label, self.call = settings, placement, label, call
        self.feeds = {
            name: Feed(
                fit.task, fit.seed, f"{fit.path}/{name}", stream, settings.batch_size, fit.device
            )
            for name, stream in streams.items()
        }
        self.first = next(iter(self.feeds.values()))
        self.per_epoch = self.first.length * self.first.stream.period
        self.steps = self.per_epoch * settings.epochs
        self.everything = dict(network.named_parameters())
        self.params = {n: p for n, p in self.everything.items() if p.requires_grad}
        self.weights = tuple(self.params.values())
        self.optimizer = make_optimizer(self.params, settings)
        self.seen_mask = fit.subject.mask if fit.subject else None
        self.history: History = []
        self.total, self.step = 0.0, 0
        self.recorded: int | None = None
        self.images = dict.fromkeys(self.feeds, 0)
        self.spent = [0.0, 0.0]
        self.started = self.committed = time.monotonic()
        self.cpu_started = time.process_time()

    def all_epochs(self) -> History:
        """Every epoch from where the journal left off."""
        self._resume()
        self._fill_mask()
        if self.fit.recorder:
            self.fit.recorder.resume(self.network, self.step, self.steps, self.recorded)
        while self.step < self.steps:
            self._epoch(self.step // self.per_epoch)
        self._count()
        return self.history

    def _epoch(self, epoch: int) -> None:
        alone = any(len(f.stream.positions) == 1 for f in self.feeds.values())  # no variance
        train_mode(self.network, frozen_bn=self.settings.bn == "frozen" or alone)
        if self.fit.recorder and self.step % self.per_epoch == 0:
            self.fit.recorder.epoch(epoch, self._state)
        sources = {
            name: feed.batches(self.step, epoch if feed is self.first else None)
            for name, feed in self.feeds.items()
        }
        for _ in range(self.step % self.per_epoch, self.per_epoch):
            due = {
                name: batch
                for name, feed in self.feeds.items()
                if self.step % feed.stream.period == 0 and (batch := next(sources[name]))
            }
            if due:
                self.total += self._one_step(
                    due, Clock(epoch, self.settings.epochs, self.step, self.steps)
                )
            self.step += 1
            if self.fit.progress:
                self.fit.progress(self.label, self.step, self.steps)
            if self.step % self.per_epoch:  # the last step's commit waits for history and hooks
                self._commit_when_due()
        mean = self.total / self.per_epoch
        self.history.append({"epoch": epoch, "loss": mean, "steps": self.per_epoch})
        self.total = 0.0
        clock = Clock(epoch, self.settings.epochs, self.step - 1, self.steps)
        for hook in self.fit.hooks:
            hook(self.network, clock, self.history)
        self._commit_when_due()

    def _one_step(self, batches: dict[str, Batch], clock: Clock) -> float:
        fit = self.fit
        self._notice_mask()
        noise = seed_for(fit.seed, f"{fit.path}/noise", self.call, clock.step)
        seed_torch(noise, fit.device)
        for name, batch in batches.items():
            self.images[name] += len(batch.positions)
        now = self.settings.lr * rate(self.settings, clock.progress, self.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = now
        for weight in self.weights:  # as zero_grad does, without its 10 µs of bookkeeping
            weight.grad = None
        value = sum(self._pass(*p, clock) for p in portions(batches, self.settings.micro_batch))
        if fit.recorder:
            seed_torch(noise, fit.device)  # should it look at the batch again
            fit.recorder.before(batches, clock.step, self.optimizer)
        for constraint in fit.constraints:
            constraint.begin(self.params)
        self.optimizer.step()
        for constraint in fit.constraints:
            constraint.end(self.params)
        self._fill_mask()
        if fit.recorder:
            fit.recorder.after(clock.epoch, clock.step, self.optimizer)
        return value

    def _pass(self, batches: dict[str, Batch], share: float, clock: Clock) -> float:
        """One forward and one backward pass; returns its part of the step's loss."""
        with self.placement.autocast():
            loss = self.objective(self.network, batches, clock)
        loss = loss if share == 1 else loss * share
        value = float(loss.detach())
        if not math.isfinite(value):
            raise DivergedError(
                f"the loss became {value} in epoch {clock.epoch + 1}, step {clock.step + 1} "
                f"({self.label}); use a lower learning rate or cap, or look for NaN in the data."
            )
        loss.backward()  # type: ignore[no-untyped-call]
        return value

    def _notice_mask(self) -> None:
        """A mask that was changed since the last step clears the optimiser's state."""
        mask = self.fit.subject.mask if self.fit.subject else None
        if mask is not self.seen_mask:
            self._clear_state(mask, self.seen_mask)
            self.seen_mask = mask

    def _fill_mask(self) -> None:
        """Hold pruned weights at exactly zero."""
        mask = self.fit.subject.mask if self.fit.subject else None
        if mask is not None:
            with torch.no_grad():
                for name, gone in mask.dropped(self.fit.device).items():
                    self.everything[name].masked_fill_(gone, 0.0)

    def _clear_state(self, *masks: Mask | None) -> None:
        for mask in masks:
            for name, gone in (mask.dropped(self.fit.device) if mask else {}).items():
                for value in self.optimizer.state.get(self.everything[name], {}).values():
                    if isinstance(value, Tensor) and value.shape == gone.shape:
                        value.masked_fill_(gone, 0.0)

    def _count(self) -> None:
        """Move what this run has spent to the meter."""
        meter = self.fit.meter
        for name, n in self.images.items():
            meter.images[name] = meter.images.get(name, 0) + n
        meter.wall_before += self.spent[0]
        meter.cpu_before += self.spent[1]

    def _commit_when_due(self) -> None:
        journal = self.fit.journal
        spare = 1.0 if self.step == self.steps else math.inf  # what is finished is not run again
        if journal and time.monotonic() - self.committed >= min(journal.seconds, spare):
            self._commit(journal)

    def _commit(self, journal: Journal) -> None:
        if self.fit.recorder:  # never behind the fit
            self.recorded = self.fit.recorder.commit()
        journal.write(self.call, self._state())
        self.committed = time.monotonic()

    def _state(self) -> State:
        self._notice_mask()
        mask = self.fit.subject.mask if self.fit.subject else None
        values = {
            "step": self.step,
            "total": self.total,
            "history": self.history,
            "images": self.images,
            "wall": self.spent[0] + time.monotonic() - self.started,
            "cpu": self.spent[1] + time.process_time() - self.cpu_started,
            "masked": mask is not None,
            "recorded": self.recorded,
        }
        return State(capture(self.network, self.params, self.optimizer, mask), values)

    def _resume(self) -> None:
        kept = self.fit.journal.read(self.call) if self.fit.journal else None
        state = kept or self.fit.start
        if state is None:
            return
        mask = Mask(restore(state.tensors, self.network, self.params, self.optimizer))
        values = state.values
        self.recorded = values.get("recorded")
        if self.fit.subject:
            if (mask if values["masked"] else None) != self.fit.subject.mask:
                self.fit.subject.set_mask(mask if values["masked"] else None)
            self.seen_mask = self.fit.subject.mask
        self.step, self.total, self.history = values["step"], values["total"], values["history"]
        self.images, self.spent = dict(values["images"]), [values["wall"], values["cpu"]]
