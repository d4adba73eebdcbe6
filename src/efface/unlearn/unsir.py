"""UNSIR: noise that stands for a class, to impair it; then repair. No record of D_f is read."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from efface.data import Batch, Stream
from efface.errors import MethodError, NeedsError
from efface.fitting import Clock, Fit
from efface.task import Settings, Split
from efface.trained import TrainedModel
from efface.unlearn.base import check_ranges, fit_settings, positive_or_none, streams
from efface.unlearn.boundary import as_real, pixel_scale

PENALTY = 0.1
"""Weight of the mean squared norm of the noise, as in the released code."""
NOISE_LR = 0.1
"""Adam's rate on the noise, as there."""


class Noise(nn.Module):
    """Inputs as parameters: ``centre + spread · values``, where values begin as unit normal ones.

    Args:
        like: Inputs of which shape, mean and standard deviation are taken ``[n, …]``.
        count: Of inputs that are parameters, B.
        draw: Draws the values.

    >>> Noise(torch.rand(2, 1, 8, 8), 5, torch.Generator().manual_seed(0))().shape
    torch.Size([5, 1, 8, 8])
    """

    def __init__(self, like: Tensor, count: int, draw: torch.Generator) -> None:
        super().__init__()
        drawn = torch.randn(count, *like.shape[1:], generator=draw)
        self.values = nn.Parameter(drawn.to(like.device))
        self.centre = float(like.mean())
        self.spread = float(like.std()) if like.numel() > 1 else 0.0
        self.spread = self.spread or 1.0  # of inputs that are all alike

    def forward(self) -> Tensor:
        """The inputs ``[B, …]``."""
        return self.centre + self.spread * self.values

    def energy(self) -> Tensor:
        """Mean over the inputs of the squared norm of the values."""
        return self.values.square().flatten(1).sum(1).mean()


def error_maximising(
    trained: TrainedModel, noise: Noise, label: int, steps: int, fit: Fit, clock: Tensor
) -> Tensor:
    """Inputs that a model finds least like a class.

    Minimises −CE(label) + 0.1 · mean ‖values‖² by Adam; the model is frozen, in eval mode.

    Args:
        trained: The model.
        noise: Where to begin; trained in place.
        label: The class.
        steps: Of Adam.
        fit: Supplies loss and the loop.
        clock: Position of one record ``[1]``: an epoch of the loop is a pass over it, and a step.

    Returns:
        Inputs ``[B, …]`` on the fit's device.
    """
    teacher, count = fit.teacher(trained), len(noise.values)
    labels = torch.full((count,), label, device=fit.device)

    def objective(network: nn.Module, batches: dict[str, Batch], now: Clock) -> Tensor:
        loss = fit.task.loss(fit.task.forward(teacher, noise()).float(), labels)
        return PENALTY * noise.energy() - loss

    settings = Settings(
        epochs=steps, lr=NOISE_LR, optimizer="adam", weight_decay=0.0, schedule="constant"
    )
    # what holds for the model's own steps does not concern the noise
    bare = replace(fit, subject=None, constraints=(), hooks=(), recorder=None)
    bare(noise, objective, {"noise": Stream(clock)}, settings, label="unsir noise")
    spent(fit, steps * (count - 1))
    made: Tensor = noise()
    return made.detach().to(fit.device)


def spent(fit: Fit, count: int) -> None:
    """Count rows of noise that went forward and backward."""
    fit.meter.images["noise"] = fit.meter.images.get("noise", 0) + count


@dataclass(frozen=True)
class Pool:
    """Noise of several classes, class after class in turn.

    Args:
        inputs: ``[M, …]``.
        targets: ``[M]``.
    """

    inputs: Tensor
    targets: Tensor

    @classmethod
    def of(cls, noises: dict[int, Tensor]) -> Pool:
        """From the noise of each class ``[B, …]``.

        >>> Pool.of({4: torch.zeros(2, 3), 7: torch.ones(2, 3)}).targets.tolist()
        [4, 7, 4, 7]
        """
        inputs = torch.stack(list(noises.values()), 1).flatten(0, 1)
        labels = torch.tensor(list(noises), device=inputs.device)
        return cls(inputs, labels.repeat(len(inputs) // len(labels)))

    def mixed(self, batch: Batch, scale: float, count: int, start: int) -> Batch:
        """A batch with ``count`` rows of noise behind its own, beginning with row ``start``.

        Raises:
            MethodError: If the records of the task differ in shape.
        """
        rows = (start + torch.arange(count, device=self.targets.device)) % len(self.targets)
        own = as_real(batch.inputs, scale)
        if own.shape[1:] != self.inputs.shape[1:]:
            raise MethodError(
                f"unsir needs records of one shape, but found {tuple(own.shape[1:])} beside "
                f"{tuple(self.inputs.shape[1:])}; take another method, such as finetune."
            )
        inputs = torch.cat([own, self.inputs[rows]])
        targets = torch.cat([batch.targets, self.targets[rows]])
        return batch._replace(inputs=inputs, targets=targets)


@dataclass(frozen=True)
class Unsir:
    """UNSIR: learn noise that a class is worst at, train it as that class, then repair on D_r.

    Tarun et al. 2023. For every class that D_f has: noise that maximises the trained model's loss
    of that class. Impair: passes over D_r in which every batch also holds noise, labelled as its
    class. Repair: as many passes over D_r alone. Of D_f only the classes are read, no record. For
    whole classes: one that D_r has, too, is impaired and then repaired. The paper takes a part of
    D_r; for that, put :class:`efface.unlearn.Frugal` around.

    Args:
        noise: Rows of noise per retained record, for each class of D_f.
        steps: Of Adam on the noise.
        epochs: Passes over D_r to impair, and as many to repair; ``None``: the task's default, else
            1 as in the paper.
        impair_lr: Peak rate while impairing; ``None``: the task's default, else twice ``lr``.
        lr: Peak rate while repairing; ``None``: the task's default, else half of the training's
            peak.
        bn: What happens to batch-norm statistics; they see the noise, too.
    """

    name: ClassVar[str] = "unsir"
    title: ClassVar[str] = "Impair and repair (UNSIR)"
    paper: ClassVar[str] = "Tarun et al. 2023"
    needs: ClassVar[frozenset[str]] = frozenset({"retain"})

    noise: float = 0.64
    steps: int = 40
    epochs: int | None = None
    impair_lr: float | None = None
    lr: float | None = None
    bn: Literal["train", "frozen", "recalibrate"] = "train"

    def __post_init__(self) -> None:
        check_ranges(
            self,
            noise=("positive", 0 < self.noise < math.inf),
            steps=("0 or more", self.steps >= 0),
            impair_lr=("positive", positive_or_none(self.impair_lr)),
        )

    def check(self, trained: TrainedModel, split: Split) -> None:
        """Raise for a request without a class, and for inputs that cannot be learnt."""
        if not classes_of(split):
            raise NeedsError(
                "unsir needs a class to forget, and D_f has none; select with --class."
            )
        pixel_scale(self.name, trained.network, trained.task, split.retain[:1])

    def __call__(self, trained: TrainedModel, split: Split, fit: Fit) -> None:
        """Edit ``trained`` in place."""
        epochs = 1 if self.epochs is None else self.epochs
        if epochs == 0:
            return
        lr = fit.task.fit.lr / 2 if self.lr is None else self.lr
        repair = fit_settings(fit, self, epochs=epochs, lr=lr, bn=self.bn)
        running: Literal["train", "frozen"] = "frozen" if self.bn == "frozen" else "train"
        impair = replace(repair, lr=self.impair_lr or 2 * lr, bn=running)
        self._impair(trained, split, fit.at("impair"), impair)
        again = fit.at("repair")
        again(trained.network, fit.descend, streams(split, "retain"), repair, label="unsir repair")

    def _impair(self, trained: TrainedModel, split: Split, fit: Fit, settings: Settings) -> None:
        scale = pixel_scale(self.name, trained.network, fit.task, split.retain[:1])
        pool = self._pool(trained, split, fit, settings.batch_size, scale)
        ratio = self.noise * len(classes_of(split))
        kept = max(1, round(settings.batch_size / (1 + ratio)))
        each = round(ratio * kept)

        def objective(network: nn.Module, batches: dict[str, Batch], clock: Clock) -> Tensor:
            batch = batches["retain"]
            count = max(1, round(ratio * len(batch.targets)))
            return fit.loss(network, pool.mixed(batch, scale, count, clock.step * each))

        stream = {"retain": Stream(split.retain, batch_size=kept)}
        fit(trained.network, objective, stream, settings, label="unsir impair")
        spent(fit, round(ratio * len(split.retain)) * settings.epochs)

    def _pool(self, trained: TrainedModel, split: Split, fit: Fit, size: int, scale: float) -> Pool:
        """A batch of noise for every class of D_f."""
        like, noises = sample(split.retain, size, scale, fit), {}
        for label in classes_of(split):
            own = fit.at(f"noise/{label}")
            noise = Noise(like, size, own.generator("start"))
            noises[label] = error_maximising(
                trained, noise, label, self.steps, own, split.retain[:1]
            )
        return Pool.of(noises)


def classes_of(split: Split) -> list[int]:
    """The classes that D_f has, from labels alone."""
    own = [] if split.label is None else [split.label]
    return sorted({*own, *split.task.records.targets[split.forget].tolist()})


def sample(positions: Tensor, size: int, scale: float, fit: Fit) -> Tensor:
    """Real inputs of up to ``size`` records, evenly spread over positions, ``[B, …]``."""
    where = torch.linspace(0, len(positions) - 1, min(size, len(positions))).long()
    batch = next(iter(fit.task.records.batches([positions[where]], fit.device)))
    return as_real(batch.inputs, scale)
