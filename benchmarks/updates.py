"""Stored updates: how small they are, what storing them costs, and how fast they are undone.

Updates are those of real training steps on CIFAR-10 (random images where that is not at hand),
batches of 64, the 21st step by SGD, SGD with momentum and Adam. *Times smaller* is the whole change
in float32, dense part and batch-norm statistics included, over the bytes of the update with all of
that; of the optimisers the worst counts, the spread is over them. All combinations of what is kept
and how values are rounded are in the JSON file, with the bytes of their parts. *Undoing* reads the
updates of eight steps from a log on disk and subtracts them from the weights; *reading* reads them
likewise, checks their digests and only decompresses them.

    python benchmarks/updates.py
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zstandard
from default_path import images
from measure import compared, judged, one_thread, rounds, steady_memory, write
from torch import nn

import efface
from efface.data import Stream
from efface.fitting import Fit, Params
from efface.networks import AirNet, ResNet18, ResNet20
from efface.updates.codec import KINDS, add_all, add_to, decode, encode
from efface.updates.layout import Floats, Layout
from efface.updates.log import UpdateLog
from efface.updates.payload import Payload
from efface.updates.pruning import Update, prune

BATCH, STEPS, LAST, ROUNDS = 64, 21, 8, 9
KEEPS = (0.6, 0.3, 0.1, 0.05, 0.01)
OPTIMIZERS = {
    "SGD": efface.Settings(lr=0.1, momentum=0.0, weight_decay=5e-4),
    "momentum": efface.Settings(lr=0.1, momentum=0.9, weight_decay=5e-4),
    "Adam": efface.Settings(optimizer="adam", lr=1e-3, weight_decay=0.0),
}
NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "ResNet-18": ResNet18,
    "ResNet-20": ResNet20,
    "AirNet": AirNet,
}
TARGETS = {0.1: (22, 15), 0.05: (44, 30), 0.01: (170, 80)}
"""Times smaller with bf16 values: ResNet-18, networks of 0.3 million."""


@dataclass
class Watch:
    """A constraint that constrains nothing and keeps what the last steps changed."""

    network: nn.Module
    layout: Layout
    changes: list[Floats] = field(default_factory=list)
    before: Floats | None = None
    step: int = 0

    def begin(self, _params: Params) -> None:
        """Nothing."""

    def end(self, _params: Params) -> None:
        """Since the end of the step before: the forward pass moves batch-norm statistics."""
        self.step += 1
        if self.step < STEPS - LAST:
            return
        state = dict(self.network.named_parameters()) | dict(self.network.named_buffers())
        parts = [state[name].detach().float().reshape(-1) for name, _ in self.layout]
        now: Floats = torch.cat(parts).numpy()
        if self.before is not None:
            self.changes.append(now - self.before)
        self.before = now


def trained(
    make: Callable[[], nn.Module], settings: efface.Settings
) -> tuple[Layout, list[Floats]]:
    """The layout of a network, and the whole changes of its last steps."""
    pixels, labels, _ = images(BATCH * STEPS)
    fit_settings = replace(settings, epochs=1, batch_size=BATCH, schedule="constant")
    task = efface.Task(make, (pixels, labels), (pixels[:10], labels[:10]), fit=fit_settings)
    fit = Fit(task)
    network = fit.fresh()
    watch = Watch(network, Layout.of(network))
    stream = {"retain": Stream(torch.arange(len(pixels)))}
    fit.with_(constraint=watch)(network, fit.descend, stream, task.fit)
    return watch.layout, watch.changes


# -- sizes -----------------------------------------------------------------------------------------


def parts(data: bytes) -> dict[str, int]:
    """Bytes of an update's parts."""
    entries = Payload(data).entries
    sparse, dense = ([e for e in entries if (e.coding == 2) == d] for d in (False, True))
    found = {
        "places": sum(e.places for e in sparse),
        "upper": sum(e.upper for e in sparse),
        "lower": sum(e.lower for e in sparse),
        "signs": sum(e.signs for e in sparse),
        "dense": sum(sum(e[6:]) for e in dense),
    }
    return found | {"rest": len(data) - sum(found.values())}


def size(update: Update, layout: Layout, kind: Any) -> dict[str, Any]:
    """Of an update in one kind of values: times smaller, parts, error; checked on the way."""
    data = encode(update, kind, layout.bounds)
    again = decode(data)
    assert np.array_equal(again.indices, update.indices)
    if kind == "fp32":
        assert np.array_equal(again.values.view(np.int32), update.values.view(np.int32))
        assert np.array_equal(again.dense.view(np.int32), update.dense.view(np.int32))
    error = np.linalg.norm(again.values - update.values) / np.linalg.norm(update.values)
    return {
        "values": kind,
        "bytes": len(data),
        "times": round(4 * layout.total / len(data), 2),
        "parts": parts(data),
        "relative_error": float(f"{error:.2g}"),
    }


def sizes(changes: dict[tuple[str, str], tuple[Layout, list[Floats]]]) -> list[dict[str, Any]]:
    """Every combination."""
    rows = []
    for (network, optimizer), (layout, deltas) in changes.items():
        for keep in KEEPS:
            update = prune(deltas[-1], layout, keep)
            share = float(
                np.square(update.values).sum() / np.square(deltas[-1][: layout.size]).sum()
            )
            case = {"network": network, "optimizer": optimizer, "keep": keep}
            rows += [
                case | size(update, layout, kind) | {"squared_norm_kept": round(share, 4)}
                for kind in KINDS
            ]
    return rows


def size_checks(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows that have a target, and those of ResNet-18 at 10 % in the other kinds."""
    checks = []
    for network in NETWORKS:
        for keep, (large, small) in TARGETS.items():
            target = large if network == "ResNet-18" else small
            for kind in KINDS if (network, keep) == ("ResNet-18", 0.1) else ("bf16",):
                found = {
                    row["optimizer"]: row["times"]
                    for row in rows
                    if (row["network"], row["keep"], row["values"]) == (network, keep, kind)
                }
                check = judged(
                    f"{network}, keep {100 * keep:g} %, {kind}: times smaller, worst optimiser",
                    [min(found.values())],
                    at_least=target if kind == "bf16" else None,
                    optimizers=found,
                )
                checks.append(check | {"max": max(found.values())})
    return checks


# -- times -----------------------------------------------------------------------------------------


def milliseconds(work: Callable[[], object], times: int = 3) -> list[float]:
    """CPU milliseconds of one call, several times over."""
    work()
    found = []
    for _ in range(ROUNDS):
        start = time.process_time()
        for _ in range(times):
            work()
        found.append(1000 * (time.process_time() - start) / times)
    return found


def store_checks(network: str, layout: Layout, delta: Floats) -> list[dict[str, Any]]:
    """What pruning, encoding and decoding an update take."""
    checks = []
    for keep in TARGETS:
        update = prune(delta, layout, keep)
        data = encode(update, "bf16", layout.bounds)
        what = f"{network}, keep {100 * keep:g} %: milliseconds of"
        works: dict[str, Callable[[], object]] = {
            "pruning": lambda keep=keep: prune(delta, layout, keep),  # type: ignore[misc]
            "encoding": lambda update=update: encode(update, "bf16", layout.bounds),  # type: ignore[misc]
            "decoding": lambda data=data: decode(data),  # type: ignore[misc]
        }
        checks += [judged(f"{what} {name}", milliseconds(work)) for name, work in works.items()]
    return checks


def frames(data: bytes) -> Iterator[bytes]:
    """The compressed parts of an update."""
    read = Payload(data)
    lengths = [n for entry in read.entries for n in entry[6:]]
    for a, b in pairwise(accumulate(lengths, initial=read.start)):
        if a < b:
            yield data[a:b]


@dataclass
class Undo:
    """The arms: updates of some steps in a log on disk, and in memory."""

    log: UpdateLog
    payloads: list[bytes]
    flat: Floats

    def __post_init__(self) -> None:
        self.steps = np.arange(len(self.payloads))
        self.pieces = [piece for data in self.payloads for piece in frames(data)]

    def undo(self) -> None:
        """Read, check and subtract."""
        payloads = ((data, -1.0) for _, _, data in self.log.frames(self.steps))
        add_all(payloads, self.flat, checked=True)

    def read(self) -> None:
        """Read, check and decompress."""
        for _ in self.log.frames(self.steps):
            pass
        self.unpack()

    def add(self) -> None:
        """Subtract, one update after the other, from memory."""
        for data in self.payloads:
            add_to(data, self.flat, -1.0)

    def unpack(self) -> None:
        """Decompress from memory."""
        decompress = zstandard.ZstdDecompressor().decompress
        for piece in self.pieces:
            decompress(piece)


def undo_checks(network: str, layout: Layout, deltas: Sequence[Floats]) -> list[dict[str, Any]]:
    """Undoing against reading and decompressing, and against decompressing in memory."""
    checks = []
    for keep in TARGETS:
        payloads = [encode(prune(d, layout, keep), "bf16", layout.bounds) for d in deltas]
        with tempfile.TemporaryDirectory() as place:
            with UpdateLog.create(Path(place) / "log", {}, [f"{0:016x}"]) as log:
                for step, data in enumerate(payloads):
                    log.append(step, 0, np.array([0]), data, lr=0.1)
                log.commit()
                log.finish()
            with UpdateLog.open(Path(place) / "log") as log:
                own = Undo(log, payloads, np.zeros(layout.total, np.float32))
                arms = {"undo": own.undo, "read": own.read, "add": own.add, "unpack": own.unpack}
                done = rounds(arms, ROUNDS, 2)
        what = f"{network}, keep {100 * keep:g} %:"
        per_step = [1000 * r["undo"].cpu / len(payloads) for r in done]
        checks += [
            compared(
                f"{what} undoing / reading and decompressing", done, "undo", "read", at_most=2
            ),
            compared(f"{what} adding to weights / decompressing, in memory", done, "add", "unpack"),
            judged(f"{what} milliseconds of undoing a step", per_step),
        ]
    return checks


def main() -> None:
    one_thread()
    steady_memory()
    begun = time.perf_counter()
    changes = {
        (network, optimizer): trained(make, settings)
        for network, make in NETWORKS.items()
        for optimizer, settings in OPTIMIZERS.items()
    }
    rows = sizes(changes)
    checks = size_checks(rows)
    for network in ("ResNet-18", "ResNet-20"):
        layout, deltas = changes[network, "momentum"]
        checks += store_checks(network, layout, deltas[-1])
        checks += undo_checks(network, layout, deltas)
    entries = {name: changes[name, "SGD"][0].total for name in NETWORKS}
    dense = {name: entries[name] - changes[name, "SGD"][0].size for name in NETWORKS}
    write(
        "updates",
        __doc__.split("\n    python")[0],
        checks,
        images=images(1)[2],
        entries=entries,
        dense_entries=dense,
        zstd=".".join(map(str, zstandard.ZSTD_VERSION)),
        sizes=rows,
    )
    print(f"{time.perf_counter() - begun:.0f} s")


if __name__ == "__main__":
    main()
