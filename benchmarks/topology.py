"""Masks of two ResNet-18s (11.2 million entries) compared on packed bits; what θ₀ and a mask cost.

Milliseconds are CPU time per comparison. A mask is packed once, when it is first compared; the twin
compares bool tensors. Sizes are of whole model files: "beyond θ₀" is the file of a sparse model
that keeps its initial weights and its mask, less the initial weights, over that of a dense model.

    python benchmarks/topology.py
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from measure import compared, judged, one_thread, rounds, write

import efface
from efface.auditing.topology import chance, layers
from efface.mask import Mask, scope_names
from efface.networks import ResNet18

ROUNDS, TIMES = 9, 20
DENSITY = 0.1


def masks(count: int) -> list[Mask]:
    """Random masks of a ResNet-18 at 90 % sparsity, the classifier left out."""
    network, draw = ResNet18(), torch.Generator().manual_seed(0)
    shapes = {name: network.get_parameter(name).shape for name in scope_names(network)}
    return [
        Mask({name: torch.rand(shape, generator=draw) < DENSITY for name, shape in shapes.items()})
        for _ in range(count)
    ]


def by_tensors(a: Mask, b: Mask) -> float:
    """The twin: IoU of bool tensors, one weight after the other."""
    both = sum(int((a[name] & b[name]).sum()) for name in a)
    either = sum(int((a[name] | b[name]).sum()) for name in a)
    return both / either


def milliseconds(work: Callable[[], object], times: int) -> list[float]:
    """CPU milliseconds of one call, several times over."""
    found = []
    for _ in range(ROUNDS):
        start = time.process_time()
        for _ in range(times):
            work()
        found.append(1000 * (time.process_time() - start) / times)
    return found


def sizes() -> tuple[int, int, int, int]:
    """Bytes of files: dense, sparse, sparse with θ₀, and of θ₀ itself."""
    data = (torch.rand(8, 3, 32, 32), torch.arange(8) % 2)
    task = efface.Task(ResNet18, data, data)
    model = efface.adopt(task, ResNet18().state_dict())
    dense = len(model.to_bytes())
    model.set_mask(masks(1)[0])
    sparse = len(model.to_bytes())
    model.initial_weights = ResNet18().state_dict()
    first = sum(t.numel() * t.element_size() for t in model.initial_weights.values())
    return dense, sparse, len(model.to_bytes()), first


def main() -> None:
    one_thread()
    a, b, c = masks(3)
    assert a.iou(b) == by_tensors(a, b)
    fresh = [Mask(dict(a)) for _ in range(ROUNDS + 1)]
    arms = {
        "packed": lambda: [a.iou(b) for _ in range(TIMES)],
        "bool tensors": lambda: [by_tensors(a, b) for _ in range(TIMES)],
    }
    done = rounds(arms, ROUNDS)
    dense, sparse, whole, first = sizes()
    checks = [
        judged(
            "IoU of two masks, packed: milliseconds",
            milliseconds(lambda: a.iou(b), TIMES),
            at_most=5.0,
        ),
        judged(
            "packing a mask and its first IoU: milliseconds",
            milliseconds(lambda: fresh.pop().iou(b), 1),
        ),
        compared(
            "IoU on packed bits / on bool tensors", done, "packed", "bool tensors", at_most=0.2
        ),
        judged("IoU by chance: milliseconds", milliseconds(lambda: chance(a, b), 1)),
        judged(
            "kept, removed, regrown per layer: milliseconds",
            milliseconds(lambda: layers(a, b, [c, b]), 1),
        ),
        judged(
            "file with θ₀ and mask, beyond θ₀ / dense file", [(whole - first) / dense], at_most=1.04
        ),
        judged(
            "file with θ₀ and mask / dense file and θ₀", [whole / (dense + first)], at_most=1.04
        ),
        judged("file with a seed for θ₀, and mask / dense file", [sparse / dense], at_most=1.04),
    ]
    write("topology", __doc__.split("\n    python")[0], checks, entries=a.total)


if __name__ == "__main__":
    main()
