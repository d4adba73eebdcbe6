"""Where and in which precision a network runs: a static rule, never a timed probe."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from efface.errors import InputError


@dataclass(frozen=True)
class Placement:
    """Device, precision of the forward and backward pass, and layout of convolutions."""

    device: str
    bf16: bool
    channels_last: bool

    def __str__(self) -> str:
        precision = "bf16" if self.bf16 else "fp32"
        return f"{self.device} {precision}{' channels-last' if self.channels_last else ''}"

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """The context of a forward pass."""
        if not self.bf16:
            return contextlib.nullcontext()
        return torch.autocast(self.device, dtype=torch.bfloat16)


def pick_device(name: str = "auto") -> torch.device:
    """The device of that name; ``auto`` prefers CUDA, then Apple's, then the CPU.

    Raises:
        InputError: If the device is not there.
    """
    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    if name == "auto":
        name = "cuda" if cuda else "mps" if mps else "cpu"
    if {"cuda": cuda, "mps": mps, "cpu": True}.get(name) is not True:
        raise InputError(f"device {name!r} is not available here; use --device auto or cpu.")
    return torch.device(name)


def _bf16_is_fast(device: torch.device) -> bool:
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported())
    if device.type == "cpu":
        flags = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
        return any(getattr(torch.cpu, flag, bool)() for flag in flags)
    return False


def rule(network: nn.Module, device: torch.device, train: bool) -> Placement:
    """The rule: convolutional networks run channels-last, those of some width train in bf16.

    A network is wide when its widest 2-d convolution has at least 32 output channels: below that,
    conversions cost more than bf16 saves. Evaluation is always in fp32.
    """
    widths = [m.out_channels for m in network.modules() if isinstance(m, nn.Conv2d)]
    bf16 = train and max(widths, default=0) >= 32 and _bf16_is_fast(device)
    return Placement(device.type, bf16, bool(widths) and device.type != "mps")


@contextlib.contextmanager
def placed(network: nn.Module, device: torch.device, train: bool) -> Iterator[Placement]:
    """Move a network to where the rule says, and back on leaving."""
    home = next((p.device for p in network.parameters()), device)
    placement = rule(network, device, train)
    layout = torch.channels_last if placement.channels_last else None
    network.to(device)
    if layout is not None:
        network.to(memory_format=layout)  # type: ignore[call-overload]
    try:
        yield placement
    finally:
        if layout is not None:
            network.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
        network.to(home)


@contextlib.contextmanager
def preserved(network: nn.Module) -> Iterator[None]:
    """Leave modes and the global random state as they were found; gradients are cleared."""
    modes = {module: module.training for module in network.modules()}
    state = torch.get_rng_state()
    used = torch.cuda.is_available() and torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    cuda = torch.cuda.get_rng_state_all() if used else None
    try:
        yield
    finally:
        torch.set_rng_state(state)
        if cuda is not None:
            torch.cuda.set_rng_state_all(cuda)
        for module, mode in modes.items():
            module.training = mode
        network.zero_grad(set_to_none=True)
