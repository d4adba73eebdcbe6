"""Records, index streams and batches.

A *record* is one training example. It is addressed by its position in the data set; IDs are the
task's business. Two kinds of records exist: in memory (tensors, gathered a batch at a time, on the
device that trains) and loaded (anything map-style, through a ``DataLoader``). Both consume the same
index stream, so that both see the same batches.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, cast, runtime_checkable

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map
from torch.utils.data import DataLoader, TensorDataset, default_collate

from efface.errors import InputError, TaskError
from efface.seeds import generator

MEMORY_LIMIT = 2 * 1024**3
"""Data sets of fixed-shape records up to this many bytes are read into memory once."""

PROBED = 16


class Batch(NamedTuple):
    """Inputs (a pytree of ``[B, …]``), targets ``[B]``, positions ``[B]``, the stream's weight."""

    inputs: Any
    targets: Tensor
    positions: Tensor
    weight: float = 1.0


class Sized(Protocol):
    """A map-style data set of ``(input, target)`` pairs."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> Any: ...


@runtime_checkable
class Augment(Protocol):
    """A batch transform whose randomness for a record comes only from that record's row.

    ``draws`` uniform numbers in [0, 1) are drawn for every (record, epoch), so that leaving a
    record out shifts nobody else's augmentation.
    """

    @property
    def draws(self) -> int:
        """Uniform numbers needed per record."""

    def __call__(self, inputs: Any, uniform: Tensor, /) -> Any:
        """Transform inputs ``[B, …]`` with ``uniform`` ``[B, draws]``."""


class TensorRecords:
    """Records in memory: one indexing operation makes a batch.

    Args:
        inputs: A pytree of tensors ``[N, …]``.
        targets: Class indices ``[N]``.
    """

    in_memory = True

    def __init__(self, inputs: Any, targets: Tensor) -> None:
        self.inputs = inputs
        self.targets = targets.cpu()
        self._placed: dict[torch.device, tuple[Any, Tensor]] = {}

    def __len__(self) -> int:
        return len(self.targets)

    def _on(self, device: torch.device) -> tuple[Any, Tensor]:
        if device not in self._placed:
            move: Callable[[Tensor], Tensor] = lambda t: t.to(device)  # noqa: E731
            self._placed[device] = (tree_map(move, self.inputs), self.targets.to(device))
        return self._placed[device]

    def batches(self, plan: Iterable[Tensor], device: torch.device) -> Iterator[Batch]:
        """A batch for each tensor of positions; the data lives on the device."""
        inputs, targets = self._on(device)
        for positions in plan:
            where = positions.to(device)
            gather: Callable[[Tensor], Tensor] = lambda t, w=where: t.index_select(0, w)  # type: ignore[misc]  # noqa: E731
            yield Batch(tree_map(gather, inputs), targets.index_select(0, where), positions)

    def raw(self, position: int) -> tuple[Any, int]:
        """One record as it lies in memory."""
        return tree_map(lambda t: t[position], self.inputs), int(self.targets[position])


class LoadedRecords:
    """Records read one by one through a ``DataLoader``: ragged, huge or lazily decoded data.

    Args:
        dataset: Any map-style data set of ``(input, target)``.
        workers: Processes of the loader; 0 reads in this one.
        collate: How pairs become a batch.
    """

    in_memory = False

    def __init__(
        self, dataset: Sized, workers: int = 0, collate: Callable[[list[Any]], Any] | None = None
    ) -> None:
        self.dataset = dataset
        self.workers = workers
        self.collate = collate or default_collate
        self.targets = _targets(dataset)

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> Any:
        return self.dataset[index]

    def batches(self, plan: Iterable[Tensor], device: torch.device) -> Iterator[Batch]:
        """A batch for each tensor of positions, collated and moved to the device."""
        plan = list(plan)
        loader = DataLoader(
            cast("Any", self.dataset),
            batch_sampler=[p.tolist() for p in plan],
            num_workers=self.workers,
            collate_fn=self.collate,
        )
        move: Callable[[Any], Any] = lambda t: t.to(device) if isinstance(t, Tensor) else t  # noqa: E731
        try:
            for positions, pair in zip(plan, loader, strict=True):
                inputs, targets = pair
                yield Batch(tree_map(move, inputs), targets.to(device), positions)
        except InputError as error:  # a loader process puts its whole traceback before the sentence
            sentence = str(error).strip().splitlines()[-1].removeprefix(f"{_full_name(error)}: ")
            raise type(error)(sentence) from None

    def raw(self, position: int) -> tuple[Any, int]:
        """One record as the data set gives it."""
        inputs, target = self.dataset[position]
        return inputs, int(target)


def _full_name(error: Exception) -> str:
    return f"{type(error).__module__}.{type(error).__qualname__}"


Records = TensorRecords | LoadedRecords


def as_records(
    dataset: Any,
    *,
    workers: int = 0,
    collate: Callable[[list[Any]], Any] | None = None,
    limit: int = MEMORY_LIMIT,
) -> Records:
    """Records of a map-style data set; read into memory when they are of one shape and fit.

    Args:
        dataset: Map-style data set of ``(input, target)``, a ``TensorDataset``, or a pair
            ``(inputs, targets)`` of a pytree of tensors and a tensor.
        workers: Loader processes, where a loader is needed.
        collate: How a list of pairs becomes a batch; giving one keeps the loader path.
        limit: Bytes up to which data is read into memory.

    Raises:
        TaskError: If the data set is empty, changes between two reads, or holds no such pairs.
    """
    if isinstance(dataset, TensorRecords | LoadedRecords):
        return dataset
    if isinstance(dataset, tuple) and len(dataset) == 2 and isinstance(dataset[1], Tensor):
        records = TensorRecords(dataset[0], dataset[1].long())
    elif isinstance(dataset, TensorDataset) and len(dataset.tensors) == 2:
        records = TensorRecords(dataset.tensors[0], dataset.tensors[1].long())
    else:
        return _read(dataset, workers, collate, limit)
    if len(records) == 0:
        raise TaskError("the data set is empty; a task needs at least one record.")
    lengths = {len(leaf) for leaf in tree_flatten(records.inputs)[0]}
    if lengths != {len(records)}:
        raise TaskError(
            f"there are {len(records)} targets but inputs of {sorted(lengths)} records; give one "
            "target per record, in the same order."
        )
    return records


def _read(dataset: Any, workers: int, collate: Any, limit: int) -> Records:
    if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
        raise TaskError(
            f"{type(dataset).__name__} is not a map-style data set; give one with __len__ and "
            "__getitem__ that returns (input, target)."
        )
    if len(dataset) == 0:
        raise TaskError("the data set is empty; a task needs at least one record.")
    check_repeatable(dataset)
    first = [[_as_tensor(leaf) for leaf in _leaves(dataset[i])] for i in probes(len(dataset))]
    shapes = {tuple((t.shape, t.dtype) for t in leaves if t is not None) for leaves in first}
    size = sum(t.numel() * t.element_size() for t in first[0] if t is not None) * len(dataset)
    plain = all(t is not None for leaves in first for t in leaves)
    if plain and collate is None and len(shapes) == 1 and size <= limit:
        pairs = [dataset[i] for i in range(len(dataset))]
        try:
            inputs, targets = default_collate(pairs)
        except RuntimeError:  # a record of another shape after all
            return LoadedRecords(dataset, workers)
        return TensorRecords(inputs, targets.long())
    return LoadedRecords(dataset, workers, collate)


def _leaves(item: Any) -> list[Any]:
    if not isinstance(item, tuple | list) or len(item) != 2:
        raise TaskError(
            "a record must be a pair (input, target); wrap the data set so that it returns one."
        )
    return tree_flatten(item)[0]


def _as_tensor(leaf: Any) -> Tensor | None:
    """A tensor, array or number as a tensor; None for text and anything else."""
    if isinstance(leaf, Tensor | np.ndarray | np.generic | int | float):
        return torch.as_tensor(leaf)
    return None


def _targets(dataset: Any) -> Tensor:
    """Targets from an attribute where the data set has one, else by reading every record."""
    known = getattr(dataset, "targets", getattr(dataset, "labels", None))
    if known is not None and len(known) == len(dataset):
        return torch.as_tensor(known).long()
    return torch.tensor([int(dataset[i][1]) for i in range(len(dataset))])


def probes(n: int) -> list[int]:
    """Up to 16 positions, evenly spread over ``n``."""
    return sorted({int(i) for i in np.linspace(0, n - 1, min(n, PROBED))})


def record_digest(item: Any) -> str:
    """SHA-256 of a record's content: every leaf's type, shape and bytes.

    Text counts as it is, an image by its pixels, anything else by what it prints as.
    """
    total = hashlib.sha256()
    for leaf in _leaves(item):
        tensor = _as_tensor(np.asarray(leaf) if hasattr(leaf, "__array_interface__") else leaf)
        if tensor is None:
            total.update(repr(leaf).encode())
            continue
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        total.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
        total.update(flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b"")
    return total.hexdigest()


def check_repeatable(dataset: Any) -> None:
    """Read some records twice.

    Raises:
        TaskError: If a record differs between two reads: the data set augments by itself.
    """
    for i in probes(len(dataset)):
        if record_digest(dataset[i]) != record_digest(dataset[i]):
            raise TaskError(
                f"record {i} differs between two reads: the data set augments by itself; give "
                "un-augmented records and pass the transform as Task(augment=…)."
            )


def fingerprint(records: Records) -> str:
    """A digest of the data that changes when records are reordered, changed, added or removed.

    In memory it is taken over everything; where records are loaded one by one, over all targets
    and 16 records.
    """
    if isinstance(records, TensorRecords):
        return record_digest((records.inputs, records.targets))
    parts = [record_digest(records.raw(i)) for i in probes(len(records))]
    return hashlib.sha256(
        "\n".join([record_digest((records.targets, 0)), *parts]).encode()
    ).hexdigest()


def order(seed: int, purpose: str, epoch: int, positions: Tensor, total: int) -> Tensor:
    """The index stream: positions in the order in which an epoch visits them.

    All ``total`` records are put in an order that depends only on (seed, purpose, epoch); those
    not asked for are then left out. So forgetting a record moves nobody else.

    >>> a = order(0, "train", 1, torch.arange(6), 6).tolist()
    >>> b = order(0, "train", 1, torch.tensor([0, 1, 2, 4, 5]), 6).tolist()
    >>> [p for p in a if p != 3] == b
    True
    """
    everyone = torch.randperm(total, generator=generator(seed, f"order/{purpose}", epoch))
    if len(positions) == total:
        return everyone
    wanted = torch.zeros(total, dtype=torch.bool)
    wanted[positions] = True
    return everyone[wanted[everyone]]


def queue(targets: Tensor, luck: Tensor) -> Tensor:
    """An order of records whose every beginning holds the classes in proportion.

    The r-th record of a class of n (r = 0, 1, …) comes at (2 r + 1) / 2 n: the divisor method of
    Webster and Sainte-Laguë. Rounding shares to the largest remainders would not do: there a class
    may get fewer records out of more, and a smaller part would not lie within a larger one.

    Args:
        targets: Classes ``[n]``.
        luck: Distinct numbers ``[n]``: who is first within a class, and among classes that tie.

    Returns:
        Places in ``targets``, ``[n]``.

    >>> targets = torch.tensor([0, 0, 0, 0, 1, 1])
    >>> targets[queue(targets, torch.arange(6))].tolist()
    [0, 1, 0, 0, 1, 0]
    """
    drawn = luck.argsort()
    when = torch.empty(len(targets), dtype=torch.float64)
    for label in torch.unique(targets).tolist():
        mine = drawn[targets[drawn] == label]
        place = torch.arange(len(mine), dtype=torch.float64)
        when[mine] = (2 * place + 1) / (2 * len(mine))
    return drawn[when[drawn].argsort(stable=True)]


def chunks(positions: Tensor, batch_size: int) -> list[Tensor]:
    """Batches of positions; a last batch of one joins the one before (batch norm needs two)."""
    parts = list(torch.split(positions, max(1, batch_size)))
    if len(parts) > 1 and len(parts[-1]) == 1:
        parts[-2:] = [torch.cat(parts[-2:])]
    return parts


@dataclass(frozen=True)
class Cohorts:
    """Deletable records that share batches, so that few steps see them.

    Args:
        labels: For every record of the task its cohort, or −1 ``[N]``.
        since: They take part from this epoch on; before it, their places are left empty.
    """

    labels: Tensor
    since: int = 0


@dataclass(frozen=True)
class Stream:
    """A set of records that a fit draws batches from.

    Args:
        positions: Which records ``[n]``.
        batch_size: Records per batch; ``None`` takes the fit's.
        period: The stream supplies a batch at every ``period``-th step.
        weight: A factor of this stream's loss in :meth:`efface.Fit.descend`.
        targets: Labels ``[N]`` to use instead of the records' own (by position), or ``None``.
        within: The batches of these positions are planned and keep their places; what is not in
            ``positions`` is left out of them. ``None`` plans batches of ``positions`` alone.
        cohorts: Which records share batches, or ``None``.
    """

    positions: Tensor
    batch_size: int | None = None
    period: int = 1
    weight: float = 1.0
    targets: Tensor | None = None
    within: Tensor | None = None
    cohorts: Cohorts | None = None

    def __post_init__(self) -> None:
        if len(self.positions) == 0:
            raise TaskError("a stream without records cannot be trained on.")


def uniforms(seed: int, epoch: int, total: int, draws: int) -> Tensor:
    """Uniform numbers ``[total, draws]`` for augmentation: a row for every (record, epoch)."""
    return torch.rand(total, draws, generator=generator(seed, "augment", epoch))


def as_strings(values: Sequence[Any]) -> list[str]:
    """IDs as strings; whole floats lose their ``.0`` so that tables read with gaps still match."""
    return [
        str(int(v)) if isinstance(v, float | np.floating) and float(v).is_integer() else str(v)
        for v in values
    ]
