"""Filter groups: which rows of which parameters live and die together.

A filter is an output channel of a convolution, or an output of a linear layer, with its bias and
its scale and shift in the batch norm behind it. Where a network adds the outputs of several layers,
channel ``c`` of all of them is one filter. ``torch-pruning`` (Fang et al. 2023) says what belongs
together; a forward pass with half of the filters at zero checks that their channels are dead.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from efface.errors import MismatchError, listed
from efface.mask import Mask
from efface.sparsify.tracing import trace
from efface.task import Task

Keep = Mapping[str, Tensor]
"""Group name → bool ``[size]``: which filters are kept."""


@dataclass(frozen=True, eq=False)
class Group:
    """Filters that live and die together.

    Args:
        name: Weight of the first layer of the group, in the network's order (``"conv1.weight"``).
        size: Number of filters.
        members: Parameter name and rows, int64 ``[size]`` or ``[size, k]``: filter ``c`` owns
            ``rows[c]`` of dimension 0 of that parameter. Weights and biases of layers, and scales
            and shifts of batch norms.
        weights: Those members that are weights of layers; rows ``[size]``.
    """

    name: str
    size: int
    members: tuple[tuple[str, Tensor], ...]
    weights: tuple[tuple[str, Tensor], ...] = ()


@dataclass(frozen=True, eq=False)
class Groups:
    """All groups of a network.

    Args:
        prunable: Groups whose filters can be dropped, in the network's order.
        whole: Name of a layer → why it is kept whole.
    """

    prunable: tuple[Group, ...]
    whole: Mapping[str, str]


def filter_groups(task: Task, network: nn.Module) -> Groups:
    """The filters of a network that can be dropped, and the layers that are kept whole.

    The answer depends on the architecture alone, not on the weights, so that a model and its
    references have the same groups. It is found on a copy with weights drawn anew, in evaluation
    mode, on a few un-augmented records: the network is left as it is.

    Kept whole are the output layer, layers whose channels a norm other than batch norm mixes,
    grouped convolutions other than depthwise ones, attention, whatever is added to a parameter or
    to the input, and layers that the traced forward pass does not reach. Where an activation maps
    zero to something else (a sigmoid), a dropped filter's channel is a constant instead of zero.

    Args:
        task: Supplies the records and the batch adapter.
        network: The network.

    Raises:
        MethodError: If the forward pass cannot be traced, with the cause.

    Example:
        >>> import efface
        >>> x, y = torch.rand(8, 1, 8, 8), torch.arange(8) % 2
        >>> task = efface.Task(lambda: efface.networks.DigitsCNN(2), (x, y), (x, y))
        >>> found = filter_groups(task, task.network())
        >>> [(g.name, g.size) for g in found.prunable]
        [('conv1.weight', 16), ('conv2.weight', 24), ('conv3.weight', 24)]
        >>> [name for name, _ in found.prunable[0].members]
        ['conv1.weight', 'norm1.weight', 'norm1.bias']
        >>> dict(found.whole)
        {'classifier': 'it is the output layer'}
    """
    found = trace(task, network)
    sound = tuple(Group(f.name, f.size, f.members, f.weights) for f in found if f.reason is None)
    reasons = {layer: f.reason for f in found if f.reason is not None for layer in f.layers}
    return Groups(sound, reasons)


def mask_of(groups: Sequence[Group], keep: Keep, network: nn.Module) -> Mask:
    """The mask that drops whole filters.

    It names every parameter of the groups: weights, biases, and batch-norm scales and shifts. With
    all of them at zero, a dropped filter's channel is zero behind batch norm and ReLU, too.

    Args:
        groups: The groups.
        keep: Group name → bool ``[size]``; groups that it does not name are kept whole.
        network: Supplies the shapes.

    Raises:
        MismatchError: If ``keep`` names an unknown group or has another size.

    Example:
        >>> net = nn.Linear(2, 3)
        >>> group = Group("weight", 3, (("weight", torch.arange(3)), ("bias", torch.arange(3))))
        >>> mask = mask_of([group], {"weight": torch.tensor([True, False, True])}, net)
        >>> mask["weight"].tolist(), mask["bias"].tolist()
        ([[True, True], [False, False], [True, True]], [True, False, True])
    """
    sizes = {group.name: group.size for group in groups}
    wrong = [name for name, kept in keep.items() if sizes.get(name) != len(kept)]
    if wrong:
        raise MismatchError(
            f"{listed(wrong)} are no filter groups of this network, or of another size; take the "
            "groups of filter_groups(task, network)."
        )
    shapes = {name: p.shape for name, p in network.named_parameters()}
    parts: dict[str, Tensor] = {}
    for group in groups:
        kept = keep.get(group.name)
        for name, rows in group.members:
            part = parts.setdefault(name, torch.ones(shapes[name], dtype=torch.bool))
            if kept is not None:
                part[rows[~kept.cpu()].flatten()] = False
    return Mask({name: parts[name] for name in shapes if name in parts})


def kept_filters(mask: Mask, groups: Sequence[Group]) -> dict[str, Tensor]:
    """Which filters a mask keeps: the reverse of :func:`mask_of`.

    A filter is dropped when all of its entries are. What a mask does not name is kept.

    Returns:
        Group name → bool ``[size]``.

    Example:
        >>> group = Group("weight", 2, (("weight", torch.arange(2)),))
        >>> half = Mask({"weight": torch.tensor([[True, False], [False, False]])})
        >>> kept_filters(half, [group])["weight"].tolist()
        [True, False]
    """
    return {
        group.name: torch.stack(
            [
                _any_entry(mask[name], rows)
                if name in mask
                else torch.ones(group.size, dtype=torch.bool)
                for name, rows in group.members
            ]
        ).any(0)
        for group in groups
    }


def is_structured(mask: Mask) -> bool:
    """Whether every row (dimension 0) of every weight is kept or dropped as a whole.

    >>> is_structured(Mask({"w": torch.tensor([[True, True], [False, False]])}))
    True
    >>> is_structured(Mask({"w": torch.tensor([[True, False], [False, False]])}))
    False
    """
    rows = [keep.reshape(len(keep), -1) for keep in mask.values() if keep.ndim]
    return all(bool((r.all(1) == r.any(1)).all()) for r in rows)


def zero_filters(groups: Sequence[Group], network: nn.Module) -> dict[str, Tensor]:
    """Which filters are exactly zero in all of their weights, biases and batch norm left aside.

    Returns:
        Group name → bool ``[size]``, on the CPU.

    Example:
        >>> net = nn.Linear(2, 2)
        >>> net.weight.data = torch.tensor([[0.0, 1.0], [0.0, 0.0]])
        >>> rows = ("weight", torch.arange(2))
        >>> zero_filters([Group("weight", 2, (rows,), (rows,))], net)["weight"].tolist()
        [False, True]
    """
    params = {name: p.detach() for name, p in network.named_parameters()}
    return {
        group.name: ~torch.stack(
            [_any_entry(params[name].cpu() != 0, rows) for name, rows in group.weights]
        ).any(0)
        for group in groups
    }


def _any_entry(entries: Tensor, rows: Tensor) -> Tensor:
    """Whether a filter has an entry that holds: bool ``[size]``."""
    return entries.reshape(len(entries), -1).any(1)[rows].reshape(len(rows), -1).any(1)
