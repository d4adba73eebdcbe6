"""Layout: how a network's weights lie in one flat vector."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, chain
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import nn

from efface.errors import LogError
from efface.files import digest

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]
Shapes = tuple[tuple[str, tuple[int, ...]], ...]


@dataclass(frozen=True)
class Layout:
    """How trainable parameters and floating-point buffers lie in one flat vector.

    First the *sparse* layers, of whose change only a part is stored; then the *dense* parameters
    (biases, batch-norm weights, small tensors), stored whole since an index would cost as much as
    their values; then the buffers (batch-norm statistics), stored whole, too. Every tensor lies in
    the order of its indices, the last one running fastest, whatever its memory format.

    Args:
        sparse: Names and shapes of parameters with two or more dimensions and enough entries, in
            the order of ``named_parameters``.
        dense: All other trainable parameters.
        buffers: Floating-point buffers.

    Example:
        >>> layout = Layout.of(nn.Linear(64, 32))
        >>> layout.size, layout.total, layout.bounds.tolist()
        (2048, 2080, [0, 2048])
    """

    sparse: Shapes
    dense: Shapes
    buffers: Shapes

    @classmethod
    def of(cls, network: nn.Module, *, small: int = 1024, buffers: bool = True) -> Layout:
        """The layout of a network.

        Args:
            network: Any module; only names and shapes are read. Frozen parameters are left out,
                and a parameter that has several names counts once, under its first.
            small: A tensor with fewer entries is dense.
            buffers: Whether floating-point buffers belong to it.
        """
        own = {n: p for n, p in network.named_parameters() if p.requires_grad}
        large = {n for n, p in own.items() if p.ndim >= 2 and p.numel() >= small}
        floating = {n: b for n, b in network.named_buffers() if b.is_floating_point()}
        return cls(
            sparse=tuple((n, tuple(p.shape)) for n, p in own.items() if n in large),
            dense=tuple((n, tuple(p.shape)) for n, p in own.items() if n not in large),
            buffers=tuple((n, tuple(b.shape)) for n, b in floating.items() if buffers),
        )

    @cached_property
    def size(self) -> int:
        """Entries of the sparse part."""
        return sum(prod(shape) for _, shape in self.sparse)

    @cached_property
    def total(self) -> int:
        """Entries of everything."""
        return sum(prod(shape) for _, shape in self)

    @cached_property
    def bounds(self) -> Ints:
        """Where every sparse layer begins, and where the last one ends; int64 [layers + 1]."""
        return np.array([0, *accumulate(prod(shape) for _, shape in self.sparse)], np.int64)

    @cached_property
    def fingerprint(self) -> str:
        """A digest of all names and shapes, in hexadecimal."""
        return digest(self.to_json())

    def __iter__(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """All names and shapes, in the order in which they lie."""
        return chain(self.sparse, self.dense, self.buffers)

    def parts(self, flat: npt.NDArray[Any]) -> dict[str, npt.NDArray[Any]]:
        """Every tensor as a view of the flat vector.

        Args:
            flat: Vector of ``total`` entries, contiguous.

        Raises:
            LogError: If it has another length.

        >>> layout = Layout((("w", (2, 2)),), (("b", (2,)),), ())
        >>> layout.parts(np.arange(6))["w"].tolist()
        [[0, 1], [2, 3]]
        """
        if flat.shape != (self.total,):
            raise LogError(
                f"a vector of shape {flat.shape} is none of this layout, which has {self.total} "
                "entries; take the log of this very network."
            )
        ends = accumulate(prod(shape) for _, shape in self)
        return {
            name: flat[end - prod(shape) : end].reshape(shape)
            for (name, shape), end in zip(self, ends, strict=True)
        }

    def to_json(self) -> dict[str, Any]:
        """Names and shapes as JSON."""
        groups = {"sparse": self.sparse, "dense": self.dense, "buffers": self.buffers}
        return {key: [[n, list(shape)] for n, shape in group] for key, group in groups.items()}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Layout:
        """The layout that :meth:`to_json` wrote.

        Raises:
            LogError: If it is no layout.
        """
        try:
            groups = {
                key: tuple((str(n), tuple(int(d) for d in shape)) for n, shape in value[key])
                for key in ("sparse", "dense", "buffers")
            }
        except (KeyError, TypeError, ValueError) as error:
            raise LogError(
                "the layout of the network is damaged; take the log's manifest from a backup."
            ) from error
        return cls(**groups)
