"""Logits once per (model, records); what follows from them is array arithmetic (signals)."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from efface.data import Records
from efface.mask import classifier_name
from efface.placement import placed, preserved
from efface.task import Task


def logits(
    network: nn.Module,
    task: Task,
    records: Records,
    positions: Tensor | None = None,
    *,
    device: torch.device | None = None,
    batch_size: int | None = None,
) -> np.ndarray[tuple[int, int], np.dtype[np.float32]]:
    """Logits of un-augmented records, in eval mode and fp32; modes are left as found.

    Args:
        network: The network.
        task: Supplies the batch adapter.
        records: Training or test records.
        positions: Which of them; all by default.
        device: Where to compute; the CPU by default.
        batch_size: Records per forward pass; by default 125 on a CPU (which then stays in the
            cache) and 500 elsewhere.

    Returns:
        float32 ``[n, C]``, in the order of ``positions``.
    """
    device = device or torch.device("cpu")
    batch_size = batch_size or (125 if device.type == "cpu" else 500)
    positions = torch.arange(len(records)) if positions is None else positions
    parts: list[Tensor] = []
    with preserved(network), placed(network, device, train=False), torch.inference_mode():
        network.eval()
        for batch in records.batches(torch.split(positions, batch_size), device):
            parts.append(task.forward(network, batch.inputs).float().cpu())
    return torch.cat(parts).numpy()


def features(
    network: nn.Module,
    task: Task,
    records: Records,
    positions: Tensor | None = None,
    *,
    device: torch.device | None = None,
) -> np.ndarray[tuple[int, int], np.dtype[np.float32]]:
    """What the output layer is given, of un-augmented records, in eval mode and fp32.

    Args:
        network: The network; its output layer is ``task.classifier`` or the last matrix.
        task: Supplies the batch adapter.
        records: Training or test records.
        positions: Which of them; all by default.
        device: Where to compute; the CPU by default.

    Returns:
        float32 ``[n, F]``, in the order of ``positions``.
    """
    caught: list[Tensor] = []

    def catch(layer: nn.Module, inputs: tuple[Any, ...]) -> None:
        caught.append(inputs[0].detach().float().flatten(1).cpu())

    owner = classifier_name(network, task.classifier).rpartition(".")[0]
    handle = network.get_submodule(owner).register_forward_pre_hook(catch)
    try:
        logits(network, task, records, positions, device=device)
    finally:
        handle.remove()
    return torch.cat(caught).numpy()
