"""ShapePlan: what compaction left of a network, so that its module can be built again without it.

A plan names, for every tensor that lost something, the indices kept along each dimension, and the
sizes that modules write down beside their tensors (``out_channels``, ``num_features``, …). Applied
to what the task's own factory makes, it gives the small network, with the very weights that the
large one would have begun with. It is JSON in a model file, never code.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from efface.errors import CheckpointError
from efface.task import Task

Size = int | tuple[int, ...]
Sizes = Mapping[str, tuple[Size, Size]]


@dataclass(frozen=True, eq=False)
class Cut:
    """What is kept of one tensor.

    Args:
        shape: Its shape before.
        keep: Dimension → bool ``[shape[dimension]]``; a dimension that is not named is whole.
    """

    shape: tuple[int, ...]
    keep: Mapping[int, Tensor]

    @property
    def after(self) -> tuple[int, ...]:
        """Its shape after."""
        kept = {d: int(bits.sum()) for d, bits in self.keep.items()}
        return tuple(kept.get(d, size) for d, size in enumerate(self.shape))

    def of(self, tensor: Tensor) -> Tensor:
        """The part of a tensor that is kept, contiguous.

        >>> Cut((3, 2), {0: torch.tensor([True, False, True])}).of(torch.arange(6).view(3, 2))
        tensor([[0, 1],
                [4, 5]])
        """
        for dimension, bits in self.keep.items():
            places = bits.nonzero().flatten().to(tensor.device)
            tensor = tensor.index_select(dimension, places)
        return tensor.contiguous()


@dataclass(frozen=True, eq=False)
class ShapePlan:
    """What is kept of every tensor, and which sizes of modules change.

    Args:
        cuts: Name of a parameter or buffer → what is kept; whole tensors are not named.
        sizes: Module → attribute → its value before and after: whole numbers or tuples of them.

    Example:
        >>> rows = torch.tensor([True, False, True])
        >>> cuts = {"weight": Cut((3, 2), {0: rows}), "bias": Cut((3,), {0: rows})}
        >>> plan = ShapePlan(cuts, {"": {"out_features": (3, 2)}})
        >>> plan.apply(nn.Linear(2, 3))
        Linear(in_features=2, out_features=2, bias=True)
    """

    cuts: Mapping[str, Cut]
    sizes: Mapping[str, Sizes]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ShapePlan) and self.to_json() == other.to_json()

    def __hash__(self) -> int:
        return hash(self.to_json())

    def apply(self, network: nn.Module) -> nn.Module:
        """Cut a network, in place; returns it.

        Parameters are replaced by new ones; those that share memory still do afterwards.

        Raises:
            CheckpointError: If the plan was made for another network.
        """
        self._check(network)
        done: dict[int, Tensor] = {}
        for name, cut in self.cuts.items():
            owner, _, leaf = name.rpartition(".")
            module = network.get_submodule(owner)
            old: Tensor = getattr(module, leaf)
            if id(old) not in done:
                done[id(old)] = _smaller(old, cut)
            setattr(module, leaf, done[id(old)])
        for name, sizes in self.sizes.items():
            for attribute, (_, after) in sizes.items():
                setattr(network.get_submodule(name), attribute, after)
        return network

    def _check(self, network: nn.Module) -> None:
        tensors = _tensors(network)
        modules = dict(network.named_modules())
        wrong = [
            f"{name} of shape {tuple(tensors[name].shape)} instead of {cut.shape}"
            if name in tensors
            else f"no {name}"
            for name, cut in self.cuts.items()
            if name not in tensors or tuple(tensors[name].shape) != cut.shape
        ]
        for name, sizes in self.sizes.items():
            for attribute, (before, _) in sizes.items():
                found = vars(modules[name]).get(attribute) if name in modules else None
                if found != before:
                    wrong.append(f"{name}.{attribute} of {found} instead of {before}")
        if wrong:
            raise CheckpointError(
                f"the shape plan of the compacted model does not fit the task's network (it has "
                f"{wrong[0]}{_more(wrong)}); load the model with the task that it was made with."
            )

    def after(self, earlier: ShapePlan) -> ShapePlan:
        """This plan following an earlier one, as one plan for the network before both."""
        cuts = dict(earlier.cuts)
        for name, cut in self.cuts.items():
            first = earlier.cuts.get(name)
            cuts[name] = cut if first is None else _joined(first, cut)
        sizes = {name: dict(changed) for name, changed in earlier.sizes.items()}
        for name, changed in self.sizes.items():
            own = sizes.setdefault(name, {})
            for attribute, (before, then) in changed.items():
                own[attribute] = (own.get(attribute, (before,))[0], then)
        return ShapePlan(cuts, sizes)

    def to_json(self) -> str:
        """As text: bits packed as hexadecimal digits, eight to two digits, little-endian."""
        cuts = {
            name: {
                "shape": list(cut.shape),
                "keep": {str(d): _pack(bits) for d, bits in cut.keep.items()},
            }
            for name, cut in self.cuts.items()
        }
        value = {"cuts": cuts, "sizes": self.sizes}
        return json.dumps(value, sort_keys=True, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> ShapePlan:
        """The reverse of :meth:`to_json`.

        Raises:
            CheckpointError: If the text is no plan.
        """
        try:
            value = json.loads(text)
            cuts = {name: _cut(entry) for name, entry in value["cuts"].items()}
            sizes = {
                name: {a: (_size(b), _size(c)) for a, (b, c) in changed.items()}
                for name, changed in value["sizes"].items()
            }
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            raise CheckpointError(
                f"the shape plan of the compacted model is damaged ({error}); restore the file."
            ) from None
        return cls(cuts, sizes)


def _smaller(old: Tensor, cut: Cut) -> Tensor:
    small = cut.of(old.detach())
    return nn.Parameter(small, old.requires_grad) if isinstance(old, nn.Parameter) else small


def _joined(first: Cut, then: Cut) -> Cut:
    """Two cuts of one tensor, one after the other, as one."""
    keep = dict(first.keep)
    for dimension, bits in then.keep.items():
        if dimension not in keep:
            keep[dimension] = bits
            continue
        both = keep[dimension].clone()
        both[both.nonzero().flatten()] = bits
        keep[dimension] = both
    return Cut(first.shape, keep)


def _pack(bits: Tensor) -> str:
    return np.packbits(bits.numpy(), bitorder="little").tobytes().hex()


def _cut(entry: Mapping[str, Any]) -> Cut:
    shape = tuple(map(int, entry["shape"]))
    keep = {}
    for dimension, digits in entry["keep"].items():
        packed = np.frombuffer(bytes.fromhex(digits), dtype=np.uint8)
        size = shape[int(dimension)]
        bits = np.unpackbits(packed, bitorder="little")[:size]
        if len(bits) != size:
            raise ValueError(f"{len(bits)} bits for {size} entries")
        keep[int(dimension)] = torch.from_numpy(bits.astype(bool))
    return Cut(shape, keep)


def _size(value: Any) -> Size:
    return tuple(map(int, value)) if isinstance(value, list) else int(value)


def _more(items: list[str]) -> str:
    return f" and {len(items) - 1} more" if len(items) > 1 else ""


def _tensors(network: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer, under each of its names."""
    found: dict[str, Tensor] = dict(network.named_parameters(remove_duplicate=False))
    return found | dict(network.named_buffers(remove_duplicate=False))


# -- plans found by comparison ---------------------------------------------------------------------


def number(network: nn.Module) -> None:
    """Fill every parameter and buffer with 0, 1, 2, … in float64, in place: see :func:`compare`.

    What then cuts the network, by whatever means, can be read off what is left.
    """
    for tensor in network.state_dict(keep_vars=True).values():
        codes = torch.arange(tensor.numel(), dtype=torch.float64, device=tensor.device)
        tensor.data = codes.view(tensor.shape)


def sizes_of(network: nn.Module) -> dict[str, dict[str, Size]]:
    """Every whole number, and tuple of them, that the modules write down: module → name → value."""
    return {
        name: {
            attribute: value
            for attribute, value in vars(module).items()
            if _is_size(value) and not attribute.startswith("_")
        }
        for name, module in network.named_modules()
    }


def _is_size(value: Any) -> bool:
    values = value if isinstance(value, tuple) and value else (value,)
    return all(type(v) is int for v in values)


def compare(
    before: Mapping[str, Tensor], sizes: Mapping[str, Mapping[str, Size]], after: nn.Module
) -> ShapePlan:
    """The plan that turns a network into what something made of its numbered copy.

    Args:
        before: State dict of the network as it was.
        sizes: Its :func:`sizes_of`.
        after: A copy that was given to :func:`number` and then cut.

    Raises:
        ValueError: If more was done to it than to leave out slices of tensors.
    """
    cuts = {}
    for name, codes in after.state_dict().items():
        cut = _read(name, tuple(before[name].shape), codes)
        if cut.keep:
            cuts[name] = cut
    changed = {
        name: {a: (old, own[a]) for a, old in sizes[name].items() if a in own and own[a] != old}
        for name, own in sizes_of(after).items()
    }
    return ShapePlan(cuts, {name: values for name, values in changed.items() if values})


def _read(name: str, shape: tuple[int, ...], codes: Tensor) -> Cut:
    """What was kept of a numbered tensor."""
    if codes.ndim != len(shape):
        raise ValueError(f"{name} has other dimensions than before")
    left = codes.to("cpu", torch.int64)
    keep = {}
    for dimension, size in enumerate(shape):
        inner = math.prod(shape[dimension + 1 :])
        bits = torch.zeros(size, dtype=torch.bool)
        bits[(left // inner % size).flatten()] = True
        if not bool(bits.all()):
            keep[dimension] = bits
    cut = Cut(shape, keep)
    whole = torch.arange(math.prod(shape)).view(shape)
    if not torch.equal(cut.of(whole), left):
        raise ValueError(f"{name} is no slice of what it was")
    return cut


# -- tasks whose network is cut --------------------------------------------------------------------


@dataclass(frozen=True)
class Compacted:
    """A network factory behind which a plan is applied.

    Args:
        factory: The user's own.
        plan: What is left of what it makes.
    """

    factory: Callable[[], nn.Module]
    plan: ShapePlan

    def __call__(self) -> nn.Module:
        """A freshly initialised small network: what is left of a freshly initialised large one."""
        return self.plan.apply(self.factory())


def plan_of(task: Task) -> ShapePlan | None:
    """The plan of a compacted model's task; None for any other."""
    return task.network.plan if isinstance(task.network, Compacted) else None


def with_plan(task: Task, plan: ShapePlan | None) -> Task:
    """The task with its network cut by a plan, in the place of any plan that it had."""
    own = task.network
    factory = own.factory if isinstance(own, Compacted) else own
    return _with_network(task, factory if plan is None else Compacted(factory, plan))


def _with_network(task: Task, factory: Callable[[], nn.Module]) -> Task:
    """The task with another network; data that was read already is not read again."""
    if factory is task.network:
        return task
    other = copy.copy(task)
    object.__setattr__(other, "network", factory)
    return other


def metadata(task: Task) -> dict[str, str]:
    """What a model file says of its shapes: nothing, unless the model is compacted."""
    plan = plan_of(task)
    return {} if plan is None else {"shape_plan": plan.to_json()}


def from_metadata(task: Task, given: Mapping[str, str]) -> Task:
    """The task of a model in a file: the one given, with the network cut by the file's plan.

    Raises:
        CheckpointError: If the plan is damaged.
    """
    text = given.get("shape_plan")
    return with_plan(task, None if text is None else ShapePlan.from_json(text))


def described(given: Mapping[str, str], tensors: Mapping[str, Tensor]) -> dict[str, Any] | None:
    """What a model file says of its compaction; None for one that was not compacted.

    Args:
        given: The file's metadata.
        tensors: Its weights and buffers.

    Returns:
        ``{"before", "after", "tensors"}``: values in all, and the name and both shapes of every
        weight (of two or more dimensions) that was cut.
    """
    text = given.get("shape_plan")
    if text is None:
        return None
    cuts = ShapePlan.from_json(text).cuts
    after = sum(t.numel() for t in tensors.values())
    gone = sum(math.prod(cut.shape) - math.prod(cut.after) for cut in cuts.values())
    rows = [
        {"name": name, "before": list(cut.shape), "after": list(cut.after)}
        for name, cut in cuts.items()
        if len(cut.shape) >= 2
    ]
    return {"before": after + gone, "after": after, "tensors": rows}
