"""What a step is made of: optimiser, learning rate, and the modes of batch norm."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from efface.data import Batch
from efface.journal import State
from efface.mask import Mask
from efface.task import Settings, Task


class StepRecorder(Protocol):
    """Sees every optimiser step of a fit, from outside the constraints and the mask."""

    def resume(self, network: nn.Module, step: int, steps: int, recorded: int | None, /) -> None:
        """The fit begins, or goes on, with this step: what was recorded from there on is void.

        ``recorded`` is what :meth:`commit` told then; None: the fit begins.
        """

    def epoch(self, epoch: int, state: Callable[[], State], /) -> None:
        """An epoch begins; ``state()`` is what the fit could go on from."""

    def before(
        self, batches: Mapping[str, Batch], step: int, optimizer: torch.optim.Optimizer, /
    ) -> None:
        """Gradients are there, weights are old."""

    def after(self, epoch: int, step: int, optimizer: torch.optim.Optimizer, /) -> None:
        """Weights are new, and the mask holds."""

    def commit(self) -> int:
        """Make durable what was recorded: the fit's own commit follows. Tells how much it is."""


def like(tensor: Tensor, param: Tensor) -> Tensor:
    """Optimiser state on the parameter's device and in its layout."""
    if tensor.shape != param.shape:
        return tensor
    return torch.empty_like(param, dtype=tensor.dtype).copy_(tensor)


def capture(
    network: nn.Module,
    params: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    mask: Mask | None,
) -> dict[str, Tensor]:
    """The tensors of a fit's state: ``network.…``, ``optim.KEY.…`` and ``mask.…``."""
    names: dict[Tensor, str] = {p: n for n, p in params.items()}
    tensors = {f"network.{n}": t for n, t in network.state_dict().items()}
    for param, values in optimizer.state.items():
        for key, value in values.items():
            if isinstance(value, Tensor):
                tensors[f"optim.{key}.{names[param]}"] = value
    return tensors | {f"mask.{n}": t for n, t in (mask or {}).items()}


def restore(
    tensors: Mapping[str, Tensor],
    network: nn.Module,
    params: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
) -> dict[str, Tensor]:
    """Put captured tensors back; returns those of the mask."""
    parts: dict[str, dict[str, Tensor]] = {"network": {}, "optim": {}, "mask": {}}
    for name, tensor in tensors.items():
        kind, _, rest = name.partition(".")
        parts[kind][rest] = tensor
    with torch.no_grad():
        own = network.state_dict()
        for name, tensor in parts["network"].items():
            own[name].copy_(tensor)
    for name, tensor in parts["optim"].items():
        key, _, param = name.partition(".")
        optimizer.state[params[param]][key] = like(tensor, params[param])
    return parts["mask"]


def make_optimizer(params: Mapping[str, nn.Parameter], settings: Settings) -> torch.optim.Optimizer:
    """The optimiser that settings ask for."""
    # foreach and not fused: PyTorch 2.13's fused SGD on CPU goes wrong when a gradient's layout
    # differs from its weight's, silently.
    common: dict[str, Any] = {"lr": settings.lr, "weight_decay": settings.weight_decay}
    weights = list(params.values())
    if settings.optimizer == "sgd":
        momentum = settings.momentum
        return torch.optim.SGD(
            weights, momentum=momentum, nesterov=momentum > 0, foreach=True, **common
        )
    kind = torch.optim.Adam if settings.optimizer == "adam" else torch.optim.AdamW
    return kind(weights, foreach=True, **common)


def rate(settings: Settings, progress: float, steps: int) -> float:
    """The learning rate at a point of the fit, as a fraction of the peak."""
    if settings.begun or settings.ahead:  # in whole steps, to meet those of one fit exactly
        each, done = steps // settings.epochs, round(progress * steps)
        steps = each * (settings.begun + settings.epochs + settings.ahead)
        progress = (each * settings.begun + done) / steps
    if progress < settings.warmup:
        return (progress + 1 / steps) / (settings.warmup + 1 / steps)
    rest = (progress - settings.warmup) / (1 - settings.warmup) if settings.warmup < 1 else 0.0
    if settings.schedule == "linear":
        return 1 - rest
    if settings.schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * rest))
    if settings.schedule == "step":
        return 0.1 ** ((progress >= 0.5) + (progress >= 0.75))
    return 1.0


def batch_norms(network: nn.Module) -> list[nn.modules.batchnorm._BatchNorm]:
    """The network's batch-norm layers that keep running statistics."""
    kinds = (nn.modules.batchnorm._BatchNorm,)
    return [m for m in network.modules() if isinstance(m, kinds) and m.track_running_stats]


def train_mode(network: nn.Module, frozen_bn: bool) -> None:
    """Put a network in training mode, its batch norms in evaluation mode when they are frozen."""
    network.train()
    for layer in batch_norms(network) if frozen_bn else ():
        layer.eval()


def recalibrate_bn(
    network: nn.Module, task: Task, positions: Tensor, batch_size: int, device: torch.device
) -> None:
    """Replace batch-norm statistics by plain averages over un-augmented records."""
    layers = batch_norms(network)
    if not layers or len(positions) < 2:  # of one record, there is no variance
        return
    with contextlib.ExitStack() as stack, torch.no_grad():
        for layer in layers:
            stack.callback(setattr, layer, "momentum", layer.momentum)
            layer.reset_running_stats()
            layer.momentum = None
        network.eval()
        for layer in layers:
            layer.train()
        plan = positions.tensor_split(-(-len(positions) // batch_size))  # each weighs the same
        for batch in task.records.batches(plan, device):
            task.forward(network, batch.inputs)
