"""What a step is made of: optimiser, learning rate, and the modes of batch norm."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from efface.data import chunks
from efface.task import Settings, Task


def like(tensor: Tensor, param: Tensor) -> Tensor:
    """Optimiser state on the parameter's device and in its layout."""
    if tensor.shape != param.shape:
        return tensor
    return torch.empty_like(param, dtype=tensor.dtype).copy_(tensor)


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
        for batch in task.records.batches(chunks(positions, batch_size), device):
            task.forward(network, batch.inputs)
