"""The computational blocks of a network at three granularities, and how to turn them down.

A block is whatever can be multiplied by one factor: a filter, a residual branch or an attention
head, a layer. It is turned down at its *gates*: channels of what a module puts out, or takes in.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from efface.errors import MethodError, listed
from efface.mask import Mask, classifier_name
from efface.placement import preserved
from efface.sparsify.blocks.flow import BATCH_NORM, Flow
from efface.sparsify.groups import Group, filter_groups, mask_of
from efface.sparsify.tracing import LAYERS, examples, redrawn
from efface.task import Task

Granularity = Literal["filter", "branch", "layer"]
Side = Literal["in", "out"]


@dataclass(frozen=True, eq=False)
class Gate:
    """Channels of what a module puts out, or takes in, and the blocks that own them.

    Args:
        module: Its name.
        side: ``out``: a factor goes to the rows of its weight and bias; ``in``: to the columns of
            its weight.
        owner: Block of every channel, int64 ``[channels]``; −1: nobody's.
        copied: What it puts out is changed in place later on.
    """

    module: str
    side: Side
    owner: Tensor
    copied: bool = False

    def scaled(self, network: nn.Module) -> Iterator[tuple[str, int]]:
        """Parameters that take the factors, by name, and along which dimension."""
        if self.side == "in":
            yield f"{self.module}.weight", 1
            return
        module, path = network.get_submodule(self.module), self.module
        if isinstance(module, nn.MultiheadAttention):
            module, path = module.out_proj, f"{path}.out_proj"
        for leaf in ("weight", "bias"):
            if isinstance(getattr(module, leaf, None), nn.Parameter):
                turned = leaf == "weight" and getattr(module, "transposed", False)
                yield f"{path}.{leaf}" if path else leaf, int(turned)


@dataclass(frozen=True, eq=False)
class Blocks:
    """The blocks of a network.

    Args:
        granularity: What a block is.
        names: Of the blocks, in the network's order.
        layer: The layer of each, int64 ``[blocks]``: blocks of one layer are alike, and are
            compared with one another.
        layers: Names of the layers.
        gates: Where blocks are turned down.
        groups: Filter groups, where blocks are filters: one for each layer.
        inside: Names of the parameters that are a block's alone, where blocks are branches or
            layers.
        whole: Name of a layer → why it is no block, or is not made of blocks.
    """

    granularity: Granularity
    names: tuple[str, ...]
    layer: Tensor
    layers: tuple[str, ...]
    gates: tuple[Gate, ...]
    groups: tuple[Group, ...] = ()
    inside: tuple[tuple[str, ...], ...] = ()
    whole: Mapping[str, str] | None = None

    def __len__(self) -> int:
        return len(self.names)

    def territory(self, chosen: Tensor, network: nn.Module) -> dict[str, Tensor]:
        """Everything that is the chosen blocks' own: parameter name → bool of its shape.

        Args:
            chosen: bool ``[blocks]``.
            network: Supplies the shapes.
        """
        if self.groups:
            parts = torch.split(~chosen, [g.size for g in self.groups])
            keep = {g.name: part for g, part in zip(self.groups, parts, strict=True)}
            return {name: ~kept for name, kept in mask_of(self.groups, keep, network).items()}
        shapes = {name: p.shape for name, p in network.named_parameters()}
        found: dict[str, Tensor] = {}
        for gate in self.gates:
            gone = (gate.owner >= 0) & chosen[gate.owner.clamp(min=0)]
            for name, dim in gate.scaled(network):
                part = found.setdefault(name, torch.zeros(shapes[name], dtype=torch.bool))
                part |= gone.reshape([-1 if d == dim else 1 for d in range(part.ndim)])
        for gone, names in zip(chosen.tolist(), self.inside, strict=True):
            for name in names:
                there = found.get(name, torch.tensor(False))
                found[name] = there | torch.full(shapes[name], gone, dtype=torch.bool)
        return found


def find_blocks(task: Task, network: nn.Module, granularity: Granularity = "filter") -> Blocks:
    """The blocks of a network; they depend on the architecture alone, not on the weights.

    ``filter``: filters and neurons, as :func:`efface.sparsify.groups.filter_groups` has them: where
    a network adds the outputs of several layers, channel ``c`` of all of them is one block.
    ``branch``: what a network adds to a shortcut; an attention whose heads can be told apart is one
    block for each head. ``layer``: every layer but the output layer.

    The output layer is no block: switching off a class there leaves all features as they are.

    Args:
        task: Supplies the records of a traced forward pass, and the batch adapter.
        network: Left as it is.
        granularity: What a block is.

    Raises:
        MethodError: If the network cannot be traced, or has no such block.

    Example:
        >>> import efface
        >>> x, y = torch.rand(8, 1, 8, 8), torch.arange(8) % 2
        >>> task = efface.Task(lambda: efface.networks.DigitsCNN(2), (x, y), (x, y))
        >>> found = find_blocks(task, task.network())
        >>> len(found), found.layers, found.names[0]
        (64, ('conv1.weight', 'conv2.weight', 'conv3.weight'), 'conv1.weight 0')
        >>> [(gate.module, gate.side) for gate in found.gates]
        [('norm1', 'out'), ('norm2', 'out'), ('norm3', 'out')]
    """
    flow = Flow(task, network)
    makers = {"filter": _filters, "branch": _branches, "layer": _layers}
    found = makers[granularity](task, network, flow)
    mixed = [gate.module for gate in found.gates if gate.module in flow.mixed]
    if mixed:
        raise MethodError(
            f"{listed(mixed, 3)} of {type(network).__name__} see something else than a row for "
            "every record (a sequence first, or windows), so that no block can be scored record "
            "by record; let records come first, or take another method."
        )
    if len(found) == 0:
        why = [f"{name}: {reason}" for name, reason in (found.whole or {}).items()]
        other = {"filter": "layer", "branch": "filter"}.get(granularity)
        take = f"score.granularity={other}, or another method" if other else "another method"
        raise MethodError(
            f"{type(network).__name__} has no {granularity} to score ({listed(why, 3) or 'none'}); "
            f"take {take}."
        )
    return found


# -- filters --------------------------------------------------------------------------------------


def _filters(task: Task, network: nn.Module, flow: Flow) -> Blocks:
    found = filter_groups(task, network)
    blocks = _of_groups(found.prunable, found.whole, network, flow)
    if blocks.groups and not _silent(task, network, blocks):
        singly = [_of_groups([g], {}, network, flow) for g in found.prunable]
        good = [_silent(task, network, one) for one in singly]
        why = "part of what reads its channels lies past its batch norm"
        past = [g for g, fine in zip(found.prunable, good, strict=True) if not fine]
        whole = {**found.whole, **{g.name.rpartition(".")[0]: why for g in past}}
        kept = [g for g, fine in zip(found.prunable, good, strict=True) if fine]
        blocks = _of_groups(kept, whole, network, flow)
    return blocks


def _of_groups(
    groups: Sequence[Group], whole: Mapping[str, str], network: nn.Module, flow: Flow
) -> Blocks:
    names, gates, start = [], [], 0
    layer: list[int] = []
    for i, group in enumerate(groups):
        names += [f"{group.name} {c}" for c in range(group.size)]
        layer += [i] * group.size
        gates += _gates_of(group, start, network, flow)
        start += group.size
    return Blocks(
        "filter",
        tuple(names),
        torch.tensor(layer, dtype=torch.int64),
        tuple(g.name for g in groups),
        tuple(gates),
        tuple(groups),
        whole=whole,
    )


def _silent(task: Task, network: nn.Module, blocks: Blocks) -> bool:
    """Whether filters at factor 0 are heard no more than filters whose every weight is 0."""
    inputs, answers = examples(task), []
    half = torch.arange(len(blocks)) % 2 == 0
    for gates in (True, False):
        twin = redrawn(network)
        params = dict(twin.named_parameters())
        with preserved(twin), torch.no_grad():
            if gates:
                for gate in blocks.gates:
                    gone = (gate.owner >= 0) & half[gate.owner.clamp(min=0)]
                    for name, dim in gate.scaled(twin):
                        params[name].index_fill_(dim, gone.nonzero().flatten(), 0.0)
            else:
                for name, gone in blocks.territory(half, twin).items():
                    params[name].masked_fill_(gone, 0.0)
            answers.append(task.forward(twin, tree_map(_copied, inputs)).double())
    return torch.allclose(
        answers[0], answers[1], rtol=1e-3, atol=1e-5 * float(answers[1].abs().max())
    )


def _copied(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


def _gates_of(group: Group, start: int, network: nn.Module, flow: Flow) -> list[Gate]:
    """Where the channels of a group leave its last parameters: batch norms, or layers without one.

    A depthwise layer takes its channels from the layer before: the gate is behind it. A batch norm
    that reads a sum is a gate, and the summands are none.
    """
    rows = {name.rpartition(".")[0]: rows for name, rows in group.members}
    norms = {m for m in rows if isinstance(flow.modules[m], BATCH_NORM)}
    feeds = {m: flow.source(flow.taken[m]) for m in rows if m in flow.taken}
    passing = [m for m in feeds if m in norms or getattr(flow.modules[m], "groups", 1) > 1]
    before = {feeds[m] for m in passing if feeds[m] in rows and feeds[m] != m}
    ends = [m for m in rows if m not in before]
    if any(feeds.get(m) not in rows for m in norms):  # it reads a sum
        ends = [m for m in ends if m in norms]
    made = []
    for module in ends:
        table = rows[module]
        channels = len(network.get_submodule(module).weight)  # type: ignore[arg-type]
        owner = torch.full((channels,), -1, dtype=torch.int64)
        numbers = torch.arange(start, start + group.size)
        owner[table] = numbers if table.ndim == 1 else numbers[:, None].expand_as(table)
        made.append(Gate(module, "out", owner, module in flow.changed))
    return made


# -- branches and layers --------------------------------------------------------------------------


def _branches(task: Task, network: nn.Module, flow: Flow) -> Blocks:
    names: list[str] = []
    gates: list[Gate] = []
    inside: list[tuple[str, ...]] = []
    layer: list[int] = []
    layers: list[str] = []
    whole: dict[str, str] = {}
    for branch in flow.branches():
        module = network.get_submodule(branch.module) if branch.module else network
        last = module.out_proj if isinstance(module, nn.MultiheadAttention) else module
        weight = getattr(last, "weight", None)
        if not branch.module or not isinstance(weight, nn.Parameter):
            where = branch.module or listed(branch.params, 2)
            whole[where] = "a branch that ends in no layer with a weight of its own"
            continue
        heads = _heads(network, branch.module) if branch.attends else 1
        layers.append(branch.module)
        start = len(names)
        if heads > 1:
            owner = torch.arange(start, start + heads)
            owner = owner.repeat_interleave(weight.shape[1] // heads)
            gates.append(Gate(branch.module, "in", owner))
            names += [f"{branch.module} head {h}" for h in range(heads)]
            inside += [()] * heads
        else:
            owner = torch.full((len(weight),), start)
            gates.append(Gate(branch.module, "out", owner, branch.module in flow.changed))
            names.append(branch.module)
            inside.append(branch.params)
        layer += [len(layers) - 1] * (len(names) - start)
    return _made("branch", names, layer, layers, gates, inside, whole)


def _heads(network: nn.Module, module: str) -> int:
    """Heads of an attention whose last layer a module is: 1 where there are none to tell apart."""
    layer, parent = network.get_submodule(module), network.get_submodule(module.rpartition(".")[0])
    heads = getattr(parent, "num_heads", getattr(parent, "heads", 1))
    known = isinstance(layer, nn.Linear) and isinstance(heads, int) and parent is not network
    return heads if known and layer.in_features % heads == 0 else 1  # type: ignore[operator]


def _layers(task: Task, network: nn.Module, flow: Flow) -> Blocks:
    behind = {
        source: name
        for name, node in flow.taken.items()
        if isinstance(flow.modules[name], BATCH_NORM)
        and flow.modules[name].affine
        and (source := flow.source(node, sole=True)) is not None
    }
    output = classifier_name(network, task.classifier).rpartition(".")[0]
    made, whole = set(flow.made.values()), {output: "it is the output layer"}
    names: list[str] = []
    gates, inside, params = [], [], dict(network.named_parameters())
    for name, module in network.named_modules():
        if not isinstance(module, LAYERS) or name == output:
            continue
        if name not in made:
            inside_ = isinstance(flow.modules[name.rpartition(".")[0]], nn.MultiheadAttention)
            unseen = "the traced forward pass does not reach it"
            whole[name] = "its attention uses it without calling it" if inside_ else unseen
            continue
        end = behind.get(name, name)
        last: Any = network.get_submodule(end)
        if not isinstance(last.weight, nn.Parameter) or f"{end}.weight" not in params:
            whole[name] = "its weight is computed from other parameters"
            continue
        size = last.out_channels if getattr(last, "transposed", False) else len(last.weight)
        gates.append(Gate(end, "out", torch.full((size,), len(names)), end in flow.changed))
        owned = [f"{m}.{n}" for m in {name, end} for n, _ in flow.modules[m].named_parameters()]
        inside.append(tuple(sorted(owned)))
        names.append(name)
    return _made("layer", names, list(range(len(names))), names, gates, inside, whole)


def _made(
    granularity: Granularity,
    names: Sequence[str],
    layer: Sequence[int],
    layers: Sequence[str],
    gates: Sequence[Gate],
    inside: Sequence[tuple[str, ...]],
    whole: Mapping[str, str],
) -> Blocks:
    return Blocks(
        granularity,
        tuple(names),
        torch.tensor(layer, dtype=torch.int64),
        tuple(layers),
        tuple(gates),
        inside=tuple(inside),
        whole=whole,
    )


def dropped(blocks: Blocks, chosen: Tensor, network: nn.Module, mask: Mask | None) -> Mask:
    """The mask that drops the chosen blocks, and what was dropped before.

    Args:
        blocks: Of the network.
        chosen: bool ``[blocks]``.
        network: Supplies the shapes.
        mask: The mask so far.
    """
    before: Mapping[str, Tensor] = mask or {}
    gone = blocks.territory(chosen, network)
    keep = {name: ~t & before[name] if name in before else ~t for name, t in gone.items()}
    order = [name for name, _ in network.named_parameters()]
    whole = {**before, **keep}
    return Mask({name: whole[name] for name in order if name in whole})
