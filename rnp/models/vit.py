"""A vision transformer, shaped for small images."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

HEAD = 16
"""Channels of one head of attention."""


@fx.wrap
def position_embedding(grid: Tensor) -> Tensor:
    """Sines and cosines of row and column for each place of `grid` [n, c, h, w]: [1, h*w, c]."""
    c, h, w = grid.shape[1:]
    rates = 10_000 ** -(torch.arange(c // 4, device=grid.device) / (c // 4))
    y = torch.arange(h, device=grid.device).view(-1, 1) * rates  # [h, c/4]
    x = torch.arange(w, device=grid.device).view(-1, 1) * rates  # [w, c/4]
    y = y.unsqueeze(1).expand(h, w, -1)
    x = x.unsqueeze(0).expand(h, w, -1)
    waves = torch.cat([y.sin(), y.cos(), x.sin(), x.cos()], dim=2)
    return waves.reshape(1, h * w, c).to(grid.dtype)


class Attention(nn.Module):
    """Self-attention with heads of `HEAD` channels."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.heads = width // HEAD
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(x).unflatten(2, (3, self.heads, HEAD)).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)  # [n, heads, tokens, HEAD]
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Encoder(nn.Module):
    """Attention, then two linear layers; each after a norm and added to its input."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = Attention(width)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class ViT(nn.Module):
    """One token for four by four pixels.

    Source: Dosovitskiy et al., ICLR 2021, in the size of ViT-Lite-6/4 (Hassani et al., 2021, arXiv
    2104.05704).
    Differs: two strided convolutions make the tokens, which is said to train faster and with more
    settings (Xiao et al., NeurIPS 2021); fixed positions and a mean over the tokens as in Beyer et
    al., 2022, arXiv 2205.01580, so that images can have any size.
    """

    def __init__(self, depth: int, classes: int, *, channels: int, width: int) -> None:
        super().__init__()
        width = HEAD * math.ceil(width / HEAD)
        self.stem = nn.Sequential(
            nn.Conv2d(channels, width, 3, 2, padding=1),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, 2, padding=1),
        )
        self.blocks = nn.Sequential(*[Encoder(width) for _ in range(depth)])
        self.norm = nn.LayerNorm(width)
        self.fc = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        grid = self.stem(x)
        tokens = grid.flatten(2).transpose(1, 2) + position_embedding(grid)  # [n, tokens, width]
        return self.fc(self.norm(self.blocks(tokens)).mean(1))
