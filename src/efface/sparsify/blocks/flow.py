"""What flows where in a network: one traced forward pass, read from its autograd graph."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from efface.errors import MethodError
from efface.placement import preserved
from efface.sparsify.tracing import LAYERS, examples
from efface.task import Task

Node = Any
"""A node of the autograd graph (``Tensor.grad_fn``)."""

BATCH_NORM = nn.modules.batchnorm._BatchNorm

STRAIGHT = (
    *(
        "Mul",
        "Div",
        "View",
        "Reshape",
        "Permute",
        "Transpose",
        "UnsafeView",
        "Clone",
        "NativeDropout",
    ),
    *("Relu", "LeakyRelu", "MaxPool", "AvgPool", "Mean", "AdaptiveAvgPool"),
)
"""Operations through which a factor ≥ 0 passes unchanged, by the names of their nodes."""
ATTENDS = ("Softmax", "ScaledDot", "Flash", "_Scaled")
"""What attention is known by."""


@dataclass(frozen=True)
class Branch:
    """A residual branch: what a network adds to a shortcut.

    Args:
        module: Name of the module whose output is added.
        params: Names of the parameters that the branch alone uses.
        attends: Whether it holds an attention.
    """

    module: str
    params: tuple[str, ...]
    attends: bool = False


@contextmanager
def no_fast_path() -> Iterator[None]:
    """PyTorch's fused transformer layers call no submodule; without them, hooks are called."""
    asked = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(asked)


class Flow:
    """One forward pass of a copy of a network, in evaluation mode on a few records.

    Args:
        task: Supplies the records and the batch adapter.
        network: Left as it is.

    Raises:
        MethodError: If the forward pass fails, or its output does not come from the weights.
    """

    def __init__(self, task: Task, network: nn.Module) -> None:
        twin = copy.deepcopy(network).cpu().eval()
        self.modules = dict(twin.named_modules())
        self.made: dict[Node, str] = {}
        """Output node → the module that made it: the innermost, and of those the first."""
        self.taken: dict[str, Node] = {}
        """Module → the node of its input."""
        self.changed: set[str] = set()
        """Modules whose output is changed in place later on."""
        self.mixed: set[str] = set()
        """Modules that are given something else than a row for every record."""
        self._versions: list[tuple[str, Tensor, int]] = []
        self._params = {id(p): n for n, p in twin.named_parameters()}
        inputs = examples(task)
        handles = [m.register_forward_hook(self._hook(n)) for n, m in self.modules.items() if n]
        for p in twin.parameters():
            p.requires_grad_(p.is_floating_point())
        tracing = torch.inference_mode(False), torch.enable_grad(), no_fast_path()
        with preserved(twin), tracing[0], tracing[1], tracing[2]:
            self.end = self._run(task, twin, tree_map(_leaf, inputs))
            self.changed = {name for name, out, was in self._versions if out._version != was}
            self._count(task, twin, inputs)
        for handle in handles:
            handle.remove()
        self._versions = []
        self.readers = Counter(
            parent for node in self.above(self.end) for parent, _ in node.next_functions
        )

    def _run(self, task: Task, twin: nn.Module, inputs: Any) -> Node:
        try:
            out = task.forward(twin, inputs)
        except Exception as error:
            said = (str(error).strip() or "no message").split("\n")[0].rstrip(".")
            raise MethodError(
                f"the forward pass of {type(twin).__name__} fails ({type(error).__name__}: "
                f"{said}); correct the network or Task.forward."
            ) from error
        if not isinstance(out, Tensor) or out.grad_fn is None:
            raise MethodError(
                f"the output of {type(twin).__name__} is not computed from its weights in a way "
                "that autograd sees, so that no block of it can be scored."
            )
        return out.grad_fn

    def _hook(self, name: str) -> Any:
        def hook(module: nn.Module, given: tuple[Any, ...], out: Any) -> None:
            first = next((t for t in tree_leaves(given) if isinstance(t, Tensor)), None)
            if first is not None and first.grad_fn is not None and name not in self.taken:
                self.taken[name] = first.grad_fn
            made = next((t for t in tree_leaves(out) if isinstance(t, Tensor)), None)
            if made is not None and made.grad_fn is not None:
                self.made.setdefault(made.grad_fn, name)
                self._versions.append((name, made, made._version))

        return hook

    def _count(self, task: Task, twin: nn.Module, inputs: Any) -> None:
        """Find modules whose first dimension does not follow the number of records."""
        leaves = [t for t in tree_leaves(inputs) if isinstance(t, Tensor)]
        for less in (0, 1):
            count = max(1, min(len(t) for t in leaves) - less)
            self._versions = []
            self._run(task, twin, tree_map(lambda t, n=count: _first(t, n), inputs))
            self.mixed |= {name for name, out, _ in self._versions if len(out) != count}

    # -- the graph

    def parents(self, node: Node) -> list[Node]:
        """Where a node's values come from, weights left aside."""
        found = [n for n, _ in node.next_functions if n is not None]
        return [n for n in found if not self._is_weight(n)]

    def _is_weight(self, node: Node) -> bool:
        """Whether a node holds a parameter, or something made from one parameter alone."""
        while node not in self.made:
            if hasattr(node, "variable"):
                return id(node.variable) in self._params
            below = [n for n, _ in node.next_functions if n is not None]
            if len(below) != 1:
                return False
            node = below[0]
        return False

    def above(self, node: Node) -> set[Node]:
        """A node and everything that its value comes from, weights too."""
        seen, waiting = {node}, [node]
        while waiting:
            for parent, _ in waiting.pop().next_functions:
                if parent is not None and parent not in seen:
                    seen.add(parent)
                    waiting.append(parent)
        return seen

    def source(self, node: Node, through: tuple[str, ...] = (), sole: bool = False) -> str | None:
        """The layer or batch norm whose output arrives at a node by a single way, or None.

        Args:
            node: Where to begin.
            through: Beginnings of the names of the operations that may lie between; all if empty.
            sole: Nothing else may read it on the way.
        """
        while node is not None:
            if sole and self.readers[node] > 1:
                return None
            name = self.made.get(node)
            if name is not None and isinstance(self.modules[name], (*LAYERS, BATCH_NORM)):
                return name
            parents = self.parents(node)
            passes = not through or node.name().startswith(through)
            if len(parents) != 1 or not passes:
                return None
            node = parents[0]
        return None

    def branches(self) -> Iterator[Branch]:
        """Every residual branch, in the order of the forward pass."""
        found = [n for n in self.above(self.end) if n.name().startswith("AddBackward")]
        pairs = [(node, self.parents(node)) for node in found]
        sums = [(len(self.above(node)), parents) for node, parents in pairs if len(parents) == 2]
        for _, (one, two) in sorted(sums, key=lambda s: s[0]):
            branch, shortcut = self._sides(one, two)
            if branch is None:
                continue
            own = self.above(branch) - self.above(shortcut)
            held = {id(n.variable) for n in own if hasattr(n, "variable")}
            params = tuple(p for i, p in self._params.items() if i in held)
            attends = any(n.name().startswith(ATTENDS) for n in own)
            yield Branch(self._end(branch), params, attends)

    def _end(self, branch: Node) -> str:
        """The module that a branch ends in; nothing where that is no module with weights."""
        node = branch
        while node is not None:
            name = self.made.get(node, "")
            kinds = (*LAYERS, BATCH_NORM, nn.MultiheadAttention)
            if name and isinstance(self.modules[name], kinds):
                return name
            parents = self.parents(node)
            if len(parents) != 1 or not (name or node.name().startswith(STRAIGHT)):
                return ""
            node = parents[0]
        return ""

    def _sides(self, one: Node, two: Node) -> tuple[Node, Node]:
        """Which of two summands is the branch: the one with more layers of its own."""
        first, second = self.above(one), self.above(two)
        depth = [self._layers(first - second), self._layers(second - first)]
        if depth[0] == depth[1]:
            sums = [n.name().startswith("AddBackward") for n in (one, two)]
            if sums[0] == sums[1]:
                return None, None
            return (two, one) if sums[0] else (one, two)
        return (one, two) if depth[0] > depth[1] else (two, one)

    def _layers(self, nodes: set[Node]) -> int:
        names = {self.made[n] for n in nodes if n in self.made}
        kinds = (*LAYERS, nn.MultiheadAttention)
        return sum(isinstance(self.modules[name], kinds) for name in names)


def _first(value: Any, count: int) -> Any:
    return value[:count].clone() if isinstance(value, Tensor) else value


def _leaf(value: Any) -> Any:
    """Inputs that autograd follows, so that a weight is told apart from what comes from data."""
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.detach().requires_grad_(True).clone()  # which may be changed in place
    return value
