"""Mask: which weights are kept. An immutable value: name → bool tensor."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from efface.errors import MismatchError

Words = npt.NDArray[np.uint64]
_WORD = 64
"""Entries that one unsigned integer holds: masks are compared that many at a time."""


class Overlap(NamedTuple):
    """How many entries two masks keep: both, either, the first, the second; and of how many.

    >>> Overlap(both=2, either=6, own=4, theirs=4, total=8).iou
    0.3333333333333333
    """

    both: int
    either: int
    own: int
    theirs: int
    total: int

    @property
    def iou(self) -> float:
        """Intersection over union, 0 to 1 (1 where neither keeps anything)."""
        return self.both / self.either if self.either else 1.0

    @property
    def iom(self) -> float:
        """Intersection over the smaller of the two, 0 to 1 (1 where that one is empty)."""
        smaller = min(self.own, self.theirs)
        return self.both / smaller if smaller else 1.0


class Mask(Mapping[str, Tensor]):
    """The pruned topology: for every weight in scope, which entries are kept.

    Sparsity is always over the entries that the mask names: its scope is its denominator.

    Args:
        keep: Name → bool tensor of the weight's shape; copied.

    Example:
        >>> m = Mask({"w": torch.tensor([True, False, False, False])})
        >>> m.sparsity, m.iou(m)
        (0.75, 1.0)
    """

    def __init__(self, keep: Mapping[str, Tensor]) -> None:
        self._keep = {
            name: t.detach().to("cpu", torch.bool).contiguous().clone() for name, t in keep.items()
        }
        self._dropped: dict[torch.device, dict[str, Tensor]] = {}
        self._packed: _Bits | None = None

    def __getitem__(self, name: str) -> Tensor:
        return self._keep[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._keep)

    def __len__(self) -> int:
        return len(self._keep)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Mask) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)

    def __repr__(self) -> str:
        return f"Mask({len(self)} tensors, {self.kept}/{self.total} kept)"

    @property
    def total(self) -> int:
        """Entries in scope."""
        return sum(t.numel() for t in self._keep.values())

    @property
    def kept(self) -> int:
        """Entries kept."""
        return int(self._bits.counts.sum())

    @property
    def sparsity(self) -> float:
        """Fraction of the scope that is pruned."""
        return 1 - self.kept / self.total if self.total else 0.0

    def layers(self) -> list[dict[str, Any]]:
        """Per weight: name, kept, total and sparsity, and how many filters have something left.

        A filter is a row (dimension 0) of a weight with two or more dimensions; others have none.
        """
        return [
            {
                "name": name,
                "kept": int(t.sum()),
                "total": t.numel(),
                "sparsity": 1 - int(t.sum()) / t.numel(),
                "filters": len(t) if t.ndim >= 2 else None,
                "filters_kept": int(t.flatten(1).any(1).sum()) if t.ndim >= 2 else None,
            }
            for name, t in self._keep.items()
        ]

    @property
    def digest(self) -> str:
        """SHA-256 over names, shapes and packed bits."""
        total = hashlib.sha256()
        for name in sorted(self._keep):
            total.update(f"{name}{tuple(self._keep[name].shape)}".encode())
            total.update(pack(self._keep[name]).numpy().tobytes())
        return total.hexdigest()

    def dropped(self, device: torch.device) -> dict[str, Tensor]:
        """The pruned entries, on a device (kept there: a mask never changes)."""
        if device not in self._dropped:
            self._dropped[device] = {name: (~t).to(device) for name, t in self._keep.items()}
        return self._dropped[device]

    def apply_(self, tensors: Mapping[str, Tensor]) -> None:
        """Set pruned entries to exactly zero, in place (fill, not multiply: no −0.0, no inf·0)."""
        for name, gone in self.dropped(next(iter(tensors.values())).device).items():
            tensors[name].detach().masked_fill_(gone, 0.0)

    def check(self, network: nn.Module) -> None:
        """Check that the mask is one of this network.

        Raises:
            MismatchError: If names or shapes differ.
        """
        shapes = {name: tuple(p.shape) for name, p in network.named_parameters()}
        for name, t in self._keep.items():
            if shapes.get(name) != tuple(t.shape):
                raise MismatchError(
                    f"the mask is of another network: it has {name!r} of shape {tuple(t.shape)}, "
                    f"the network {shapes.get(name, 'no such weight')}."
                )

    @property
    def _bits(self) -> _Bits:
        """The mask packed, made when it is first asked for (a mask never changes)."""
        if self._packed is None:
            self._packed = _Bits.of(self._keep)
        return self._packed

    def overlap(self, other: Mask) -> dict[str, Overlap]:
        """For every weight, how many entries the two masks keep together, either and each.

        Counted on packed bits, 64 entries at a time; packing happens once for each mask.

        Raises:
            MismatchError: If the two name other weights.

        >>> first = Mask({"w": torch.tensor([True, True, False, False])})
        >>> first.overlap(Mask({"w": torch.tensor([True, False, True, False])}))
        {'w': Overlap(both=1, either=3, own=2, theirs=2, total=4)}
        """
        if {n: t.shape for n, t in self.items()} != {n: t.shape for n, t in other.items()}:
            raise MismatchError("the masks name different weights; compare masks of one scope.")
        mine, yours = self._bits, other._bits
        both = mine.tally(mine.words & yours.words)
        each = zip(
            mine.names, both.tolist(), mine.counts.tolist(), yours.counts.tolist(), strict=True
        )
        found = {
            name: Overlap(b, m + y - b, m, y, self._keep[name].numel()) for name, b, m, y in each
        }
        return {name: found[name] for name in self}

    def overall(self, other: Mask) -> Overlap:
        """The same over all weights together.

        Raises:
            MismatchError: If the two name other weights.
        """
        parts = self.overlap(other).values()
        return Overlap(*(sum(column) for column in zip(*parts, strict=True))) if parts else _NOTHING

    def iou(self, other: Mask) -> float:
        """Intersection over union of the kept entries (1 for two empty masks).

        Raises:
            MismatchError: If the two name other weights.
        """
        return self.overall(other).iou

    def iom(self, other: Mask) -> float:
        """Intersection over the smaller number of kept entries (1 where that is none).

        With equal densities IoU = IoM / (2 − IoM).

        Raises:
            MismatchError: If the two name other weights.
        """
        return self.overall(other).iom

    @classmethod
    def from_pruned(cls, network: nn.Module) -> Mask | None:
        """The mask of a live ``torch.nn.utils.prune`` module, or None when it has none."""
        ends = "_mask"
        found = {n[: -len(ends)]: b.bool() for n, b in network.named_buffers() if n.endswith(ends)}
        parameters = dict(network.named_parameters())
        found = {n: b for n, b in found.items() if f"{n}_orig" in parameters}
        return cls(found) if found else None

    def to_pruned(self, network: nn.Module) -> nn.Module:
        """Hang the mask on a network as live ``torch.nn.utils.prune`` masks; returns it."""
        self.check(network)
        for name, keep in self.items():
            owner, _, leaf = name.rpartition(".")
            prune.custom_from_mask(network.get_submodule(owner), leaf, keep)  # type: ignore[no-untyped-call]
        return network


_NOTHING = Overlap(0, 0, 0, 0, 0)


class _Bits(NamedTuple):
    """All of a mask in one array of words: each weight, in the order of names, begins a word."""

    names: list[str]
    words: Words
    starts: npt.NDArray[np.intp]
    counts: npt.NDArray[np.int64]

    @classmethod
    def of(cls, keep: Mapping[str, Tensor]) -> _Bits:
        """Pack a mask; what fills up a last word counts as pruned."""
        names = sorted(name for name in keep)
        lengths = [-(-keep[name].numel() // _WORD) for name in names]
        starts = np.cumsum([0, *lengths])
        packed = np.zeros(int(starts[-1]) * 8, dtype=np.uint8)
        for name, start in zip(names, starts.tolist(), strict=False):
            bits = pack(keep[name]).numpy()
            packed[start * 8 : start * 8 + len(bits)] = bits
        made = cls(names, packed.view(np.uint64), starts, np.zeros(len(names), dtype=np.int64))
        return made._replace(counts=made.tally(made.words))

    def tally(self, words: Words) -> npt.NDArray[np.int64]:
        """How many bits are set, weight by weight."""
        before = np.concatenate([[0], np.cumsum(np.bitwise_count(words), dtype=np.int64)])
        found: npt.NDArray[np.int64] = before[self.starts[1:]] - before[self.starts[:-1]]
        return found


def pack(keep: Tensor) -> Tensor:
    """A bool tensor as bytes, eight entries each, little-endian bit order.

    >>> pack(torch.tensor([True, False, False, True])).tolist()
    [9]
    """
    bits = np.packbits(keep.cpu().contiguous().numpy().reshape(-1), bitorder="little")
    return torch.from_numpy(bits)


def unpack(packed: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The reverse of :func:`pack`."""
    count = int(np.prod(shape))
    bits = np.unpackbits(packed.numpy(), bitorder="little", count=count)
    return torch.from_numpy(bits.astype(bool)).reshape(shape)


def scope_names(
    network: nn.Module, scope: str = "weights", classifier: str | None = None
) -> list[str]:
    """Names of the weights that pruning may touch.

    Args:
        network: The network.
        scope: ``"weights"``: every parameter with two or more dimensions except the classifier;
            ``"conv"``: weights of convolutions only, as Jia et al. 2023; ``"all"``: every
            parameter with two or more dimensions.
        classifier: Name of the output layer's weight; by default the last of them.
    """
    matrices = [name for name, p in network.named_parameters() if p.ndim >= 2]
    if scope == "all":
        return matrices
    if scope == "conv":
        owners = {
            f"{name}.weight" if name else "weight"
            for name, m in network.named_modules()
            if isinstance(m, nn.Conv1d | nn.Conv2d | nn.Conv3d)
        }
        return [name for name in matrices if name in owners]
    return [name for name in matrices if name != classifier_name(network, classifier)]


def classifier_name(network: nn.Module, given: str | None = None) -> str:
    """Name of the output layer's weight: the one given, else the last with two dimensions or more.

    Raises:
        MismatchError: If the network has no such weight.
    """
    matrices = [name for name, p in network.named_parameters() if p.ndim >= 2]
    if given is not None and given not in matrices:
        raise MismatchError(f"the task's classifier {given!r} is not a weight of the network.")
    if not matrices:
        raise MismatchError("the network has no weight of two or more dimensions.")
    return given or matrices[-1]
