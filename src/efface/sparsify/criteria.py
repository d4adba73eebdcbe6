"""Criteria: how much a weight matters. ``criterion(network, batches) → {name: scores}``."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar, Protocol

from torch import Tensor, nn

from efface.data import Batch


class Criterion(Protocol):
    """Scores shaped like the parameters; the higher, the rather a weight is kept."""

    name: ClassVar[str]

    def __call__(self, network: nn.Module, batches: Iterable[Batch], /) -> dict[str, Tensor]:
        """Scores by parameter name."""
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

    def __call__(self, network: nn.Module, batches: Iterable[Batch]) -> dict[str, Tensor]:
        """Scores of every parameter with two or more dimensions."""
        return {n: p.detach().abs() for n, p in network.named_parameters() if p.ndim >= 2}


CRITERIA: dict[str, type[Criterion]] = {c.name: c for c in (Magnitude,)}
