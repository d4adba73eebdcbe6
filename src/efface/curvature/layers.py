"""Per-sample gradients of a layer from its inputs and the gradient of its outputs.

In eval mode a record's gradient of a linear layer, a convolution or a batch norm is a product of
what went into the layer and of what came back to it. Both are there after one ordinary forward and
backward pass over a batch, so that no record needs a pass of its own.

Gradients come in *blocks* ``[b, …]`` of some of the batch's records, in order: a small weight's in
one block, a large weight's record by record, so that they stay in the processor's cache and that
the memory does not grow with the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Blocks = Iterator[Tensor]

LARGE = 100_000
"""Weights of more entries are worked on record by record."""

FEW = 64
"""Up to as many output positions, a product of unfolded patches beats a convolution."""


def supported(module: nn.Module) -> bool:
    """Whether a module's own parameters have a formula here."""
    names = set(module._parameters)
    if type(module) is nn.Conv2d:
        plain = module.groups == 1 and module.padding_mode == "zeros"
        return plain and not isinstance(module.padding, str) and names == {"weight", "bias"}
    return type(module) in FORMULAS and names == {"weight", "bias"}


def linear(layer: nn.Module, inputs: Tensor, deltas: Tensor) -> dict[str, Blocks]:
    """A linear layer: inputs ``[B, …, I]``, deltas ``[B, …, O]``."""
    a = inputs.reshape(len(inputs), -1, inputs.shape[-1])
    d = deltas.reshape(len(deltas), -1, deltas.shape[-1])
    return {"weight": _products(d.transpose(1, 2), a), "bias": iter([d.sum(1)])}


def batch_norm(layer: nn.Module, inputs: Tensor, deltas: Tensor) -> dict[str, Blocks]:
    """A batch norm that uses its running statistics: channels in dimension 1."""
    assert isinstance(layer.running_mean, Tensor)
    assert isinstance(layer.running_var, Tensor)
    rest = list(range(2, inputs.ndim))
    plain, times = (t.sum(rest) if rest else t for t in (deltas, deltas * inputs))
    scale = torch.rsqrt(layer.running_var + float(layer.eps))  # type: ignore[arg-type]
    return {
        "weight": iter([(times - plain * layer.running_mean) * scale]),
        "bias": iter([plain]),
    }


def conv2d(layer: nn.Module, inputs: Tensor, deltas: Tensor) -> dict[str, Blocks]:
    """A convolution without groups: inputs ``[B, C, H, W]``, deltas ``[B, O, h, w]``."""
    assert isinstance(layer, nn.Conv2d)
    large = layer.weight.numel() > LARGE
    if inputs.device.type != "cpu" or (large and deltas[0, 0].numel() <= FEW):
        blocks = _unfolded(layer, inputs, deltas)
    else:
        blocks = _grouped(layer, inputs, deltas, 1 if large else len(inputs))
    return {"weight": blocks, "bias": iter([deltas.sum((2, 3))])}


def _products(left: Tensor, right: Tensor) -> Blocks:
    """Matrix products ``[B, O, L] · [B, L, K]``, in one block or record by record."""
    if left.shape[1] * right.shape[2] <= LARGE or left.device.type != "cpu":
        yield torch.bmm(left, right)
        return
    for d, a in zip(left, right, strict=True):
        yield torch.mm(d, a)[None]


def _unfolded(layer: nn.Conv2d, inputs: Tensor, deltas: Tensor) -> Blocks:
    assert not isinstance(layer.padding, str)
    patches = F.unfold(inputs, layer.kernel_size, layer.dilation, layer.padding, layer.stride)
    d = deltas.reshape(*deltas.shape[:2], -1)
    for block in _products(d, patches.transpose(1, 2)):
        yield block.view(-1, *layer.weight.shape)


def _grouped(layer: nn.Conv2d, inputs: Tensor, deltas: Tensor, size: int) -> Blocks:
    """The weight's gradient of ``size`` records at a time: one convolution, a group per record."""
    assert not isinstance(layer.padding, str)
    for a, d in zip(torch.split(inputs, size), torch.split(deltas, size), strict=True):
        b, (outs, ins) = len(a), layer.weight.shape[:2]
        shape = (b * outs, ins, *layer.kernel_size)
        _, found, _ = torch.ops.aten.convolution_backward(
            d.reshape(1, b * outs, *d.shape[2:]),
            a.reshape(1, b * ins, *a.shape[2:]),
            layer.weight.new_empty(shape) if b > 1 else layer.weight.detach(),
            None,
            layer.stride,
            layer.padding,
            layer.dilation,
            False,
            (0, 0),
            b,
            (False, True, False),
        )
        yield found.view(b, *layer.weight.shape)


FORMULAS: dict[type[nn.Module], Callable[[nn.Module, Tensor, Tensor], dict[str, Blocks]]] = {
    nn.Linear: linear,
    nn.Conv2d: conv2d,
    nn.BatchNorm1d: batch_norm,
    nn.BatchNorm2d: batch_norm,
    nn.BatchNorm3d: batch_norm,
}
