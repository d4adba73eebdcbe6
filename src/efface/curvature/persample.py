"""Per-sample gradients in batches: three routes to the same numbers, the fastest that is right.

*By layer*: one forward and backward pass over a batch; each layer's formula does the rest. For
networks whose parameters all sit in linear layers, convolutions and batch norms, each used once.
*Vectorised*: ``torch.func`` maps the gradient of one record over a batch. For almost all others.
*Record by record*: one pass each. For networks whose forward pass cannot be vectorised, e.g. since
it branches on the data.

Which one is used is settled on two records: a network that vectorises is safe to batch, and the
formulas are used where they agree there with the vectorised gradients (they would not where a
weight is used outside of its layer, or where a record's output depends on the rest of its batch).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vjp, vmap
from torch.utils._pytree import tree_map

from efface.curvature.layers import FORMULAS, LARGE, supported
from efface.data import Batch
from efface.errors import MethodError
from efface.placement import placed, preserved
from efface.task import Task

AGREEMENT = 1e-3
"""Largest relative difference between two routes that is taken for rounding."""

MOST, FEW_RECORDS = 128, 32
"""Records per pass, at most; on a CPU by layer fewer, which then stay in the cache."""

CANNOT = (RuntimeError, ValueError, TypeError, NotImplementedError, AttributeError)
"""What a forward pass raises that cannot be vectorised."""

BATCH_NORMS = nn.modules.batchnorm._BatchNorm
DROPOUTS = nn.modules.dropout._DropoutNd

Block = tuple[str, int, Tensor]
"""A parameter's name, the first record's place in the batch, gradients ``[b, *shape]``."""


class Route(Protocol):
    """A way to per-sample gradients."""

    name: str

    def forward(self, batch: Batch) -> Tensor:
        """Logits ``[B, C]`` in float32, without a graph."""

    def records(self, memory: int) -> int:
        """How many records fit into a pass; to be asked after a forward pass."""

    def pull(self, cotangents: Tensor) -> Iterator[Block]:
        """Per-sample gradients of ⟨logits, cotangents ``[B, C]``⟩ of the last forward pass."""


def check_independent(network: nn.Module) -> None:
    """Check that no record's output depends on other records or on chance.

    Raises:
        MethodError: Naming the layer that mixes records or is random.
    """
    for name, module in network.named_modules():
        batch_statistics = module.training or getattr(module, "running_mean", 0) is None
        if isinstance(module, BATCH_NORMS) and batch_statistics:
            raise MethodError(
                f"layer {name or 'network'!r} normalises with the statistics of the batch, so that "
                "no record has a gradient of its own; call network.eval(), and keep running "
                "statistics."
            )
        if isinstance(module, DROPOUTS) and module.training and module.p > 0:
            raise MethodError(
                f"layer {name or 'network'!r} drops at random, so that per-sample gradients mean "
                "nothing; call network.eval()."
            )


def trainable(network: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that require a gradient, by name.

    Raises:
        MethodError: If there is none.
    """
    found = {name: p for name, p in network.named_parameters() if p.requires_grad}
    if not found:
        raise MethodError("no parameter of the network requires a gradient; unfreeze some.")
    return found


@contextlib.contextmanager
def evaluating(network: nn.Module, device: torch.device) -> Iterator[None]:
    """Eval mode on a device; modes, gradients, place, layout and random state are left as found."""
    grads = {name: p.grad for name, p in network.named_parameters()}
    with preserved(network), placed(network, device, train=False):
        network.eval()
        check_independent(network)
        yield
    for name, p in network.named_parameters():
        p.grad = grads[name]


def within(memory: int, floats: int, most: int, device: torch.device) -> int:
    """Records for which ``floats`` numbers each fit into ``memory`` bytes: 1 to ``most``."""
    most = most if device.type == "cpu" else MOST
    return max(1, min(most, memory // (4 * max(1, floats))))


# -- the routes -----------------------------------------------------------------------------------


@dataclass
class ByLayer:
    """One pass over a batch; the layers' formulas do the rest."""

    network: nn.Module
    task: Task
    name = "by layer"
    _seen: list[tuple[str, nn.Module, Tensor, Any]] = field(default_factory=list)
    _logits: Tensor | None = None

    @staticmethod
    def possible(network: nn.Module) -> bool:
        """Whether every trainable parameter is in one layer that has a formula."""
        every = [p for _, p in network.named_parameters(remove_duplicate=False)]
        owners = [m for m in network.modules() if any(True for _ in m.parameters(recurse=False))]
        return len(every) == len(set(every)) and all(supported(m) for m in owners)

    def forward(self, batch: Batch) -> Tensor:
        """Logits; what goes into every layer is kept."""
        self._seen = []
        names = {m: n for n, m in self.network.named_modules() if type(m) in FORMULAS}

        def keep(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
            # the edge, not the tensor: an in-place activation may write over the tensor
            edge = torch.autograd.graph.get_gradient_edge(output) if output.requires_grad else None
            self._seen.append((names[module], module, inputs[0].detach(), edge))

        handles = [m.register_forward_hook(keep) for m in names]
        try:
            with torch.enable_grad():
                self._logits = self.task.forward(self.network, batch.inputs).float()
        finally:
            for handle in handles:
                handle.remove()
        seen = [name for name, *_ in self._seen]
        if len(set(seen)) < len(seen):
            raise RuntimeError("a layer is used twice")
        return self._logits.detach()

    def records(self, memory: int) -> int:
        """Activations and what comes back to them; small weights have a block for all records."""
        inputs = self._seen[0][2]
        kept = sum(row[2].numel() for row in self._seen) // max(1, len(inputs))
        weights = [p.numel() for m in self.network.modules() for p in m.parameters(recurse=False)]
        block = max(min(w, LARGE) for w in weights)
        return within(memory, 4 * kept + 2 * block, FEW_RECORDS, inputs.device)

    def pull(self, cotangents: Tensor) -> Iterator[Block]:
        """Per-sample gradients, layer after layer."""
        assert self._logits is not None
        reached = [row for row in self._seen if row[3] is not None]
        deltas: tuple[Tensor | None, ...] = torch.autograd.grad(
            self._logits,
            [edge for *_, edge in reached],
            cotangents,
            retain_graph=True,
            allow_unused=True,
        )
        for (name, module, inputs, _), delta in zip(reached, deltas, strict=True):
            if delta is None:
                continue
            for leaf, blocks in FORMULAS[type(module)](module, inputs, delta).items():
                param = getattr(module, leaf)
                if param is None or not param.requires_grad:
                    continue
                first = 0
                for block in blocks:
                    yield f"{name}.{leaf}" if name else leaf, first, block
                    first += len(block)


@dataclass
class Vectorised:
    """``torch.func`` maps the gradient of one record over the batch."""

    network: nn.Module
    task: Task
    name = "vectorised"
    _inputs: Any = None

    def forward(self, batch: Batch) -> Tensor:
        """Logits, of every record by itself."""
        self._inputs = batch.inputs
        with torch.no_grad():
            found: Tensor = vmap(self._logits, (None, 0))(self._weights(), batch.inputs)
        return found

    def records(self, memory: int) -> int:
        """Every record has a gradient of its own, and a copy while it is worked on."""
        weights = self._weights().values()
        device = next(iter(weights)).device
        return within(memory, 2 * sum(w.numel() for w in weights), MOST, device)

    def pull(self, cotangents: Tensor) -> Iterator[Block]:
        """Per-sample gradients."""
        weights = self._weights()

        def one(inputs: Any, cotangent: Tensor) -> dict[str, Tensor]:
            back = vjp(lambda w: self._logits(w, inputs), weights)[1]
            (found,) = back(cotangent)
            return found  # type: ignore[no-any-return]

        found = vmap(one)(self._inputs, cotangents)
        yield from ((name, 0, block) for name, block in found.items())

    def _weights(self) -> dict[str, Tensor]:
        return {n: p.detach() for n, p in trainable(self.network).items()}

    def _logits(self, weights: dict[str, Tensor], inputs: Any) -> Tensor:
        """Logits ``[C]`` of one record."""
        swapped = {f"network.{n}": w for n, w in weights.items()}
        single = tree_map(lambda t: t[None], inputs)
        found: Tensor = functional_call(Apply(self.network, self.task), swapped, (single,))
        return found[0].float()


@dataclass
class OneByOne:
    """A pass for each record: correct for any network."""

    network: nn.Module
    task: Task
    name = "record by record"
    _logits: Tensor | None = None

    def forward(self, batch: Batch) -> Tensor:
        """Logits of a batch of one."""
        if len(batch.targets) != 1:
            raise RuntimeError("one record at a time")
        with torch.enable_grad():
            self._logits = self.task.forward(self.network, batch.inputs).float()
        return self._logits.detach()

    def records(self, memory: int) -> int:
        """One."""
        return 1

    def pull(self, cotangents: Tensor) -> Iterator[Block]:
        """The record's gradient."""
        assert self._logits is not None
        params = trainable(self.network)
        found = torch.autograd.grad(
            self._logits,
            list(params.values()),
            cotangents,
            retain_graph=True,
            materialize_grads=True,
        )
        yield from ((name, 0, g[None]) for name, g in zip(params, found, strict=True))


class Apply(nn.Module):
    """A network behind the task's batch adapter, as one module: its weights can be swapped."""

    def __init__(self, network: nn.Module, task: Task) -> None:
        super().__init__()
        self.network, self.task = network, task

    def forward(self, inputs: Any) -> Tensor:
        """Logits."""
        return self.task.forward(self.network, inputs)


# -- what is used ---------------------------------------------------------------------------------


def choose(network: nn.Module, task: Task, batch: Batch) -> tuple[Route, str]:
    """The fastest route that is right for a network, and why it is not a faster one.

    Args:
        network: In eval mode.
        task: Supplies the batch adapter.
        batch: A few records to settle it on; two are enough.
    """
    vectorised: Route = Vectorised(network, task)
    try:
        wanted = _rows(vectorised, batch)
    except torch.cuda.OutOfMemoryError:
        raise
    except CANNOT as problem:
        return OneByOne(network, task), str(problem).strip().split("\n")[0][:200]
    if not ByLayer.possible(network):
        return vectorised, "a parameter is shared or in a layer without a formula"
    by_layer = ByLayer(network, task)
    try:
        found = _rows(by_layer, batch)
    except CANNOT as problem:
        return vectorised, str(problem).strip().split("\n")[0][:200]
    if all(_agree(found.get(name), rows) for name, rows in wanted.items()):
        return by_layer, ""
    return vectorised, "the formulas of the layers do not hold here"


def _rows(route: Route, batch: Batch) -> dict[str, Tensor]:
    logits = route.forward(batch).detach()
    probe = torch.cos(torch.arange(logits.numel(), device=logits.device)).reshape(logits.shape)
    return collected(route.pull(probe.to(logits.dtype)))


def _agree(found: Tensor | None, wanted: Tensor) -> bool:
    found = torch.zeros_like(wanted) if found is None else found
    return float((found - wanted).norm()) <= AGREEMENT * float(wanted.norm())


def collected(blocks: Iterator[Block]) -> dict[str, Tensor]:
    """Blocks put together: name → ``[B, *shape]``."""
    parts: dict[str, list[Tensor]] = {}
    for name, _, block in blocks:
        parts.setdefault(name, []).append(block)
    return {name: torch.cat(rows) for name, rows in parts.items()}


def loss_gradients(task: Task, logits: Tensor, targets: Tensor) -> Tensor:
    """Gradient of every record's own loss by its logits: ``[B, C]`` each, in float32."""

    def one(row: Tensor, target: Tensor) -> Tensor:
        return task.loss(row[None], target[None])

    try:
        found: Tensor = vmap(grad(one))(logits, targets)
        return found
    except CANNOT:  # a loss that cannot be vectorised
        parts = []
        for row, target in zip(logits, targets, strict=True):
            leaf = row.detach().requires_grad_()
            with torch.enable_grad():
                parts.extend(torch.autograd.grad(one(leaf, target), leaf))
        return torch.stack(parts)


def per_sample_gradients(network: nn.Module, task: Task, batch: Batch) -> dict[str, Tensor]:
    """The gradient of every record's own loss.

    Args:
        network: As it is: nothing is switched to eval mode here.
        task: Supplies the loss and the batch adapter.
        batch: Records, their targets.

    Returns:
        Name → ``[B, *shape]`` for every parameter that requires a gradient, in float32.

    Raises:
        MethodError: If a layer mixes the records of a batch or is random, naming it.

    Example:
        >>> import torch, efface
        >>> from efface.data import Batch
        >>> x, y = torch.eye(2), torch.tensor([0, 1])
        >>> task = efface.Task(lambda: torch.nn.Linear(2, 2), (x, y), (x, y))
        >>> found = per_sample_gradients(task.network(), task, Batch(x, y, torch.arange(2)))
        >>> found["weight"].shape
        torch.Size([2, 2, 2])
    """
    check_independent(network)
    shapes = {name: p.shape for name, p in trainable(network).items()}
    route, _ = choose(network, task, first(batch, 2))
    if isinstance(route, OneByOne):
        singles = [slice_of(batch, i, i + 1) for i in range(len(batch.targets))]
        parts = [_losses_rows(route, task, single) for single in singles]
        found = {name: torch.cat([p[name] for p in parts]) for name in shapes}
    else:
        found = _losses_rows(route, task, batch)
    n, device = len(batch.targets), batch.targets.device
    for name, shape in shapes.items():  # a parameter that the forward pass does not use
        found.setdefault(name, torch.zeros(n, *shape, device=device))
    return {name: found[name].contiguous() for name in shapes}


def _losses_rows(route: Route, task: Task, batch: Batch) -> dict[str, Tensor]:
    logits = route.forward(batch)
    return collected(route.pull(loss_gradients(task, logits, batch.targets)))


def slice_of(batch: Batch, start: int, stop: int) -> Batch:
    """Some of a batch's records."""
    inputs = tree_map(lambda t: t[start:stop] if isinstance(t, Tensor) else t, batch.inputs)
    return Batch(inputs, batch.targets[start:stop], batch.positions[start:stop], batch.weight)


def first(batch: Batch, n: int) -> Batch:
    """The first records of a batch."""
    return slice_of(batch, 0, n)
