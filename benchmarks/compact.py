"""A compacted network against the masked one that it answers like.

70 % of the filters of every group are dropped, at random: the number of zeros is the same for any
choice. Both networks run in eval mode, fp32 and efface's own layout, on random images. Beside the
ratio of seconds stands that of multiply-adds (convolutions and matrix products, counted by torch).
The target is twice that: batch norm, activations and pooling shrink by the share of filters only,
calls not at all (which is what batch 1 shows), and convolution kernels work in blocks of channels,
16 where there is AVX-512, so that 10 filters take as long as 16. "In sixteens": as many filters
kept as the nearest multiple of 16, at least 16. File sizes are of whole model files, lineage and
shape plan included.

    python benchmarks/compact.py
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from measure import compared, judged, one_thread, rounds, steady_memory, write
from torch import nn

import efface
from efface.networks import AirNet, ResNet18, ResNet20
from efface.placement import rule
from efface.sparsify.groups import filter_groups, mask_of

DROPPED = 0.7
ROUNDS, SECONDS = 9, 0.3
"""Rounds per comparison, and about how long an arm works in one."""

NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "AirNet": AirNet,
    "ResNet-20": ResNet20,
    "ResNet-18": ResNet18,
}


def kept(size: int, multiple: int) -> int:
    """How many of so many filters are kept.

    >>> kept(64, 1), kept(64, 16), kept(16, 16)
    (19, 16, 16)
    """
    return max(multiple, round((1 - DROPPED) * size / multiple) * multiple)


def masked(network: Callable[[], nn.Module], multiple: int) -> efface.TrainedModel:
    """A fresh network with 70 % of the filters of every group dropped."""
    draw = torch.Generator().manual_seed(0)
    images = torch.rand(8, 3, 32, 32, generator=draw)
    data = (images, torch.arange(8) % 2)
    torch.manual_seed(0)
    task = efface.Task(network, data, data)
    trained = efface.adopt(task, network().state_dict())
    groups = filter_groups(task, trained.network).prunable
    keep = {}
    for group in groups:
        order = torch.randperm(group.size, generator=draw)
        keep[group.name] = order < kept(group.size, multiple)
    trained.set_mask(mask_of(groups, keep, trained.network))
    return trained


def runner(network: nn.Module, images: torch.Tensor, times: int) -> Callable[[], None]:
    """Forward passes as efface places them."""
    network = network.eval()
    if rule(network, torch.device("cpu"), train=False).channels_last:
        network = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        images = images.contiguous(memory_format=torch.channels_last)

    def run() -> None:
        with torch.inference_mode():
            for _ in range(times):
                network(images)

    return run


def repetitions(network: nn.Module, images: torch.Tensor) -> int:
    """How many forward passes of the masked network take about as long as an arm should work."""
    run = runner(network, images, 2)
    run()
    ((both,),) = [tuple(r.values()) for r in rounds({"masked": run}, 1)]
    return max(1, round(2 * SECONDS / both.wall))


def latency(
    name: str, large: efface.TrainedModel, small: efface.TrainedModel, batch: int
) -> dict[str, Any]:
    """The ratio of seconds for batches of one size."""
    before, after = small.lineage[-1].detail["multiply_adds"]
    ratio = round(after / before, 4)
    images = torch.rand(batch, 3, 32, 32, generator=torch.Generator().manual_seed(batch))
    times = repetitions(large.network, images)
    arms: dict[str, Callable[[], object]] = {
        "compact": runner(small.network, images, times),
        "masked": runner(large.network, images, times),
    }
    measured = rounds(arms, ROUNDS)
    return compared(
        f"{name}, batch {batch}: seconds of compact / masked (multiply-adds: {ratio:.3f})",
        measured,
        "compact",
        "masked",
        at_most=round(2 * ratio, 3) if batch > 1 else None,
        multiply_adds=[before, after],
        multiply_adds_ratio=ratio,
        milliseconds=[
            round(1000 * min(r[arm].cpu for r in measured) / times, 3)
            for arm in ("compact", "masked")
        ],
    )


def size(name: str, large: efface.TrainedModel, small: efface.TrainedModel) -> dict[str, Any]:
    """The ratio of bytes of the two model files."""
    before, after = small.lineage[-1].detail["parameters"]
    sizes = [len(model.to_bytes()) for model in (small, large)]
    return judged(
        f"{name}: bytes of the file of compact / masked (parameters: {after / before:.3f})",
        [sizes[0] / sizes[1]],
        at_most=round(1.25 * after / before, 3),
        bytes=sizes,
        parameters=[before, after],
    )


def main() -> None:
    os.environ.setdefault("EFFACE_KEY", "benchmark")
    one_thread()
    steady_memory()
    checks: list[dict[str, Any]] = []
    for name, network in NETWORKS.items():
        for multiple in (1, 16):
            large = masked(network, multiple)
            small = efface.compact(large)
            if multiple == 1:
                checks.append(latency(name, large, small, 1))
                checks.append(latency(name, large, small, 64))
                checks.append(size(name, large, small))
            else:
                checks.append(latency(f"{name}, in sixteens", large, small, 64))
    write("compact", __doc__.split("\n    python")[0], checks)


if __name__ == "__main__":
    main()
