"""Criteria: how much a weight matters. ``criterion(network, batches, loss) → {name: scores}``.

A criterion looks at a copy in evaluation mode (no dropout, running batch-norm statistics), so that
the network that it is given stays as it is, and scores every parameter with two or more dimensions.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_leaves, tree_map

from efface.data import Batch
from efface.errors import MethodError
from efface.seeds import generator
from efface.steps import batch_norms

Loss = Callable[[nn.Module, Batch], Tensor]
"""The loss of a network on a batch, a scalar; :meth:`efface.Fit.loss` is one."""


def cross_entropy(network: nn.Module, batch: Batch) -> Tensor:
    """Mean cross-entropy of a network that takes the batch's inputs as they are."""
    return F.cross_entropy(network(batch.inputs), batch.targets)


class Criterion(Protocol):
    """Scores shaped like the parameters; the higher, the rather a weight is kept."""

    name: ClassVar[str]
    needs_data: ClassVar[bool]

    def __call__(
        self, network: nn.Module, batches: Iterable[Batch], loss: Loss = ..., /
    ) -> dict[str, Tensor]:
        """Scores by parameter name, on the network's device.

        Raises:
            MethodError: If the criterion needs data and there is none.
        """
        ...


@dataclass(frozen=True)
class Magnitude:
    """Absolute value of the weight (Han et al. 2015; OMP and IMP in Jia et al. 2023).

    Needs no data.

    Example:
        >>> import torch
        >>> net = torch.nn.Linear(2, 1, bias=False)
        >>> net.weight.data = torch.tensor([[-3.0, 1.0]])
        >>> Magnitude()(net, ())["weight"].tolist()
        [[3.0, 1.0]]
    """

    name: ClassVar[str] = "magnitude"
    needs_data: ClassVar[bool] = False

    def __call__(
        self, network: nn.Module, batches: Iterable[Batch], loss: Loss = cross_entropy
    ) -> dict[str, Tensor]:
        """``|θ|`` of every parameter with two or more dimensions."""
        return {name: p.detach().abs() for name, p in _scored(network).items()}


@dataclass(frozen=True)
class Random:
    """Uniform scores: the control that every criterion should beat. Needs no data.

    Args:
        seed: The same seed gives the same scores; a weight's depend on its name, not on the others.

    Example:
        >>> net = torch.nn.Linear(2, 1)
        >>> bool((Random(3)(net, ())["weight"] == Random(3)(net, ())["weight"]).all())
        True
    """

    name: ClassVar[str] = "random"
    needs_data: ClassVar[bool] = False

    seed: int = 0

    def __call__(
        self, network: nn.Module, batches: Iterable[Batch], loss: Loss = cross_entropy
    ) -> dict[str, Tensor]:
        """Numbers in [0, 1) for every parameter with two or more dimensions."""
        return {
            name: torch.rand(p.shape, generator=generator(self.seed, f"criterion/{name}")).to(
                p.device
            )
            for name, p in _scored(network).items()
        }


@dataclass(frozen=True)
class Snip:
    """Connection sensitivity ``|θ · ∂L/∂θ|`` (Lee et al. 2019).

    The gradient is summed over all batches before the absolute value is taken.

    Args:
        batch_stats: Batch norm uses each batch's own statistics, as in training; right for a
            network at initialisation, whose running statistics have seen no data.

    Example:
        >>> net = torch.nn.Linear(2, 2)
        >>> x, y = torch.randn(4, 2), torch.tensor([0, 1, 1, 0])
        >>> Snip()(net, [Batch(x, y, torch.arange(4))])["weight"].shape
        torch.Size([2, 2])
    """

    name: ClassVar[str] = "snip"
    needs_data: ClassVar[bool] = True

    batch_stats: bool = False

    def __call__(
        self, network: nn.Module, batches: Iterable[Batch], loss: Loss = cross_entropy
    ) -> dict[str, Tensor]:
        """Scores of every parameter with two or more dimensions."""
        data, twin = _given(self, batches), _twin(network, self.batch_stats)
        params = _scored(twin)
        total = _summed(_gradients(params, loss(twin, batch)) for batch in data)
        return {name: (p.detach() * total[name]).abs() for name, p in params.items()}


@dataclass(frozen=True)
class Gradient:
    """Size of the gradient ``|∂L/∂θ|``: which pruned weights to grow in RigL (Evci et al. 2020).

    The gradient is summed over all batches before the absolute value is taken.

    Args:
        batch_stats: Batch norm uses each batch's own statistics, as in training.

    Example:
        ``Gradient()(network, batches, fit.loss)``
    """

    name: ClassVar[str] = "gradient"
    needs_data: ClassVar[bool] = True

    batch_stats: bool = False

    def __call__(
        self, network: nn.Module, batches: Iterable[Batch], loss: Loss = cross_entropy
    ) -> dict[str, Tensor]:
        """Scores of every parameter with two or more dimensions."""
        data, twin = _given(self, batches), _twin(network, self.batch_stats)
        params = _scored(twin)
        total = _summed(_gradients(params, loss(twin, batch)) for batch in data)
        return {name: gradient.abs() for name, gradient in total.items()}


@dataclass(frozen=True)
class Taylor:
    """First-order Taylor importance ``Σ_b (θ · ∂L_b/∂θ)²`` (Molchanov et al. 2019).

    Squared per batch ``b`` and then summed, where SNIP sums first: on a trained network the summed
    gradient is near zero, the gradients of single batches are not.

    Args:
        batch_stats: Batch norm uses each batch's own statistics, as in training.

    Example:
        ``Taylor()(network, batches, fit.loss)``
    """

    name: ClassVar[str] = "taylor"
    needs_data: ClassVar[bool] = True

    batch_stats: bool = False

    def __call__(
        self, network: nn.Module, batches: Iterable[Batch], loss: Loss = cross_entropy
    ) -> dict[str, Tensor]:
        """Scores of every parameter with two or more dimensions."""
        data, twin = _given(self, batches), _twin(network, self.batch_stats)
        params = _scored(twin)

        def squares(batch: Batch) -> dict[str, Tensor]:
            gradients = _gradients(params, loss(twin, batch))
            return {name: (p.detach() * gradients[name]) ** 2 for name, p in params.items()}

        return _summed(squares(batch) for batch in data)


@dataclass(frozen=True)
class Grasp:
    """Preservation of gradient flow, ``θ ⊙ Hg`` (Wang et al. 2020).

    Removing a weight changes the squared norm of the gradient, to first order, by
    ``S(−θ) = −θ ⊙ Hg`` (times two). The paper removes the weights with the highest ``S``, those
    whose loss lets the gradient grow most or shrink least; here the higher is kept, so the score is
    ``−S``. ``g`` and the Hessian ``H`` are those of the loss summed over all batches, with respect
    to the scored weights; the product is exact.

    Args:
        temperature: Divides the network's outputs before the loss, as in the authors' code.
        batch_stats: Batch norm uses each batch's own statistics, as in training.

    Example:
        ``Grasp()(network, batches, fit.loss)``
    """

    name: ClassVar[str] = "grasp"
    needs_data: ClassVar[bool] = True

    temperature: float = 200.0
    batch_stats: bool = False

    def __call__(
        self, network: nn.Module, batches: Iterable[Batch], loss: Loss = cross_entropy
    ) -> dict[str, Tensor]:
        """Scores of every parameter with two or more dimensions; they may be negative."""
        data, twin = _given(self, batches), _twin(network, self.batch_stats)
        twin.register_forward_hook(lambda *call: _divided(call[2], self.temperature))
        params = _scored(twin)
        g = _summed(_gradients(params, loss(twin, batch)) for batch in data)

        def product(batch: Batch) -> dict[str, Tensor]:
            with sdpa_kernel(SDPBackend.MATH):  # fused attention has no second derivative
                value = loss(twin, batch)
            own = _gradients(params, value, create_graph=True)
            along = torch.stack([(own[name] * g[name]).sum() for name in params]).sum()
            return _gradients(params, along)

        hg = _summed(product(batch) for batch in data)
        return {name: p.detach() * hg[name] for name, p in params.items()}


@dataclass(frozen=True)
class SynFlow:
    """Synaptic flow ``|θ| · ∂R/∂|θ|`` (Tanaka et al. 2020).

    ``R`` is the sum of the outputs for an input of ones, of the network with the absolute value of
    its whole state: parameters and buffers, batch-norm statistics too. Labels and values of the
    data are not looked at, only the shape of a record. Computed in float64, because ``R`` of a deep
    and wide network is beyond float32.

    Example:
        ``SynFlow()(network, batches, fit.loss)``
    """

    name: ClassVar[str] = "synflow"
    needs_data: ClassVar[bool] = True  # for the shape of a record

    def __call__(
        self, network: nn.Module, batches: Iterable[Batch], loss: Loss = cross_entropy
    ) -> dict[str, Tensor]:
        """Scores of every parameter with two or more dimensions, in float64.

        Raises:
            MethodError: If there is no data, or the flow is beyond float64 as well.
        """
        first = _given(self, batches)[0]
        twin = _twin(network, batch_stats=False)
        if any(p.device.type == "mps" for p in twin.parameters()):  # no float64 there
            twin, first = twin.cpu(), _moved(first)
        twin.double()
        with torch.no_grad():
            for tensor in [*twin.parameters(), *twin.buffers()]:
                if tensor.dtype != torch.bool:  # which has no sign
                    tensor.copy_(tensor.abs())
        outputs: list[Any] = []
        twin.register_forward_hook(lambda *call: outputs.append(call[2]))
        ones = tree_map(_ones, first.inputs)
        try:  # the loss is not wanted: it leads there through the task's batch adapter
            loss(twin, first._replace(inputs=ones, targets=first.targets[:1]))
        except RuntimeError as error:
            raise MethodError(
                f"synflow computes in float64, and the network does not ({error}); let its forward "
                "take its type from its weights instead of calling float()."
            ) from error
        leaves = [t for t in tree_leaves(outputs) if isinstance(t, Tensor)]
        if not leaves:
            raise MethodError(
                "synflow saw no output: Task.forward must call the network itself, not a part."
            )
        flow = torch.stack([t.sum() for t in leaves if t.is_floating_point()]).sum()
        params = _scored(twin)
        gradients = _gradients(params, flow)
        scores = {name: p.detach() * gradients[name] for name, p in params.items()}
        if not all(bool(torch.isfinite(s).all()) for s in scores.values()):
            raise MethodError(
                "synflow's flow is too large even for float64; scale the initial weights down, or "
                "take another criterion."
            )
        return scores


CRITERIA: dict[str, type[Any]] = {
    c.name: c for c in (Magnitude, Random, Snip, Gradient, Taylor, Grasp, SynFlow)
}


# -- parts ----------------------------------------------------------------------------------------


def _scored(network: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in network.named_parameters() if p.ndim >= 2}


def _given(criterion: Criterion, batches: Iterable[Batch]) -> list[Batch]:
    data = list(batches)
    if not data:
        raise MethodError(
            f"the criterion {criterion.name!r} needs data; give it at least one batch of records."
        )
    return data


def _twin(network: nn.Module, batch_stats: bool) -> nn.Module:
    """A copy to compute on: hooks, modes, statistics and gradients of the network stay as found."""
    twin = copy.deepcopy(network).eval().requires_grad_(True)
    for layer in batch_norms(twin) if batch_stats else ():
        layer.train()
    return twin


def _gradients(
    params: dict[str, nn.Parameter], value: Tensor, create_graph: bool = False
) -> dict[str, Tensor]:
    found = torch.autograd.grad(
        value, list(params.values()), create_graph=create_graph, allow_unused=True
    )
    pairs = zip(params.items(), found, strict=True)
    return {name: torch.zeros_like(p) if g is None else g for (name, p), g in pairs}


def _summed(parts: Iterator[dict[str, Tensor]]) -> dict[str, Tensor]:
    total: dict[str, Tensor] = {}
    for part in parts:
        total = {name: total[name] + t if total else t for name, t in part.items()}
    return total


def _divided(outputs: Any, by: float) -> Any:
    def divide(t: Any) -> Any:
        return t / by if isinstance(t, Tensor) and t.is_floating_point() else t

    return tree_map(divide, outputs)


def _ones(leaf: Any) -> Any:
    if not isinstance(leaf, Tensor):
        return leaf
    return torch.ones_like(leaf[:1], dtype=torch.float64 if leaf.is_floating_point() else None)


def _moved(batch: Batch) -> Batch:
    move: Callable[[Any], Any] = lambda t: t.cpu() if isinstance(t, Tensor) else t  # noqa: E731
    return batch._replace(inputs=tree_map(move, batch.inputs), targets=batch.targets.cpu())
