"""The share that a record has in an optimiser step: the step less what it would be without it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from efface.data import Batch
from efface.errors import NeedsError
from efface.steps import batch_norms
from efface.task import Task

Flat = npt.NDArray[np.float32]


def step_of(optimizer: torch.optim.Optimizer, param: Tensor, gradient: Tensor) -> Tensor:
    """What the optimiser's next step would add to a parameter, had it this gradient.

    Args:
        optimizer: SGD, Adam or AdamW, before the step.
        param: The parameter.
        gradient: Of the loss, without weight decay ``[like param]``.

    Raises:
        NeedsError: For any other optimiser.
    """
    group = next(g for g in optimizer.param_groups if any(p is param for p in g["params"]))
    lr, decay, state = float(group["lr"]), group["weight_decay"], optimizer.state.get(param, {})
    if isinstance(optimizer, torch.optim.SGD):
        gradient = gradient + decay * param
        mu, buffer = group["momentum"], state.get("momentum_buffer")
        moved = gradient if buffer is None else mu * buffer + gradient
        step: Tensor = gradient + mu * moved if group["nesterov"] else moved if mu else gradient
        return step.mul(-lr)
    if not isinstance(optimizer, torch.optim.Adam | torch.optim.AdamW):
        raise NeedsError(
            f"a record's share of a step of {type(optimizer).__name__} is not known; record with "
            "attribution=batch, or train with sgd, adam or adamw."
        )
    apart = isinstance(optimizer, torch.optim.AdamW)
    gradient = gradient if apart else gradient + decay * param
    (b1, b2), t = group["betas"], float(state.get("step", 0)) + 1
    zero = torch.zeros_like(param)
    first = b1 * state.get("exp_avg", zero) + (1 - b1) * gradient
    second = b2 * state.get("exp_avg_sq", zero) + (1 - b2) * gradient.square()
    size = (second / (1 - b2**t)).sqrt() + group["eps"]
    step = first / (1 - b1**t) / size + (decay * param if apart else 0)
    return step.mul(-lr)


def shares(
    task: Task,
    network: nn.Module,
    batch: Batch,
    rows: Tensor,
    optimizer: torch.optim.Optimizer,
    flat: Callable[[Mapping[str, Tensor]], Flat],
) -> Iterator[tuple[int, Flat]]:
    """The share of some records of a batch in the step that comes next.

    A record's gradient is that of its own loss over the size of the batch, *through* the batch's
    statistics, so that those of all records add up to the step's gradient. Its share is the step
    with all records less the step without it: exact for SGD, and for Adam as far as one step goes
    (what momentum and second moments carry on is not in it).

    Args:
        task: Supplies loss and adapter.
        network: In training mode, gradients of the whole batch there; left as it is.
        batch: The step's batch.
        rows: Which of its rows ``[k]``.
        optimizer: Before the step.
        flat: Parameter name → tensor, laid out as the log has it.

    Yields:
        Position of the record, and its share.
    """
    params = {n: p for n, p in network.named_parameters() if p.requires_grad}
    kept = [(layer, layer.momentum) for layer in batch_norms(network)]
    try:
        for layer, _ in kept:
            layer.momentum = 0.0  # statistics of this pass are not kept
        counters = [layer.num_batches_tracked for layer, _ in kept]
        before = [None if c is None else c.clone() for c in counters]
        logits = task.forward(network, batch.inputs).float()
    finally:
        for layer, momentum in kept:
            layer.momentum = momentum
    for counter, value in zip(counters, before, strict=True):
        if counter is not None and value is not None:
            counter.copy_(value)
    for row in rows.tolist():
        here = slice(row, row + 1)
        loss = task.loss(logits[here], batch.targets[here]) / len(batch.targets)
        found = torch.autograd.grad(
            loss, list(params.values()), retain_graph=True, allow_unused=True
        )
        with torch.no_grad():
            parts = {}
            for (name, param), own in zip(params.items(), found, strict=True):
                if own is None or param.grad is None:
                    parts[name] = torch.zeros_like(param)
                    continue
                whole = step_of(optimizer, param, param.grad)
                parts[name] = whole - step_of(optimizer, param, param.grad - own)
        yield int(batch.positions[row]), flat(parts)
