"""What torch-pruning finds when it traces a network, in efface's terms, and checked.

:func:`efface.sparsify.groups.filter_groups` is the way in. torch-pruning takes every operation that
it does not know for one that leaves channels alone. So what it says is believed only after a
forward pass with half of all filters at zero, in which their channels must be dead.
"""

from __future__ import annotations

import copy
import importlib
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from efface.errors import MethodError
from efface.mask import classifier_name
from efface.placement import preserved
from efface.seeds import generator
from efface.task import Task

SHOWN = 4
"""Records that the forward pass is traced and checked with."""

_CONV = nn.modules.conv._ConvNd
_BATCH_NORM = nn.modules.batchnorm._BatchNorm

LAYERS = (_CONV, nn.Linear)
"""Layers that have filters."""

_TIED = "a split or concatenation ties its filters to each other"

Rows = tuple[str, Tensor]
"""Parameter name and rows of dimension 0, one line for each filter: ``[size]`` or ``[size, k]``."""


@dataclass
class Found:
    """A group of layers whose filters torch-pruning takes for the same.

    Args:
        layers: Their names.
        reason: Why they are kept whole, or None.
        size: Number of filters.
        members: Rows of the parameters that write the channels, in the network's order.
        weights: Those of them that are weights of layers.
        readers: Layers that read the channels: module, channels, and the filter of each.
    """

    layers: list[str]
    reason: str | None = None
    size: int = 0
    members: tuple[Rows, ...] = ()
    weights: tuple[Rows, ...] = ()
    readers: tuple[tuple[nn.Module, Tensor, Tensor], ...] = ()

    @property
    def name(self) -> str:
        """Weight of the first layer."""
        return self.weights[0][0]


def examples(task: Task, count: int = SHOWN) -> Any:
    """Inputs to trace a forward pass with: test records, which no request ever removes."""
    records = task.test_records
    where = torch.linspace(0, len(records) - 1, min(count, len(records))).long()
    return next(iter(records.batches([where], torch.device("cpu")))).inputs


def trace(task: Task, network: nn.Module) -> list[Found]:
    """All groups of a network, in its order, and the reason where one is kept whole.

    Raises:
        MethodError: If the forward pass cannot be traced.
    """
    twin = redrawn(network)
    inputs = examples(task)
    with preserved(twin), torch.inference_mode(False), torch.enable_grad():
        names = _Names(twin, classifier_name(twin, task.classifier))
        found = _groups(task, twin, inputs, names)
        _check(task, twin, inputs, [f for f in found if f.reason is None])
    traced = {layer for one in found for layer in one.layers}
    found += [_outside(twin, layer) for layer in names.layers if layer not in traced]
    return sorted(found, key=lambda f: names.place.get(f.layers[0], 0))


def redrawn(network: nn.Module) -> nn.Module:
    """A copy whose weights are drawn anew, so that what is found does not depend on them."""
    twin = copy.deepcopy(network).cpu().eval()
    for name, p in twin.named_parameters():
        if p.is_floating_point():
            p.requires_grad_(True)
            draw = torch.rand(p.shape, generator=generator(0, f"groups/{name}"))
            fan = p[0].numel() if p.ndim >= 2 else 0
            p.data.copy_((2 * draw - 1) * (3 / fan) ** 0.5 if fan else 0.5 + draw)
    return twin


class _Names:
    """Names and places of a network's layers and parameters.

    A layer that is the whole network goes by the name of its weight.
    """

    def __init__(self, network: nn.Module, classifier: str) -> None:
        self.module = {m: name or "weight" for name, m in network.named_modules()}
        self.parameter = {id(p): name for name, p in network.named_parameters()}
        self.order = {name: i for i, name in enumerate(self.parameter.values())}
        self.output = _owner(classifier)
        self.owners = Counter(id(p) for m in network.modules() for p in m._parameters.values())
        self.layers = dict.fromkeys(_owner(n) for n, p in network.named_parameters() if p.ndim >= 2)
        self.place = {name: i for i, name in enumerate(self.layers)}

    def own(self, module: nn.Module) -> list[str]:
        """Names of a layer's weight and bias, as far as it has them."""
        leaves = [getattr(module, leaf, None) for leaf in ("weight", "bias")]
        return [self.parameter[id(p)] for p in leaves if id(p) in self.parameter]


def _owner(parameter: str) -> str:
    """The layer of a parameter, or of one that it is computed from."""
    computed, _, rest = parameter.partition(".parametrizations.")
    return computed if rest else parameter.rpartition(".")[0] or parameter


# -- what torch-pruning says ----------------------------------------------------------------------


def _groups(task: Task, twin: nn.Module, inputs: Any, names: _Names) -> list[Found]:
    tp: Any = importlib.import_module("torch_pruning")
    graph, ends = tp.DependencyGraph(), []

    def forward(network: nn.Module, given: Any) -> Tensor:
        logits = task.forward(network, given)
        if not isinstance(logits, Tensor) or logits.grad_fn is None:
            raise TypeError(
                "its output is not computed from its weights in a way that autograd sees"
            )
        ends.append(logits.grad_fn)
        return logits

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            graph.build_dependency(twin, inputs, forward_fn=forward, verbose=False)
            groups = list(graph.get_all_groups())
    except Exception as error:
        said = (str(error).strip() or "no message").split("\n")[0].rstrip(".")
        raise MethodError(
            f"the forward pass of {type(twin).__name__} cannot be traced "
            f"({type(error).__name__}: {said}); prune weights instead: granularity=layer."
        ) from error
    return [_read(graph, list(group), names, ends[0]) for group in groups]


def _read(graph: Any, items: Sequence[Any], names: _Names, end: Any) -> Found:
    """One group of torch-pruning's in efface's terms."""
    layers = [i for i in items if isinstance(i.dep.target.module, LAYERS)]
    makers = [i for i in layers if graph.is_out_channel_pruning_fn(i.dep.handler)]
    makers.sort(key=lambda i: min([names.order[n] for n in names.own(i.dep.target.module)] or [0]))
    readers = [i for i in layers if i not in makers]
    modules = [i.dep.target.module for i in makers]
    found = Found([names.module[m] for m in modules])
    ended = any(i.dep.target.grad_fn is end for i in items if i not in readers)
    found.reason = _mixed([i.dep.target.module for i in items], ended) or _odd(modules, names)
    if names.output in found.layers:
        found.reason = "it is the output layer"
    if found.reason is None:
        norms = [i for i in items if isinstance(i.dep.target.module, _BATCH_NORM)]
        _take(found, makers, norms, readers, names)
    return found


def _take(
    found: Found, makers: Sequence[Any], norms: Sequence[Any], readers: Sequence[Any], names: _Names
) -> None:
    """Fill in the rows; torch-pruning counts in rows of a layer of its choice, we of the first."""
    first = makers[0]
    found.size = len(first.dep.target.module.weight)
    filters = dict(zip(first.root_idxs, first.idxs, strict=True))
    members: dict[str, Tensor] = {}
    weights: list[str] = []
    for item in (*makers, *norms):
        module = item.dep.target.module
        table = _table(*_paired(item, filters), found.size, len(module.weight))
        if table is None or (item in makers and table.ndim > 1):
            found.reason = _TIED
            return
        members |= dict.fromkeys(names.own(module), table)
        weights += [names.own(module)[0]] if item in makers else []
    ordered = sorted(members, key=names.order.__getitem__)
    found.members = tuple((name, members[name]) for name in ordered)
    found.weights = tuple((name, members[name]) for name in ordered if name in weights)
    found.readers = tuple((i.dep.target.module, *_paired(i, filters)) for i in readers)
    read = {f for _, _, owners in found.readers for f in owners.tolist()}
    if not read >= set(range(found.size)):
        found.reason = "no layer reads its channels one by one" if not read else _TIED


def _paired(item: Any, filters: Mapping[Any, int]) -> tuple[Tensor, Tensor]:
    """Rows of a parameter and the filters that own them, ``[n]`` each; −1 where nobody knows."""
    return torch.tensor(item.idxs), torch.tensor([filters.get(r, -1) for r in item.root_idxs])


def _table(rows: Tensor, filters: Tensor, size: int, total: int) -> Tensor | None:
    """The rows of every filter, ``[size]`` or ``[size, k]``; None where they have not as many."""
    k = len(rows) // size
    counts = torch.bincount(filters.clamp(min=0), minlength=size)
    if k == 0 or bool((filters < 0).any()) or not bool((counts == k).all()):
        return None
    if int(rows.max()) >= total or len(set(rows.tolist())) < len(rows):
        return None
    table = rows[(filters * total + rows).argsort()].reshape(size, k)
    return table[:, 0] if k == 1 else table


# -- what is kept whole ---------------------------------------------------------------------------


def _mixed(modules: Sequence[nn.Module], ended: bool) -> str | None:
    """Why the filters of a group cannot be told apart behind its layers, or None."""
    kinds = [(type(m).__name__, m) for m in modules]
    if ended or any(kind == "_OutputOp" for kind, _ in kinds):
        return "its channels reach the network's output"
    for kind, m in kinds:
        if kind == "Parameter":
            return "a parameter is added to its channels, or multiplies them"
        if "Norm" in kind and not isinstance(m, _BATCH_NORM):
            return f"{kind} mixes its channels"
        if isinstance(m, _BATCH_NORM) and not m.affine:
            return "the batch norm behind it has no scale and shift"
        if isinstance(m, nn.MultiheadAttention | nn.Embedding | nn.RNNBase):
            return f"its channels are those of {kind}"
        if (
            isinstance(m, _CONV)
            and m.groups > 1
            and not m.groups == m.in_channels == m.out_channels
        ):
            return "a grouped convolution ties its channels to each other"
    if any(kind in ("_UnbindOp", "_SplitOp") or "BmmBackward" in str(m) for kind, m in kinds):
        return "attention or a split mixes its channels"
    return None


def _odd(layers: Sequence[nn.Module], names: _Names) -> str | None:
    """Why the filters of these layers are not rows of parameters of their own, or None."""
    for layer in layers:
        weight: Any = layer.weight
        if id(weight) not in names.parameter:
            return "its weight is computed from other parameters"
        if names.owners[id(weight)] > 1:
            return "it shares its weight with another layer"
        if isinstance(layer, nn.modules.conv._ConvTransposeNd):
            return "it is a transposed convolution"
        if len(weight) == 1:
            return "it has a single filter"
    return None


def _outside(twin: nn.Module, name: str) -> Found:
    """A layer that no group holds."""
    owner = twin.get_submodule(name) if name not in dict(twin.named_parameters()) else twin
    if isinstance(owner, LAYERS):
        return Found([name], "the traced forward pass does not reach it")
    return Found([name], f"{type(owner).__name__} has no filters of its own")


# -- the check ------------------------------------------------------------------------------------


def _check(task: Task, twin: nn.Module, inputs: Any, found: Sequence[Found]) -> None:
    """Set a random half of every group's filters to zero, and look at what the readers are given.

    A channel may be constant where its activation maps zero to something else. Weights of the twin
    are spent.
    """
    params = dict(twin.named_parameters())
    handles = []
    for one in found:
        draw = torch.randperm(one.size, generator=generator(0, f"groups/half/{one.name}"))
        gone = draw < one.size // 2
        for name, rows in one.members:
            params[name].data[rows[gone].flatten()] = 0.0
        for module, channels, filters in one.readers:
            dead = channels[(filters >= 0) & gone[filters]]
            look = _look(one, dead, complete=bool((filters >= 0).all()))
            handles.append(module.register_forward_pre_hook(look))
    try:
        task.forward(twin, inputs)
    finally:
        for handle in handles:
            handle.remove()


def _look(one: Found, dead: Tensor, complete: bool) -> Callable[[nn.Module, tuple[Any, ...]], None]:
    def look(module: Any, given: tuple[Any, ...]) -> None:
        if len(dead) == 0:
            return
        channel = -1 if isinstance(module, nn.Linear) else 1 - module.weight.ndim
        if not complete or int(dead.max()) >= given[0].shape[channel]:
            one.reason = "its channels do not stay apart"
            return
        seen = given[0].index_select(channel, dead)
        constant = len(seen) > 1 and bool((seen == seen[:1]).all())
        if bool(seen.any()) and not constant:
            one.reason = "its channels do not stay apart"

    return look
