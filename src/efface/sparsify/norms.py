"""Criteria for whole filters: vectors float64 ``[size, d]`` → scores ``[size]``."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor


def l1(vectors: Tensor) -> Tensor:
    """Sum of the absolute values (Li et al. 2017).

    >>> import torch
    >>> l1(torch.tensor([[3.0, -4.0], [0.0, 1.0]])).tolist()
    [7.0, 1.0]
    """
    return vectors.abs().sum(1)


def l2(vectors: Tensor) -> Tensor:
    """Euclidean norm (He et al. 2018).

    >>> import torch
    >>> l2(torch.tensor([[3.0, -4.0], [0.0, 1.0]])).tolist()
    [5.0, 1.0]
    """
    return vectors.square().sum(1).sqrt()


def geometric_median(vectors: Tensor) -> Tensor:
    """Sum of the Euclidean distances to all others (He et al. 2019).

    It is lowest near the geometric median, where others can stand in for a filter, whatever its
    norm.

    >>> import torch
    >>> geometric_median(torch.tensor([[0.0], [1.0], [5.0]]).double()).tolist()
    [6.0, 5.0, 9.0]
    """
    centred = vectors - vectors.mean(0)  # less is lost in the subtraction below
    products = centred @ centred.T
    own = products.diagonal()
    squares = (own[:, None] + own - 2 * products).clamp(min=0).fill_diagonal_(0)
    return squares.sqrt().sum(1)


NORMS: dict[str, Callable[[Tensor], Tensor]] = {
    "l1": l1,
    "l2": l2,
    "geometric-median": geometric_median,
}
"""Every criterion for whole filters by its name."""
