"""A small vision transformer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from efface.errors import TaskError
from efface.networks.layers import normalize


class Attention(nn.Module):
    """Self-attention of all tokens, ``[B, T, width]`` → the same (Vaswani et al., 2017).

    Args:
        width: Features of a token.
        heads: Parts into which they are divided, each with attention of its own.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, tokens: Tensor) -> Tensor:
        """What every token gathers from all."""
        # Written out: fused kernels have no rule for vmap, which per-sample gradients need.
        batch, count, width = tokens.shape
        parts = self.qkv(tokens).view(batch, count, 3, self.heads, width // self.heads)
        query, key, value = parts.permute(2, 0, 3, 1, 4).unbind(0)
        scores = query @ key.transpose(2, 3) * (width // self.heads) ** -0.5
        gathered = (scores.softmax(3) @ value).transpose(1, 2).reshape(batch, count, width)
        out: Tensor = self.out(gathered)
        return out


class Block(nn.Module):
    """Attention and two linear layers, each behind layer norm and beside a shortcut.

    Args:
        width: Features of a token; the hidden layer has four times as many.
        heads: Of the attention.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.linear1 = nn.Linear(width, 4 * width)
        self.linear2 = nn.Linear(4 * width, width)

    def forward(self, tokens: Tensor) -> Tensor:
        """``[B, T, width]`` → the same."""
        tokens = tokens + self.attention(self.norm1(tokens))
        hidden: Tensor = self.linear2(F.gelu(self.linear1(self.norm2(tokens))))
        return tokens + hidden


class ViT(nn.Module):
    """A small vision transformer (Dosovitskiy et al., 2021; 258,058 parameters by default).

    Pre-norm blocks, learned positions, no dropout. Positions and the class token are stored as
    vectors, so that pruning, which goes over parameters of two or more dimensions, leaves them.

    Args:
        classes: Outputs.
        image: Height and width of the images.
        patch: Height and width of a patch; divides ``image``.
        width: Features of a token; a multiple of ``heads``.
        depth: Blocks.
        heads: Of every attention.
        pool: What the head sees: a class ``"token"``, or the ``"mean"`` of all patches.
        channels: Of the images; 1 for grey ones.
        mean: For normalisation, per channel (see :mod:`efface.networks`).
        std: The same.

    Raises:
        TaskError: If the sizes do not divide, or ``pool`` is unknown.

    Shapes: ``[B, channels, image, image]`` → ``[B, classes]``.

    >>> ViT()(torch.rand(2, 3, 32, 32)).shape
    torch.Size([2, 10])
    """

    def __init__(
        self,
        classes: int = 10,
        *,
        image: int = 32,
        patch: int = 4,
        width: int = 64,
        depth: int = 5,
        heads: int = 4,
        pool: Literal["token", "mean"] = "token",
        channels: int = 3,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        if image % patch or width % heads or pool not in ("token", "mean"):
            raise TaskError(
                f"a ViT of {image} pixels in patches of {patch}, {width} features in {heads} heads "
                f"and pool {pool!r} cannot be made; let patch divide image, heads divide width, "
                "and pool be 'token' or 'mean'."
            )
        self.width, self.pool = width, pool
        tokens = (image // patch) ** 2 + (pool == "token")
        self.normalize = normalize(channels, mean, std)
        self.patches = nn.Conv2d(channels, width, patch, patch)
        self.token = nn.Parameter(torch.zeros(width)) if pool == "token" else None
        self.positions = nn.Parameter(torch.empty(tokens * width))
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)
        self._start()

    def _start(self) -> None:
        """Normal weights of deviation 0.02, cut at two deviations; biases at zero."""
        nn.init.trunc_normal_(self.positions, std=0.02, a=-0.04, b=0.04)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02, a=-0.04, b=0.04)
                nn.init.zeros_(module.bias)

    def forward(self, images: Tensor) -> Tensor:
        """``[B, channels, image, image]`` → ``[B, classes]``."""
        tokens = self.patches(self.normalize(images)).flatten(2).transpose(1, 2)
        if self.token is not None:
            first = self.token.expand(tokens.shape[0], 1, -1)
            tokens = torch.cat([first.to(tokens.dtype), tokens], 1)
        tokens = self.blocks(tokens + self.positions.view(-1, self.width))
        seen = self.norm(tokens[:, 0] if self.pool == "token" else tokens.mean(1))
        logits: Tensor = self.head(seen)
        return logits
